"""What a stage would be made from if it ran now, and what is to be done: run it, continue, take over, refuse.

Nothing here imports torch or writes a file: to find that there is nothing to do takes about half a second.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from recipe.config.recipe import load_recipe
from recipe.config.staleness import deciding_config
from recipe.corpus.source_files import with_hashes
from recipe.project import (
    OUTPUTS,
    RECORD,
    ROOT,
    RecipeError,
    Refused,
    is_finished,
    known_record,
    read_record,
    read_state,
    stage_folder,
    warn,
    work_folder,
)
from recipe.run.extension import Extension, find_extension
from recipe.run.freshness import FACTS, differences, fact_changes, input_changes, input_identity, stale_inputs
from recipe.run.integrity import damage, how_to_repair, parts_read
from recipe.run.publication import WANTED, has_checkpoints

SAME_OPTIONS = "If the earlier run had options --set, give the same ones again"


@dataclass(frozen=True)
class Definition:
    """What a script says about its stage; `recipe.run.stage.run_stage` explains the fields."""

    name: str
    work: Callable[..., None]
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
            "config": deciding_config(name, {section: self.config[section] for section in sections}),
            "inputs": {stage: input_identity(folder) for stage, folder in self.folders.items()},
        }
        return expected | ({"facts": FACTS[name](self.config)} if name in FACTS else {})

    @cached_property
    def made_from(self) -> dict[str, Any]:
        """`expected` for the record, with the sha256 of the user's own files: a copy is the same file."""
        return with_hashes(self.expected)

    def changes(self, recorded: dict[str, Any]) -> list[str]:
        """How `expected` differs from what an earlier run has recorded, as ``key: old -> new``."""
        before = deciding_config(self.definition.name, recorded["config"])
        changed = differences(before, self.expected["config"], "config")
        changed += fact_changes(recorded.get("facts", {}), self.expected.get("facts", {}))
        return changed + input_changes(recorded["inputs"], self.folders)

    @property
    def missing(self) -> list[str]:
        """The earlier stages that have not been run."""
        return [stage for stage, folder in self.folders.items() if not is_finished(folder)]


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


def describe(definition: Definition, arguments: argparse.Namespace) -> Description:
    """Read the recipe and find the stage's inputs."""
    config = load_recipe(arguments.recipe, arguments.overrides)
    skipped = definition.skip(config) if definition.skip else ""
    inputs = definition.inputs
    if callable(inputs):
        inputs = () if skipped else inputs(config)
    folders = {stage: stage_folder(arguments.recipe, stage) for stage in inputs}
    final = stage_folder(arguments.recipe, definition.name)
    return Description(definition, arguments, config, skipped, folders, final, work_folder(final))


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
        remedy += f"Run `{rerun} --to {name[:2]}`; finished stages are skipped"
        return Decision("refuse", f"waits for {', '.join(missing)}", remedy)
    for stage, changes in stale_inputs(recipe, description.folders, description.config):
        if stage in _would_run():
            if arguments.force:
                return Decision("run", f"would start over (--force) after {stage}, which is stale")
            if not is_finished(description.final):
                return Decision("run", f"would run after {stage}")
            remedy = f"After that, redo it and what follows: {rerun} --from {name[:2]} --force"
            return Decision("refuse", f"it would be stale after {stage}", remedy)
        remedy = f"Redo it and what follows: {rerun} --from {stage[:2]} --force\n  {SAME_OPTIONS}"
        return Decision("refuse", f"its input {stage} is stale: {'; '.join(changes)}", remedy)

    for stage, parts in parts_read(name, description.folders).items():
        folder = description.folders[stage]
        if reason := damage(folder, read_record(folder), parts, hashes=False):
            return Decision("refuse", reason, how_to_repair(folder))
    if arguments.force:
        return Decision("run", "would start over (--force)")
    unfinished = _unfinished_changes(description)
    if is_finished(description.final):
        done = read_record(description.final, "wanted", "seconds", "headline", "figures")
        changes = description.changes(done["wanted"])
        if unfinished == []:  # a redo (--force) or a longer training that was interrupted
            return Decision("continue", "would continue")
        if not changes:
            if reason := damage(description.final, done, hashes=False):
                return Decision("refuse", reason, how_to_repair(description.final))
            return Decision("done before", f"done before ({done['seconds']:.0f} s)  {done['headline']}")
        if extended := _decide_extension(description, done, changes):
            return extended
        remedy = f"Redo it and what follows: {rerun} --from {name[:2]} --force\n"
        remedy += f"  Or keep this result: undo the change, and make it in a copy (cp -r configs/{recipe} "
        remedy += f"configs/NAME, then --recipe NAME). {SAME_OPTIONS}"
        reason = f"stale: made from other settings or inputs. Changed: {'; '.join(changes)}"
        return Decision("refuse", reason, remedy)

    if unfinished is not None:
        if not unfinished:
            return Decision("continue", "would continue")
        if has_checkpoints(description.work):
            reason = "an unfinished run with other settings has checkpoints in "
            reason += f"{description.work.relative_to(ROOT)}. Changed: {'; '.join(unfinished)}"
            again = any(not change.startswith("inputs.") for change in unfinished)
            remedy = "Set the old values again to continue it, or start" if again else "Start"
            remedy += " over with --force (its checkpoints are set aside), or work on a copy: "
            remedy += f"cp -r configs/{recipe} configs/NAME"
            return Decision("refuse", reason, remedy)
    twin = _find_twin(description)
    if twin:
        return Decision("take over", f"would be taken from {twin.relative_to(ROOT)}", twin=twin)
    return Decision("run", "would run")


def _would_run() -> list[str]:
    """The stages that a dry run of run_all.sh would have run by now: see `note_that_it_would_run`."""
    path = os.environ.get("RECIPE_WOULD_RUN")
    return Path(path).read_text("utf-8").split() if path else []


def note_that_it_would_run(name: str) -> None:
    """Tell the later stages of a dry run of run_all.sh, which names the file, that this one would run."""
    if path := os.environ.get("RECIPE_WOULD_RUN"):
        with Path(path).open("a", encoding="utf-8") as handle:
            handle.write(f"{name}\n")


def _unfinished_changes(description: Description) -> list[str] | None:
    """How the settings and inputs of an unfinished run differ from today's; None if there is no such run."""
    if not description.definition.resumable or not (description.work / WANTED).exists():
        return None
    recorded = read_state(description.work / WANTED, "config", "inputs")
    return description.changes(recorded) if recorded else [f"{WANTED} cannot be read"]


def _decide_extension(description: Description, done: dict[str, Any], changes: list[str]) -> Decision | None:
    """What is to be done with a finished training whose length was raised; None if more has changed."""
    file, recipe = description.definition.extends, description.arguments.recipe
    if not file:
        return None
    values, where = description.config[file], f"configs/{recipe}/{file}.json"
    settings = deciding_config(description.definition.name, done["wanted"]["config"])
    done = done | {"wanted": done["wanted"] | {"config": settings}}
    try:
        extension = find_extension(description.final, done, changes, values, where)
    except Refused as error:
        return Decision("refuse", str(error))
    if not extension:
        return None
    reason = f"only its length was raised ({extension.changes}): "
    reason += f"goes on from step {extension.step} of {extension.steps}"
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
