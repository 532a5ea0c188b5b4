"""What is decided about a training before its model is built: values, hardware, steps, where the model is."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import HfArgumentParser, PreTrainedModel, TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from recipe.config.choice import Choice, choose
from recipe.config.launch import batch_layout
from recipe.config.optimizers import OPTIMIZERS, Optimizer, check_optimizer_hardware, optimizer_name
from recipe.config.phases import samples_of
from recipe.config.schedules import check_schedule
from recipe.config.settings import Settings
from recipe.config.training import attention_needs, check_boards, repeats, steps_of_epochs, unreached_steps
from recipe.hardware import Hardware, detect, initialise_vector_math
from recipe.model.sharding import shard
from recipe.model.zero import load_without_code
from recipe.training.extended import schedule_begin
from recipe.training.files import CHECKPOINTS


@dataclass
class Run:
    """Everything that is decided before a model is built.

    folder: the stage's work folder. deepspeed: path of a DeepSpeed file. tensor_parallel: ranks that share
    each matrix. ranks: their number on all machines. parent: the process whose end stops the training.
    probe: only speed and memory are measured, and no model is saved. new_optimizer: a checkpoint of another
    kind of parallelism is continued without its optimizer state.
    """

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
    new_optimizer: bool

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 or tensor parallelism shards the weights."""
        return self.fsdp or self.tensor_parallel > 1

    @property
    def is_main(self) -> bool:
        """Whether this process is rank 0, which alone prints and writes."""
        return self.arguments.process_index == 0


def prepare(
    plan: dict[str, Any],
    file: str,
    arguments_class: type[TrainingArguments] = TrainingArguments,
    fixed: dict[str, Any] | None = None,
) -> Run:
    """Decide everything about a training by the plan that `recipe.run.launch` wrote.

    file: ``pretrain``, ``finetune`` or ``preference``. arguments_class: the TrainingArguments of the trainer.
    fixed: values that this trainer always needs. Raises Refused for what this hardware cannot do.
    """
    _quiet_libraries()
    initialise_vector_math()
    values = plan["config"][file] | (fixed or {})
    hardware, folder = detect(), Path(plan["folder"])
    choice, optimizer = _choose(plan, file, values, hardware)
    native = _trainer_values(plan, file, values, hardware, choice)
    if optimizer.builder:
        native.pop("optim", None)  # the Trainer knows no optimizer of our own
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    os.environ.setdefault("WANDB_PROJECT", native["project"])
    os.environ.setdefault("WANDB_DIR", str(folder))
    settings, arguments = HfArgumentParser((Settings, arguments_class)).parse_dict(native)
    # A process trains on one GPU. Of several visible ones the Trainer would make a torch.nn.DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if plan["deepspeed"]:
        _start_deepspeed(hardware)
    return Run(
        settings=settings,
        arguments=arguments,
        choice=choice,
        optimizer=optimizer,
        hardware=hardware,
        folder=folder,
        deepspeed=plan["deepspeed"],
        fsdp=plan["fsdp"],
        tensor_parallel=plan["tensor_parallel"],
        ranks=plan["ranks"],
        # The training stops when its launcher has ended. Ranks on other machines cannot see the launcher.
        parent=plan["parent"] if plan["host"] == platform.node() else os.getpid(),
        probe=plan.get("probe", False),
        new_optimizer=plan["new_optimizer"],
    )


def _quiet_libraries() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # trl and peft still use the old name of a setting, which a user cannot change.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def _choose(
    plan: dict[str, Any], file: str, values: dict[str, Any], hardware: Hardware
) -> tuple[Choice, Optimizer]:
    """Precision, attention and compiling, and the optimizer."""
    where = f"{file}.json"
    check_optimizer_hardware(hardware, values, where)
    choice = choose(hardware, values, where, attention_needs(plan["config"], file))
    return choice, OPTIMIZERS[optimizer_name(values)]


def _trainer_values(
    plan: dict[str, Any], file: str, values: dict[str, Any], hardware: Hardware, choice: Choice
) -> dict[str, Any]:
    """The values for TrainingArguments and `Settings`: defaults of ours, the file's, and what is fixed."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batch, accumulation = batch_layout(
        *samples_of(values),
        ranks // plan["tensor_parallel"],
    )
    defaults = {
        "ddp_find_unused_parameters": False,
        "per_device_eval_batch_size": values["per_device_train_batch_size"],
        "project": plan["recipe"],
        "run_name": f"{plan['recipe']} {file}",
    }
    fixed = {
        "output_dir": str(Path(plan["folder"]) / CHECKPOINTS),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "use_cpu": hardware.device == "cpu",
        "bf16": choice.precision == "bf16",
        "fp16": choice.precision == "fp16",
        "torch_compile": choice.compile,
        "deepspeed": plan["deepspeed"],
        "report_to": check_boards(values.get("report_to"), f"{file}.json"),
        "train_sampling_strategy": "sequential",  # the dataset itself is shuffled
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # it would hide a NaN loss, and wait for the GPU at each step
        "push_to_hub": False,  # stage 16 pushes, once, what was measured
        "dataloader_pin_memory": hardware.device == "cuda",
        "accelerator_config": {"non_blocking": hardware.device == "cuda"},  # pinned batches need no wait
        "tf32": bool(values.get("tf32")),  # see `RecipeTrainer.create_accelerator_and_postprocess`
    }
    return defaults | values | fixed


def _start_deepspeed(hardware: Hardware) -> None:
    load_without_code()
    if hardware.device == "cpu":
        import deepspeed

        # The Trainer does this only later, too late for from_pretrained under ZeRO-3.
        deepspeed.init_distributed(dist_backend="gloo")


def total_steps(arguments: TrainingArguments, samples: int, global_batch: int) -> tuple[int, int]:
    """(optimizer steps, epochs that the dataset must offer), by max_steps or by num_train_epochs.

    samples: of one epoch. global_batch: samples of one step.
    """
    steps = (
        arguments.max_steps
        if arguments.max_steps > 0
        else steps_of_epochs(arguments.num_train_epochs, samples, global_batch)
    )
    return steps, math.ceil(steps * global_batch / samples)


def check_steps(run: Run, values: dict[str, Any], file: str, samples: int) -> None:
    """Check that the schedule fits into its steps, which may follow from the number of epochs.

    They are those of the run, or those that an extension with ``rewarm`` has added. values: of the training
    file `file`, such as ``pretrain``. samples: of one epoch. Raises Refused, e.g. for a longer warm-up.
    Prints a line about each key such as ``eval_steps`` that names a step after the last, and about data that
    are repeated too often.
    """
    steps = run.arguments.max_steps
    check_schedule(values | {"max_steps": steps - schedule_begin(run.folder)}, f"{file}.json")
    if run.is_main and not run.probe:
        epochs = steps * run.settings.global_batch_size / samples
        for line in (*unreached_steps(values, steps, f"{file}.json"), *repeats(epochs, file)):
            print(line, flush=True)


@contextlib.contextmanager
def whole_model(arguments: TrainingArguments) -> Iterator[None]:
    """Build a new model whole on every rank, also under ZeRO-3, which partitions it later.

    If ZeRO-3 partitioned the model while it is built, the same seed would give other weights than in one
    process. The price is 4 bytes a parameter of host memory per rank while it is built.
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
    """The model of `build`: sharded over the ranks if the launcher asks for it, else whole on every rank."""
    scratch = run.folder / "unsharded"
    if not run.sharded:
        if run.is_main:  # what a sharded run that was killed has left would be published
            shutil.rmtree(scratch, ignore_errors=True)
        return build()
    bf16 = run.choice.precision == "bf16"
    return shard(build, scratch, run.tensor_parallel, run.choice.attention, bf16)
