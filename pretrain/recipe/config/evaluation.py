"""The keys of evaluation.json and their checks."""

from __future__ import annotations

from typing import Any

from recipe.config.keys import check_keys, require, show, type_name
from recipe.config.ranges import ABOVE_0, FROM_0, check_ranges, one_of, whole
from recipe.config.tasks import SUITES, harness_files, metadata, own_tasks
from recipe.project import Refused, nearest

EVALUATION = {
    "batch_size": "int",
    "megabytes_per_source": "float",
    "tasks": "dict",
    "items_per_task": "int",
    "suite": "str",
    "skip_unavailable": "bool",
}
RANGES = {"batch_size": whole(1, 2**24), "megabytes_per_source": ABOVE_0, "items_per_task": ABOVE_0}
RANGES |= {"suite": one_of(*SUITES)}


def check_evaluation(values: dict[str, Any], where: str) -> None:
    """Raise Refused for an unknown key or task, a wrong type or a value out of range.

    where: the file as the user knows it, for the messages.
    """
    check_keys(values, EVALUATION, where)
    check_ranges(values, RANGES, where)
    if values.get("skip_unavailable") and "suite" not in values:
        raise Refused(
            f"{where}: skip_unavailable: true, but only tasks of a suite can be skipped, and there is none. "
            f"Set suite ({', '.join(SUITES)}), or leave skip_unavailable out"
        )
    for name, task in values.get("tasks", {}).items():
        here = f"{where}: tasks.{name}"
        if not isinstance(task, dict):
            raise Refused(f"{here}: {show(task)} is {type_name(task)}, expected an object")
        _check_task(name, task, here)


def _check_task(name: str, task: dict[str, Any], here: str) -> None:
    """The keys of one task, which depend on where its questions come from."""
    needs = metadata(name)
    if "source" in needs:
        check_keys(task, {"source": "str"}, here)
        require(task, ("source",), here)
    elif "files" in needs:
        check_keys(task, {"path": "str"}, here)
        if needs.get("path") == "required" and "path" not in task:
            raise Refused(
                f"{here}.path: missing. MARC-ja can no longer be downloaded: give the folder of your own "
                "copy (train-*.json and valid-*.json), or remove the task"
            )
    else:
        check_keys(task, {"num_fewshot": "int"}, here)
        check_ranges(task, {"num_fewshot": FROM_0}, here)
        if name not in own_tasks() and name not in harness_files():
            known = [*own_tasks(), *harness_files()]
            raise Refused(
                f"{here}: no such task.{nearest(name, known)} Known: {', '.join(own_tasks())}, and the "
                "tasks and groups of lm-evaluation-harness (`.venv/bin/lm-eval ls tasks` lists them)"
            )


def check_task_source(name: str, task: dict[str, Any], sources: dict[str, Any], where: str) -> None:
    """Raise Refused unless the source that a task names is one of dataset.json, and of the task's kind."""
    expected = metadata(name).get("source")
    if expected and sources.get(task["source"], {}).get("source") != expected:
        raise Refused(
            f"{where}.{name}.source: {show(task['source'])} is no source of kind {expected} in "
            f"dataset.json.{nearest(task['source'], sources)} Remove the task, or name such a source"
        )
