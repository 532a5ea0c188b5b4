"""A finished training whose length alone was raised: it goes on from one of its checkpoints."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from recipe.config.phases import in_steps
from recipe.config.schedules import check_schedule, same_rates_until
from recipe.config.staleness import deciding_keys
from recipe.project import Refused, append_json_line
from recipe.training.checkpoints import damage, list_checkpoints, step_of
from recipe.training.extended import EXTENDED
from recipe.training.files import CHECKPOINTS, METRICS
from recipe.training.spikes import SKIPPED

LENGTH = ("max_steps", "num_train_epochs")
# What a training goes on writing, next to its checkpoints.
LOGS = (METRICS, "experts.jsonl", "samples.jsonl", "samples.md", SKIPPED, EXTENDED)


class Extension(NamedTuple):
    """How a finished training goes on.

    changes: its old and new length, in words. checkpoint: from which. steps: of the finished training.
    rewarm: whether the schedule begins anew there.
    """

    changes: str
    checkpoint: Path
    steps: int
    rewarm: bool

    @property
    def step(self) -> int:
        """The step of the checkpoint."""
        return step_of(self.checkpoint)


def raised_length(old: dict[str, Any], new: dict[str, Any]) -> str:
    """How the length of a training was raised, as ``max_steps: 100 -> 200``; empty if more has changed.

    old, new: the deciding keys of its file. `extend` may change as well, and the steps of a decay at the end.
    """
    kept = [{key: value for key, value in values.items() if key not in LENGTH} for values in (old, new)]
    for values, whole in zip(kept, (old, new), strict=True):
        values.pop("extend", None)
        if values.get("phases"):  # a share of another length is another step
            values["phases"] = in_steps(values["phases"], whole.get("max_steps", -1))
        options = values.get("lr_scheduler_kwargs")
        if isinstance(options, dict):
            options = {key: value for key, value in options.items() if key != "num_decay_steps"}
            values["lr_scheduler_kwargs"] = options
    if kept[0] != kept[1]:
        return ""
    # max_steps replaces num_train_epochs.
    keys = [LENGTH[0] if values.get(LENGTH[0], -1) > 0 else LENGTH[1] for values in (old, new)]
    before, after = (values.get(keys[0], 3) for values in (old, new))
    return f"{keys[0]}: {before} -> {after}" if keys[0] == keys[1] and after > before else ""


def find_extension(
    folder: Path, record: dict[str, Any], changed: list[str], values: dict[str, Any], where: str
) -> Extension | None:
    """How a finished training goes on; None when more than its length has changed.

    folder: of the finished stage. record: its ``stage.json``. changed: what differs from it now, each as
    ``key: old -> new``. values: the training file as it is now, `where`. Raises Refused, with the way out,
    when the schedule or the checkpoints that were kept do not allow it.
    """
    file = Path(where).stem
    before = record["wanted"]["config"].get(file, {})
    changes = raised_length(before, deciding_keys(file, values))
    if not changes or not all(change.startswith(f"config.{file}.") for change in changed):
        return None
    steps, rewarm = record["figures"]["steps"], values.get("extend") == "rewarm"
    redo = "Or start over with --force, or work on a copy of the recipe"
    limits = [same_rates_until(before, steps)]
    if values.get("max_steps", -1) > 0:
        limits.append(same_rates_until(values, values["max_steps"]))
    limit = steps if rewarm else min(steps if x is None else x for x in limits)
    if not rewarm and None in limits:
        kind = values.get("lr_scheduler_type", "linear")
        raise Refused(
            f"{where}: {changes}: the rates of the schedule {kind} with its warm-up depend on the "
            'length, so the training cannot simply go on. Add "extend": "rewarm", to warm up again and '
            f"follow the schedule over the added steps. {redo}. A run that shall be extended later needs "
            "warmup_stable_decay, constant_with_warmup or constant, and warmup_steps that are not a share"
        )
    kept = {step_of(path): path for path in list_checkpoints(folder / CHECKPOINTS)}
    # The newest first; a damaged one is passed over.
    usable = next((path for step, path in kept.items() if step <= limit and not damage(path)), None)
    if not usable:
        names = ", ".join(path.name for path in kept.values()) or "none"
        raise Refused(
            f"{where}: {changes}: going on needs a good checkpoint of step {limit} or before, and "
            f"{folder.name} has {names} (keep_checkpoints, save_steps and save_total_limit decide). {redo}"
        )
    extension = Extension(changes, usable, steps, rewarm)
    if rewarm and values.get("max_steps", -1) > 0:
        # The schedule must fit into the steps that it is followed over.
        check_schedule(values | {"max_steps": values["max_steps"] - extension.step}, where)
    return extension


def prepare_extension(extension: Extension, folder: Path, work: Path) -> None:
    """Fill the work folder of an extension: the checkpoints up to the one it goes on from, and the logs.

    folder: of the finished stage, which stays as it is until the longer training is published. The files of
    checkpoints are never changed, so they are hard links where the file system has them.
    """
    for checkpoint in list_checkpoints(folder / CHECKPOINTS):
        if step_of(checkpoint) <= extension.step:
            shutil.copytree(checkpoint, work / CHECKPOINTS / checkpoint.name, copy_function=_link)
    for name in LOGS:
        with contextlib.suppress(FileNotFoundError):
            shutil.copy(folder / name, work / name)
    with contextlib.suppress(FileNotFoundError):
        shutil.copytree(folder / "tensorboard", work / "tensorboard")
    row = {"from": extension.step, "steps": extension.steps, "rewarm": extension.rewarm}
    append_json_line(work / EXTENDED, row)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
