"""A check of a running Trainer's learning rates against the formula of its schedule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from recipe.config.schedules import SCHEDULES

if TYPE_CHECKING:
    from transformers import Trainer


def scheduler_of(trainer: Trainer) -> Any:
    """The scheduler that sets the rates, without accelerate's wrapper."""
    scheduler: Any = trainer.lr_scheduler
    while hasattr(scheduler, "scheduler"):
        scheduler = scheduler.scheduler
    return scheduler


def set_rates(trainer: Trainer) -> None:
    """Set the optimizer's rates to those that the scheduler gives for its step.

    Does nothing for a scheduler that is not a function of the step.
    """
    scheduler = scheduler_of(trainer)
    if not hasattr(scheduler, "lr_lambdas"):
        return
    rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    scheduler._last_lr = [base * shape(scheduler.last_epoch) for base, shape in rates]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate


def check_rates(trainer: Trainer) -> tuple[dict[int, float], list[str]]:
    """The learning rates that a running Trainer's scheduler gives at a few steps, and a list of faults.

    Faults are: another rate than the schedule's formula gives; a scheduler that did not count the steps; an
    optimizer with another rate than its scheduler's. The rates are empty for a scheduler that is not a
    function of the step.
    """
    args, state = trainer.args, trainer.state
    scheduler = scheduler_of(trainer)
    if not hasattr(scheduler, "lr_lambdas"):
        return {}, []
    kind, begin = args.lr_scheduler_type.value, trainer.schedule_begin
    total = state.max_steps - begin
    warmup = args.get_warmup_steps(total)
    options = dict(args.lr_scheduler_kwargs or {})
    if options.get("min_lr") is not None:
        options["min_lr_rate"] = options["min_lr"] / args.learning_rate
    if kind == "polynomial":
        options["lr_end"] = options.get("lr_end", 1e-7) / args.learning_rate
    formula = SCHEDULES[kind].formula
    shape, peak = scheduler.lr_lambdas[0], scheduler.base_lrs[0]
    wrong = []
    rates = {}
    for position in sorted({warmup // 2, warmup, (warmup + total) // 2, total - 1, total}):
        step = begin + position
        rates[step] = peak * shape(step)
        expected = formula(options, position, warmup, total) * trainer.rate(step)
        if not math.isclose(shape(step), expected, rel_tol=1e-6, abs_tol=1e-9):
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
