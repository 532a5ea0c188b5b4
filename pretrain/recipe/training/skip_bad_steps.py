"""A step whose loss or gradient is not plausible changes no weight: it is skipped and recorded."""

from __future__ import annotations

import json
import math
import statistics
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from recipe.project import RecipeError, read_json_lines
from recipe.training.callbacks import gather

if TYPE_CHECKING:
    from recipe.training.trainer import RecipeTrainer

SPIKE = 20  # a loss of so many times the recent ones, and at least so many nats, is a spike
RECENT = 50  # steps whose losses are remembered
MOST_IN_A_ROW = 5  # steps that may be skipped one after the other


class Guard(TrainerCallback):
    """Skip a step whose loss or gradient norm is NaN or infinite, or whose loss is a spike.

    It checks after the backward pass and before the optimizer's step, so that nothing must be rolled back.
    PaLM restarted before a spike and skipped its batches (Chowdhery et al., 2022, section 5.1); here only the
    batch itself is skipped. ``skipped.jsonl`` lists these steps: a training that continues from an earlier
    checkpoint skips the same ones. All ranks decide the same. After `MOST_IN_A_ROW` skipped steps one after
    the other it raises RecipeError. A checkpoint that is due meanwhile is saved after the next good step.

    Under DeepSpeed the optimizer's step is part of the backward pass. In bf16 and fp16 DeepSpeed itself skips
    NaN and infinity, and they are only recorded here; in float32 it does not, and the training ends at once.
    Spikes are not skipped under DeepSpeed: their gradients are clipped.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "skipped.jsonl"
        self.trainer: RecipeTrainer | None = None
        self.losses: deque[float] = deque(maxlen=RECENT)
        self.in_a_row = 0
        self.skipped: set[int] = set()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Read which steps earlier runs have skipped."""
        if self.path.exists():
            self.skipped = {row["step"] for row in read_json_lines(self.path)}

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Check the step; to skip it, remove its gradients, so that the optimizer does nothing."""
        trainer = self.trainer
        assert trainer is not None
        own = float(trainer.step_loss)
        trainer.step_loss = 0.0
        losses = [loss for (loss,) in gather([own], args.device)]
        loss = sum(losses) / len(losses)
        # The loss scaler of fp16 checks the gradients itself, and skips some of the first steps.
        norm = None if args.fp16 or trainer.gradient_norm is None else float(trainer.gradient_norm)
        step = state.global_step + 1
        deepspeed = trainer.is_deepspeed_enabled
        reason = self._reason(loss, norm, math.inf if deepspeed else SPIKE)
        if reason and deepspeed and not (args.bf16 or args.fp16):
            raise RecipeError(
                f"step {step}: {reason}, which DeepSpeed has put into the weights. Run the same command "
                "again: it continues from the last checkpoint, before this step"
            )
        if not reason and step not in self.skipped:
            self.losses.append(loss)
            self.in_a_row = 0
            trainer.skipping = False
            return
        for parameter in objects["model"].parameters():
            parameter.grad = None
        self.in_a_row += 1
        trainer.skipping = True
        if step not in self.skipped and state.is_world_process_zero:
            row = {"step": step, "reason": reason, "loss": str(loss), "grad_norm": str(norm)}
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
            print(f"warning: step {step} is skipped: {reason}", flush=True)
        self.skipped.add(step)
        if self.in_a_row >= MOST_IN_A_ROW:
            why = reason or "as in an earlier run"
            raise RecipeError(
                f"{MOST_IN_A_ROW} steps in a row were skipped, the last is {step}: {why}. "
                "The weights are those before these steps, and checkpoints are kept. Start again with "
                "--force and a lower learning_rate, or with z_loss; or check the data of these steps"
            )

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for the checkpoint that was due while steps were skipped."""
        trainer = self.trainer
        assert trainer is not None
        if trainer.save_postponed and not trainer.skipping and state.global_step < state.max_steps:
            control.should_save = True

    def _reason(self, loss: float, norm: float | None, spike: float) -> str:
        if not math.isfinite(loss):
            return f"a loss of {loss}"
        if norm is not None and not math.isfinite(norm):
            return f"a gradient norm of {norm}"
        usual = statistics.median(self.losses) if self.losses else math.inf
        if loss > spike * max(usual, 1.0):
            return f"a loss of {loss:.4g} after {usual:.4g}"
        return ""
