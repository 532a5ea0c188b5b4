"""The share of a step during which ranks communicate, by PyTorch's profiler."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from transformers import TrainerCallback

# How the profiler names collectives: NCCL's kernels on a GPU, gloo's operations on a CPU.
COLLECTIVES = ("nccl", "gloo:")
STEP = "recipe: a step"


class CommunicationShare(TrainerCallback):
    """Profiles the last step of a training with several ranks.

    share: the share of that step during which a collective was under way; computation may go on meanwhile.
    """

    def __init__(self) -> None:
        self.share = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the profiler before the last step."""
        if state.global_step == state.max_steps - 1:
            kinds = [ProfilerActivity.CPU]
            kinds += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profiler = torch.profiler.profile(activities=kinds)
            self._profiler.start()
            self._step = torch.profiler.record_function(STEP)
            self._step.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Read the share of the last step."""
        if state.global_step == state.max_steps:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._step.__exit__(None, None, None)
            self._profiler.stop()
            self.share = communication_share(self._profiler.events())


def communication_share(events: Iterable[Any]) -> float:
    """The share of the step `STEP` that the collectives among the events of a profiler cover."""
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in events:
        if event.name == STEP or event.name.startswith(COLLECTIVES):
            spans[event.name == STEP].append((event.time_range.start, event.time_range.end))
    begin, end = spans[True][0]
    return covered((max(start, begin), min(stop, end)) for start, stop in spans[False]) / (end - begin)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals (from, to)."""
    total, last = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, last))
        last = max(last, stop)
    return total
