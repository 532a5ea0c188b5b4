"""Check a whole recipe before run_all.sh starts the first stage."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from recipe.config.recipe import load_recipe, recipe_options
from recipe.config.tasks import in_suite, metadata, tasks_of
from recipe.config.training import training_files, unreached_steps
from recipe.conversations.instructions import no_pairs, pair_facts
from recipe.conversations.preferences import preference_facts
from recipe.corpus.aozora import require_notation
from recipe.corpus.download import source_facts
from recipe.evaluation.tasks.available import answers, check_available, hub_address, not_served, silence
from recipe.evaluation.tasks.files import to_download
from recipe.hardware import glance
from recipe.project import (
    EXIT_REFUSED,
    RecipeError,
    Refused,
    is_finished,
    known_record,
    require_extra,
    stage_folder,
    user_path,
)
from recipe.run.freshness import hub
from recipe.run.launch_options import TRAINING_STAGES, add_options, launch_of


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


def fetched_later(recipe: str, config: dict[str, Any], first: int, last: int) -> dict[str, tuple[str, str]]:
    """What the stages from `first` to `last` will read from a server, by its key in the recipe.

    For each the stage, and a data set of the hub or a URL. Left out are sources of stage 01, which starts at
    once, tasks that `check_available` looks at, and stages that are finished.
    """
    rows = [
        ("02_dataset", f"dataset.json: sources.{name}", spec.get("dataset"))
        for name, spec in config["dataset"]["sources"].items()
    ]
    for stage, file in (("11_dataset", "instruction"), ("13_preference", "preference")):
        for name, spec in config.get(file, {}).get("pairs", {}).items():
            rows.append((stage, f"{file}.json: pairs.{name}", spec.get("dataset")))
    tuned = () if no_pairs(config) else ("14_evaluate",)
    for stage in (*tuned, "06_evaluate"):  # the first one that runs fetches the file of a task
        for name in tasks_of(config, stage):
            if "files" in metadata(name) and not in_suite(name, config["evaluation"]):
                url = to_download(name, config["evaluation"]["tasks"][name])
                rows.append((stage, f"evaluation.json: tasks.{name}", url))
    return {
        where: (stage, name)
        for stage, where, name in rows
        if name
        and first <= int(stage[:2]) <= last
        and not user_path(name).is_dir()
        and not is_finished(stage_folder(recipe, stage))
    }


def check_reachable(needed: dict[str, tuple[str, str]]) -> Iterator[str]:
    """A note for what a stage will read from a server that does not answer. needed: of `fetched_later`.

    Raises Refused for data sets that the hub does not serve: the stage would stop, perhaps hours later.
    """
    servers = {
        name: "/".join(name.split("/")[:3]) if "://" in name else hub_address() for _, name in needed.values()
    }
    hosts = sorted(set(servers.values()))
    with ThreadPoolExecutor(8) as threads:
        reached = dict(zip(hosts, threads.map(answers, hosts), strict=True))
        sets = [name for name in servers if "://" not in name and reached[servers[name]]]
        lacks = dict(zip(sets, threads.map(not_served, sets), strict=True))
    refused = [
        f"{where}: {lack.why}. {lack.remedy}."
        for where, (_, name) in needed.items()
        if (lack := lacks.get(name))
    ]
    if refused:
        raise Refused(" ".join(refused))
    for where, (stage, name) in needed.items():
        if not reached[servers[name]]:
            yield f"note: {where}: stage {stage[:2]} will read {name}, but {silence(servers[name])}"


def main() -> None:
    """Check a recipe with the options of run_all.sh; exit with 2 and a message if it cannot run."""
    parser = recipe_options("Check a recipe with the options of run_all.sh; exit with 2 if it cannot run.")
    parser.add_argument(
        "--from", type=int, default=0, dest="first", help="number of the first stage that will run"
    )
    parser.add_argument(
        "--to", type=int, default=99, dest="last", help="number of the last stage that will run"
    )
    add_options(parser)
    arguments = parser.parse_args()

    try:
        config = load_recipe(arguments.recipe, arguments.overrides)
        cleans = arguments.first <= 2 <= arguments.last
        if cleans and config["dataset"].get("engine", {}).get("executor") == "ray":
            require_extra("ray", 'dataset.json: engine: executor: "ray"')
        if cleans and any(spec["source"] == "aozora" for spec in config["dataset"]["sources"].values()):
            require_notation()
        if config["tokenizer"].get("segmenter") == "sudachi":
            require_extra("sudachi", 'tokenizer.json: segmenter: "sudachi"')
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
            if runs and not asked(arguments.recipe, stage_name, config):
                check_available(config)
        for line in check_reachable(fetched_later(arguments.recipe, config, arguments.first, arguments.last)):
            print(line)
        source_facts(config)
        pair_facts(config)
        preference_facts(config)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        # Whatever the error is, nothing has started yet.
        sys.exit(EXIT_REFUSED)


if __name__ == "__main__":
    main()
