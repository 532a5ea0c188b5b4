"""Callbacks of the training loop: signals, signs of life, measured speed, the progress line."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState

from recipe.hardware import peak_memory
from recipe.project import append_json_line, read_json_lines, write_json_lines
from recipe.signals import on_stop
from recipe.training.files import METRICS
from recipe.training.gpu_load import GpuLoad, open_gpu
from recipe.training.watchdog import SignsOfLife


class StopOnSignal(TrainerCallback):
    """Finish the step, save and end: on a signal, on the launcher's stop file, or when the launcher ended.

    All ranks decide together, so that no rank waits for another.
    """

    def __init__(self, stop_file: Path, parent: int) -> None:
        self.stop_file, self.parent = stop_file, parent
        self.received = False
        on_stop(self._note)

    def _note(self, signum: int, frame: object) -> None:
        self.received = True

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask the Trainer to save and stop when any rank has a reason to."""
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


class Heartbeat(TrainerCallback):
    """Tell the launcher's watchdog that this rank is alive. It must be the last callback."""

    def __init__(self, life: SignsOfLife, changes: Collection[int] = ()) -> None:
        """changes: the steps after which a new phase begins, whose first step compiles the model, too."""
        self.life, self.changes, self.compiled = life, changes, False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The first step compiles the model, which may take long."""
        self.life.unpaced(state.global_step)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock again after something whose time is not known."""
        if self.compiled and state.global_step in self.changes:
            self.compiled = False
            self.life.unpaced(state.global_step)
        if self.compiled and self.life.started is None:
            self.life.step(state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Report a step. The time of an evaluation or a checkpoint after it is not known."""
        self.life.step(state.global_step)
        if not self.compiled or control.should_evaluate or control.should_save:
            self.life.unpaced(state.global_step)
        self.compiled = True

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Report that an evaluation goes on."""
        self.life.alive(state.global_step)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The model is saved now, which may take long."""
        self.life.unpaced(state.global_step)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class Meter(TrainerCallback):
    """Measure speed and memory on every rank; `complete` adds them to what is logged."""

    def __init__(
        self,
        tokens_per_step: int,
        flops: Callable[[int], float],
        peak: float,
        bytes_per_token: float | None,
    ) -> None:
        """flops: per token, in the step after so many. peak: FLOP/s of all ranks together. bytes_per_token:
        of the validation text.
        """
        self.tokens_per_step, self.flops, self.peak = tokens_per_step, flops, peak
        self.bytes_per_token = bytes_per_token
        self.compiled = False
        self.load: GpuLoad | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock."""
        self.load = open_gpu(args.device)
        self._restart(state)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Do not count the first step, which compiles the model."""
        if not self.compiled:
            self.compiled = True
            self._restart(state)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure the speed anew after an evaluation, which is not training time."""
        self._restart(state)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure the speed anew after a checkpoint was saved."""
        self._restart(state)

    def _restart(self, state: TrainerState) -> None:
        self.mark, self.mark_step = time.perf_counter(), state.global_step
        if self.load:
            self.load.restart()

    def complete(self, logs: dict[str, float], state: TrainerState, device: torch.device) -> None:
        """Add figures to a log: to every loss its bits per byte; to a training log tokens/s, MFU, seconds
        left, and each rank's tokens/s and memory, and its GPU's utilisation and power where NVML tells them.

        All ranks must call it. Memory is the peak so far in GiB: of the GPU's allocator, or on a CPU what is
        resident in the process.
        """
        for key in ("loss", "eval_loss"):
            if key in logs and self.bytes_per_token:
                name = key.removesuffix("loss") + "bits_per_byte"
                logs[name] = logs[key] / math.log(2) / self.bytes_per_token
        if "loss" not in logs or state.global_step == self.mark_step:
            return
        steps, seconds = state.global_step - self.mark_step, time.perf_counter() - self.mark
        load = self.load.read() if self.load else (math.nan, math.nan)
        rows = gather([seconds, peak_memory(device.type), *load], device)
        slowest = max(row[0] for row in rows)
        speed = steps * self.tokens_per_step / slowest
        mfu = speed * self.flops(state.global_step - 1) / self.peak
        logs |= {"tokens_per_second": round(speed, 1), "mfu": round(mfu, 4)}
        logs["seconds_left"] = round((state.max_steps - state.global_step) * slowest / steps)
        for rank, (taken, memory, percent, watts) in enumerate(rows):
            share = steps * self.tokens_per_step / len(rows)
            logs[f"rank{rank}/tokens_per_second"] = round(share / taken, 1)
            logs[f"rank{rank}/memory_gib"] = round(memory / 2**30, 3)
            if not math.isnan(watts):
                logs[f"rank{rank}/gpu_percent"], logs[f"rank{rank}/watts"] = percent, round(watts, 1)
        self._restart(state)


def gather(values: list[float], device: torch.device) -> list[list[float]]:
    """The values of every rank, by rank. All ranks must call it."""
    if not dist.is_initialized():  # on the CPU: a device would be waited for
        return [torch.tensor(values, dtype=torch.float32).tolist()]
    row = torch.tensor(values, dtype=torch.float32, device=device)
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, row)
    return [row.tolist() for row in rows]


def fork_rng(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """torch's context without effect on the random numbers that follow, for the CPU and the device.

    By default it would copy the state of every GPU that a rank sees, and warn of that.
    """
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


class Progress(TrainerCallback):
    """One line with loss, speed, MFU and time left; it also writes every logged value to metrics.jsonl."""

    def __init__(self, folder: Path, tokens_per_step: int) -> None:
        self.path = folder / METRICS
        self.tokens_per_step = tokens_per_step
        self.seconds_before = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Continue the file at the checkpoint's step."""
        kept = keep_rows(self.path, state.global_step)
        self.seconds_before = kept[-1]["seconds"] if kept else 0.0
        self.started = time.perf_counter()
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=1.0,
            bar_format="{desc}{percentage:3.0f}% {n_fmt}/{total_fmt} steps [{elapsed}]{postfix}",
        )

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Write one row and show it on the bar.

        Its seconds count all runs of this training, with evaluation and compiling.
        """
        if "loss" not in logs and "eval_loss" not in logs:
            return
        row = {
            "step": state.global_step,
            "tokens": state.global_step * self.tokens_per_step,
            "seconds": round(self.seconds_before + time.perf_counter() - self.started, 3),
        }
        row |= {key: value for key, value in logs.items() if key not in NOT_WRITTEN}
        append_json_line(self.path, row)
        shown = "  ".join(text.format(row[key]) for key, text in SHOWN.items() if key in row)
        if "seconds_left" in row:  # tqdm's own estimate would go by the first step, which compiles
            shown += f"  {tqdm.format_interval(row['seconds_left'])} left"
        if "loss" in row:
            self.bar.set_postfix_str(shown)
        else:
            self.bar.write(f"step {state.global_step}: {shown}")

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep the last line of the bar."""
        self.bar.close()


# Figures of the Trainer that are not written: an evaluation's speed says nothing about the model.
NOT_WRITTEN = ("epoch", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
SHOWN = {
    "loss": "loss {:.3f}",
    "z_loss": "z-loss {:.1e}",
    "router_aux_loss": "router loss {:.1e}",
    "expert_load_max": "busiest expert {:.2f}x",
    "bits_per_byte": "{:.3f} bits/byte",
    "eval_loss": "valid loss {:.4f}",
    "reward": "reward {:.3f}",
    "eval_reward": "valid reward {:.3f}",
    "eval_bits_per_byte": "{:.4f} bits/byte",
    "grad_norm": "gradient {:.2f}",
    "learning_rate": "lr {:.1e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.0%}",
}


def keep_rows(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove the lines after a step from a file of JSON lines with ``step``; return the rows that are left.

    Later lines come from a run that was interrupted; the last one may be incomplete. At step 0 none is left:
    the training starts again from the beginning.
    """
    if not path.exists():
        return []
    kept = [row for row in read_json_lines(path) if row["step"] <= step] if step else []
    write_json_lines(path, kept)
    return kept
