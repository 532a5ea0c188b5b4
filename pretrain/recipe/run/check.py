"""Check a whole recipe before run_all.sh starts the first stage."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from recipe.config.initial_model import published_config
from recipe.config.recipe import load_recipe, recipe_options
from recipe.config.tasks import in_suite, metadata, tasks_of
from recipe.config.training import training_files, unreached_steps
from recipe.conversations.instructions import check_own_pairs, no_pairs, pair_facts
from recipe.conversations.preferences import check_own_preferences, preference_facts
from recipe.corpus.aozora import require_notation
from recipe.corpus.download import source_facts
from recipe.corpus.engine import require_executor
from recipe.endings import errors_in_one_line
from recipe.evaluation.tasks.available import answers, check_available, hub_address, not_served, silence
from recipe.evaluation.tasks.files import to_download
from recipe.hardware import glance
from recipe.project import (
    RecipeError,
    Refused,
    is_finished,
    known_record,
    stage_folder,
    user_path,
)
from recipe.run.freshness import hub
from recipe.run.launch_options import TRAINING_STAGES, add_options, launch_of
from recipe.tokenization.word_segmenter import require_segmenter


def asked(recipe: str, stage: str, config: dict[str, Any]) -> bool:
    """Whether a finished stage has asked all tasks that evaluation.json names now."""
    folder = stage_folder(recipe, stage)
    record = known_record(folder, "wanted")
    if not record:
        return False
    if record.get("figures", {}).get("skipped_tasks"):
        return False
    before = record["wanted"]["config"]["evaluation"]
    return before.get("tasks", {}) == config["evaluation"].get("tasks", {})


class Remote(NamedTuple):
    """What a stage will read from a server. kind: ``url``, or what the hub calls it, datasets or models."""

    stage: str
    kind: str
    name: str


def fetched_later(
    recipe: str, config: dict[str, Any], first: int, last: int, force: bool = False
) -> dict[str, Remote]:
    """What the stages from `first` to `last` will read from a server, by its key in the recipe.

    Left out are sources of stage 01, which starts at once, tasks that `check_available` looks at, models that
    are in the cache, and, without `force`, what finished stages have read.
    """
    rows = [
        (f"dataset.json: sources.{name}", Remote("02_dataset", "datasets", spec.get("dataset", "")))
        for name, spec in config["dataset"]["sources"].items()
    ]
    tokenizer, model = config["tokenizer"], config["pretrain"].get("initial_model")
    if "published" in tokenizer and not _is_here(tokenizer):
        rows.append(("tokenizer.json: published", Remote("03_tokenizer", "models", tokenizer["published"])))
    if model and not published_config(config["pretrain"]):
        rows.append(("pretrain.json: initial_model", Remote("05_pretrain", "models", model)))
    for stage, file in (("11_dataset", "instruction"), ("13_preference", "preference")):
        for name, spec in config.get(file, {}).get("pairs", {}).items():
            rows.append((f"{file}.json: pairs.{name}", Remote(stage, "datasets", spec.get("dataset", ""))))
    tuned = () if no_pairs(config) else ("14_evaluate",)
    for stage in (*tuned, "06_evaluate"):  # the first one that runs fetches the file of a task
        for name in tasks_of(config, stage):
            if "files" in metadata(name) and not in_suite(name, config["evaluation"]):
                url = to_download(name, config["evaluation"]["tasks"][name])
                rows.append((f"evaluation.json: tasks.{name}", Remote(stage, "url", url)))
    return {
        where: remote
        for where, remote in rows
        if remote.name
        and first <= int(remote.stage[:2]) <= last
        and not user_path(remote.name).exists()
        and (force or not is_finished(stage_folder(recipe, remote.stage)))
    }


def _is_here(tokenizer: dict[str, Any]) -> bool:
    """Whether a published tokenizer is a path or in the cache of the hub. tokenizer: tokenizer.json."""
    from recipe.tokenization.published import find_published  # slow to import, and seldom needed

    try:
        find_published(tokenizer["published"], tokenizer.get("revision"), local_files_only=True)
    except RecipeError:
        return False
    return True


def check_reachable(needed: dict[str, Remote]) -> Iterator[str]:
    """A note for what a stage will read from a server that does not answer. needed: of `fetched_later`.

    Raises Refused for what the hub does not serve: the stage would stop, perhaps hours later.
    """
    servers = {
        remote: "/".join(remote.name.split("/")[:3]) if remote.kind == "url" else hub_address()
        for remote in needed.values()
    }
    hosts = sorted(set(servers.values()))
    with ThreadPoolExecutor(8) as threads:
        reached = dict(zip(hosts, threads.map(answers, hosts), strict=True))
        asked = [r for r in servers if r.kind != "url" and reached[servers[r]]]
        lacks = dict(zip(asked, threads.map(lambda r: not_served(r.name, r.kind), asked), strict=True))
    refused = [
        f"{where}: {lack.why}. {lack.remedy}."
        for where, remote in needed.items()
        if (lack := lacks.get(remote))
    ]
    if refused:
        raise Refused(" ".join(refused))
    for where, remote in needed.items():
        if not reached[servers[remote]]:
            silent = silence(servers[remote])
            yield f"note: {where}: stage {remote.stage[:2]} will read {remote.name}, but {silent}"


def check(arguments: argparse.Namespace) -> None:
    """Raise RecipeError for a recipe that cannot run; print notes. arguments: as of `main`."""
    config = load_recipe(arguments.recipe, arguments.overrides)
    cleans = arguments.first <= 2 <= arguments.last
    if cleans or arguments.first <= 4 <= arguments.last:
        require_executor(config["dataset"].get("engine", {}))
    if cleans and any(spec["source"] == "aozora" for spec in config["dataset"]["sources"].values()):
        require_notation()
    require_segmenter(config["tokenizer"].get("segmenter"))
    hub(config)
    skipped = ("12_finetune", "14_evaluate") if no_pairs(config) else ()
    for stage in TRAINING_STAGES.values():
        if stage.file not in config or stage.name in skipped:
            continue
        # A stage outside this range may run on another machine, with other options.
        if arguments.first <= stage.number <= arguments.last:
            launch_of(arguments).check(config, stage.file, glance())
    for file in training_files(config):
        if (steps := config[file].get("max_steps", -1)) > 0:
            for line in unreached_steps(config[file], steps, f"configs/{arguments.recipe}/{file}.json"):
                print(line)
    for number, stage_name in ((6, "06_evaluate"), (14, "14_evaluate")):
        # A finished stage that asked the same tasks no longer needs their data.
        runs = arguments.first <= number <= arguments.last and stage_name not in skipped
        if runs and (arguments.force or not asked(arguments.recipe, stage_name, config)):
            check_available(config)
    later = fetched_later(arguments.recipe, config, arguments.first, arguments.last, arguments.force)
    for line in check_reachable(later):
        print(line)
    source_facts(config)
    pair_facts(config)
    preference_facts(config)
    for number, stage, check_rows in (
        (11, "11_dataset", check_own_pairs),
        (13, "13_preference", check_own_preferences),
    ):
        runs = arguments.first <= number <= arguments.last
        if runs and (arguments.force or not is_finished(stage_folder(arguments.recipe, stage))):
            check_rows(config)


def main() -> None:
    """Check a recipe with the options of run_all.sh; exit with 2 and a message if it cannot run."""
    parser = recipe_options("Check a recipe with the options of run_all.sh; exit with 2 if it cannot run.")
    parser.add_argument(
        "--from", type=int, default=0, dest="first", help="number of the first stage that will run"
    )
    parser.add_argument(
        "--to", type=int, default=99, dest="last", help="number of the last stage that will run"
    )
    parser.add_argument("--force", action="store_true", help="finished stages will run again")
    add_options(parser)
    arguments = parser.parse_args()
    with errors_in_one_line("run_all.sh"):
        try:
            check(arguments)
        except RecipeError as error:
            # Whatever the error is, nothing has started yet.
            raise Refused(str(error)) from error


if __name__ == "__main__":
    main()
