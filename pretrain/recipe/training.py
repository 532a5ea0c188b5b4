"""Training under the Hugging Face Trainer: settings, proof of what is active, one progress line, safe
checkpoints.

Used by ``run_clm.py`` and ``run_sft.py``, which differ only in the model they start from and the samples they
read.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.utils.data import Dataset
from transformers import (
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
)
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from recipe.callbacks import Heartbeat, Meter, Progress, Proof, StopOnSignal, gather, parallel_wish
from recipe.checkpoints import MANIFEST, list_checkpoints, newest_good_checkpoint, write_manifest
from recipe.config_launch import batch_layout
from recipe.config_training import check_boards, documents_suffice
from recipe.hardware import Choice, Hardware, choose, detect, gemm_peak, peak_memory
from recipe.losses import return_loss_only
from recipe.modeling import flops_per_token
from recipe.optimizers import MuonAdamW, decayed
from recipe.outputs import EXIT_TERMINATED, RecipeError
from recipe.sampling import Samples
from recipe.sharding import ShardedTrainer, load_without_code, shard
from recipe.spikes import Guard
from recipe.watchdog import STACKS, SignsOfLife


@dataclass
class Settings:
    """Our keys in pretrain.json and finetune.json, beside those of TrainingArguments.

    global_batch_size: sequences per optimizer step over all ranks; accumulation follows from it.
    block_size: tokens per sequence. muon_learning_rate: Muon for the layers' matrices; absent: AdamW for
    everything.
    eval_blocks: blocks of the validation side that are measured during training; absent: all (stage 06
    measures all). z_loss: coefficient of the z-loss, 0 for none. sample_steps: after every so many steps, or
    after those named, measure the validation side and continue the prompts of generation.json.
    lora: tune an adapter in place of all weights (see `recipe.adapters`). initial_model, initial_revision: a
    published checkpoint to start from (see `recipe.initial`).
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


@dataclass
class Run:
    """Everything that is settled before a model is built."""

    settings: Settings
    arguments: TrainingArguments
    choice: Choice
    hardware: Hardware
    folder: Path
    deepspeed: str | None
    fsdp: bool
    tensor_parallel: int
    ranks: int
    parent: int
    probe: bool

    @property
    def sharded(self) -> bool:
        """Whether the weights are to be sharded by FSDP2 or tensor parallelism."""
        return self.fsdp or self.tensor_parallel > 1

    @property
    def is_main(self) -> bool:
        """Whether this process is rank 0, which alone prints and writes."""
        return self.arguments.process_index == 0


def prepare(
    plan: dict[str, Any],
    file: str,
    arguments_class: type[TrainingArguments] = TrainingArguments,
    also: dict[str, Any] | None = None,
) -> Run:
    """Settle a run by the plan that `recipe.launch` wrote; file: ``pretrain``, ``finetune`` or
    ``preference``.

    arguments_class: the TrainingArguments of the trainer. also: what that trainer always wants of them.
    Raises Refused for what this hardware cannot do.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # trl and peft still use the old name of a setting; nothing a user could mend.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
    values, folder, deepspeed = plan["config"][file] | (also or {}), Path(plan["folder"]), plan["deepspeed"]
    hardware = detect()
    choice = choose(hardware, values, f"{file}.json", documents_suffice(plan["config"], file))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    fsdp, tensor_parallel = plan["fsdp"], plan["tensor_parallel"]
    micro_batch, accumulation = batch_layout(
        values["global_batch_size"], values["per_device_train_batch_size"], ranks // tensor_parallel
    )
    native = {
        "ddp_find_unused_parameters": False,
        "per_device_eval_batch_size": values["per_device_train_batch_size"],
        "project": plan["recipe"],
        "run_name": f"{plan['recipe']} {file}",
    } | values
    native |= {
        "output_dir": str(folder / "checkpoints"),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "use_cpu": hardware.device == "cpu",
        "bf16": choice.precision == "bf16",
        "fp16": choice.precision == "fp16",
        "torch_compile": choice.compile and not (deepspeed or fsdp or tensor_parallel > 1),
        "deepspeed": deepspeed,
        "report_to": check_boards(values.get("report_to"), f"{file}.json"),
        "train_sampling_strategy": "sequential",  # the dataset itself is shuffled
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "push_to_hub": False,  # stage 16 pushes, once, what was measured
        "dataloader_pin_memory": hardware.device == "cuda",
    }
    choice = Choice(choice.precision, choice.attention, native["torch_compile"])
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    os.environ.setdefault("WANDB_PROJECT", native["project"])
    os.environ.setdefault("WANDB_DIR", str(folder))
    settings, arguments = HfArgumentParser((Settings, arguments_class)).parse_dict(native)
    if deepspeed:
        load_without_code()
    if deepspeed and hardware.device == "cpu":
        import deepspeed as library

        # The Trainer does so only later, too late for from_pretrained under ZeRO-3.
        library.init_distributed(dist_backend="gloo")
    # The launcher whose end ends the training; ranks on other machines than its own cannot look for it.
    parent = plan["parent"] if plan["host"] == platform.node() else os.getpid()
    return Run(
        settings,
        arguments,
        choice,
        hardware,
        folder,
        deepspeed,
        fsdp,
        tensor_parallel,
        plan["ranks"],
        parent,
        plan.get("probe", False),
    )


def total_steps(arguments: TrainingArguments, samples: int, global_batch: int) -> tuple[int, int]:
    """(optimizer steps, epochs that the dataset must offer) by max_steps, or by num_train_epochs over
    `samples`.
    """
    steps = (
        arguments.max_steps
        if arguments.max_steps > 0
        else math.ceil(arguments.num_train_epochs * samples / global_batch)
    )
    return steps, math.ceil(steps * global_batch / samples)


@contextlib.contextmanager
def whole_model(arguments: TrainingArguments) -> Iterator[None]:
    """Build a new model whole on every rank also under ZeRO-3, which partitions it later.

    Partitioned while it is made, it would draw other weights than one process does from the same seed. The
    price is 4 bytes a parameter of host memory per rank while it is made.
    """
    if not arguments.deepspeed:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(arguments.hf_deepspeed_config)


def place(run: Run, build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The model of `build`, sharded over the ranks where that was asked for, else whole on every rank."""
    if not run.sharded:
        return build()
    bf16 = run.choice.precision == "bf16"
    return shard(build, run.folder / "unsharded", run.tensor_parallel, run.choice.attention, bf16)


class RecipeTrainer(ShardedTrainer):
    """The Trainer with our optimizer choice and verified checkpoints."""

    rows_per_sample = 1  # of a batch that is trained on

    def __init__(self, settings: Settings, meter: Meter, **keywords: Any) -> None:
        self.settings, self.meter = settings, meter
        self.z_losses: list[torch.Tensor] = []  # of each micro-batch since the last log
        self.sequences = 0  # that this rank has trained on
        self.step_loss: torch.Tensor | float = 0.0  # of the micro-batches since the last step
        self.gradient_norm: torch.Tensor | float | None = None  # before it was clipped
        self.clipped_at: float | None = None  # since it was clipped once
        super().__init__(**keywords)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """What weight decay applies to: unlike the stock Trainer's, no embeddings."""
        return decayed(model)

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> torch.Tensor:
        """The Trainer's step over one micro-batch, whose sequences are counted for the proof."""
        self.sequences += len(inputs["input_ids"]) // self.rows_per_sample
        loss = super().training_step(model, inputs, *rest)
        self.step_loss = self.step_loss + loss
        return loss

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
        """The Trainer's loss; the z-loss in it is noted beside, on the device."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if "z_loss" in outputs:
            # As the Trainer scales a loss that is divided by the tokens of all ranks.
            self.z_losses.append(self.accelerator.num_processes // self.get_tp_size() * outputs["z_loss"])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the loss without the z-loss, that apart, and what `Meter` measures."""
        if "loss" in logs and self.z_losses:
            mean = torch.stack(self.z_losses).mean().item() * self.args.gradient_accumulation_steps
            shares = gather([mean], self.args.device)
            logs["z_loss"] = sum(share for (share,) in shares) / len(shares)
            logs["loss"] -= logs["z_loss"]
            self.z_losses.clear()
        self.meter.complete(logs, self.state, self.args.device)
        super().log(logs, start_time)

    def evaluate(self, *arguments: Any, **keywords: Any) -> dict[str, float]:
        """Evaluate without drawing from the random numbers of the training."""
        with torch.random.fork_rng():
            return super().evaluate(*arguments, **keywords)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Muon with AdamW where muon_learning_rate is set, else the Trainer's own choice."""
        if self.optimizer is None and self.settings.muon_learning_rate:
            args = self.args
            self.optimizer = MuonAdamW(
                self.model if model is None else model,
                self.settings.muon_learning_rate,
                args.learning_rate,
                (args.adam_beta1, args.adam_beta2),
                args.adam_epsilon,
                args.weight_decay,
            )
        return super().create_optimizer(model)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save, verify, and only then delete older checkpoints."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        folder = Path(self.args.output_dir)
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        try:
            if self.is_world_process_zero() and checkpoint.exists():
                shutil.rmtree(checkpoint)  # what a kill left of an earlier try
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            write_manifest(checkpoint)
            good = [path for path in list_checkpoints(folder) if (path / MANIFEST).exists()]
            for old in good[limit:] if limit else []:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    samples: Dataset,
    valid: Dataset,
    run: Run,
    bytes_per_token: float | None,
    sampling: Samples | None = None,
    trainer_class: type[RecipeTrainer] = RecipeTrainer,
    tokens_per_step: int | None = None,
    **keywords: Any,
) -> dict[str, Any]:
    """Train to the last step, continuing from the newest good checkpoint; save a plain Hugging Face folder.

    A model under an adapter is saved as the adapter alone, in the folder ``adapter``. trainer_class,
    tokens_per_step, keywords: another trainer than for packed blocks, the tokens of its steps on average, and
    what it takes beside.

    Returns the figures for stage.json. Ends the process with exit 143 when a signal stopped the training
    after its checkpoint was saved.
    """
    settings, arguments, folder = run.settings, run.arguments, run.folder
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    peak = gemm_peak(run.hardware.device, run.choice.precision) if run.is_main else 1.0
    parallel = parallel_wish(run.ranks, run.deepspeed, run.fsdp, run.tensor_parallel)
    tokens_per_step = tokens_per_step or settings.global_batch_size * settings.block_size
    proof = Proof(run.choice, parallel, run.ranks, settings, tokens_per_step)
    stop, guard = StopOnSignal(folder / "stop", run.parent), Guard(folder)
    life = SignsOfLife(folder / "ranks", arguments.process_index)
    flops = flops_per_token(model, settings.block_size)
    meter = Meter(tokens_per_step, flops, peak * run.ranks, bytes_per_token)
    progress = Progress(folder, tokens_per_step)
    model.config.use_cache = False  # a cache would also switch off the separation of packed documents
    if trainer_class is RecipeTrainer:
        return_loss_only(model, settings.z_loss)
    trainer = trainer_class(
        settings,
        meter,
        model=model,
        args=arguments,
        train_dataset=samples,
        eval_dataset=valid,
        callbacks=[
            stop,
            guard,
            proof,
            *([sampling] if sampling else []),
            meter,  # behind the sampling, whose time is none of training
            *([progress] if run.is_main else []),
            Heartbeat(life),
        ],
        **keywords,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    proof.trainer = guard.trainer = trainer
    checkpoint = newest_good_checkpoint(Path(arguments.output_dir))
    _agree_on(checkpoint)
    if checkpoint and run.is_main:
        print(f"continues from {checkpoint.name}", flush=True)
    if dist.is_initialized():
        dist.barrier()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < trainer.state.max_steps:
        if run.is_main:
            print(
                f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; saved", flush=True
            )
        raise SystemExit(EXIT_TERMINATED)
    final: dict[str, Any] = {}
    if not run.probe:  # which wants the speed and the memory, no model
        history = {log["step"]: log for log in trainer.state.log_history if "eval_loss" in log}
        final = history.get(trainer.state.global_step) or trainer.evaluate()
        model.config.use_cache = True
        target = folder / "adapter" if settings.lora else folder
        trainer.save_model(str(target))
    if run.is_main and not run.probe:
        tokenizer.save_pretrained(folder)
        # A pickle, and what it says stands in stage.json.
        (target / "training_args.bin").unlink(missing_ok=True)
    rows = []
    if run.is_main:
        rows = [json.loads(line) for line in progress.path.read_text("utf-8").splitlines()]
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    figures = {
        "active": proof.block or None,
        "hardware": run.hardware.name,
        "gemm_peak_flops": peak,
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * tokens_per_step,
        "eval_loss": final.get("eval_loss"),
        "peak_memory_bytes": peak_memory(run.hardware.device),
        "skipped_steps": sorted(guard.skipped),
    }
    if speeds:
        speed = sorted(speeds)[len(speeds) // 2]
        figures |= {"tokens_per_second": speed, "mfu": speed * flops / meter.peak}
    return figures


def _agree_on(checkpoint: Path | None) -> None:
    """Raise RecipeError when another rank would continue from another checkpoint than this one."""
    if not dist.is_initialized():
        return
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, checkpoint.name if checkpoint else None)
    if len(set(found)) > 1:
        raise RecipeError(
            f"the ranks see different checkpoints: {sorted(set(map(str, found)))}. Several nodes must share "
            "the project's folder (outputs/) over a network file system"
        )


def speed_of(figures: dict[str, Any]) -> str:
    """The speed for a headline; nothing when the run was too short to measure one."""
    if "tokens_per_second" not in figures:
        return ""
    return f", {figures['tokens_per_second']:,.0f} tokens/s, MFU {figures['mfu']:.0%}"


def run_script(work: Any) -> None:
    """Call a training script's main function with its plan; errors a user can mend end in one line."""
    plan = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    faulthandler.register(STACKS)
    code = 0
    try:
        work(plan)
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    if dist.is_initialized():
        dist.barrier()  # a rank that leaves while another still talks to it would abort it
        dist.destroy_process_group()
        # Everything is written. At a regular exit gloo's threads, still joinable, sometimes abort the process
        # ("terminate called without an active exception"), and a finished training would count as failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
