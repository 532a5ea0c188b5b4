"""Where results lie and how a stage makes them: paths, the lock, skip or stale, ``stage.json``, the final
rename.

A numbered script hands its work to `run_stage`; everything that every stage needs happens there, so that the
script holds only its own story. Nothing here imports torch: deciding that nothing is to be done takes 0.1 s.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import importlib.metadata
import os
import platform
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe.config.recipe import load_recipe
from recipe.config.staleness import deciding_keys
from recipe.project import (
    DATA,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    OUTPUTS,
    ROOT,
    Interrupted,
    RecipeError,
    Refused,
    fsync_tree,
    read_json,
    stage_folder,
    write_json,
)
from recipe.run.freshness import FACTS, differences, stale_inputs

VERSIONED = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "deepspeed",
    "sentencepiece",
    "tokenizers",
    "neologdn",
    "hojichar",
    "mwparserfromhell",
    "aozora",
    "datatrove",
    "trl",
    "peft",
    "lxml",
    "pyarrow",
    "numpy",
)


# ------------------------------------------------------------------------------------------------- files


# ------------------------------------------------------------------------------------------------ stages


@dataclass
class Stage:
    """What a stage's own code works with.

    config: the recipe's sections (``config["pretrain"]["learning_rate"]``).
    inputs: folder of each earlier stage that this one reads.
    folder: the work folder to write into; it becomes ``outputs/<recipe>/<stage>`` when the stage is done.
    lock: the descriptor of the lock, for child processes that must hold it too.
    """

    name: str
    recipe: str
    config: dict[str, dict[str, Any]]
    inputs: dict[str, Path]
    folder: Path
    arguments: argparse.Namespace
    lock: int
    figures: dict[str, Any] = field(default_factory=dict)
    headline: str = ""

    def say(self, message: str) -> None:
        """Print one line with the time and the stage."""
        print(f"{time.strftime('%H:%M:%S')} {self.name}  {message}", flush=True)


def stage_arguments(doc: str) -> argparse.ArgumentParser:
    """The options every stage has."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", default="tiny", help="folder below configs/ (default: tiny)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FILE.KEY=VALUE",
        dest="overrides",
        help="override one key for an experiment, e.g. pretrain.learning_rate=1e-4",
    )
    parser.add_argument(
        "--force", action="store_true", help="redo a finished or stale stage; discards its old output"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, say what would be done, do nothing"
    )
    return parser


def run_stage(
    script: str,
    doc: str,
    work: Callable[[Stage], None],
    sections: tuple[str, ...],
    inputs: tuple[str, ...] | Callable[[dict[str, Any]], tuple[str, ...]] = (),
    options: Callable[[argparse.ArgumentParser], None] | None = None,
    resumable: bool = False,
    skip: Callable[[dict[str, Any]], str] | None = None,
    preview: Callable[[dict[str, Any], argparse.Namespace], None] | None = None,
) -> None:
    """Run a stage as a command: parse, check, skip or refuse, lock, work, publish; exits with the right code.

    script, doc: the stage's ``__file__`` and ``__doc__``.
    sections: the recipe's files that decide this stage's result; a change in one makes it stale.
    inputs: earlier stages it reads, or a function of the config that names them. What else the result depends
    on, `recipe.run.freshness` says.
    skip: gives the reason for which a recipe does without this stage, or an empty string.
    preview: prints what is known beforehand, for --dry-run.
    resumable: the work folder of an unfinished run with the same wishes is kept and handed to `work` again.
    """
    name = Path(script).stem
    parser = stage_arguments(doc)
    if options:
        options(parser)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _raise_terminated)
    if sys.platform == "linux" and os.environ.get("RECIPE_RUN_ALL") == str(os.getppid()):
        ctypes.CDLL(None).prctl(
            1, signal.SIGTERM
        )  # PR_SET_PDEATHSIG: when run_all.sh is killed, stop as well
    try:
        _run(name, arguments, work, sections, inputs, resumable, skip, preview)
    except RecipeError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted. Run the same command again to continue.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except OSError as error:
        if error.errno not in (28, 122, 30, 13):  # no space, quota, read-only, permission
            raise
        free = shutil.disk_usage(ROOT).free
        print(
            f"{name}: error: cannot use {error.filename or OUTPUTS}: {error.strerror} ({free:,} bytes "
            "free). Make room or mend the permissions, then run again",
            file=sys.stderr,
        )
        sys.exit(EXIT_FAILED)


def _raise_terminated(signum: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: the way out must not be interrupted
    raise Interrupted("terminated (SIGTERM). Run the same command again to continue.", EXIT_TERMINATED)


def _run(
    name: str,
    arguments: argparse.Namespace,
    work: Callable[[Stage], None],
    sections: tuple[str, ...],
    inputs: tuple[str, ...] | Callable[[dict[str, Any]], tuple[str, ...]],
    resumable: bool,
    skip: Callable[[dict[str, Any]], str] | None,
    preview: Callable[[dict[str, Any], argparse.Namespace], None] | None,
) -> None:
    config = load_recipe(arguments.recipe, arguments.overrides)
    reason = skip(config) if skip else ""
    if reason:
        print(f"{name:15} skipped: {reason}")
        return
    if preview and arguments.dry_run:
        preview(config, arguments)
    inputs = inputs(config) if callable(inputs) else inputs
    folders = {stage: stage_folder(arguments.recipe, stage) for stage in inputs}
    missing = [stage for stage, folder in folders.items() if not (folder / "stage.json").exists()]
    if missing:
        if arguments.dry_run:
            print(f"{name:15} waits for {', '.join(missing)}")
            return
        raise Refused(
            f"its input is missing: {', '.join(missing)} has not been run for recipe {arguments.recipe!r}. "
            f"Run `bash run_all.sh --recipe {arguments.recipe} --from {missing[0][:2]}`"
        )
    rerun = f"bash run_all.sh --recipe {arguments.recipe}"
    rerun += "".join(f" --set {shlex.quote(override)}" for override in arguments.overrides)
    for stage, changes in stale_inputs(arguments.recipe, inputs, config):
        message = f"its input {stage} is stale: {'; '.join(changes)}"
        if not arguments.dry_run:
            raise Refused(f"{message}.\n  Redo it and what follows: {rerun} --from {stage[:2]} --force")
        print(f"{name:15} {message}")
        return
    wanted: dict[str, Any] = {
        "config": {section: deciding_keys(section, config[section]) for section in sections}
    }
    wanted["inputs"] = {stage: _file_digest(folder / "stage.json") for stage, folder in folders.items()}
    if name in FACTS:
        wanted["facts"] = FACTS[name](config)

    final = stage_folder(arguments.recipe, name)
    folder = final.with_name(f".{name}.work")
    if arguments.dry_run:
        print(f"{name:15} {_forecast(final, folder, wanted, resumable, arguments)}")
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    with _lock(final.parent / ".lock", name) as lock:
        _finish_publication(folder, final, wanted)
        if (final / "stage.json").exists() and not arguments.force:
            done = read_json(final / "stage.json")
            changes = differences(done["wanted"], wanted)
            if changes:
                raise Refused(
                    f"stale: made from other settings or inputs. Changed: {'; '.join(changes)}.\n"
                    f"  Redo it and what follows: {rerun} --from {name[:2]} --force\n"
                    f"  Or keep this result and work on a copy: cp -r configs/{arguments.recipe} "
                    "configs/NAME, then --recipe NAME"
                )
            _warn_of_versions(name, done)
            print(f"{name:15} done before ({done['seconds']:.0f} s)  {done['headline']}")
            return
        unfinished = _can_continue(folder, wanted, resumable, arguments)
        twin = None if arguments.force or unfinished else _finished_twin(arguments.recipe, name, wanted)
        if not unfinished:
            shutil.rmtree(folder, ignore_errors=True)
        if twin:
            _link_tree(twin, folder)
            _publish(folder, final)
            print(f"{name:15} taken from {twin.relative_to(ROOT)}: same settings, same inputs")
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / ".wanted.json", wanted)
        stage = Stage(name, arguments.recipe, config, folders, folder, arguments, lock)
        stage.say("continues" if unfinished else "starts")
        started = time.monotonic()
        try:
            work(stage)
        finally:
            seconds = _add_seconds(folder, time.monotonic() - started)
        record = {
            "stage": name,
            "recipe": arguments.recipe,
            "headline": stage.headline,
            "seconds": round(seconds, 3),
            "peak_memory_bytes": _peak_memory(),
            "figures": stage.figures,
            "wanted": wanted,
            "config": {section: config[section] for section in sections},
            "versions": _versions(),
            "commit": _commit(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_json(folder / ".stage.json.part", record)
        (folder / ".stage.json.part").rename(folder / "stage.json")
        _publish(folder, final)
        stage.say(f"done in {seconds:.1f} s  {stage.headline}")


def _forecast(
    final: Path, folder: Path, wanted: dict[str, Any], resumable: bool, arguments: argparse.Namespace
) -> str:
    """What a run would do, in words."""
    if (final / "stage.json").exists() and not arguments.force:
        done = read_json(final / "stage.json")
        changes = differences(done["wanted"], wanted)
        return f"stale: {'; '.join(changes)}" if changes else f"done before  {done['headline']}"
    return "would continue" if _can_continue(folder, wanted, resumable, arguments) else "would run"


def _can_continue(
    folder: Path, wanted: dict[str, Any], resumable: bool, arguments: argparse.Namespace
) -> bool:
    """True when there is an unfinished run of the same wishes. Checkpoints of others are never deleted."""
    if not resumable or not (folder / ".wanted.json").exists():
        return False
    changes = differences(read_json(folder / ".wanted.json"), wanted)
    if not changes:
        return True
    if arguments.force or not any(folder.glob("checkpoints/checkpoint-*")):
        return False
    raise Refused(
        f"an unfinished run with other settings has checkpoints in {folder.relative_to(ROOT)}. Changed: "
        f"{'; '.join(changes)}.\n  Put the settings back to continue it, or start over with --force (its "
        f"checkpoints are deleted), or work on a copy: cp -r configs/{arguments.recipe} configs/NAME"
    )


def _finished_twin(recipe: str, name: str, wanted: dict[str, Any]) -> Path | None:
    """The same stage of another recipe, finished from equal settings and inputs."""
    for record in sorted(OUTPUTS.glob(f"*/{name}/stage.json")):
        if record.parent.parent.name != recipe and read_json(record)["wanted"] == wanted:
            return record.parent
    return None


def _link_tree(source: Path, target: Path) -> None:
    """Copy a finished folder by hard links, which cost nothing; real copies where the disk has no links."""

    def link(old: str, new: str) -> None:
        try:
            os.link(old, new)
        except OSError:
            shutil.copy2(old, new)

    shutil.copytree(source, target, copy_function=link)


def _publish(folder: Path, final: Path) -> None:
    """Make a finished work folder the stage's output: flushed to disk, then renamed into place."""
    fsync_tree(folder)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    folder.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    for name in (".wanted.json", ".seconds", "stop"):
        (final / name).unlink(missing_ok=True)


def _finish_publication(folder: Path, final: Path, wanted: dict[str, Any]) -> None:
    """Do what a kill during `_publish` left undone."""
    old = final.with_name(f".{final.name}.old")
    if (folder / "stage.json").exists() and read_json(folder / "stage.json")["wanted"] == wanted:
        _publish(folder, final)
    elif old.exists() and not final.exists():
        old.rename(final)


def _add_seconds(folder: Path, seconds: float) -> float:
    """Working time over all tries of a resumed stage, kept in the work folder."""
    path = folder / ".seconds"
    total = seconds + (float(path.read_text()) if path.exists() else 0.0)
    if folder.exists():
        path.write_text(str(total))
    return total


@contextlib.contextmanager
def _lock(path: Path, name: str) -> Iterator[int]:
    """Hold a recipe's output folder; a second run is refused and told who holds it.

    The kernel drops an flock with its holder, so a dead process never blocks anyone.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(descriptor, 200).decode(errors="replace") or "another run"
            raise Refused(
                f"{path.parent} is in use by {holder}. Wait for it, stop it, or use another recipe name "
                "(cp -r configs/tiny configs/NAME)"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()} ({name})".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def data_lock() -> Iterator[None]:
    """Hold the download cache, which all recipes share."""
    DATA.mkdir(exist_ok=True)
    with _lock(DATA / ".lock", "01_download"):
        yield


def _file_digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _warn_of_versions(name: str, done: dict[str, Any]) -> None:
    changed = differences(done["versions"], _versions())
    if changed:
        print(f"{name}: warning: made with other versions ({'; '.join(changed)}); kept", file=sys.stderr)


def _commit() -> str:
    """The project's git commit, with ``+`` when the work tree was changed; empty outside git."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return commit.stdout.strip() + ("+" if status.stdout.strip() else "")


def _peak_memory() -> int:
    """Peak resident bytes of the largest process of this stage (itself or a finished child)."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) * 1024


# ----------------------------------------------------------------------------------------------- summary
