"""How evenly the tokens of a mixture of experts are spread over its experts, logged during training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from recipe.project import append_json_line
from recipe.training.callbacks import gather, keep_rows

EXPERTS = "experts.jsonl"  # the share of every expert in every layer, a row for each log


class ExpertLoad(TrainerCallback):
    """Collect the shares of the experts on every rank; `complete` adds them to what is logged."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / EXPERTS
        self.sum: torch.Tensor | None = None  # of the shares [layers, experts] since the last log
        self.count = 0  # of micro-batches in the sum

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Continue the file at the checkpoint's step."""
        if state.is_world_process_zero:
            keep_rows(self.path, state.global_step)

    def add(self, shares: torch.Tensor) -> None:
        """Add a micro-batch. shares: of the tokens' choices, [layers, experts]; nothing waits for them."""
        self.sum = shares if self.sum is None else self.sum + shares
        self.count += 1

    def complete(self, logs: dict[str, float], state: TrainerState, device: torch.device) -> None:
        """Add the loads of the busiest and the idlest expert of any layer: 1 is an equal share.

        The main rank writes the shares of all experts to `EXPERTS`. All ranks must call it.
        """
        if self.sum is None:
            return
        rows = torch.tensor(gather((self.sum / self.count).flatten().tolist(), device))
        shares = rows.mean(0).view_as(self.sum.cpu())
        load = shares * shares.shape[1]
        logs |= {"expert_load_max": round(load.max().item(), 4)}
        logs |= {"expert_load_min": round(load.min().item(), 4)}
        if state.is_world_process_zero:
            table = [[round(share, 5) for share in layer] for layer in shares.tolist()]
            append_json_line(self.path, {"step": state.global_step, "shares": table})
        self.sum, self.count = None, 0
