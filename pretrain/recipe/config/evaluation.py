"""The keys of evaluation.json and their checks."""

from __future__ import annotations

from typing import Any

from recipe.config.keys import check_keys, nearest, require, show, type_name
from recipe.project import Refused

EVALUATION = {
    "batch_size": "int",
    "megabytes_per_source": "float",
    "tasks": "dict",
    "items_per_task": "int",
}


# Tasks with questions from a packaged source, and its kind; and those of JGLUE, from their files.
PACKAGED_TASKS = {
    "command-summary": "manpages",
    "package-summary": "descriptions",
    "translation": "tatoeba",
    "reading": "tatoeba",
}


JGLUE_TASKS = ("jcommonsenseqa", "jnli", "marc-ja", "jsquad")


def check_evaluation(values: dict[str, Any], where: str) -> None:
    check_keys(values, EVALUATION, where)
    for key in ("batch_size", "megabytes_per_source", "items_per_task"):
        if values.get(key, 1) <= 0:
            raise Refused(f"{where}: {key}: {values[key]}, wanted more than 0")
    for name, task in values.get("tasks", {}).items():
        here = f"{where}: tasks.{name}"
        known = (*PACKAGED_TASKS, *JGLUE_TASKS)
        if name not in known:
            raise Refused(f"{here}: no such task.{nearest(name, known)} Known: {', '.join(known)}")
        if not isinstance(task, dict):
            raise Refused(f"{here}: {show(task)} is {type_name(task)}, wanted an object")
        if name in PACKAGED_TASKS:
            check_keys(task, {"source": "str"}, here)
            require(task, ("source",), here)
        else:
            check_keys(task, {"path": "str"}, here)
            if name == "marc-ja" and "path" not in task:
                raise Refused(
                    f"{here}.path: missing. MARC-ja is no longer given out: give the folder of your own copy "
                    "(train-*.json and valid-*.json), or remove the task"
                )


def check_task(name: str, source: str, sources: dict[str, Any], where: str) -> None:
    kind = sources.get(source, {}).get("source")
    if kind != PACKAGED_TASKS[name]:
        raise Refused(
            f"{where}.{name}.source: {show(source)} is no source of kind {PACKAGED_TASKS[name]} in "
            f"dataset.json.{nearest(source, sources)} Remove the task, or name such a source"
        )
