"""Training under the Hugging Face Trainer: settings, proof of what is active, one progress line, safe
checkpoints.

Used by ``run_clm.py`` and ``run_sft.py``, which differ only in the model they start from and the samples they
read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import (
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from recipe.config import batch_layout
from recipe.hardware import Choice, Hardware, choose, detect, gemm_peak
from recipe.modeling import MuonAdamW, flops_per_token, parameter_count
from recipe.outputs import EXIT_TERMINATED, RecipeError, Refused, write_json

MANIFEST = "manifest.json"


@dataclass
class Settings:
    """Our keys in pretrain.json and finetune.json, beside those of TrainingArguments.

    global_batch_size: sequences per optimizer step over all ranks; accumulation follows from it.
    block_size: tokens per sequence. muon_learning_rate: Muon for the layers' matrices; absent: AdamW for
    everything.
    eval_blocks: blocks of the validation side that are measured during training; absent: all (stage 06
    measures all).
    """

    global_batch_size: int
    block_size: int
    muon_learning_rate: float | None = None
    attn_implementation: str = "auto"
    eval_blocks: int | None = None


def parse(
    values: dict[str, Any], folder: Path, deepspeed: str | None
) -> tuple[Settings, TrainingArguments, Choice, Hardware]:
    """Our settings, the Trainer's arguments and the hardware choice from a recipe's file.

    Raises Refused for what this hardware, or this launcher, cannot do.
    """
    hardware = detect()
    choice = choose(hardware, values)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batch, accumulation = batch_layout(
        values["global_batch_size"], values["per_device_train_batch_size"], ranks
    )
    native = {
        "ddp_find_unused_parameters": False,
        "per_device_eval_batch_size": values["per_device_train_batch_size"],
        "report_to": ["tensorboard"],
    } | values
    native |= {
        "output_dir": str(folder / "checkpoints"),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "use_cpu": hardware.device == "cpu",
        "bf16": choice.precision == "bf16",
        "fp16": choice.precision == "fp16",
        "torch_compile": choice.compile and not deepspeed,
        "deepspeed": deepspeed,
        "train_sampling_strategy": "sequential",  # the dataset itself is shuffled
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": hardware.device == "cuda",
    }
    choice = Choice(choice.precision, choice.attention, native["torch_compile"])
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    settings, arguments = HfArgumentParser((Settings, TrainingArguments)).parse_dict(native)
    if deepspeed and hardware.device == "cpu":
        import deepspeed as library

        library.init_distributed(
            dist_backend="gloo"
        )  # the Trainer only does so later, too late for from_pretrained
    return settings, arguments, choice, hardware


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


# ------------------------------------------------------------------------------------------- checkpoints


def write_manifest(checkpoint: Path) -> None:
    """Record every file of a checkpoint with its size and sha256; the manifest comes last, by rename."""
    files = {}
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST):
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
            os.fsync(handle.fileno())
        files[str(path.relative_to(checkpoint))] = {"bytes": path.stat().st_size, "sha256": digest}
    part = checkpoint / f"{MANIFEST}.part"
    write_json(part, files)
    part.rename(checkpoint / MANIFEST)


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, empty when every file is as its manifest says."""
    manifest = checkpoint / MANIFEST
    if not manifest.exists():
        return "it was never finished"
    for name, facts in json.loads(manifest.read_text("utf-8")).items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        with path.open("rb") as handle:
            if hashlib.file_digest(handle, "sha256").hexdigest() != facts["sha256"]:
                return f"{name} is not what was written"
    return ""


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, the newest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)


def newest_good_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole. Damaged ones are named in a warning and passed over."""
    for checkpoint in list_checkpoints(folder):
        reason = damage(checkpoint)
        if not reason:
            return checkpoint
        print(f"warning: {checkpoint.name} is not used: {reason}", flush=True)
    return None


# ---------------------------------------------------------------------------------------------- the Trainer


def return_loss_only(model: PreTrainedModel) -> None:
    """Let the model's forward return nothing but the loss when it is given labels.

    The logits (batch x block x vocabulary) are by far the largest tensor of a step. Returned, they would be
    kept, and accelerate would convert them to float32 outside the compiled graph.
    """
    forward = model.forward

    @functools.wraps(forward)
    def loss_of(*arguments: Any, **keywords: Any) -> Any:
        output = forward(*arguments, **keywords)
        return output if output.loss is None else {"loss": output.loss}

    model.forward = loss_of


class RecipeTrainer(Trainer):
    """The stock Trainer, with our optimizer choice and verified checkpoints."""

    def __init__(self, settings: Settings, **keywords: Any) -> None:
        self.settings = settings
        super().__init__(**keywords)

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


class StopOnSignal(TrainerCallback):
    """On SIGTERM or SIGINT: finish the step, save, end. All ranks agree, so that none is left waiting."""

    def __init__(self) -> None:
        self.received = False
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._note)

    def _note(self, signum: int, frame: object) -> None:
        self.received = True

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask the Trainer to save and stop when any rank was told to."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            flag = torch.tensor([int(self.received)], device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            self.received = bool(flag.item())
        if self.received and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


class Progress(TrainerCallback):
    """One line with loss, speed, MFU and time left; every logged value also goes to ``metrics.jsonl``."""

    def __init__(
        self, folder: Path, tokens_per_step: int, flops: float, peak: float, bytes_per_token: float | None
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self.tokens_per_step, self.flops, self.peak, self.bytes_per_token = (
            tokens_per_step,
            flops,
            peak,
            bytes_per_token,
        )
        self.seconds_before = 0.0
        self.compiled = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Continue the curve where the checkpoint stands: later lines belong to a try that was cut off."""
        kept = []
        if self.path.exists():
            rows = [
                json.loads(line) for line in self.path.read_text("utf-8").splitlines() if line.endswith("}")
            ]
            kept = [row for row in rows if row["step"] <= state.global_step]
            self.path.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
        self.seconds_before = kept[-1]["seconds"] if kept else 0.0
        self.started = self.mark = time.perf_counter()
        self.mark_step = state.global_step
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=1.0 if sys.stderr.isatty() else 20.0,
            bar_format="{desc}{percentage:3.0f}% {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}]{postfix}",
        )

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar; leave the first step, which compiles, out of the speed."""
        self.bar.update(state.global_step - self.bar.n)
        if not self.compiled:
            self.compiled = True
            self.mark, self.mark_step = time.perf_counter(), state.global_step

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluation is not training time: the speed starts afresh after it."""
        self.mark, self.mark_step = time.perf_counter(), state.global_step

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Write one row, show it on the bar. Seconds count all tries, evaluation and compiling too."""
        now = time.perf_counter()
        row: dict[str, Any] = {
            "step": state.global_step,
            "tokens": state.global_step * self.tokens_per_step,
            "seconds": round(self.seconds_before + now - self.started, 3),
        }
        shown = {}
        for key in ("loss", "eval_loss", "learning_rate", "grad_norm"):
            if key in logs:
                row[key] = logs[key]
        for key in ("loss", "eval_loss"):
            if key in row and self.bytes_per_token:
                bits = row[key] / math.log(2) / self.bytes_per_token
                row[f"{'eval_' * (key == 'eval_loss')}bits_per_byte"] = bits
                shown["bits/byte" if key == "loss" else "valid bits/byte"] = f"{bits:.3f}"
        if "loss" in row and state.global_step > self.mark_step:
            speed = (state.global_step - self.mark_step) * self.tokens_per_step / (now - self.mark)
            row |= {"tokens_per_second": round(speed, 1), "mfu": round(speed * self.flops / self.peak, 4)}
            shown |= {"tokens/s": f"{speed:,.0f}", "MFU": f"{row['mfu']:.0%}"}
            self.mark, self.mark_step = now, state.global_step
        if len(row) > 3:
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
        if "loss" in row:
            self.bar.set_postfix_str(
                ", ".join([f"loss {row['loss']:.3f}", *(f"{k} {v}" for k, v in shown.items())])
            )
        elif "eval_loss" in row:
            self.bar.write(
                f"step {state.global_step}: valid loss {row['eval_loss']:.4f}  "
                + "  ".join(f"{k} {v}" for k, v in shown.items())
            )

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the finished line standing."""
        self.bar.close()


class Proof(TrainerCallback):
    """After the first step, find out what is really active; stop when it is not what was asked for."""

    def __init__(self, choice: Choice, deepspeed: str | None, wanted_ranks: int, settings: Settings) -> None:
        self.choice, self.deepspeed, self.wanted_ranks, self.settings = (
            choice,
            deepspeed,
            wanted_ranks,
            settings,
        )
        self.trainer: RecipeTrainer | None = None
        self.block: dict[str, Any] = {}

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look once, at the first step of this process."""
        if self.block:
            return
        assert self.trainer is not None
        self.block = active(self.trainer)
        self.block["tokens_per_step"] = self.settings.global_batch_size * self.settings.block_size
        wanted = {
            "precision": self.choice.precision,
            "attention": self.choice.attention,
            "compiled": self.choice.compile,
            "ranks": self.wanted_ranks,
            "global_batch": self.settings.global_batch_size,
            "deepspeed": deepspeed_wishes(self.deepspeed),
            "optimizer": "MuonAdamW" if self.settings.muon_learning_rate else self.block["optimizer"],
        }
        wrong = [
            f"{key}: asked for {value}, active is {self.block[key]}"
            for key, value in wanted.items()
            if self.block[key] != value
        ]
        if state.is_world_process_zero:
            print("active: " + ", ".join(f"{key} {value}" for key, value in self.block.items()), flush=True)
        if wrong:
            raise Refused("not what was asked for is active. " + "; ".join(wrong))


def deepspeed_wishes(path: str | None) -> dict[str, Any] | None:
    """ZeRO stage and offload that a DeepSpeed file asks for; None without a file."""
    if not path:
        return None
    zero = json.loads(Path(path).read_text("utf-8")).get("zero_optimization", {})
    return {
        "stage": zero.get("stage", 0),
        "offload_optimizer": zero.get("offload_optimizer", {}).get("device", "none"),
        "offload_parameters": zero.get("offload_param", {}).get("device", "none"),
    }


def active(trainer: RecipeTrainer) -> dict[str, Any]:
    """What a running Trainer really uses, read from the objects that do the work, not from the wishes."""
    from torch._dynamo.utils import counters

    wrapped, accelerator = trainer.model_wrapped, trainer.accelerator
    optimizer: Any = trainer.optimizer
    while hasattr(optimizer, "optimizer"):  # accelerate's, then DeepSpeed's wrapper
        optimizer = optimizer.optimizer
    scheduler = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
    block: dict[str, Any] = {
        "device": str(trainer.args.device),
        "precision": {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision),
        "attention": trainer.model.config._attn_implementation,
        "compiled": counters["stats"]["unique_graphs"] > 0,
        "optimizer": type(optimizer).__name__,
        "scheduler": f"{trainer.args.lr_scheduler_type.value} ({type(scheduler).__name__})",
        "deepspeed": None,
        "parallel": type(wrapped).__name__ if accelerator.num_processes > 1 else "one process",
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
        "micro_batch": trainer.args.per_device_train_batch_size,
        "accumulation": trainer.args.gradient_accumulation_steps,
        "parameters": parameter_count(trainer.model),
    }
    if hasattr(wrapped, "zero_optimization_stage"):
        offload = wrapped.zero_offload_optimizer(), wrapped.zero_offload_param()
        block["deepspeed"] = {
            "stage": wrapped.zero_optimization_stage(),
            "offload_optimizer": str(getattr(offload[0], "device", "none")).split(".")[-1],
            "offload_parameters": str(getattr(offload[1], "device", "none")).split(".")[-1],
        }
        block["precision"] = (
            "bf16" if wrapped.bfloat16_enabled() else "fp16" if wrapped.fp16_enabled() else "fp32"
        )
    block["global_batch"] = block["micro_batch"] * block["accumulation"] * block["ranks"]
    return block


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    samples: Dataset,
    valid: Dataset,
    settings: Settings,
    arguments: TrainingArguments,
    choice: Choice,
    hardware: Hardware,
    folder: Path,
    deepspeed: str | None,
    ranks: int,
    bytes_per_token: float | None,
) -> dict[str, Any]:
    """Train to the last step, continuing from the newest good checkpoint, and save a plain Hugging Face
    folder.

    Returns the figures for stage.json. Ends the process with exit 143 when a signal stopped the training
    after its checkpoint was saved.
    """
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main_process = arguments.process_index == 0
    peak = gemm_peak(hardware.device, choice.precision) if main_process else 1.0
    proof, stop = Proof(choice, deepspeed, ranks, settings), StopOnSignal()
    tokens_per_step = settings.global_batch_size * settings.block_size
    progress = Progress(
        folder, tokens_per_step, flops_per_token(model, settings.block_size), peak * ranks, bytes_per_token
    )
    model.config.use_cache = False  # a cache would also switch off the separation of packed documents
    return_loss_only(model)
    trainer = RecipeTrainer(
        settings,
        model=model,
        args=arguments,
        train_dataset=samples,
        eval_dataset=valid,
        callbacks=[stop, proof, *([progress] if main_process else [])],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    proof.trainer = trainer
    checkpoint = newest_good_checkpoint(Path(arguments.output_dir))
    if checkpoint and main_process:
        print(f"continues from {checkpoint.name}", flush=True)
    if dist.is_initialized():
        dist.barrier()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < trainer.state.max_steps:
        if main_process:
            print(
                f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; saved", flush=True
            )
        raise SystemExit(EXIT_TERMINATED)
    done = next(
        (
            log
            for log in trainer.state.log_history
            if "eval_loss" in log and log["step"] == trainer.state.global_step
        ),
        None,
    )
    final = done or trainer.evaluate()
    model.config.use_cache = True
    trainer.save_model(str(folder))
    if main_process:
        tokenizer.save_pretrained(folder)
        (folder / "training_args.bin").unlink(
            missing_ok=True
        )  # a pickle, and what it says stands in stage.json
    rows = (
        [json.loads(line) for line in progress.path.read_text("utf-8").splitlines()] if main_process else []
    )
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    figures = {
        "active": proof.block or None,
        "hardware": hardware.name,
        "gemm_peak_flops": peak,
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * tokens_per_step,
        "eval_loss": final.get("eval_loss"),
    }
    if speeds:
        speed = sorted(speeds)[len(speeds) // 2]
        figures |= {"tokens_per_second": speed, "mfu": speed * progress.flops / progress.peak}
    return figures


def run_script(work: Any) -> None:
    """Call a training script's main function with its plan; errors a user can mend end in one line, on every
    rank.
    """
    plan = json.loads(Path(sys.argv[1]).read_text("utf-8"))
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
    sys.exit(code)
