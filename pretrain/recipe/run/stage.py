"""What every stage needs around its own work: options, checks, the lock, ``stage.json``, the final rename.

A numbered script hands its work to `run_stage`. Each run goes through three steps: `describe` (what would
this stage be made from?) and `decide` (what is to be done?), both in `recipe.run.decision`, and `act`.
Nothing here imports torch, so finding out that there is nothing to do takes about half a second.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe.config.recipe import recipe_options
from recipe.corpus.download import require_data
from recipe.endings import errors_in_one_line, raise_stopped
from recipe.progress import write_lines_without_a_terminal
from recipe.project import (
    DATA,
    RECORD,
    ROOT,
    RecipeError,
    Refused,
    naming_full_disk,
    read_record,
    read_state,
    warn,
    write_json,
)
from recipe.run.decision import Decision, Definition, Description, decide, describe, note_that_it_would_run
from recipe.run.environment import commit, peak_memory, versions
from recipe.run.extension import prepare_extension
from recipe.run.freshness import differences
from recipe.run.integrity import damage, describe_files, how_to_repair, parts_read, require_whole
from recipe.run.publication import (
    SECONDS,
    WANTED,
    clear,
    copy_stage,
    finish_publication,
    hold,
    publish,
    write_last,
)
from recipe.signals import end_with_parent, on_stop


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
    definition = Definition(
        name=name,
        work=work,
        sections=sections,
        inputs=inputs,
        resumable=resumable,
        skip=skip,
        preview=preview,
        reusable=reusable,
        extends=extends,
    )
    on_stop(raise_stopped)
    if os.environ.get("RECIPE_RUN_ALL") == str(os.getppid()):
        # When run_all.sh is killed, this process is terminated as well.
        end_with_parent(signal.SIGTERM)
    with errors_in_one_line(name):
        _run(definition, arguments)


def _run(definition: Definition, arguments: argparse.Namespace) -> None:
    description = describe(definition, arguments)
    if definition.preview and arguments.dry_run and not description.skipped:
        definition.preview(description.config, arguments)
    decision = decide(description)
    if arguments.dry_run and decision.action == "refuse" and not description.missing:
        # As the run itself would be. What is missing may be made by an earlier stage.
        raise Refused(_refusal(decision))
    if arguments.dry_run and decision.action not in ("skip", "done before", "refuse"):
        note_that_it_would_run(definition.name)
    if arguments.dry_run or decision.action == "skip":
        print(f"{definition.name:15} {decision.reason}")
        return
    if description.missing:
        raise Refused(decision.remedy)
    with hold(description.final.parent, definition.name) as lock:
        finish_publication(
            description.work,
            description.final,
            is_current=lambda seen: not description.changes(seen),
            damage_of=lambda record: damage(description.work, record, hashes=False),
        )
        act(decide(description), description, lock)


def _refusal(decision: Decision) -> str:
    return f"{decision.reason}.\n  {decision.remedy}" if decision.remedy else decision.reason


def act(decision: Decision, description: Description, lock: int) -> None:
    """Do what was decided. lock: the descriptor of the held lock. Raises Refused for a refusal."""
    name, work, final = description.definition.name, description.work, description.final
    if decision.action == "refuse":
        raise Refused(_refusal(decision))
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
    write_last(work / RECORD, _record(stage, description, seconds))
    publish(work, final)
    stage.say(f"done in {seconds:.1f} s  {stage.headline}")


def _record(stage: Stage, description: Description, seconds: float) -> dict[str, Any]:
    """The content of ``stage.json``."""
    return {
        "stage": stage.name,
        "recipe": stage.recipe,
        "headline": stage.headline,
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory(),
        "figures": stage.figures,
        "wanted": description.made_from,
        "config": {section: stage.config[section] for section in description.definition.sections},
        "files": describe_files(stage.folder),
        "versions": versions(),
        "commit": commit(),
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


def _warn_of_versions(name: str, done: dict[str, Any]) -> None:
    changed = differences(done["versions"], versions())
    if changed:
        print(f"{name}: warning: made with other versions ({'; '.join(changed)}); kept", file=sys.stderr)
