"""Learning rate schedules as formulas, and a check of a running Trainer against them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer

# From 0 at 0 to 1 at 1.
SHAPES = {
    "linear": lambda x: x,
    "cosine": lambda x: 0.5 * (1 - math.cos(math.pi * x)),
    "1-sqrt": lambda x: 1 - math.sqrt(1 - x),
}

# Schedules that rise from 0 over the warm-up.
WARMED = ("constant_with_warmup", "linear", "polynomial", "inverse_sqrt", "cosine", "cosine_with_restarts")
WARMED += ("cosine_with_min_lr",)


def factor(kind: str, options: dict[str, Any], step: int, warmup: int, total: int) -> float | None:
    """The learning rate after `step` steps as a share of its peak; None without a formula for this schedule.

    options: ``lr_scheduler_kwargs``, with a floor or an end given as a share of the peak (``min_lr_rate``,
    ``min_lr_ratio``, ``lr_end``).
    """
    floor = options.get("min_lr_rate", options.get("min_lr_ratio", 0.0))
    warming = step < warmup
    if kind == "constant":
        return 1.0
    if kind == "warmup_stable_decay":
        if "num_cycles" in options:
            return None
        decay = options["num_decay_steps"]
        if warming:
            return floor + (1 - floor) * SHAPES[options.get("warmup_type", "linear")](step / warmup)
        left = min((total - step) / decay, 1.0)
        return floor + (1 - floor) * SHAPES[options.get("decay_type", "cosine")](left)
    if kind not in WARMED:
        return None
    if warming:
        return step / warmup
    if kind == "constant_with_warmup":
        return 1.0
    if kind == "inverse_sqrt":
        scale = options.get("timescale") or warmup or 10_000
        return math.sqrt(scale / (step + scale - warmup))
    done = min((step - warmup) / max(1, total - warmup), 1.0)
    if kind == "linear":
        return (total - step) / max(1, total - warmup)  # 0 at the end, also of a run that only warms up
    if kind == "polynomial":
        return options["lr_end"] + (1 - options["lr_end"]) * (1 - done) ** options.get("power", 1.0)
    if kind == "cosine_with_restarts":
        return 0.0 if done == 1 else SHAPES["cosine"](1 - options.get("num_cycles", 1) * done % 1)
    cycles = options.get("num_cycles", 0.5)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(2 * math.pi * cycles * done))


def check_rates(trainer: Trainer) -> tuple[dict[int, float], list[str]]:
    """The learning rates that a running Trainer's scheduler gives at a few steps, and a list of faults.

    Faults are: another rate than the schedule's formula gives; a scheduler that did not count the steps; an
    optimizer with another rate than its scheduler's. The rates are empty for a scheduler that is not a
    function of the step.
    """
    args, state = trainer.args, trainer.state
    scheduler: Any = trainer.lr_scheduler
    while hasattr(scheduler, "scheduler"):  # accelerate's wrapper, under DeepSpeed
        scheduler = scheduler.scheduler
    if not hasattr(scheduler, "lr_lambdas"):
        return {}, []
    kind, total = args.lr_scheduler_type.value, state.max_steps
    warmup = args.get_warmup_steps(total)
    options = dict(args.lr_scheduler_kwargs or {})
    if options.get("min_lr") is not None:
        options["min_lr_rate"] = options["min_lr"] / args.learning_rate
    if kind == "polynomial":
        options["lr_end"] = options.get("lr_end", 1e-7) / args.learning_rate
    shape, peak = scheduler.lr_lambdas[0], scheduler.base_lrs[0]
    wrong = []
    rates = {}
    for step in sorted({warmup // 2, warmup, (warmup + total) // 2, total - 1, total}):
        if step > total:  # a warm-up longer than the run: schedules say nothing about steps beyond it
            break
        rates[step] = peak * shape(step)
        expected = factor(kind, options, step, warmup, total)
        if expected is not None and not math.isclose(shape(step), expected, rel_tol=1e-6, abs_tol=1e-9):
            wrong.append(
                f"learning rate at step {step}: {kind} is {peak * expected:.4g}, active is {rates[step]:.4g}"
            )
    # fp16 may skip the first steps, until its loss scale fits, and the scheduler does not count them.
    if scheduler.last_epoch != state.global_step and not args.fp16:
        wrong.append(
            f"the scheduler is at step {scheduler.last_epoch}, the training at step {state.global_step}"
        )
    active = [group["lr"] for group in trainer.optimizer.param_groups]
    scheduled = [
        base * function(scheduler.last_epoch)
        for base, function in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    same = len(active) == len(scheduled) and all(map(math.isclose, active, scheduled))
    if not same:
        wrong.append(f"the optimizer's learning rates are {active}, its scheduler's {scheduled}")
    return rates, wrong
