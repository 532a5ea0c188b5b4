"""The keys of ours in all three training files, with their types; more of preference.json: `preference`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any


@dataclass(frozen=True)
class SpikeRule:
    """The keys of ``spikes``.

    deviations: a loss or a gradient norm that is so many robust standard deviations above the median of the
    last `window` steps is a spike. back: checkpoints to go back after one; 0: only its batch is skipped.
    skip: batches around the spike that are skipped after going back. rate: factor of the learning rate from
    the checkpoint on.
    """

    deviations: float = 8.0
    window: int = 100
    back: int = 0
    skip: int = 1
    rate: float = 1.0


@dataclass
class Settings:
    """Our keys in the training files, in addition to those of TrainingArguments.

    `recipe.config.training` reads the JSON types of the keys from these annotations.

    global_batch_size: sequences per optimizer step over all ranks; accumulation follows from it.
    block_size: tokens per sequence. muon_learning_rate: of Muon for the layers' matrices; absent: no Muon.
    embedding_learning_rate: of AdamW for the embeddings, next to Muon; absent: that of the rest.
    attn_implementation: the attention; ``auto`` chooses by the hardware. eval_blocks: blocks of the
    validation side that are measured during training; absent: all.
    z_loss: coefficient of the z-loss, 0 for no z-loss. sample_steps: every so many steps, or after the steps
    of a list, measure the validation side and continue the prompts of generation.json.
    spikes: which steps are spikes and what follows, by the fields of `SpikeRule`; None: no step is one.
    extend: what a finished training does whose length alone is raised, where its schedule depends on the
    length: ``rewarm`` begins the schedule anew. keep_checkpoints: whether a finished training keeps them.
    lora: train an adapter instead of all weights (see `recipe.model.adapters`).
    phases: mixtures, block sizes and rates that change on the way (see `recipe.config.phases`).
    initial_model, initial_revision: a published checkpoint to start from (see `recipe.config.initial_model`).
    fp8: the layers multiply in fp8 (see `recipe.model.fp8`).
    """

    global_batch_size: int
    block_size: int
    muon_learning_rate: float | None = None
    embedding_learning_rate: float | None = None
    attn_implementation: str = "auto"
    eval_blocks: int | None = None
    z_loss: float = 0.0
    # HfArgumentParser accepts no int | list | None; it sees Any.
    sample_steps: Annotated[Any, int | list | None] = None
    spikes: dict | None = field(default_factory=dict)
    extend: str | None = None
    keep_checkpoints: bool = True
    lora: dict | None = None
    # HfArgumentParser would read a list of texts.
    phases: Annotated[Any, list | None] = None
    initial_model: str | None = None
    initial_revision: str | None = None
    fp8: bool = False
