"""Whether the tasks that bring their own data can run on this machine, checked before anything is started.

Nothing here imports the harness, datasets or torch.
"""

from __future__ import annotations

import ast
import glob
import http.client
import json
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from recipe.config.tasks import FUNCTION, Values, brings_data, in_suite, may_be_skipped, single_tasks
from recipe.evaluation.tasks.files import to_download
from recipe.project import ROOT, Refused, markdown_text, missing_packages

# What load_dataset takes for a file format rather than for a data set of that name.
FORMATS = ("json", "csv", "parquet", "arrow", "text", "xml")
SECONDS = 1.0  # to wait for an answer of the hub
DataSet = tuple[str, str | None]  # a data set of the hub: path, and the name of its configuration
TRUE = ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads its environment variables


class Lack(NamedTuple):
    """Why a task cannot run here, and what to do. `why` has no path of this machine: metrics.md shows it."""

    why: str
    remedy: str


def check_available(config: dict[str, Any]) -> dict[str, str]:
    """Raise Refused for a task of evaluation.json that cannot run here, and say what to do.

    Looks at the Python packages of the task's own functions, and at its data: files, the cache of datasets,
    and the hub, which is asked only when the cache does not have them. config: a whole recipe. Returns the
    tasks whose data or packages are not here and that evaluation.json allows to skip, with the reason.
    """
    asked_by: dict[str, str] = {}
    missing: dict[str, list[DataSet]] = {}
    downloads: dict[str, str] = {}
    lacks: dict[str, Lack] = {}
    evaluation = config["evaluation"]
    for name, spec in evaluation.get("tasks", {}).items():
        if not brings_data(name):
            if in_suite(name, evaluation) and (url := to_download(name, spec)):
                downloads[name] = url
            continue
        here = f"evaluation.json: tasks.{name}"
        found = _tasks_behind(name, here)
        for task, values in found.items():
            if task in asked_by:
                raise Refused(
                    f"{here}: it holds {task}, as tasks.{asked_by[task]} does. Remove one of the two"
                )
            asked_by[task] = name
            _check_kind(task, values, here)
            if lack := _missing_modules(task, values):
                lacks[name] = lack
        data = (_missing_data(values, here) for values in found.values())
        missing[name] = list(dict.fromkeys(filter(None, data)))
    missing = {name: sets for name, sets in missing.items() if sets and name not in lacks}
    lacks |= _unreachable(missing, downloads)
    skipped = {name: lack.why for name, lack in lacks.items() if may_be_skipped(name, evaluation)}
    refused = [
        f"evaluation.json: tasks.{name}: {lack.why}. {lack.remedy}."
        for name, lack in lacks.items()
        if name not in skipped
    ]
    if refused:
        way_out = (
            f'Or set "skip_unavailable": true, to go on without such tasks of {evaluation["suite"]}.'
            if "suite" in evaluation
            else "Or remove the task."
        )
        raise Refused(" ".join([*refused, way_out]))
    return skipped


def _unreachable(missing: dict[str, list[DataSet]], downloads: dict[str, str]) -> dict[str, Lack]:
    """The tasks whose data cannot be fetched in the run.

    missing: the data sets of the hub that are not in the cache. downloads: URLs of files that are not here.
    """
    found = {}
    if missing and not answers(hub_address()):
        found = {name: _how_to_fetch(sets) for name, sets in missing.items()}
    elif missing:
        paths = list(dict.fromkeys(path for sets in missing.values() for path, _ in sets))
        with ThreadPoolExecutor(len(paths)) as threads:
            refused = dict(zip(paths, threads.map(not_served, paths), strict=True))
        for name, sets in missing.items():
            if lacks := [lack for path, _ in sets if (lack := refused[path])]:
                found[name] = lacks[0]
    hosts = {url: "/".join(url.split("/")[:3]) for url in downloads.values()}
    silent = {host for host in set(hosts.values()) if not answers(host)}
    for name, url in downloads.items():
        if hosts[url] in silent:
            found[name] = Lack(
                f"its file {url} is not in data/, and {silence(hosts[url])}",
                f'Download it elsewhere and give its folder in tasks: "{name}": {{"path": FOLDER}}',
            )
    return found


def not_served(path: str, kind: str = "datasets") -> Lack | None:
    """Why the hub does not serve a data set or a model to us; None if it does, or if that cannot be known."""
    from huggingface_hub import get_token

    page = f"{hub_address()}/{path if kind == 'models' else f'{kind}/{path}'}"
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{hub_address()}/api/{kind}/{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5 * SECONDS) as answer:
            facts = json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404):
            return Lack(
                f"{path} does not exist on the hub, or is not public (HTTP {error.code})",
                f"Look at {page}; if you may read it: `.venv/bin/hf auth login`",
            )
        return None
    except (OSError, ValueError, http.client.HTTPException):
        return None
    script = f"{path.rsplit('/', 1)[-1]}.py"
    if kind == "datasets" and any(file.get("rfilename") == script for file in facts.get("siblings", [])):
        return Lack(
            f"{path} is loaded by a script of its own, {script}, which datasets no longer runs",
            "Read its content from files of your own (configs/README.md)",
        )
    if facts.get("gated") and not token:
        return Lack(
            f"{path} is gated",
            f"Accept its terms on {page}, then `.venv/bin/hf auth login`",
        )
    return None


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


def _missing_modules(task: str, values: Values) -> Lack | None:
    """The packages that the Python functions of a task import and that are not installed."""
    for module in sorted(set(re.findall(FUNCTION + r"([\w.]+)\.\w+", str(values)))):
        path = Path(values["folder"], *module.split(".")).with_suffix(".py")
        if not path.is_file():
            continue
        packages = _imports(ast.parse(path.read_text("utf-8")).body)
        own = (path.parent / f"{package}.py" for package in packages)
        missing = [file.stem for file in own if not file.is_file() and find_spec(file.stem) is None]
        if missing:
            names = " ".join(missing)
            extra = set(missing) <= set(missing_packages("japanese"))
            how = "bash setup.sh --extra japanese" if extra else f".venv/bin/pip install {names}"
            return Lack(
                f"{task} needs Python packages that are not installed: {names} (imported by {path.name})",
                f"Install them (`{how}`), or name other tasks",
            )
    return None


def _imports(body: list[ast.stmt]) -> Iterator[str]:
    """The packages that a module cannot be imported without, by their top name."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Try) and any(isinstance(inner, ast.Raise) for inner in ast.walk(node)):
            yield from _imports(node.body)


def _missing_data(values: Values, here: str) -> DataSet | None:
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


def answers(address: str) -> bool:
    """Whether a server answers within a second, whatever it answers; False without asking when offline."""
    if hub_offline():
        return False
    answered = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=SECONDS):
                answered.set()
        except urllib.error.HTTPError:
            answered.set()
        except (OSError, ValueError, http.client.HTTPException):  # no connection, no host, no web address
            pass

    # In a thread: looking up a host's name does not heed a timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return answered.is_set()


def silence(address: str) -> str:
    """Why a server cannot be asked, in words."""
    if "://" not in address and not hub_offline():
        return f"HF_ENDPOINT is {address}, which is no web address: expected https:// before it"
    return "the environment says offline" if hub_offline() else f"{address} does not answer"


def _how_to_fetch(sets: list[DataSet]) -> Lack:
    """What to say about data sets that are neither in the cache nor can be fetched."""
    shown = ", ".join(path if config is None else f"{path} ({config})" for path, config in sets[:3])
    more = f" and {len(sets) - 3} more" if len(sets) > 3 else ""
    folders = ", ".join(sorted({cached_name(path) for path, _ in sets}))
    calls = " ".join(
        f"datasets.load_dataset({', '.join(repr(part) for part in found if part is not None)});"
        for found in sets[:3]
    )
    return Lack(
        f"its data, {shown}{more}, are not in the cache of datasets, and {silence(hub_address())}",
        f'Run `.venv/bin/python -c "import datasets; {calls.rstrip(";")}"` on a machine with a network, and '
        f"copy {folders} from its cache to {cache_folder()}",
    )


def left_out_line(not_asked: Mapping[str, int]) -> str:
    """A line about the questions of four choices that were left out, by task; empty when there are none."""
    counts = [f"{name} {count:,}" for name, count in not_asked.items() if count]
    why = "Questions left out, because fewer than three other answers are wrong"
    return f"{why}: {', '.join(counts)}.\n" if counts else ""


def skipped_list(skipped: dict[str, str]) -> str:
    """The tasks that were not asked, each with the reason, as Markdown; empty when there are none."""
    if not skipped:
        return ""
    lines = [f"- {name}: {markdown_text(why)}" for name, why in skipped.items()]
    return "\n".join(["Not asked (skip_unavailable):", "", *lines]) + "\n"
