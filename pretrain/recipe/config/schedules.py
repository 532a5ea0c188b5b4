"""The learning rate schedules that a training can use, one entry each.

transformers builds a schedule by its name; the formula here lets stage 05 check what is really active
(`recipe.training.check_schedule`). To add one that transformers has, write its formula and one entry in
`SCHEDULES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from recipe.config.keys import check_keys, is_type, known_keys, show, type_name
from recipe.config.ranges import ABOVE_0, BELOW_1, FROM_0, FROM_1, check_ranges, one_of
from recipe.project import Refused, nearest

# (lr_scheduler_kwargs, step, steps of warm-up, steps of the run) -> the learning rate after `step` steps as
# a share of its peak. Floors and ends are given as shares of the peak, too.
Formula = Callable[[dict[str, Any], int, int, int], float]
# (keys of the training file, lr_scheduler_kwargs, how a message begins): raises Refused.
Check = Callable[[dict[str, Any], dict[str, Any], str], None]


class Schedule(NamedTuple):
    """formula: its rates. check: what must hold between its options and the other keys, if anything.

    fixed: by its options and the steps of the run, the last step up to which the rates are the same in a
    longer run; None: every rate depends on the length.
    """

    formula: Formula
    check: Check | None = None
    fixed: Callable[[dict[str, Any], int], int] | None = None


def same_rates_until(values: dict[str, Any], steps: int) -> int | None:
    """The last step of a run up to which a longer run has the same learning rates; None: it has others.

    values: of a training file; a warm-up that is a share of the steps is longer in a longer run. steps: of
    the run.
    """
    if 0 < (values.get("warmup_steps") or 0) < 1:
        return None
    fixed = SCHEDULES[values.get("lr_scheduler_type", "linear")].fixed
    return fixed(values.get("lr_scheduler_kwargs") or {}, steps) if fixed else None


def check_schedule(values: dict[str, Any], where: str) -> None:
    """Check lr_scheduler_type, its options and its warm-up. where: the training file. Raises Refused."""
    kind, options = values.get("lr_scheduler_type", "linear"), values.get("lr_scheduler_kwargs") or {}
    here = f"{where}: lr_scheduler_kwargs"
    if not isinstance(options, dict):
        raise Refused(f"{here}: {show(options)} is {type_name(options)}, expected an object")
    if kind not in SCHEDULES:
        raise Refused(
            f"{where}: lr_scheduler_type: {kind}: no formula is known to check whether it is active. "
            f"Expected one of {', '.join(SCHEDULES)}"
        )
    known = known_keys()["scheduler_options"].get(kind, options)
    for key in options:
        if key not in known:
            raise Refused(
                f"{here}: {key}: {kind} has no such option.{nearest(key, known)} "
                f"Known: {', '.join(known) or 'none'}"
            )
    check_keys(options, OPTIONS, here)
    check_ranges(options, OPTION_RANGES, here)
    _check_warm_up(values, where)
    check = SCHEDULES[kind].check
    if check:
        check(values, options, where)


def _check_warm_up(values: dict[str, Any], where: str) -> None:
    warmup, total = values.get("warmup_steps") or 0, values.get("max_steps", -1)
    if warmup > total > 0:
        raise Refused(
            f"{where}: warmup_steps: {warmup:g}, more than the {total} steps of the run: the learning rate "
            "would never reach learning_rate. Lower warmup_steps (a number below 1 is a share of the steps), "
            "or train for more steps"
        )


def _check_constant(values: dict[str, Any], options: dict[str, Any], where: str) -> None:
    if values.get("warmup_steps"):
        raise Refused(
            f"{where}: warmup_steps: {values['warmup_steps']}, but lr_scheduler_type constant has no "
            "warm-up. Write constant_with_warmup, or leave warmup_steps out"
        )


def _check_polynomial(values: dict[str, Any], options: dict[str, Any], where: str) -> None:
    end, peak = options.get("lr_end", 1e-7), values.get("learning_rate", 5e-5)
    if end >= peak:
        raise Refused(
            f"{where}: lr_scheduler_kwargs: lr_end: {end}, expected less than learning_rate, {peak}"
        )
    if values.get("warmup_steps") == values.get("max_steps", -1):
        raise Refused(
            f"{where}: warmup_steps: {values['warmup_steps']}, all of max_steps: polynomial has no step left "
            "for its decay and would divide by zero. Lower warmup_steps"
        )


def _check_floor(values: dict[str, Any], options: dict[str, Any], where: str) -> None:
    here = f"{where}: lr_scheduler_kwargs"
    floors = [key for key in ("min_lr", "min_lr_rate") if options.get(key) is not None]
    if len(floors) != 1:
        raise Refused(
            f'{here}: {show(options)}: cosine_with_min_lr needs one floor: {{"min_lr_rate": 0.1}} (a share '
            'of learning_rate) or {"min_lr": 1e-5}'
        )
    floor, most = options[floors[0]], values.get("learning_rate", 5e-5) if "min_lr" in floors else 1
    if not is_type(floor, "float") or not 0 <= floor < most:
        raise Refused(f"{here}: {floors[0]}: {show(floor)}, expected 0 or more and below {most}")


def _check_decay(values: dict[str, Any], options: dict[str, Any], where: str) -> None:
    here = f"{where}: lr_scheduler_kwargs"
    decay = options.get("num_decay_steps")
    if not is_type(decay, "int") or decay < 1:
        raise Refused(
            f"{here}: num_decay_steps: {show(decay)}: warmup_stable_decay needs the number of steps of "
            'the decay at the end: {"num_decay_steps": 1000}'
        )
    if "num_stable_steps" in options:
        raise Refused(
            f"{here}: num_stable_steps: it follows from the steps of the run, warmup_steps and "
            "num_decay_steps. Leave it out"
        )
    total, warmup = values.get("max_steps", -1), values.get("warmup_steps", 0)
    warmup = warmup if warmup >= 1 else warmup * total
    if 0 < total < decay + warmup:
        raise Refused(
            f"{here}: num_decay_steps: {decay} and warmup_steps {warmup:g} are together more than "
            f"max_steps {total}. Lower one of them, or raise max_steps"
        )


# The warm-up of warmup_stable_decay: from 0 at 0 to 1 at 1.
_RISES = {
    "linear": lambda x: x,
    "cosine": lambda x: 0.5 * (1 - math.cos(math.pi * x)),
    "1-sqrt": lambda x: 1 - math.sqrt(1 - x),
}


def _warmed(formula: Formula) -> Formula:
    """A schedule that rises linearly from 0 before it follows `formula`."""

    def rate(options: dict[str, Any], step: int, warmup: int, total: int) -> float:
        return step / warmup if step < warmup else formula(options, step, warmup, total)

    return rate


def _done(step: int, warmup: int, total: int) -> float:
    """The share of the steps after the warm-up that is done."""
    return min((step - warmup) / max(1, total - warmup), 1.0)


def _linear(options: dict[str, Any], step: int, warmup: int, total: int) -> float:
    return (total - step) / max(1, total - warmup)  # 0 at the end, also of a run that only warms up


def _polynomial(options: dict[str, Any], step: int, warmup: int, total: int) -> float:
    left = 1 - _done(step, warmup, total)
    return options["lr_end"] + (1 - options["lr_end"]) * left ** options.get("power", 1.0)


def _inverse_sqrt(options: dict[str, Any], step: int, warmup: int, total: int) -> float:
    scale = options.get("timescale") or warmup or 10_000
    return math.sqrt(scale / (step + scale - warmup))


def _wave(cycles: float, done: float) -> float:
    """A cosine from 1 at 0; half a cycle ends at 0."""
    return 0.5 * (1 + math.cos(2 * math.pi * cycles * done))


def _cosine(options: dict[str, Any], step: int, warmup: int, total: int) -> float:
    floor = options.get("min_lr_rate", 0.0)
    return floor + (1 - floor) * _wave(options.get("num_cycles", 0.5), _done(step, warmup, total))


def _restarts(options: dict[str, Any], step: int, warmup: int, total: int) -> float:
    done = _done(step, warmup, total)
    return 0.0 if done == 1 else _wave(0.5, options.get("num_cycles", 1) * done % 1)


def _stable_decay(options: dict[str, Any], step: int, warmup: int, total: int) -> float:
    floor, kind = options.get("min_lr_ratio", 0.0), options.get("decay_type", "cosine")
    left = min((total - step) / options["num_decay_steps"], 1.0)
    if step < warmup:
        share = _RISES[options.get("warmup_type", "linear")](step / warmup)
    elif left <= 0:
        share = 0.0
    elif kind == "cosine":
        share = _wave(options.get("num_cycles", 0.5), 1 - left)
    else:
        share = _RISES[kind](left)
    return floor + (1 - floor) * share


def _to_the_end(options: dict[str, Any], steps: int) -> int:
    return steps


# The options of all schedules: their types and ranges. Which schedule has which: known_keys.json.
OPTIONS = {
    "num_cycles": "float",
    "power": "float",
    "lr_end": "float",
    "timescale": "int|null",
    "min_lr": "float|null",
    "min_lr_rate": "float|null",
    "min_lr_ratio": "float",
    "num_decay_steps": "int",
    "num_stable_steps": "int",
    "decay_type": "str",
    "warmup_type": "str",
}
OPTION_RANGES = {
    "num_cycles": ABOVE_0,
    "power": ABOVE_0,
    "lr_end": FROM_0,
    "timescale": FROM_1,
    "min_lr_ratio": BELOW_1,
    "decay_type": one_of(*_RISES),
    "warmup_type": one_of(*_RISES),
}
# By the value of ``lr_scheduler_type``.
SCHEDULES = {
    "linear": Schedule(_warmed(_linear)),
    "cosine": Schedule(_warmed(_cosine)),
    "cosine_with_min_lr": Schedule(_warmed(_cosine), _check_floor),
    "cosine_with_restarts": Schedule(_warmed(_restarts)),
    "warmup_stable_decay": Schedule(
        _stable_decay, _check_decay, lambda options, steps: steps - options["num_decay_steps"]
    ),
    "constant": Schedule(lambda options, step, warmup, total: 1.0, _check_constant, _to_the_end),
    "constant_with_warmup": Schedule(_warmed(lambda options, step, warmup, total: 1.0), fixed=_to_the_end),
    "polynomial": Schedule(_warmed(_polynomial), _check_polynomial),
    "inverse_sqrt": Schedule(_warmed(_inverse_sqrt), fixed=_to_the_end),
}
