"""What every stage needs around its own work: options, checks, the lock, ``stage.json``, the final rename.

A numbered script hands its work to `run_stage`. Each run goes through three steps: `describe` (what would
this stage be made from?), `decide` (what is to be done?) and `act`. Nothing here imports torch, so finding
out that there is nothing to do takes about 0.1 s.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
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
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from recipe.config.recipe import load_recipe, recipe_options
from recipe.config.staleness import deciding_keys
from recipe.corpus.download import require_data
from recipe.corpus.source_files import with_hashes
from recipe.progress import write_lines_without_a_terminal
from recipe.project import (
    DATA,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    NO_SPACE,
    OUTPUTS,
    RECORD,
    ROOT,
    Interrupted,
    RecipeError,
    Refused,
    full_disk,
    known_record,
    naming_full_disk,
    read_record,
    read_state,
    stage_folder,
    warn,
    write_json,
)
from recipe.run.extension import Extension, find_extension, prepare_extension
from recipe.run.freshness import FACTS, differences, fact_changes, input_changes, input_identity, stale_inputs
from recipe.run.integrity import damage, describe_files, how_to_repair, parts_read, require_whole
from recipe.run.publication import (
    SECONDS,
    WANTED,
    clear,
    copy_stage,
    finish_publication,
    has_checkpoints,
    hold,
    publish,
)
from recipe.training.signals import STOPPING, end_with_parent, exit_code_of, on_stop

# The packages whose versions are written into stage.json.
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


@dataclass
class Stage:
    """What a stage's own code works with.

    config: the recipe's sections (``config["pretrain"]["learning_rate"]``).
    inputs: folder of each earlier stage that this one reads.
    folder: the work folder to write into; it becomes ``outputs/<recipe>/<stage>`` when the stage is done.
    lock: the descriptor of the lock, for child processes that must hold it too.
    figures, headline: what the stage's code has measured, and the same in one line, for ``stage.json``.
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


def require_downloads(stage: Stage) -> None:
    """Raise RecipeError when the data of stage 01, which `stage` reads, are no longer complete."""
    record = read_record(stage.inputs["01_download"], "figures")
    require_data(record["figures"], stage.config["dataset"], DATA)


@dataclass(frozen=True)
class Definition:
    """What a script says about its stage; `run_stage` explains the fields."""

    name: str
    work: Callable[[Stage], None]
    sections: tuple[str, ...]
    inputs: tuple[str, ...] | Callable[[dict[str, Any]], tuple[str, ...]]
    resumable: bool
    skip: Callable[[dict[str, Any]], str] | None
    preview: Callable[[dict[str, Any], argparse.Namespace], None] | None
    reusable: Callable[[dict[str, Any], dict[str, Any]], None] | None
    extends: str


@dataclass
class Description:
    """What a stage would be made from if it ran now.

    skipped: why the recipe does without this stage, or an empty string. folders: of the earlier stages that
    it reads. final: its output. work: its work folder.
    """

    definition: Definition
    arguments: argparse.Namespace
    config: dict[str, dict[str, Any]]
    skipped: str
    folders: dict[str, Path]
    final: Path
    work: Path

    @cached_property
    def expected(self) -> dict[str, Any]:
        """The settings, inputs and facts that decide the result: ``wanted`` in ``stage.json``."""
        name, sections = self.definition.name, self.definition.sections
        expected: dict[str, Any] = {
            "config": {section: deciding_keys(section, self.config[section]) for section in sections},
            "inputs": {stage: input_identity(folder) for stage, folder in self.folders.items()},
        }
        return expected | ({"facts": FACTS[name](self.config)} if name in FACTS else {})

    @cached_property
    def made_from(self) -> dict[str, Any]:
        """`expected` for the record, with the sha256 of the user's own files: a copy is the same file."""
        return with_hashes(self.expected)

    def changes(self, recorded: dict[str, Any]) -> list[str]:
        """How `expected` differs from what an earlier run has recorded, as ``key: old -> new``."""
        changed = differences(recorded["config"], self.expected["config"], "config")
        changed += fact_changes(recorded.get("facts", {}), self.expected.get("facts", {}))
        return changed + input_changes(recorded["inputs"], self.folders)

    @property
    def missing(self) -> list[str]:
        """The earlier stages that have not been run."""
        return [stage for stage, folder in self.folders.items() if not (folder / RECORD).exists()]


@dataclass(frozen=True)
class Decision:
    """What is to be done with a stage.

    reason: one line for the reader. remedy: what the user can do, where the stage cannot run. twin: the
    folder that is taken over. extension: how a finished training goes on.
    """

    action: Literal["skip", "refuse", "done before", "take over", "continue", "extend", "run"]
    reason: str
    remedy: str = ""
    twin: Path | None = None
    extension: Extension | None = None


def stage_arguments(doc: str) -> argparse.ArgumentParser:
    """The options every stage has."""
    parser = recipe_options(doc)
    parser.add_argument(
        "--force",
        action="store_true",
        help="start over: the old output is deleted, checkpoints of an unfinished run are set aside",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and say what would be done; change nothing"
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
    reusable: Callable[[dict[str, Any], dict[str, Any]], None] | None = None,
    extends: str = "",
) -> None:
    """Run a stage as a command, and end the process with the right exit code.

    script, doc: the stage's ``__file__`` and ``__doc__``.
    work: the stage's own code. It writes into ``stage.folder`` and sets ``stage.figures``.
    sections: the recipe's files that decide this stage's result; a change in one makes it stale.
    inputs: the earlier stages it reads, or a function of the config that names them. What else the result
    depends on is in `recipe.run.freshness`.
    options: adds the stage's own command-line options.
    resumable: the work folder of an unfinished run with the same settings is kept, and given to `work` again.
    skip: returns why a recipe does without this stage, or an empty string.
    preview: prints what is known beforehand, for --dry-run.
    reusable: raises RecipeError when the result of another recipe (its figures, our config) is no longer
    complete; the stage then runs itself.
    extends: the training file whose length may be raised after the stage was finished (`run.extension`).
    """
    parser = stage_arguments(doc)
    parser.prog = Path(script).name
    if options:
        options(parser)
    arguments = parser.parse_args()
    name = Path(script).stem
    definition = Definition(name, work, sections, inputs, resumable, skip, preview, reusable, extends)
    on_stop(raise_stopped)
    if os.environ.get("RECIPE_RUN_ALL") == str(os.getppid()):
        # When run_all.sh is killed, this process is terminated as well.
        end_with_parent(signal.SIGTERM)
    with errors_in_one_line(name):
        _run(definition, arguments)


@contextlib.contextmanager
def errors_in_one_line(name: str) -> Iterator[None]:
    """Turn errors that a user can fix, and Ctrl-C, into one line on stderr and the right exit code.

    name: of the stage, to begin the line with.
    """
    try:
        yield
    except RecipeError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted. Run the same command again to continue.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except OSError as error:
        path = error.filename or OUTPUTS
        if error.errno in NO_SPACE:
            message = str(full_disk(Path(path), error))
        elif error.errno in (errno.EROFS, errno.EACCES):
            message = f"cannot use {path}: {error.strerror}. Fix the permissions, then run again"
        elif error.errno in (errno.ENOTCONN, errno.ESTALE, errno.EIO, errno.ENODEV):
            message = (
                f"cannot use {path}: {error.strerror}. The drive does not answer: mount it again, and run "
                "the same command again. Finished work is kept"
            )
        else:
            raise
        print(f"{name}: error: {message}", file=sys.stderr)
        sys.exit(EXIT_FAILED)


def raise_stopped(signum: int, frame: object) -> None:
    """The handler of the signals that end a stage. Raises KeyboardInterrupt for Ctrl-C, else Interrupted."""
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    for other in set(STOPPING) - {signal.SIGINT}:
        # A second signal must not interrupt the way out.
        signal.signal(other, signal.SIG_IGN)
    name = signal.Signals(signum).name
    raise Interrupted(f"terminated ({name}). Run the same command again to continue.", exit_code_of(signum))


def _run(definition: Definition, arguments: argparse.Namespace) -> None:
    description = describe(definition, arguments)
    if definition.preview and arguments.dry_run and not description.skipped:
        definition.preview(description.config, arguments)
    decision = decide(description)
    if arguments.dry_run or decision.action == "skip":
        print(f"{definition.name:15} {decision.reason}")
        return
    if description.missing:
        raise Refused(decision.remedy)
    with hold(description.final.parent, definition.name) as lock:
        finish_publication(description.work, description.final, lambda seen: not description.changes(seen))
        act(decide(description), description, lock)


def describe(definition: Definition, arguments: argparse.Namespace) -> Description:
    """Read the recipe and find the stage's inputs."""
    config = load_recipe(arguments.recipe, arguments.overrides)
    skipped = definition.skip(config) if definition.skip else ""
    inputs = definition.inputs
    if callable(inputs):
        inputs = () if skipped else inputs(config)
    folders = {stage: stage_folder(arguments.recipe, stage) for stage in inputs}
    final = stage_folder(arguments.recipe, definition.name)
    work = final.with_name(f".{definition.name}.work")
    return Description(definition, arguments, config, skipped, folders, final, work)


def decide(description: Description) -> Decision:
    """Say what is to be done with a stage. This looks at the disk and changes nothing."""
    name, arguments = description.definition.name, description.arguments
    recipe, missing = arguments.recipe, description.missing
    rerun = f"bash run_all.sh --recipe {recipe}"
    rerun += "".join(f" --set {shlex.quote(override)}" for override in arguments.overrides)
    if description.skipped:
        return Decision("skip", f"skipped: {description.skipped}")
    if missing:
        remedy = f"its input is missing: {', '.join(missing)} has not been run for recipe {recipe!r}. "
        remedy += f"Run `bash run_all.sh --recipe {recipe} --from {missing[0][:2]}`"
        return Decision("refuse", f"waits for {', '.join(missing)}", remedy)
    for stage, changes in stale_inputs(recipe, description.folders, description.config):
        remedy = f"Redo it and what follows: {rerun} --from {stage[:2]} --force"
        return Decision("refuse", f"its input {stage} is stale: {'; '.join(changes)}", remedy)

    for stage, parts in parts_read(name, description.folders).items():
        folder = description.folders[stage]
        if reason := damage(folder, read_record(folder), parts, hashes=False):
            return Decision("refuse", reason, how_to_repair(folder))
    if arguments.force:
        return Decision("run", "would start over (--force)")
    if (description.final / RECORD).exists():
        done = read_record(description.final, "wanted", "seconds", "headline", "figures")
        changes = description.changes(done["wanted"])
        if not changes:
            if reason := damage(description.final, done, hashes=False):
                return Decision("refuse", reason, how_to_repair(description.final))
            return Decision("done before", f"done before ({done['seconds']:.0f} s)  {done['headline']}")
        if extended := _decide_extension(description, done, changes):
            return extended
        remedy = f"Redo it and what follows: {rerun} --from {name[:2]} --force\n"
        remedy += f"  Or keep this result and work on a copy: cp -r configs/{recipe} configs/NAME, "
        remedy += "then --recipe NAME"
        reason = f"stale: made from other settings or inputs. Changed: {'; '.join(changes)}"
        return Decision("refuse", reason, remedy)

    if description.definition.resumable and (description.work / WANTED).exists():
        unfinished = read_state(description.work / WANTED, "config", "inputs")
        changes = description.changes(unfinished) if unfinished else [f"{WANTED} cannot be read"]
        if not changes:
            return Decision("continue", "would continue")
        if has_checkpoints(description.work):
            reason = "an unfinished run with other settings has checkpoints in "
            reason += f"{description.work.relative_to(ROOT)}. Changed: {'; '.join(changes)}"
            remedy = "Set the old values again to continue it, or start over with --force (its checkpoints "
            remedy += f"are set aside), or work on a copy: cp -r configs/{recipe} configs/NAME"
            return Decision("refuse", reason, remedy)
    twin = _find_twin(description)
    if twin:
        return Decision("take over", f"would be taken from {twin.relative_to(ROOT)}", twin=twin)
    return Decision("run", "would run")


def _decide_extension(description: Description, done: dict[str, Any], changes: list[str]) -> Decision | None:
    """What is to be done with a finished training whose length was raised; None if more has changed."""
    file, recipe = description.definition.extends, description.arguments.recipe
    if not file:
        return None
    values, where = description.config[file], f"configs/{recipe}/{file}.json"
    try:
        extension = find_extension(description.final, done, changes, values, where)
    except Refused as error:
        return Decision("refuse", str(error))
    if not extension:
        return None
    reason = f"only its length was raised ({extension.changes})"
    unfinished = read_state(description.work / WANTED, "config", "inputs")
    if unfinished and not description.changes(unfinished):
        return Decision("continue", f"would continue: {reason}")
    reason += f": goes on from step {extension.step} of {extension.steps}"
    return Decision("extend", f"would continue: {reason}", extension=extension)


def _find_twin(description: Description) -> Path | None:
    """The same stage of another recipe, finished from equal settings and inputs, and still complete."""
    definition, recipe = description.definition, description.arguments.recipe
    for path in sorted(OUTPUTS.glob(f"*/{definition.name}/{RECORD}")):
        if path.parent.parent.name == recipe:
            continue
        record = known_record(path.parent, "wanted", "figures")
        if not record or description.changes(record["wanted"]):
            continue
        if reason := damage(path.parent, record, hashes=False):
            warn(f"{reason}, so it is not taken over")
            continue
        try:
            if definition.reusable:
                definition.reusable(record["figures"], description.config)
        except RecipeError:
            continue
        return path.parent
    return None


def act(decision: Decision, description: Description, lock: int) -> None:
    """Do what was decided. lock: the descriptor of the held lock. Raises Refused for a refusal."""
    name, work, final = description.definition.name, description.work, description.final
    if decision.action == "refuse":
        raise Refused(f"{decision.reason}.\n  {decision.remedy}" if decision.remedy else decision.reason)
    if decision.action == "done before":
        _warn_of_versions(name, read_record(final, "versions"))
        print(f"{name:15} {decision.reason}")
        return
    if not decision.twin:
        for stage, parts in parts_read(name, description.folders).items():
            require_whole(description.folders[stage], parts)
    if decision.action != "continue":
        clear(work)
    if decision.twin:
        copy_stage(decision.twin, work)
        if reason := damage(work, read_record(work)):
            shutil.rmtree(work)
            reason = reason.replace(str(work), str(decision.twin))
            warn(f"{reason}, so it is not taken over. {how_to_repair(decision.twin)}")
            act(Decision("run", ""), description, lock)
            return
        publish(work, final)
        print(f"{name:15} taken from {decision.twin.relative_to(ROOT)}: same settings, same inputs")
        return
    work.mkdir(parents=True, exist_ok=True)
    made_from = description.made_from  # before the work: the user may change a file meanwhile
    if decision.extension:
        prepare_extension(decision.extension, final, work)
        (work / SECONDS).write_text(str(read_record(final, "seconds")["seconds"]))
    # Last: a work folder with it is complete.
    if decision.action != "continue":
        write_json(work / WANTED, made_from)
    arguments, config = description.arguments, description.config
    stage = Stage(name, arguments.recipe, config, description.folders, work, arguments, lock)
    write_lines_without_a_terminal()
    goes_on = decision.action in ("continue", "extend")
    stage.say(decision.reason.replace("would continue", "continues") if goes_on else "starts")
    started = time.monotonic()
    try:
        with naming_full_disk(work):
            description.definition.work(stage)
    finally:
        seconds = _add_seconds(work, time.monotonic() - started)
    write_json(work / RECORD, _record(stage, description, seconds))
    publish(work, final)
    stage.say(f"done in {seconds:.1f} s  {stage.headline}")


def _record(stage: Stage, description: Description, seconds: float) -> dict[str, Any]:
    """The content of ``stage.json``."""
    return {
        "stage": stage.name,
        "recipe": stage.recipe,
        "headline": stage.headline,
        "seconds": round(seconds, 3),
        "peak_memory_bytes": _peak_memory(),
        "figures": stage.figures,
        "wanted": description.made_from,
        "config": {section: stage.config[section] for section in description.definition.sections},
        "files": describe_files(stage.folder),
        "versions": _versions(),
        "commit": _commit(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _add_seconds(folder: Path, seconds: float) -> float:
    """The working time over all runs of a resumed stage, kept in the work folder."""
    before = read_state(folder / SECONDS)
    total = seconds + (before if isinstance(before, (int, float)) else 0.0)
    # On a full disk the reason of the failure counts, not that this figure is lost.
    with contextlib.suppress(OSError, RecipeError):
        write_json(folder / SECONDS, total)
    return total


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
