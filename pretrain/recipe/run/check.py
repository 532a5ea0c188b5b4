"""Check a whole recipe before run_all.sh starts its first stage."""

from __future__ import annotations

import argparse
import sys

from recipe.config.recipe import load_recipe
from recipe.config.training import training_files
from recipe.conversations.instructions import pair_facts
from recipe.conversations.preferences import preference_facts
from recipe.corpus.download import source_facts
from recipe.hardware import glance
from recipe.project import EXIT_REFUSED, RecipeError, require_extra
from recipe.run.launch_options import add_options, launch_of

TRAINING_STAGES = {"pretrain": 5, "finetune": 12, "preference": 13}


def main() -> None:
    """Check a recipe with the options of run_all.sh; exit 2 with the fault."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--from", type=int, default=0, dest="first", help="first stage that will run")
    parser.add_argument("--to", type=int, default=99, dest="last", help="last stage that will run")
    add_options(parser)
    arguments = parser.parse_args()

    try:
        config = load_recipe(arguments.recipe, arguments.overrides)
        cleans = arguments.first <= 2 <= arguments.last
        if cleans and config["dataset"].get("engine", {}).get("executor") == "ray":
            require_extra("ray", 'dataset.json: engine: executor: "ray"')
        if config["tokenizer"].get("segmenter") == "sudachi":
            require_extra("sudachi", 'tokenizer.json: segmenter: "sudachi"')
        for file in training_files(config):
            if not arguments.first <= TRAINING_STAGES[file] <= arguments.last:
                continue  # on another machine, perhaps, or never
            launch_of(arguments).check(config, file, glance())
        source_facts(config)
        pair_facts(config)
        preference_facts(config)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)  # nothing has started yet, whatever it is


if __name__ == "__main__":
    main()
