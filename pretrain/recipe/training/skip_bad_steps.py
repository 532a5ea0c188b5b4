"""A step whose loss or gradient is not plausible changes no weight: it is skipped and recorded."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from recipe.config.settings import SpikeRule
from recipe.project import EXIT_FAILED, RecipeError
from recipe.training.callbacks import gather
from recipe.training.check_schedule import scheduler_of
from recipe.training.checkpoints import MANIFEST, list_checkpoints, step_of
from recipe.training.messages import send_message
from recipe.training.spikes import Step, add_row, read_skipped, spike, window_to_skip

if TYPE_CHECKING:
    from recipe.training.trainer import RecipeTrainer

MOST_IN_A_ROW = 5  # new steps that may be skipped one after the other
MOST_BACK = 5  # times that a training may go back to the same checkpoint


class Guard(TrainerCallback, ExportableState):
    """Skip a step whose loss or gradient norm is NaN or infinite, or a spike by `recipe.training.spikes`.

    It checks after the backward pass and before the optimizer's step, so that nothing must be rolled back.
    ``skipped.jsonl`` lists these steps: a training that continues from an earlier checkpoint skips the same
    ones. All ranks decide the same. After `MOST_IN_A_ROW` new ones one after the other it raises RecipeError,
    and the next run judges them afresh. A checkpoint that is due meanwhile is saved after the next good step.

    With ``"back": N``, a bad step ends the process, and the launcher starts it again from the Nth newest
    checkpoint, with the batches around the step skipped: as PaLM was trained (Chowdhery et al., 2022, section
    5.1). The same follows under DeepSpeed also without ``back``, from the newest checkpoint, because there
    the optimizer's step is part of the backward pass. NaN and infinity in bf16 and fp16 are skipped by
    DeepSpeed itself, and are only recorded here.

    rule: None judges no spikes. begins: the numbers of steps after which a phase begins: with other text, a
    loss far above that of the steps before is no spike, so the window begins there, too.
    """

    def __init__(self, folder: Path, rule: SpikeRule | None, begins: Collection[int] = ()) -> None:
        self.folder, self.rule, self.begins = folder, rule, begins
        self.trainer: RecipeTrainer | None = None
        self.window: deque[Step] = deque(maxlen=rule.window if rule else 0)
        self.new: list[int] = []  # the new steps that were skipped one after the other
        self.known = read_skipped(folder)
        self.left_out = False  # DeepSpeed has left out the last step
        # The sum of the losses since the last log, and its step.
        self.pending, self.logged_at = 0.0, 0

    @property
    def skipped(self) -> set[int]:
        """The steps that were skipped, or will be."""
        return self.known.steps

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resume changes neither which steps are spikes nor the loss.

        In the first row after a resume, a z-loss and the load of experts are those of the steps since then.
        """
        kept = {"window": list(self.window), "times_back": len(self.known.back)}
        return {"args": {}, "attributes": kept | {"pending": self.pending, "logged_at": self.logged_at}}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Read which steps earlier runs have skipped, and what the checkpoint has kept."""
        assert self.trainer is not None
        self.known = read_skipped(self.folder)
        # A checkpoint of an earlier release has none.
        self.logged_at = state.global_step
        kept = state.stateful_callbacks.setdefault("Guard", self.state())["attributes"]
        self.window.extend((loss, norm) for loss, norm in kept["window"])
        self.pending, self.logged_at = kept.get("pending", 0.0), kept.get("logged_at", self.logged_at)
        self.trainer._tr_loss += self.pending
        self.trainer._globalstep_last_logged = self.logged_at

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Forget the losses of the phase before. Under DeepSpeed, train nothing in a listed step.

        Its backward pass would change the weights.
        """
        assert self.trainer is not None
        if state.global_step in self.begins:
            self.window.clear()
        listed = state.global_step + 1 in self.skipped
        self.trainer.forward_only = listed and self.trainer.is_deepspeed_enabled

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Check the step; to skip it, remove its gradients, so that the optimizer does nothing."""
        trainer = self.trainer
        assert trainer is not None
        own = float(trainer.step_loss)
        trainer.step_loss = 0.0
        step = state.global_step + 1
        listed = step in self.skipped
        losses = [loss for (loss,) in gather([own], args.device)]
        loss = sum(losses) / len(losses)
        self.pending += loss
        # The loss scaler of fp16 checks the gradients itself, and skips some of the first steps.
        norm = None if args.fp16 or trainer.gradient_norm is None else float(trainer.gradient_norm)
        reason = "" if listed else self._reason(loss, norm)
        trainer.skipping = bool(listed or reason)
        if not trainer.skipping:
            self.window.append((loss, norm))
            self.new.clear()
            return
        row = {"step": step, "reason": reason, "loss": str(loss), "grad_norm": str(norm)}
        if reason:
            self._go_back_if_due(args, state, row, math.isfinite(loss) and math.isfinite(norm or 0))
        if args.fp16 and not args.max_grad_norm:
            # Clipping does it otherwise. The scaler fails at a step without any gradient to unscale.
            trainer.accelerator.unscale_gradients()
        for parameter in objects["model"].parameters():
            parameter.grad = None
        if listed:
            return
        if state.is_world_process_zero:
            add_row(self.folder, row)
            print(f"warning: step {step} is skipped: {reason}", flush=True)
            send_message(self.folder, f"step {step} is skipped: {reason}")
        self.skipped.add(step)
        if step not in self.known.doubted:
            self.new.append(step)
        if len(self.new) >= MOST_IN_A_ROW:
            if state.is_world_process_zero:
                add_row(self.folder, {"step": step, "stopped": self.new})
            raise RecipeError(
                f"{MOST_IN_A_ROW} steps in a row were skipped, the last is {step}: {reason}. "
                "The weights are those before these steps, and checkpoints are kept. The same command "
                "continues from the newest, and judges these steps afresh. If they are bad again, start over "
                "with --force and a lower learning_rate, or with z_loss; or check the data of these steps"
            )

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note whether DeepSpeed has left out the step, which it forgets when the gradients are removed."""
        trainer = self.trainer
        assert trainer is not None
        self.left_out = trainer.is_deepspeed_enabled and trainer.accelerator.optimizer_step_was_skipped

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Begin a new sum of losses."""
        if "loss" in logs:
            self.pending, self.logged_at = 0.0, state.global_step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for the checkpoint that was due while steps were skipped.

        The schedule counts every step, also one that DeepSpeed has left out. With fp16 it does not count
        those: the first ones are left out until the scale of the loss fits.
        """
        trainer = self.trainer
        assert trainer is not None
        if self.left_out and not args.fp16:
            scheduler_of(trainer).step()
        if trainer.save_postponed and not trainer.skipping and state.global_step < state.max_steps:
            control.should_save = True

    def _reason(self, loss: float, norm: float | None) -> str:
        if not math.isfinite(loss):
            return f"a loss of {loss}"
        if norm is not None and not math.isfinite(norm):
            return f"a gradient norm of {norm}"
        return spike(self.window, loss, norm, self.rule.deviations) if self.rule else ""

    def _go_back_if_due(self, args: Any, state: TrainerState, row: dict[str, Any], finite: bool) -> None:
        """End the process if the rule says so, or if DeepSpeed has put the step into the weights.

        Raises SystemExit on every rank, and RecipeError when the training has gone back to the same
        checkpoint too often.
        """
        assert self.trainer is not None
        rule = self.rule or SpikeRule()
        in_weights = self.trainer.is_deepspeed_enabled and (finite or not (args.bf16 or args.fp16))
        if not rule.back and not in_weights:
            return
        step = row["step"]
        complete = [path for path in list_checkpoints(Path(args.output_dir)) if (path / MANIFEST).exists()]
        steps = [step_of(path) for path in complete]
        back_to = steps[: max(rule.back, 1)][-1] if steps else 0
        if [target for target, _ in self.known.back].count(back_to) >= MOST_BACK:
            raise RecipeError(
                f"step {step}: {row['reason']}; the training has already gone back to step {back_to} "
                f"{MOST_BACK} times. Start over with --force and a lower learning_rate, or with z_loss; or "
                "check the data of the steps in skipped.jsonl"
            )
        first, last = window_to_skip(step, back_to, rule.skip)
        # All ranks have listed the checkpoints before one of them writes.
        gather([0.0], args.device)
        if state.is_world_process_zero:
            add_row(self.folder, row | {"back_to": back_to, "skip": [first, last], "rate": rule.rate})
            batches = f"step {first} is" if first == last else f"steps {first} to {last} are"
            print(
                f"warning: step {step}: {row['reason']}. The training goes back to step {back_to}; "
                f"{batches} skipped",
                flush=True,
            )
        raise SystemExit(EXIT_FAILED)
