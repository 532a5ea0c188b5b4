"""One training under the Hugging Face Trainer: run it to its end, save the model.

``run_clm.py``, ``run_sft.py``, ``run_dpo.py`` and ``run_grpo.py`` use it. They differ in the model they start
from and in the samples they read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median_high
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainerCallback

from recipe.config.choice import CHUNKS, LIGER, WHOLE, choose_loss
from recipe.config.phases import Phase, longest_block, phase_at
from recipe.config.settings import SpikeRule
from recipe.hardware import gemm_peak, peak_memory
from recipe.model.build import flops_per_token, trained_parameter_count
from recipe.model.chunked_loss import return_loss_in_chunks
from recipe.model.fp8 import use_fp8
from recipe.model.losses import return_loss_only, router_loss_weight
from recipe.model.save import complete_configs
from recipe.project import EXIT_TERMINATED, RecipeError, naming_full_disk, read_json_lines
from recipe.tokenization.packing import collate, collate_with_bounds
from recipe.tokenization.save import save_tokenizer
from recipe.training.active_check import ActiveCheck, Asked, expected_parallelism
from recipe.training.callbacks import Heartbeat, Meter, Progress, StopOnSignal, gather
from recipe.training.checkpoints import MANIFEST, newest_good_checkpoint
from recipe.training.communication import CommunicationShare
from recipe.training.expert_load import ExpertLoad
from recipe.training.extended import read_extended, schedule_begin
from recipe.training.files import METRICS, RANKS, STOP
from recipe.training.phase_change import PhaseChange
from recipe.training.prepare import Run
from recipe.training.sample_prompts import SamplePrompts
from recipe.training.skip_bad_steps import Guard
from recipe.training.spikes import delete_given_up, read_skipped
from recipe.training.trainer import RecipeTrainer
from recipe.training.watchdog import SignsOfLife


def train_model(
    run: Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    samples: Dataset,
    valid: Dataset,
    *,
    bytes_per_token: float | None = None,
    sampling: SamplePrompts | None = None,
    trainer_class: type[RecipeTrainer] = RecipeTrainer,
    tokens_per_step: int | None = None,
    phases: Sequence[Phase] = (),
    **trainer_keywords: Any,
) -> dict[str, Any]:
    """Train to the last step, from the newest good checkpoint if there is one, and save the model.

    The model becomes a plain Hugging Face folder; of a model under an adapter only the adapter is saved, in
    the folder ``adapter``. bytes_per_token: of the validation text, for bits per byte. tokens_per_step: the
    mean, where a step is not global_batch_size x block_size tokens. phases: of a run that has several;
    `samples` must follow them. trainer_keywords: what `trainer_class` takes in addition.

    Returns the figures for stage.json. Ends the process with exit 143 when a signal stopped the training
    after its checkpoint was saved.
    """
    settings = run.settings
    tokens_per_step = tokens_per_step or settings.global_batch_size * settings.block_size
    sizes = {settings.block_size, *(phase.block_size for phase in phases)}
    flops = {size: flops_per_token(model, size) for size in sizes}

    def flops_at(step: int) -> float:
        return flops[phase_at(phases, step).block_size if phases else settings.block_size]

    peak = _peak(run)
    meter = Meter(tokens_per_step, flops_at, peak * run.ranks, bytes_per_token)
    rule = None if settings.spikes is None else SpikeRule(**settings.spikes)
    guard = Guard(run.folder, rule, {phase.begin for phase in phases})
    fp8 = use_fp8(model) if run.choice.fp8 else None
    own = trainer_class is RecipeTrainer
    # trl's trainers compute their loss themselves, without an auxiliary one.
    loss, balancing = _set_up_loss(run, model) if own else (WHOLE, 0.0)
    load = ExpertLoad(run.folder) if balancing else None
    check = ActiveCheck(_asked(run, loss, balancing, fp8), tokens_per_step)
    life = SignsOfLife(run.folder / RANKS, run.arguments.process_index)
    communication = CommunicationShare() if run.probe and run.ranks > 1 else None
    if phases:
        # Compiled for any length, as PyTorch does from the second one on, a step would take longer.
        torch._dynamo.config.automatic_dynamic_shapes = False
        torch._dynamo.config.recompile_limit = 2 * len(phases) + 8  # each also where the evaluation differs
    model.config.use_cache = False  # a cache would also switch off the separation of packed documents
    if own:
        by_bounds = run.choice.attention.startswith(("varlen", "flash_attention"))
        trainer_keywords["data_collator"] = collate_with_bounds if by_bounds else collate
    trainer = trainer_class(
        settings,
        run.optimizer,
        meter,
        model=model,
        args=run.arguments,
        train_dataset=samples,
        eval_dataset=valid,
        callbacks=_callbacks(run, guard, check, sampling, meter, phases, life, load, communication),
        **trainer_keywords,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.new_optimizer = run.new_optimizer
    check.trainer = guard.trainer = trainer
    trainer.expert_load = load
    skipped = read_skipped(run.folder)
    trainer.schedule_begin = schedule_begin(run.folder)
    trainer.rate = lambda step: skipped.rate(step) * (phase_at(phases, step).rate if phases else 1.0)
    _train_to_the_end(run, trainer, life)
    measured = {"communication": communication.share} if communication else {}
    # On a CPU that others share the peak changes; the share of the higher one is the true one.
    before, peak = peak, max(peak, _peak(run))
    measured |= _speed(run.folder, before / peak) if run.is_main else {}
    eval_loss = None
    if not run.probe:
        eval_loss = _final_eval_loss(trainer)
        _require_finite(trainer, eval_loss)
        _save(run, trainer, tokenizer)
    return {
        "active": check.block or None,
        "hardware": run.hardware.name,
        "gemm_peak_flops": peak,
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * tokens_per_step,
        "eval_loss": eval_loss,
        "peak_memory_bytes": peak_memory(run.hardware.device),
        "skipped_steps": sorted(guard.skipped),
        "extended": read_extended(run.folder),
    } | measured


def _set_up_loss(run: Run, model: PreTrainedModel) -> tuple[str, float]:
    """Let the model return its loss; (how it computes it, the coefficient of the routers' auxiliary loss)."""
    loss = _loss_of(run, model)
    if loss != LIGER:  # the Trainer itself puts its kernels into the model
        (return_loss_in_chunks if loss == CHUNKS else return_loss_only)(model, run.settings.z_loss)
    return loss, router_loss_weight(model.config)


def _loss_of(run: Run, model: PreTrainedModel) -> str:
    if run.arguments.use_liger_kernel:
        return LIGER
    # A micro-batch has as many positions in all phases.
    positions = run.arguments.per_device_train_batch_size * longest_block(vars(run.settings))
    logits = positions * model.config.vocab_size
    # In chunks there are no routers' logits, nothing comes between the output matrix and the loss, and an
    # adapter over that matrix would not be trained.
    plain = isinstance(model.get_output_embeddings(), torch.nn.Linear)
    more = ("num_experts_per_tok", "final_logit_softcapping")
    if not plain or any(getattr(model.config, key, None) for key in more):
        return WHOLE
    return choose_loss(run.hardware.device, logits, run.choice.compile, run.tensor_parallel)


def _asked(run: Run, loss: str, router_aux_loss: float, fp8: int | None) -> Asked:
    return Asked(
        router_aux_loss=router_aux_loss or None,
        fp8=fp8,
        settings=run.settings,
        choice=run.choice,
        loss=loss,
        optimizer=run.optimizer,
        parallel=expected_parallelism(run.ranks, run.deepspeed, run.fsdp, run.tensor_parallel),
        ranks=run.ranks,
    )


def _callbacks(
    run: Run,
    guard: Guard,
    check: ActiveCheck,
    sampling: SamplePrompts | None,
    meter: Meter,
    phases: Sequence[Phase],
    life: SignsOfLife,
    load: ExpertLoad | None,
    communication: CommunicationShare | None,
) -> list[TrainerCallback]:
    """The callbacks, in the order in which the Trainer calls them."""
    callbacks: list[TrainerCallback] = [callback for callback in (load, communication) if callback]
    callbacks += [StopOnSignal(run.folder / STOP, run.parent), guard, check]
    if phases:
        callbacks.append(PhaseChange(phases))
    if sampling:
        callbacks.append(sampling)
    callbacks.append(meter)  # after the sampling, whose time does not count as training
    if run.is_main:
        callbacks.append(Progress(run.folder, meter.tokens_per_step))
    callbacks.append(Heartbeat(life, [phase.begin for phase in phases]))
    return callbacks


def _train_to_the_end(run: Run, trainer: RecipeTrainer, life: SignsOfLife) -> None:
    """Train, from the newest good checkpoint if there is one. Raises SystemExit if stopped before."""
    checkpoint = _find_checkpoint(run)
    if checkpoint:
        run.arguments.eval_on_start = False  # the first run has done it
        if run.is_main:
            print(f"continues from {checkpoint.name}", flush=True)
    if dist.is_initialized():
        dist.barrier()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except BaseException:
        # A second failure right after the same step is not followed by a restart.
        life.unpaced(trainer.state.global_step)
        raise
    step, last = trainer.state.global_step, trainer.state.max_steps
    if step < last:
        if run.is_main:
            saved = (
                "not saved, because this step was skipped"
                if trainer.save_postponed
                else "its checkpoint is saved"
            )
            print(f"stopped at step {step} of {last}; {saved}", flush=True)
        raise SystemExit(EXIT_TERMINATED)


def _find_checkpoint(run: Run) -> Path | None:
    """The checkpoint to continue from, None at the start; rank 0 checks the files, and all ranks agree.

    Raises on every rank what rank 0 raises, and RecipeError when a rank does not see the checkpoint.
    """
    folder = Path(run.arguments.output_dir)
    found: list[Path | RecipeError | None] = [None]
    if run.is_main:
        try:
            delete_given_up(run.folder)
            found = [newest_good_checkpoint(folder)]
        except RecipeError as error:
            found = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    (checkpoint,) = found
    if isinstance(checkpoint, RecipeError):
        raise checkpoint
    if checkpoint and dist.is_initialized():
        seen = gather([float((checkpoint / MANIFEST).is_file())], run.arguments.device)
        if blind := [rank for rank, (sees,) in enumerate(seen) if not sees]:
            raise RecipeError(
                f"{checkpoint} does not exist for rank {blind[0]}. Several nodes must share the project's "
                "folder (outputs/) over a network file system"
            )
    return checkpoint


def _final_eval_loss(trainer: Trainer) -> float:
    """The loss on the validation side after the last step; measured now, unless the last step did it."""
    history = {log["step"]: log for log in trainer.state.log_history if "eval_loss" in log}
    return (history.get(trainer.state.global_step) or trainer.evaluate())["eval_loss"]


def _require_finite(trainer: RecipeTrainer, eval_loss: float) -> None:
    """Raise RecipeError for a model that must not be published: a weight or its loss is NaN or infinite."""
    trainer.require_finite_weights()
    if not math.isfinite(eval_loss):
        raise RecipeError(
            f"the loss on the validation side is {eval_loss} after the last step, so the model is not saved. "
            "Start over with --force and a lower learning_rate, or check the validation data"
        )


def _save(run: Run, trainer: Trainer, tokenizer: PreTrainedTokenizerFast) -> None:
    trainer.model.config.use_cache = True
    target = run.folder / "adapter" if run.settings.lora else run.folder
    with naming_full_disk(target, 4 * trained_parameter_count(trainer.model)):
        trainer.save_model(str(target))
    if run.is_main:
        save_tokenizer(tokenizer, run.folder)
        if not run.settings.lora:
            complete_configs(run.folder)
        # A pickle, whose content is in stage.json.
        (target / "training_args.bin").unlink(missing_ok=True)


def _peak(run: Run) -> float:
    """FLOP/s of a large product on the main rank; 1 on the others."""
    return gemm_peak(run.hardware.device, run.choice.precision) if run.is_main else 1.0


def _speed(folder: Path, factor: float) -> dict[str, float]:
    """The medians of the logged speeds and MFU, that times `factor`; empty when the run was too short."""
    rows = [row for row in read_json_lines(folder / METRICS) if "tokens_per_second" in row]
    if not rows:
        return {}
    speed, share = (median_high([row[key] for row in rows]) for key in ("tokens_per_second", "mfu"))
    return {"tokens_per_second": speed, "mfu": share * factor}


def speed_of(figures: dict[str, Any]) -> str:
    """The speed for a headline; empty when the run was too short to measure one."""
    if "tokens_per_second" not in figures:
        return ""
    return f", {figures['tokens_per_second']:,.0f} tokens/s, MFU {figures['mfu']:.0%}"
