"""Whether the tasks that bring their own data can run on this machine, checked before anything is started.

Nothing here imports the harness, datasets or torch.
"""

from __future__ import annotations

import ast
import glob
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from recipe.config.tasks import FUNCTION, Values, brings_data, single_tasks
from recipe.project import ROOT, Refused

# What load_dataset takes for a file format rather than for a data set of that name.
FORMATS = ("json", "csv", "parquet", "arrow", "text", "xml")
SECONDS = 1.0  # to wait for an answer of the hub
TRUE = ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads its environment variables


def check_available(config: dict[str, Any]) -> None:
    """Raise Refused for a task of evaluation.json that cannot run here, and say what to do.

    Looks at the Python packages of the task's own functions, and at its data: files, the cache of datasets,
    and the hub, which is asked only when the cache does not have them. config: a whole recipe.
    """
    asked_by: dict[str, str] = {}
    missing: dict[str, list[tuple[str, str | None]]] = {}
    for name in filter(brings_data, config["evaluation"].get("tasks", {})):
        here = f"evaluation.json: tasks.{name}"
        found = _tasks_behind(name, here)
        for task, values in found.items():
            if task in asked_by:
                raise Refused(
                    f"{here}: it holds {task}, as tasks.{asked_by[task]} does. Remove one of the two"
                )
            asked_by[task] = name
            _check_kind(task, values, here)
            _check_packages(task, values, here)
        data = (_missing_data(values, here) for values in found.values())
        missing[name] = list(dict.fromkeys(filter(None, data)))
    missing = {name: sets for name, sets in missing.items() if sets}
    if missing and not hub_answers():
        raise Refused(" ".join(_how_to_fetch(name, sets) for name, sets in missing.items()))


def _tasks_behind(name: str, here: str) -> dict[str, Values]:
    try:
        return single_tasks(name)
    except (KeyError, OSError) as error:
        raise Refused(f"{here}: its files in lm-evaluation-harness are not complete: {error}") from error


def _check_kind(task: str, values: Values, here: str) -> None:
    """Refuse a task that is not about text alone, or that would run what the model writes."""
    if values.get("unsafe_code"):
        raise Refused(f"{here}: {task} runs the code that the model writes. Remove the task")
    for key in ("doc_to_image", "doc_to_audio"):
        if values.get(key):
            raise Refused(f"{here}: {task} asks about images or sound ({key}). Remove the task")


def _check_packages(task: str, values: Values, here: str) -> None:
    """Refuse a task whose Python functions import a package that is not installed."""
    for module in sorted(set(re.findall(FUNCTION + r"([\w.]+)\.\w+", str(values)))):
        path = Path(values["folder"], *module.split(".")).with_suffix(".py")
        if not path.is_file():
            continue
        packages = _imports(ast.parse(path.read_text("utf-8")).body)
        own = (path.parent / f"{package}.py" for package in packages)
        missing = [file.stem for file in own if not file.is_file() and find_spec(file.stem) is None]
        if missing:
            names = " ".join(missing)
            raise Refused(
                f"{here}: {task} needs Python packages that are not installed: {names} (imported by "
                f"{path.name}). Install them (.venv/bin/pip install {names}), or name other tasks"
            )


def _imports(body: list[ast.stmt]) -> Iterator[str]:
    """The packages that a module cannot be imported without, by their top name."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Try) and any(isinstance(inner, ast.Raise) for inner in ast.walk(node)):
            yield from _imports(node.body)


def _missing_data(values: Values, here: str) -> tuple[str, str | None] | None:
    """The data set that must be fetched for a task, as (path, name); None when there is nothing to fetch."""
    path, options = values.get("dataset_path"), values.get("dataset_kwargs") or {}
    if path is None or Path(path).is_dir():  # its own Python function loads the data, or a folder holds them
        return None
    if path in FORMATS:
        files = options.get("data_files", [])
        listed = files.values() if isinstance(files, dict) else [files]
        for pattern in (name for item in listed for name in ([item] if isinstance(item, str) else item)):
            if "://" not in pattern and not glob.glob(str(ROOT / pattern), recursive=True):
                raise Refused(
                    f"{here}: dataset_kwargs.data_files: {pattern}: there is no such file. Put it there"
                )
        return None
    name = values.get("dataset_name")
    folder = cache_folder() / cached_name(path)
    configs = folder.glob("*") if name is None else (folder / name, *folder.glob(f"{glob.escape(name)}-*"))
    return None if any(any(config.glob("*/*/")) for config in configs) else (path, name)


def cache_folder() -> Path:
    """Where datasets keeps what it has prepared: HF_DATASETS_CACHE, else below HF_HOME."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", f"{cache}/huggingface")
    return Path(os.environ.get("HF_DATASETS_CACHE", f"{home}/datasets")).expanduser()


def cached_name(path: str) -> str:
    """The folder of a data set in the cache: ``Rakuten/JGLUE`` is ``Rakuten___jglue``."""
    *owner, name = path.split("/")
    name = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)
    return "___".join([*owner, re.sub(r"([a-z\d])([A-Z])", r"\1_\2", name).lower()])


def hub_address() -> str:
    """The address of the hub: HF_ENDPOINT, or the public one."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def hub_offline() -> bool:
    """Whether an environment variable forbids asking the hub."""
    names = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in TRUE for name in names)


def hub_answers() -> bool:
    """Whether the hub answers within a second, whatever it answers; False without asking when offline."""
    if hub_offline():
        return False
    answered = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(
                urllib.request.Request(hub_address(), method="HEAD"), timeout=SECONDS
            ):
                answered.set()
        except urllib.error.HTTPError:
            answered.set()
        except OSError:  # no connection, no such host
            pass

    # In a thread: looking up a host's name does not heed a timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return answered.is_set()


def _how_to_fetch(name: str, sets: list[tuple[str, str | None]]) -> str:
    """What to say about a task whose data are neither in the cache nor can be fetched."""
    shown = ", ".join(path if config is None else f"{path} ({config})" for path, config in sets[:3])
    more = f" and {len(sets) - 3} more" if len(sets) > 3 else ""
    reason = "the environment says offline" if hub_offline() else f"{hub_address()} does not answer"
    calls = " ".join(
        f"datasets.load_dataset({', '.join(repr(part) for part in found if part is not None)});"
        for found in sets[:3]
    )
    return (
        f"evaluation.json: tasks.{name}: its data, {shown}{more}, are not in {cache_folder()}, and {reason}. "
        f'Run `.venv/bin/python -c "import datasets; {calls.rstrip(";")}"` on a machine with a network, and '
        f"copy {', '.join(sorted({cached_name(path) for path, _ in sets}))} from its cache into this one. Or "
        "remove the task."
    )
