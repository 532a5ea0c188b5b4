"""The Trainer of all three trainings: optimizers of our own, verified checkpoints, losses that are added."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import EvalLoopOutput

from recipe.config.optimizers import Optimizer
from recipe.config.schedules import same_rates_until
from recipe.config.settings import Settings
from recipe.model import optimizers
from recipe.model.muon import own_part
from recipe.model.sharding import ShardedTrainer
from recipe.model.varlen import for_any_number_of_documents
from recipe.project import RecipeError, folder_bytes, naming_full_disk
from recipe.tokenization.packing import IGNORED
from recipe.training.callbacks import Meter, fork_rng, gather
from recipe.training.check_schedule import set_rates
from recipe.training.checkpoints import MANIFEST, delete_old, list_checkpoints, write_manifest
from recipe.training.expert_load import ExpertLoad

# The parts of a loss that are not cross entropy (`recipe.model.losses.return_loss_only`).
ADDED = ("z_loss", "router_aux_loss")


class RecipeTrainer(ShardedTrainer):
    """The Trainer with optimizers of our own and verified checkpoints.

    A z-loss and the routers' auxiliary loss are logged separately.
    """

    rows_per_sample = 1  # rows of a batch that belong to one sample

    def __init__(self, settings: Settings, chosen: Optimizer, meter: Meter, **keywords: Any) -> None:
        """chosen: the entry of the optimizer that the training file asks for."""
        self.settings, self.chosen, self.meter = settings, chosen, meter
        # What is added to the cross entropy, by name, of each micro-batch since the last log.
        self.added: dict[str, list[torch.Tensor]] = {}
        self.expert_load: ExpertLoad | None = None  # of a mixture of experts whose load is balanced
        self.sequences = 0  # that this rank has trained on
        self.step_loss: torch.Tensor | float = 0.0  # of the micro-batches since the last step
        self.gradient_norm: torch.Tensor | float | None = None  # before clipping
        self.clipped_at: float | None = None  # the limit, once gradients were clipped
        self.skipping = False  # the last step was skipped
        self.forward_only = False  # this step's loss is measured, and nothing is trained
        self.schedule_begin = 0  # the step at which the schedule begins, if not at 0
        self.rate: Callable[[int], float] = lambda step: 1.0  # factor of the schedule at a step
        self.save_postponed = False  # a checkpoint was due while steps were skipped
        # Of an evaluation, for each batch of this rank [2]: the sum of its losses, its trained tokens.
        self.measured: list[torch.Tensor] = []
        super().__init__(**keywords)

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's, without the TF32 that transformers and accelerate switch on when they compile.

        ``tf32`` alone decides: fp32 is fp32, and max-autotune ends in an error where two APIs have set TF32.
        """
        super().create_accelerator_and_postprocess()
        torch.set_float32_matmul_precision("high" if self.args.tf32 else "highest")

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """The parameters that weight decay applies to: without embeddings, unlike the stock Trainer."""
        return optimizers.decayed(model)

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> torch.Tensor:
        """The Trainer's step over one micro-batch, whose sequences are counted for `ActiveCheck`."""
        self.sequences += self.sequences_in(inputs)
        with self._without_backward() if self.forward_only else contextlib.nullcontext():
            loss = super().training_step(model, inputs, *rest)
        self.step_loss = self.step_loss + loss
        return loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        inputs = super()._prepare_inputs(inputs)
        for_any_number_of_documents(inputs)
        return inputs

    def sequences_in(self, inputs: Any) -> int:
        """The sequences in a micro-batch."""
        ids = inputs["input_ids"]
        # The blocks of a phase may be longer than block_size; the tokens of a step stay the same.
        rows = ids.numel() // self.settings.block_size if self.settings.phases else len(ids)
        return rows // self.rows_per_sample

    @contextlib.contextmanager
    def _without_backward(self) -> Iterator[None]:
        self.accelerator.backward = lambda *_, **__: None
        try:
            with torch.no_grad():
                yield
        finally:
            del self.accelerator.backward  # the method of the class is there again

    def _init_training_state(self, max_steps: int, *rest: Any) -> tuple[int, int]:
        """The Trainer's; this run, not the checkpoint, decides how often to log, evaluate and save."""
        trained = super()._init_training_state(max_steps, *rest)
        self.state.compute_steps(self.args, max_steps)
        return trained

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's scheduler, from `schedule_begin` on, its rates multiplied by `rate`."""
        begin = self.schedule_begin
        scheduler = super().create_scheduler(num_training_steps - begin, optimizer)
        if hasattr(scheduler, "lr_lambdas"):
            scheduler.lr_lambdas = [
                lambda step, shape=shape: shape(max(0, step - begin)) * self.rate(step)
                for shape in scheduler.lr_lambdas
            ]
            set_rates(self)  # the scheduler has set the first step's rate already, by its own function alone
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both; the rates are those of this run, also when `rate` has changed since the checkpoint."""
        super()._load_optimizer_and_scheduler(checkpoint)
        set_rates(self)

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        self.clipped_at = self.args.max_grad_norm
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, *arguments: Any, **keywords: Any) -> torch.Tensor | float | None:
        self.gradient_norm = super()._get_grad_norm(*arguments, **keywords)
        return self.gradient_norm

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The Trainer's loss; what is added in it is also kept, on the device, for the log.

        In an evaluation it is the mean over this rank's batch.
        """
        if not self.model.training:
            num_items_in_batch = None
        if not self.settings.z_loss and not self.expert_load:
            # trl would make the outputs by an extra forward pass.
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        for name in ADDED:
            if name in outputs:
                # As the Trainer scales a loss that is divided by the tokens of all ranks.
                scaled = self.accelerator.num_processes // self.get_tp_size() * outputs[name]
                self.added.setdefault(name, []).append(scaled)
        if self.expert_load and "expert_shares" in outputs:
            self.expert_load.add(outputs["expert_shares"])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the cross entropy, what is added to it, the experts' load, and what `Meter` measures."""
        if "loss" in logs:
            # The Trainer sets its sum of losses to 0 by subtraction, which leaves NaN as it is.
            self._tr_loss.zero_()
        for name, losses in self.added.items() if "loss" in logs else ():
            if losses:
                mean = torch.stack(losses).mean().item() * self.args.gradient_accumulation_steps
                shares = gather([mean], self.args.device)
                logs[name] = sum(share for (share,) in shares) / len(shares)
                logs["loss"] -= logs[name]
                losses.clear()
        if "loss" in logs and self.expert_load:
            self.expert_load.complete(logs, self.state, self.args.device)
        self.meter.complete(logs, self.state, self.args.device)
        super().log(logs, start_time)

    def evaluate(self, *arguments: Any, **keywords: Any) -> dict[str, float]:
        """Evaluate without using the random numbers of the training."""
        with fork_rng(self.args.device):
            return super().evaluate(*arguments, **keywords)

    def evaluation_loop(self, *arguments: Any, **keywords: Any) -> EvalLoopOutput:
        """The Trainer's, but the loss of packed blocks is the mean over all trained tokens of all ranks.

        Its own is the mean of the batches' losses, in which the few tokens of a short answer count as much as
        the many of a long one, so that the result depends on the micro-batch and on the number of ranks.
        """
        self.measured = []
        output = super().evaluation_loop(*arguments, **keywords)
        if self.measured:
            own = torch.stack(self.measured).double().sum(dim=0).tolist()
            # Tensor parallel ranks count the same tokens, each as often as the others.
            loss, tokens = torch.tensor(gather(own, self.args.device), dtype=torch.float64).sum(dim=0)
            output.metrics[f"{keywords.get('metric_key_prefix', 'eval')}_loss"] = (loss / tokens).item()
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **keywords: Any) -> Any:
        """The Trainer's; the sum of this rank's losses and its trained tokens are kept."""
        if "shift_labels" not in inputs:
            return super().prediction_step(model, inputs, *rest, **keywords)
        labels = self._without_repeated_rows(inputs["shift_labels"])
        inputs = {**inputs, "labels": labels, "shift_labels": labels}
        found = super().prediction_step(model, inputs, *rest, **keywords)
        tokens = (labels != IGNORED).sum().to(found[0].device, torch.float32)
        # Without any token the mean is NaN.
        self.measured.append(torch.stack((torch.where(tokens > 0, found[0].float() * tokens, 0.0), tokens)))
        return found

    def _without_repeated_rows(self, labels: torch.Tensor) -> torch.Tensor:
        """The labels [rows, positions] of an evaluation's batch, `IGNORED` in rows that were there before.

        In the last batch accelerate repeats the first rows of the dataset, so that all ranks have as many.
        """
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return labels
        before = self.args.process_index // self.get_tp_size() * len(labels)  # rows of the ranks before
        labels = labels.clone()
        labels[max(0, state.remainder - before) :] = IGNORED
        return labels

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build an optimizer of our own where one is chosen; the Trainer builds all others."""
        if self.optimizer is None and self.chosen.builder:
            build = getattr(optimizers, self.chosen.builder)
            self.optimizer = build(self.model if model is None else model, self.settings, self.args)
        return super().create_optimizer(model)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write no model card: trl writes one with each checkpoint, and stage.json says more."""

    def require_finite_weights(self) -> None:
        """Raise RecipeError on every rank when a weight is NaN or infinite on any. All ranks must call it."""
        names, weights = zip(*self.model.named_parameters(), strict=True)
        # ZeRO-3 keeps a rank's partition aside; it may be offloaded to the host.
        parts = [own_part(getattr(weight, "ds_tensor", weight)) for weight in weights]
        finite = torch.stack([part.isfinite().all().to(self.args.device) for part in parts])
        bad = (~finite).nonzero().flatten()
        found = [row[0] for row in gather([bad[0].item() if len(bad) else -1], self.args.device)]
        if max(found) < 0:
            return
        raise RecipeError(
            f"step {self.state.global_step}: the weight {names[int(max(found))]} is NaN or infinite, so "
            "nothing is saved. Earlier checkpoints are kept: run the same command again to continue from the "
            "newest. If this happens again, start over with --force and a lower learning_rate, or with z_loss"
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save, verify, and only then delete older checkpoints.

        While steps are skipped, nothing is saved: such a state may be the reason why they are. Raises
        RecipeError on every rank when a weight is NaN or infinite on any.
        """
        self.save_postponed = self.skipping
        if self.skipping:
            if self.is_world_process_zero():
                print(f"warning: no checkpoint at step {self.state.global_step}: it was skipped", flush=True)
            return
        self.require_finite_weights()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        folder = Path(self.args.output_dir)
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        try:
            if self.is_world_process_zero() and checkpoint.exists():
                shutil.rmtree(checkpoint)  # what a killed run has left
            self.accelerator.wait_for_everyone()
            with naming_full_disk(checkpoint, self._bytes_of_last_checkpoint()):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            write_manifest(checkpoint)
            delete_old(folder, limit, self._last_step_of_any_length())
        self.accelerator.wait_for_everyone()

    def _bytes_of_last_checkpoint(self) -> int | None:
        """What a checkpoint needs, by the last one that was saved; None for the first."""
        for checkpoint in list_checkpoints(Path(self.args.output_dir)):
            if (checkpoint / MANIFEST).exists():
                return folder_bytes(checkpoint)
        return None

    def _last_step_of_any_length(self) -> int | None:
        """The last step that a longer training would have reached in the same way."""
        schedule = {"lr_scheduler_type": self.args.lr_scheduler_type.value}
        schedule |= {key: getattr(self.args, key) for key in ("lr_scheduler_kwargs", "warmup_steps")}
        return same_rates_until(schedule, self.state.max_steps)
