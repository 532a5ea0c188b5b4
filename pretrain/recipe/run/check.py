"""Check a whole recipe before run_all.sh starts the first stage."""

from __future__ import annotations

import sys
from typing import Any

from recipe.config.recipe import load_recipe, recipe_options
from recipe.config.training import training_files, unreached_steps
from recipe.conversations.instructions import pair_facts
from recipe.conversations.preferences import preference_facts
from recipe.corpus.download import source_facts
from recipe.evaluation.tasks.available import check_available
from recipe.hardware import glance
from recipe.project import EXIT_REFUSED, RECORD, RecipeError, known_record, require_extra, stage_folder
from recipe.run.launch_options import TRAINING_STAGES, add_options, launch_of


def asked(recipe: str, stage: str, config: dict[str, Any]) -> bool:
    """Whether a finished stage has asked all tasks that evaluation.json names now."""
    folder = stage_folder(recipe, stage)
    record = known_record(folder, "wanted") if (folder / RECORD).exists() else None
    if not record:
        return False
    if record.get("figures", {}).get("skipped_tasks"):
        return False
    before = record["wanted"]["config"]["evaluation"]
    return before.get("tasks", {}) == config["evaluation"].get("tasks", {})


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
        if config["tokenizer"].get("segmenter") == "sudachi":
            require_extra("sudachi", 'tokenizer.json: segmenter: "sudachi"')
        for stage in TRAINING_STAGES.values():
            # A stage outside this range may run on another machine, with other options.
            if stage.file in config and arguments.first <= stage.number <= arguments.last:
                launch_of(arguments).check(config, stage.file, glance())
        for file in training_files(config):
            if (steps := config[file].get("max_steps", -1)) > 0:
                for line in unreached_steps(config[file], steps, f"configs/{arguments.recipe}/{file}.json"):
                    print(line)
        for number, stage_name in ((6, "06_evaluate"), (14, "14_evaluate")):
            # A finished stage that asked the same tasks no longer needs their data.
            if arguments.first <= number <= arguments.last and not asked(
                arguments.recipe, stage_name, config
            ):
                check_available(config)
        source_facts(config)
        pair_facts(config)
        preference_facts(config)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        # Whatever the error is, nothing has started yet.
        sys.exit(EXIT_REFUSED)


if __name__ == "__main__":
    main()
