"""The rule for spikes of loss and gradient norm, and ``skipped.jsonl``, the list of what was skipped.

Nothing here imports torch: the launcher reads the list, too.
"""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe.project import append_json_line, read_json_lines, read_state
from recipe.training.checkpoints import damage, list_checkpoints, step_of
from recipe.training.files import CHECKPOINTS

SKIPPED = "skipped.jsonl"
FEWEST = 20  # steps in the window before its deviation is known
EARLY = 3  # until then, a loss of so many times the highest one is a spike
SIGMA = 1.4826  # the standard deviation of a normal distribution, in median absolute deviations
# The least standard deviations that the rule assumes, however quiet the window is: of the loss as a share of
# its median, of the gradient norm in nats.
LEAST_LOSS, LEAST_NORM = 0.02, 0.15

# A step in the window: its loss, and its gradient norm before clipping (None where there is none).
Step = tuple[float, float | None]


def spike(window: Sequence[Step], loss: float, norm: float | None, deviations: float) -> str:
    """Why a step is a spike by the steps before it; empty when it is none.

    A value is a spike when it is more than `deviations` robust standard deviations (1.4826 times the median
    absolute deviation) above the median of the window. Gradient norms are compared by their logarithms. In
    the first steps only a loss of `EARLY` times the highest is a spike. No loss is one while the median is 0,
    or in the first steps the highest: a hinge loss is 0 in most steps.

    OLMo-core's SkipStepOptimizer judges by mean and standard deviation; the median does not follow outliers.
    """
    losses = [before for before, _ in window]
    if len(window) < FEWEST:
        limit = EARLY * max(losses, default=math.inf)
        return (
            f"a loss of {loss:.4g}, more than {limit:.4g}, early in the training" if loss > limit > 0 else ""
        )
    middle = statistics.median(losses)
    limit = middle + deviations * max(_deviation(losses, middle), LEAST_LOSS * abs(middle))
    if middle and loss > limit:
        return f"a loss of {loss:.4g}, more than {limit:.4g}, the limit after a median of {middle:.4g}"
    norms = [math.log(before) for _, before in window if before]
    if norm and len(norms) >= FEWEST:
        middle = statistics.median(norms)
        limit = middle + deviations * max(_deviation(norms, middle), LEAST_NORM)
        if math.log(norm) > limit:
            return (
                f"a gradient norm of {norm:.4g}, more than {math.exp(limit):.4g}, the limit after a median "
                f"of {math.exp(middle):.4g}"
            )
    return ""


def _deviation(values: list[float], middle: float) -> float:
    return SIGMA * statistics.median(abs(value - middle) for value in values)


@dataclass
class Skipped:
    """What the rows of ``skipped.jsonl`` say, in the order in which they were written.

    steps: to be skipped again. doubted: steps after which a run has stopped; they are judged afresh, and do
    not count again as new ones. back: for each time that the training went back, (the step of the checkpoint,
    factor of the learning rate).
    """

    steps: set[int] = field(default_factory=set)
    doubted: set[int] = field(default_factory=set)
    back: list[tuple[int, float]] = field(default_factory=list)

    def rate(self, step: int) -> float:
        """The factor of the learning rate at a step: the product over the times that the training went back
        to an earlier one.
        """
        return math.prod(rate for checkpoint, rate in self.back if step >= checkpoint)


def read_skipped(folder: Path) -> Skipped:
    """Read ``skipped.jsonl`` of a training's folder; nothing is skipped where there is none."""
    found = Skipped()
    path = folder / SKIPPED
    for row in read_json_lines(path) if path.exists() else []:
        if "stopped" in row:
            found.steps -= set(row["stopped"])
            found.doubted |= set(row["stopped"])
        elif "back_to" in row:
            first, last = row["skip"]
            found.steps |= set(range(first, last + 1))
            found.back.append((row["back_to"], row["rate"]))
        else:
            found.steps.add(row["step"])
    return found


def add_row(folder: Path, row: dict[str, Any]) -> None:
    """Append a row to ``skipped.jsonl``."""
    append_json_line(folder / SKIPPED, row)


def window_to_skip(step: int, back_to: int, count: int) -> tuple[int, int]:
    """The first and the last of `count` steps around a spike, half of them before it, after a checkpoint."""
    first = max(back_to + 1, step - count // 2)
    return first, first + count - 1


def delete_given_up(folder: Path) -> None:
    """Delete the checkpoints that are newer than the one to which the training last went back.

    They are kept, with a warning, when no checkpoint up to that one is good. folder: of the training. A
    checkpoint's state says how often the training had gone back when it was saved, so that checkpoints of
    the new way are kept.
    """
    back = read_skipped(folder).back
    if not back:
        return
    target, _ = back[-1]
    checkpoints = list_checkpoints(folder / CHECKPOINTS)
    newer = [path for path in checkpoints if step_of(path) > target and _times_back(path) < len(back)]
    older = [path for path in checkpoints if step_of(path) <= target]
    if newer and target and all(damage(path) for path in older):
        print(
            f"warning: the training cannot go back to step {target}, because no checkpoint up to it is good. "
            f"It keeps the newer ones: {', '.join(path.name for path in newer)}",
            flush=True,
        )
        return
    for checkpoint in newer:
        shutil.rmtree(checkpoint)


def _times_back(checkpoint: Path) -> int:
    """How often the training had gone back when it saved a checkpoint."""
    state = read_state(checkpoint / "trainer_state.json")
    try:
        return state["stateful_callbacks"]["Guard"]["attributes"]["times_back"]
    except (KeyError, TypeError):
        return 0
