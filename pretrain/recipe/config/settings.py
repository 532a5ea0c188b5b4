"""The keys of ours in pretrain.json, finetune.json and preference.json, as a dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Settings:
    """Our keys in pretrain.json and finetune.json, beside those of TrainingArguments.

    global_batch_size: sequences per optimizer step over all ranks; accumulation follows from it.
    block_size: tokens per sequence. muon_learning_rate: Muon for the layers' matrices; absent: AdamW for
    everything.
    eval_blocks: blocks of the validation side that are measured during training; absent: all (stage 06
    measures all). z_loss: coefficient of the z-loss, 0 for none. sample_steps: after every so many steps, or
    after those named, measure the validation side and continue the prompts of generation.json.
    lora: tune an adapter in place of all weights (see `recipe.model.adapters`).
    initial_model, initial_revision: a
    published checkpoint to start from (see `recipe.config.initial_model`).
    """

    global_batch_size: int
    block_size: int
    muon_learning_rate: float | None = None
    attn_implementation: str = "auto"
    eval_blocks: int | None = None
    z_loss: float = 0.0
    sample_steps: Any = None  # HfArgumentParser takes no int | list
    lora: dict | None = None
    initial_model: str | None = None
    initial_revision: str | None = None
