"""The tasks that evaluation.json can name: our own, and those of lm-evaluation-harness.

A task is a YAML file of the harness. Our own files are in ``evaluation/tasks/``; the others come with the
installed package. They are read here as plain YAML, without importing the harness or torch, so that a wrong
name is refused before the first stage.

The ``metadata`` of our own files says what a task needs, and nothing else in the code repeats it:

- ``source``: the kind of source in dataset.json that `recipe.evaluation.tasks.items` makes its questions from
- ``files``: the set of files that its questions come from; with ``path: required`` the user gives them
- ``stage``: the only stage that asks these questions; without it, stages 06 and 14 both do

A task without ``source`` and ``files`` brings its own data and prompts, as every task of the harness does.
"""

from __future__ import annotations

import functools
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

Values = dict[str, Any]  # what a YAML file of the harness says

OWN = Path(__file__).parents[1] / "evaluation" / "tasks"
FUNCTION = "!function "  # before the name of a Python function that a YAML file refers to

# By suite: its tasks as in `tasks`, with the numbers of shots of the published results.
SUITES: dict[str, dict[str, Values]] = {
    "japanese": {
        "ja_leaderboard_jcommonsenseqa": {"num_fewshot": 3},
        "ja_leaderboard_jnli": {"num_fewshot": 3},
        "ja_leaderboard_marc_ja": {"num_fewshot": 3},
        "ja_leaderboard_jsquad": {"num_fewshot": 2},
        "ja_leaderboard_jaqket_v2": {"num_fewshot": 1},
        "ja_leaderboard_xlsum": {"num_fewshot": 1},
        "ja_leaderboard_xwinograd": {"num_fewshot": 0},
        "ja_leaderboard_mgsm": {"num_fewshot": 5},
        "global_piqa_nonparallel_cloze_jpn_jpan": {"num_fewshot": 0},
        "copa-ja": {},
        "jmmlu": {},
    }
}
# Published scores by model and task, as shares. The shots are those of the suite; the prompts are of version
# 0.2, here of 0.3. JAQKET is left out: the README and the result files there do not agree.
PUBLISHED_BY = "https://github.com/Stability-AI/lm-evaluation-harness, README.md of jp-stable at 1212f4f"
PUBLISHED: dict[str, dict[str, float]] = {
    "rinna/japanese-gpt-neox-small": {
        "ja_leaderboard_jcommonsenseqa": 0.3422,
        "ja_leaderboard_jnli": 0.3011,
        "ja_leaderboard_marc_ja": 0.8335,
        "ja_leaderboard_jsquad": 0.0580,
        "ja_leaderboard_xlsum": 0.0385,
        "ja_leaderboard_xwinograd": 0.5724,
        "ja_leaderboard_mgsm": 0.016,
    },
    "rinna/japanese-gpt-1b": {
        "ja_leaderboard_jcommonsenseqa": 0.3476,
        "ja_leaderboard_jnli": 0.3767,
        "ja_leaderboard_marc_ja": 0.8786,
        "ja_leaderboard_jsquad": 0.2618,
        "ja_leaderboard_xlsum": 0.0534,
        "ja_leaderboard_xwinograd": 0.6455,
        "ja_leaderboard_mgsm": 0.020,
    },
}

# A line that names a task, group or tag; the tags of a task can also be a list on the lines below.
_NAME = re.compile(
    rb"^[\"']?(task|group|tag)[\"']?:[ \t]*([^\s#\[-][^\n]*)?((?:\n[ \t]*-[^\n]+)*)", re.MULTILINE
)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML in which the harness's ``!function module.name`` is kept as text."""


_Loader.add_constructor("!function", lambda _, node: FUNCTION + str(node.value))


@functools.cache
def read_task(path: Path) -> Values:
    """What a YAML file of the harness says, together with the files that it includes."""
    values = yaml.load(path.read_text("utf-8"), _Loader)  # a SafeLoader: nothing is executed
    included = values.pop("include", [])
    merged: Values = {}
    for name in [included] if isinstance(included, str) else included:
        merged |= read_task(path.parent / name)
    return merged | values


@functools.cache
def own_tasks() -> dict[str, Values]:
    """Our own tasks and groups by name; files that begin with ``_`` are not for evaluation.json."""
    files = [read_task(path) | {"folder": OWN} for path in sorted(OWN.glob("[!_]*.yaml"))]
    return {values.get("group") or values["task"]: values for values in files}


def metadata(name: str) -> Values:
    """The ``metadata`` of one of our own tasks; empty for a task of the harness."""
    return own_tasks().get(name, {}).get("metadata", {})


def with_suite(evaluation: Values) -> Values:
    """The content of evaluation.json with the tasks of its ``suite``; an entry of ``tasks`` has priority."""
    if "suite" not in evaluation:
        return evaluation
    return evaluation | {"tasks": SUITES[evaluation["suite"]] | evaluation.get("tasks", {})}


def in_suite(name: str, evaluation: Values) -> bool:
    """Whether a task belongs to the suite of evaluation.json."""
    return name in SUITES.get(evaluation.get("suite", ""), {})


def may_be_skipped(name: str, evaluation: Values) -> bool:
    """Whether evaluation.json lets the run go on without a task whose data cannot be reached."""
    return evaluation.get("skip_unavailable", False) and in_suite(name, evaluation)


def tasks_of(config: dict[str, Any], stage: str) -> list[str]:
    """The tasks of evaluation.json that a stage asks, ``06_evaluate`` or ``14_evaluate``.

    config: a whole recipe.
    """
    names = config["evaluation"].get("tasks", {})
    return [name for name in names if metadata(name).get("stage", stage) == stage]


def reads_sources(config: dict[str, Any], stage: str) -> bool:
    """Whether a task that a stage asks is made from a source that stage 01 brought."""
    return any("source" in metadata(name) for name in tasks_of(config, stage))


def brings_data(name: str) -> bool:
    """Whether a task has data and prompts of its own, so that only its name is given to the harness."""
    return not metadata(name).keys() & {"source", "files"}


@functools.cache
def harness_files() -> dict[str, list[tuple[str, Path]]]:
    """The names that the installed harness knows: for each, ``task``, ``group`` or ``tag``, and its files.

    A search of 14,000 small files, which takes half a second.
    """
    spec = find_spec("lm_eval")  # finds the package without importing it
    found: dict[str, list[tuple[str, Path]]] = {}
    if spec is None or spec.origin is None:
        return found
    for folder, _, files in os.walk(Path(spec.origin).parent / "tasks"):
        for file in files:
            if file.endswith((".py", ".pyc", ".md", ".json", ".txt")):
                continue
            path = Path(folder, file)
            for kind, name, listed in _NAME.findall(path.read_bytes()):
                names = re.findall(rb"-[ \t]*([^\n]+)", listed) if kind == b"tag" and not name else [name]
                for written in filter(None, names):
                    plain = written.split(b" #")[0].strip(b" '\"").decode()
                    found.setdefault(plain, []).append((kind.decode(), path))
    return found


def single_tasks(name: str) -> dict[str, Values]:
    """The tasks behind a name, which may be one task, a group or a tag: for each its values.

    Raises KeyError for a name that neither we nor the harness know.
    """
    if name in own_tasks():
        own = own_tasks()[name]
        return _members(own) if "group" in own else {name: own}
    files = harness_files()[name]
    for kind, path in files:
        if path.suffix == ".yaml" and kind == "task":
            return {name: read_task(path) | {"folder": path.parent}}
        if path.suffix == ".yaml" and kind == "group":
            return _members(read_task(path))
    found = {}
    for _, path in files:
        for candidate in [path] if path.suffix == ".yaml" else sorted(path.parent.rglob("*.yaml")):
            values = read_task(candidate)
            tags = values.get("tag") or []
            if isinstance(values.get("task"), str) and name in ([tags] if isinstance(tags, str) else tags):
                found[values["task"]] = values | {"folder": candidate.parent}
    return found


def _members(group: Values) -> dict[str, Values]:
    """The tasks of a group, whose members are names or objects that change some values of a task."""
    found: dict[str, Values] = {}
    for member in group["task"]:
        if isinstance(member, str):
            found |= single_tasks(member)
            continue
        name = member.get("group") or member["task"]
        changes = {key: value for key, value in member.items() if key not in ("group", "task")}
        if name in own_tasks() or name in harness_files():
            found |= {task: values | changes for task, values in single_tasks(name).items()}
        elif "group" in member:
            found |= _members(member)
        else:
            found[name] = changes
    return found
