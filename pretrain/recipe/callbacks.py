"""What happens beside the training loop: signals, the progress line, the proof of what is active."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from recipe.hardware import Choice
from recipe.modeling import parameter_count
from recipe.outputs import Refused
from recipe.sharding import sharded_over

if TYPE_CHECKING:
    from recipe.training import Settings


class StopOnSignal(TrainerCallback):
    """Finish the step, save, end: on a signal, on the launcher's stop file, or when the launcher is gone.

    All ranks agree, so that none is left waiting.
    """

    def __init__(self, stop_file: Path, parent: int) -> None:
        self.stop_file, self.parent = stop_file, parent
        self.received = False
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._note)

    def _note(self, signum: int, frame: object) -> None:
        self.received = True

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask the Trainer to save and stop when any rank was told to."""
        stop = self.received or self.stop_file.exists() or not _is_running(self.parent)
        if dist.is_initialized() and dist.get_world_size() > 1:
            flag = torch.tensor([int(stop)], device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            stop = bool(flag.item())
        if state.global_step >= state.max_steps:
            # The finished model follows at once; and resumed from a checkpoint of the last step, the Trainer
            # would train one step too many.
            control.should_save = False
        elif stop:
            control.should_save = control.should_training_stop = True


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


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
            part = self.path.with_suffix(".part")
            part.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
            part.rename(self.path)
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

    def __init__(self, choice: Choice, parallel: str, ranks: int, settings: Settings) -> None:
        self.choice, self.parallel, self.ranks, self.settings = choice, parallel, ranks, settings
        self.trainer: Trainer | None = None
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
            "ranks": self.ranks,
            "parallel": self.parallel,
            "global_batch": self.settings.global_batch_size,
        }
        if self.settings.muon_learning_rate:
            wanted["optimizer"] = "MuonAdamW"
        wrong = [
            f"{key}: asked for {value}, active is {self.block[key]}"
            for key, value in wanted.items()
            if self.block[key] != value
        ]
        if state.is_world_process_zero:
            tqdm.write("active: " + ", ".join(f"{key} {value}" for key, value in self.block.items()))
        if wrong:
            raise Refused("not what was asked for is active. " + "; ".join(wrong))


def parallel_wish(ranks: int, deepspeed: str | None, fsdp: bool, tensor_parallel: int) -> str:
    """How the ranks are to be joined, in the words of `joined`. deepspeed: path of a file, or None."""
    if deepspeed:
        zero = json.loads(Path(deepspeed).read_text("utf-8")).get("zero_optimization", {})
        devices = [zero.get(part, {}).get("device") for part in ("offload_optimizer", "offload_param")]
        return _zero(zero.get("stage", 0), *devices)
    if fsdp or tensor_parallel > 1:
        return _sharded({"fsdp": ranks // tensor_parallel, "tp": tensor_parallel})
    return f"DDP {ranks}" if ranks > 1 else "one process"


def joined(model: Any) -> str:
    """How the ranks are really joined, read from the model that trains: ``one process``, ``DDP 4``,
    ``FSDP2 4``, ``TP 2``, ``FSDP2 2 x TP 2``, or ``ZeRO-2, optimizer on cpu``.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps around DistributedDataParallel
    if hasattr(model, "zero_optimization_stage"):
        offload = model.zero_offload_optimizer(), model.zero_offload_param()
        return _zero(model.zero_optimization_stage(), *(getattr(part, "device", None) for part in offload))
    if isinstance(model, DistributedDataParallel):
        return f"DDP {dist.get_world_size(model.process_group)}"
    sharded = sharded_over(model)
    if sharded:
        return _sharded(sharded)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return "one process" if ranks == 1 else f"nothing joins the {ranks} ranks"


def _zero(stage: int, optimizer: Any, parameters: Any) -> str:
    parts = [f"ZeRO-{stage}"]
    for name, device in (("optimizer", optimizer), ("parameters", parameters)):
        device = str(device).split(".")[-1]  # DeepSpeed's own are members of an enum
        if device not in ("None", "none"):
            parts.append(f"{name} on {device}")
    return ", ".join(parts)


def _sharded(sizes: dict[str, int]) -> str:
    names = {"fsdp": "FSDP2", "tp": "TP"}
    return " x ".join(f"{names[kind]} {sizes[kind]}" for kind in names if sizes.get(kind, 1) > 1)


def active(trainer: Trainer) -> dict[str, Any]:
    """What a running Trainer really uses, read from the objects that do the work, not from the wishes."""
    from torch._dynamo.utils import counters

    accelerator = trainer.accelerator
    engine = trainer.model_wrapped
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
        "parallel": joined(engine),
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
        "micro_batch": trainer.args.per_device_train_batch_size,
        "accumulation": trainer.args.gradient_accumulation_steps,
        "parameters": parameter_count(trainer.model),
    }
    if hasattr(engine, "zero_optimization_stage"):
        block["precision"] = (
            "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"
        )
    copies = block["ranks"] // sharded_over(trainer.model).get("tp", 1)
    block["global_batch"] = block["micro_batch"] * block["accumulation"] * copies
    return block
