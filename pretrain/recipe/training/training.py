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
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

from recipe.config.launch import batch_layout
from recipe.config.optimizers import OPTIMIZERS, Optimizer, check_optimizer_hardware, optimizer_name
from recipe.config.settings import Settings
from recipe.config.training import check_boards, documents_suffice
from recipe.hardware import Choice, Hardware, choose, detect, gemm_peak, peak_memory
from recipe.model.build import flops_per_token
from recipe.model.losses import return_loss_only
from recipe.model.sharding import load_without_code, shard
from recipe.progress import write_lines_without_a_terminal
from recipe.project import EXIT_TERMINATED, RecipeError
from recipe.training.callbacks import Heartbeat, Meter, Progress, StopOnSignal
from recipe.training.checkpoints import newest_good_checkpoint
from recipe.training.proof import Proof, parallel_wish
from recipe.training.sample_prompts import Samples
from recipe.training.skip_bad_steps import Guard
from recipe.training.trainer import RecipeTrainer
from recipe.training.watchdog import STACKS, SignsOfLife


@dataclass
class Run:
    """Everything that is settled before a model is built."""

    settings: Settings
    arguments: TrainingArguments
    choice: Choice
    optimizer: Optimizer
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
    """Settle a run by the plan that `recipe.run.launch` wrote; file: ``pretrain``, ``finetune`` or
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
    optimizer = OPTIMIZERS[optimizer_name(values)]
    check_optimizer_hardware(hardware, values, f"{file}.json")
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
    if optimizer.builder:
        native.pop("optim", None)  # the Trainer would not know the name of one of our own
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
        optimizer,
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
    proof = Proof(run.choice, run.optimizer, parallel, run.ranks, settings, tokens_per_step)
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
        run.optimizer,
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
    write_lines_without_a_terminal()
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
