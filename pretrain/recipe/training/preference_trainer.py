"""Direct preference optimisation (Rafailov et al., 2023) by trl's trainer, with our checkpoints."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl import DPOTrainer
from trl.trainer import utils

from recipe.tokenization.packing import permuted
from recipe.training.trainer import RecipeTrainer


def score_answers_only() -> None:
    """Let trl compute the output and its loss only for the tokens of answers, on a CPU as on a GPU.

    On devices without Triton, trl computes them for questions and padding, too, and then drops the results:
    their shapes are the same in every batch, which compiled graphs need. Here nothing is compiled.
    """
    utils._use_triton = lambda device: True


class PreferenceTrainer(RecipeTrainer, DPOTrainer):
    """trl's DPOTrainer on ids that `encode_preferences` made, with our optimizers and checkpoints."""

    rows_per_sample = 2  # the chosen and the rejected answer

    def __init__(self, *positional: Any, **keywords: Any) -> None:
        """As RecipeTrainer and DPOTrainer."""
        score_answers_only()
        super().__init__(*positional, **keywords)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset  # trl's encoding would take special-token strings in a text for control tokens


def in_order(rows: list[dict[str, list[int]]], seed: int, epochs: int) -> Dataset:
    """Rows in the order of training: each epoch another permutation, a function of (seed, epoch) only."""
    size = len(rows)
    order = [permuted(i, size, seed * 1_000_003 + epoch + 1) for epoch in range(epochs) for i in range(size)]
    return Dataset.from_list(rows).select(order)
