"""The JSON files of a recipe: read, checked against each other, overridden from the command line.

`load_recipe` checks every file of the recipe before any stage starts and without importing torch: an unknown
key (with the nearest known one), a duplicate key, a wrong type, and files that contradict each other.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from recipe.config_dataset import check_dataset
from recipe.config_model import FROM_TOKENIZER, check_model, model_values
from recipe.config_tokenizer import check_tokenizer, special_ids, vocabulary_size
from recipe.config_training import INITIAL, TUNING, check_training
from recipe.initial import published_config
from recipe.keys import check_keys, known_keys, nearest, read_config, require, show, type_name
from recipe.outputs import CONFIGS, EXIT_REFUSED, RecipeError, Refused
from recipe.templates import FORMS

FILES = ("dataset", "tokenizer", "model", "pretrain", "evaluation", "generation", "instruction", "finetune")
OPTIONAL_FILES = ("preference",)  # stage 13 is skipped without it
EVALUATION = {
    "batch_size": "int",
    "megabytes_per_source": "float",
    "tasks": "dict",
    "items_per_task": "int",
}
# Tasks with questions from a packaged source, and its kind; and those of JGLUE, from their files.
PACKAGED_TASKS = {
    "command-summary": "manpages",
    "package-summary": "descriptions",
    "translation": "tatoeba",
    "reading": "tatoeba",
}
JGLUE_TASKS = ("jcommonsenseqa", "jnli", "marc-ja", "jsquad")
INSTRUCTION = {
    "template": "str",
    "system": "str",
    "pairs": "dict",
    "translation_share": "float",
    "valid_share": "float",
}
# Pairs are packaged (source), or of a user's own: files (path), or a data set of the hub or a folder
# (dataset).
OWN_PAIRS = {"path": "str", "dataset": "str", "configuration": "str", "split": "str", "revision": "str"}
PAIRS = OWN_PAIRS | {"source": "str", "directions": "list"}
# Beside those in preference.json, by the names of DPOConfig.
PREFERENCE = {
    "pairs": "dict",
    "valid_share": "float",
    "beta": "float",
    "loss_type": "str",
    "label_smoothing": "float",
}
# Packaged pairs, and the kind of source that each is made from.
PAIR_SOURCES = {
    "command-summary": "manpages",
    "command-option": "manpages",
    "package-summary": "descriptions",
    "package-description": "descriptions",
    "translation": "tatoeba",
}
GENERATION = {"prompts": "list", "questions": "list", "seed": "int"}
# Keys that cannot change a result: a change never makes a stage stale. Prefixes end with *.
NOT_DECIDING = (
    "logging_*",
    "log_*",
    "report_to",
    "run_name",
    "disable_tqdm",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "save_total_limit",
    "push_to_hub",  # stage 16 names it among its facts
    "hub_*",
    "project",
    "sample_steps",
)
# The same of a source in dataset.json: weights are facts of the stages that draw by them (recipe/facts.py).
NOT_DECIDING_OF_SOURCE = ("minimum_megabytes", "weight")


def recipes() -> list[str]:
    """The names of the recipes below configs/."""
    return sorted(path.parent.name for path in CONFIGS.glob("*/dataset.json"))


def load_recipe(recipe: str, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """All files of a recipe as one dict by file name, checked, with ``FILE.KEY=VALUE`` overrides applied.

    Raises Refused, naming file, key, the value seen and the value wanted.
    """
    folder = CONFIGS / recipe
    if not (folder / "dataset.json").is_file():
        raise Refused(
            f"configs/{recipe}: no such recipe.{nearest(recipe, recipes())} Known: {', '.join(recipes())}"
        )
    config = {}
    for name in FILES:
        path = folder / f"{name}.json"
        if name == "model" and not path.is_file():
            config[name] = {}  # an initial model brings its own
            continue
        if not path.is_file():
            raise Refused(f"configs/{recipe}/{name}.json is missing. Copy it from configs/tiny/ and edit it")
        config[name] = read_config(path)
    for name in OPTIONAL_FILES:
        if (folder / f"{name}.json").is_file():
            config[name] = read_config(folder / f"{name}.json")
    stray = sorted(path.name for path in folder.glob("*.json") if path.stem not in FILES + OPTIONAL_FILES)
    if stray:
        guess = nearest(stray[0][:-5], FILES + OPTIONAL_FILES)
        raise Refused(f"configs/{recipe}/{stray[0]}: no stage reads this file.{guess}")
    for override in overrides:
        _apply(config, override)
    check_recipe(config, f"configs/{recipe}")
    return config


def _apply(config: dict[str, dict[str, Any]], override: str) -> None:
    """Apply ``FILE.KEY[.KEY]=VALUE``; VALUE is JSON, or a plain string."""
    target, equals, text = override.partition("=")
    file, *keys = target.split(".")
    if not equals or not keys or file not in config:
        near = nearest(file, config) if file not in config else ""
        raise Refused(f"--set {override}: wanted FILE.KEY=VALUE with FILE one of {', '.join(config)}.{near}")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    place = config[file]
    for key in keys[:-1]:
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            raise Refused(f"--set {override}: {file}.{key} is not an object")
    place[keys[-1]] = value


def check_recipe(config: dict[str, dict[str, Any]], where: str) -> None:
    """Check every key and type, then what the files must agree on. Raises Refused at the first fault."""
    native = known_keys()
    check_dataset(config["dataset"], f"{where}/dataset.json")
    check_tokenizer(config["tokenizer"], f"{where}/tokenizer.json")
    if config["model"] or not config["pretrain"].get("initial_model"):
        check_model(config["model"], f"{where}/model.json")
    check_training(config["pretrain"], INITIAL, f"{where}/pretrain.json")
    check_training(config["finetune"], TUNING, f"{where}/finetune.json")
    _check_evaluation(config["evaluation"], f"{where}/evaluation.json")
    check_keys(config["generation"], native["generation"] | GENERATION, f"{where}/generation.json")
    require(config["generation"], ("prompts", "max_new_tokens"), f"{where}/generation.json")
    if not config["generation"]["prompts"]:
        raise Refused(f"{where}/generation.json: prompts: empty, wanted one or more texts to continue")
    for key in ("prompts", "questions"):
        for text in config["generation"].get(key, []):
            if not isinstance(text, str):
                raise Refused(f"{where}/generation.json: {key}: {show(text)}, wanted texts")
    if config["finetune"].get("sample_steps") is not None and not config["generation"].get("questions"):
        raise Refused(
            f"{where}/finetune.json: sample_steps: {config['finetune']['sample_steps']}, but generation.json "
            "has no questions to answer. Add `questions` there, or leave sample_steps out"
        )
    _check_instruction(config["instruction"], f"{where}/instruction.json")
    if "preference" in config:
        _check_preference(config, f"{where}/preference.json")
    _check_agreement(config, where)


def _check_instruction(values: dict[str, Any], where: str) -> None:
    check_keys(values, INSTRUCTION, where)
    _check_own_pairs(values, PAIRS, "`source` (a source of dataset.json), `path` or `dataset`", where)
    if values.get("template", FORMS[0]) not in FORMS:
        raise Refused(
            f"{where}: template: {show(values['template'])}, wanted one of {', '.join(FORMS)}."
            f"{nearest(values['template'], FORMS)}"
        )


def _check_evaluation(values: dict[str, Any], where: str) -> None:
    check_keys(values, EVALUATION, where)
    for key in ("batch_size", "megabytes_per_source", "items_per_task"):
        if values.get(key, 1) <= 0:
            raise Refused(f"{where}: {key}: {values[key]}, wanted more than 0")
    for name, task in values.get("tasks", {}).items():
        here = f"{where}: tasks.{name}"
        known = (*PACKAGED_TASKS, *JGLUE_TASKS)
        if name not in known:
            raise Refused(f"{here}: no such task.{nearest(name, known)} Known: {', '.join(known)}")
        if not isinstance(task, dict):
            raise Refused(f"{here}: {show(task)} is {type_name(task)}, wanted an object")
        if name in PACKAGED_TASKS:
            check_keys(task, {"source": "str"}, here)
            require(task, ("source",), here)
        else:
            check_keys(task, {"path": "str"}, here)
            if name == "marc-ja" and "path" not in task:
                raise Refused(
                    f"{here}.path: missing. MARC-ja is no longer given out: give the folder of your own copy "
                    "(train-*.json and valid-*.json), or remove the task"
                )


def _check_own_pairs(values: dict[str, Any], known: dict[str, str], wanted: str, where: str) -> None:
    """Check the key `pairs` of instruction.json or preference.json, and how they are split."""
    require(values, ("pairs",), where)
    if not 0 < values.get("valid_share", 0.05) < 1:
        raise Refused(f"{where}: valid_share: {values['valid_share']}, wanted above 0 and below 1")
    for name, pair in values["pairs"].items():
        if not isinstance(pair, dict):
            raise Refused(f"{where}: pairs.{name}: {show(pair)} is {type_name(pair)}, wanted an object")
        check_keys(pair, known, f"{where}: pairs.{name}")
        if len({"source", "path", "dataset"} & pair.keys()) != 1:
            raise Refused(f"{where}: pairs.{name}: wanted exactly one of {wanted}")


def _check_preference(config: dict[str, dict[str, Any]], where: str) -> None:
    values = config["preference"]
    check_training(values, TUNING | PREFERENCE, where)
    _check_own_pairs(values, OWN_PAIRS, "`path` or `dataset`", where)
    if not values["pairs"]:
        raise Refused(f"{where}: pairs: empty. Name some, or delete the file to do without stage 13")
    if not config["instruction"]["pairs"]:
        raise Refused(
            f"{where}: preferences are trained after instructions, and instruction.json names no pairs. "
            "Add pairs there, or delete preference.json"
        )
    if values.get("muon_learning_rate"):
        raise Refused(f"{where}: muon_learning_rate: stage 13 trains with AdamW. Remove it")
    for key in ("z_loss", "sample_steps", "eval_blocks"):
        if values.get(key):
            raise Refused(f"{where}: {key}: {show(values[key])}: stage 13 does not read it. Remove it")
    if values.get("torch_compile"):
        raise Refused(f"{where}: torch_compile: the lengths of its batches differ. Remove it")
    if values.get("beta", 0.1) <= 0:
        raise Refused(f"{where}: beta: {values['beta']}, wanted more than 0")


def _check_agreement(config: dict[str, dict[str, Any]], where: str) -> None:
    """Facts that stand in two files must be the same fact."""
    _check_initial(config, where)
    model, initial = model_values(config), config["pretrain"].get("initial_model")
    home = f"{initial}/config.json" if initial else f"{where}/model.json"
    check_special_ids(config, special_ids(config["tokenizer"]), vocabulary_size(config["tokenizer"]), where)
    positions = model.get("max_position_embeddings") or model.get("n_positions")
    for name in training_files(config):
        if positions and config[name]["block_size"] > positions:
            raise Refused(
                f"{where}/{name}.json: block_size: {config[name]['block_size']}, more than the "
                f"{positions} positions of {home}"
            )
    new_tokens = config["generation"]["max_new_tokens"]
    if positions and positions <= new_tokens:
        raise Refused(
            f"{where}/generation.json: max_new_tokens: {new_tokens} leaves no room for a prompt in the "
            f"{positions} positions of {home}"
        )
    for name, pair in config["instruction"]["pairs"].items():
        _check_pair(name, pair, config["dataset"]["sources"], f"{where}/instruction.json: pairs.{name}")
    for name, task in config["evaluation"].get("tasks", {}).items():
        if name in PACKAGED_TASKS:
            _check_task(name, task["source"], config["dataset"]["sources"], f"{where}/evaluation.json: tasks")


def _check_initial(config: dict[str, dict[str, Any]], where: str) -> None:
    """The checkpoint to start from, the vocabulary and model.json belong together."""
    pretrain, tokenizer = config["pretrain"], config["tokenizer"]
    name, here = pretrain.get("initial_model"), f"{where}/pretrain.json"
    if name is None:
        if pretrain.get("initial_revision"):
            raise Refused(f"{here}: initial_revision: stands there without initial_model. Remove it")
        return
    # A SentencePiece file in the folder is named with its own path.
    place = tokenizer.get("published", "")
    if place != name and not (place.startswith(f"{name}/") and place.endswith(".model")):
        other = f"from {place}" if place else "from nowhere: it trains one"
        raise Refused(
            f"{here}: initial_model: {name}, but {where}/tokenizer.json takes its vocabulary {other}. A "
            "checkpoint is of use only with the vocabulary it was trained with: write "
            f'{{"kind": "published", "published": {show(name)}}} there (new_pieces may extend it)'
        )
    revisions = pretrain.get("initial_revision"), tokenizer.get("revision")
    if place == name and revisions[0] != revisions[1]:
        raise Refused(
            f"{here}: initial_revision: {show(revisions[0])}, but {where}/tokenizer.json has revision "
            f"{show(revisions[1])}. Give both the same"
        )
    published = published_config(pretrain)
    if published and published.get("model_type") not in known_keys()["model"]:
        raise Refused(
            f"{here}: initial_model: {name}/config.json: model_type: {show(published.get('model_type'))}, "
            f"wanted one of {', '.join(known_keys()['model'])}"
        )
    for key, value in config["model"].items():
        if key not in FROM_TOKENIZER and published.get(key, value) != value:
            raise Refused(
                f"{where}/model.json: {key}: {show(value)}, but {name}/config.json has "
                f"{show(published[key])}. Leave it out of model.json (or delete the file): the checkpoint "
                "brings its own"
            )


def check_special_ids(
    config: dict[str, dict[str, Any]], ids: dict[str, int | None], size: int | None, where: str
) -> None:
    """Refuse a vocabulary size or special ids in model.json or generation.json other than the tokenizer's."""
    if size is not None and config["model"].get("vocab_size", size) != size:
        raise Refused(
            f"{where}/model.json: vocab_size: {config['model']['vocab_size']}, but {where}/tokenizer.json "
            f"has {size}. Leave it out of model.json: it comes from the tokenizer"
        )
    for key, wanted in ids.items():
        for file in ("model", "generation"):
            if config[file].get(key, wanted) != wanted:
                raise Refused(
                    f"{where}/{file}.json: {key}: {config[file][key]}, but the tokenizer has {wanted}. "
                    f"Leave it out of {file}.json"
                )


def _check_pair(name: str, pair: dict[str, Any], sources: dict[str, Any], here: str) -> None:
    unknown = sorted(set(pair.get("directions", [])) - {"ja-en", "en-ja"})
    if unknown:
        raise Refused(f"{here}.directions: {show(unknown)}, wanted ja-en or en-ja")
    if "source" not in pair:
        return
    if name not in PAIR_SOURCES:
        raise Refused(
            f"{here}: no packaged pairs of this name.{nearest(name, PAIR_SOURCES)} Known: "
            f"{', '.join(PAIR_SOURCES)}. For pairs of your own give `path` or `dataset`"
        )
    if pair["source"] not in sources:
        raise Refused(
            f"{here}.source: {show(pair['source'])} is no source of dataset.json."
            f"{nearest(pair['source'], sources)} Remove the entry, give a `path` to pairs of your own, "
            'or write "pairs": {} to do without tuning'
        )
    kind = sources[pair["source"]]["source"]
    if kind != PAIR_SOURCES[name]:
        raise Refused(f"{here}.source: a source of kind {kind}, wanted {PAIR_SOURCES[name]}")


def _check_task(name: str, source: str, sources: dict[str, Any], where: str) -> None:
    kind = sources.get(source, {}).get("source")
    if kind != PACKAGED_TASKS[name]:
        raise Refused(
            f"{where}.{name}.source: {show(source)} is no source of kind {PACKAGED_TASKS[name]} in "
            f"dataset.json.{nearest(source, sources)} Remove the task, or name such a source"
        )


def training_files(config: dict[str, dict[str, Any]]) -> list[str]:
    """The files of a recipe that a training reads."""
    return [name for name in ("pretrain", "finetune", "preference") if name in config]


TRAINING_STAGES = {"pretrain": 5, "finetune": 12, "preference": 13}


def tuned_stage(config: dict[str, dict[str, Any]]) -> str:
    """The stage whose model is the recipe's last: what is evaluated, asked and talked to."""
    return "13_preference" if "preference" in config else "12_finetune"


def deciding_keys(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """The part of a file that can change a result: what a stage's freshness is judged by."""
    if section == "dataset":
        sources = {
            name: {key: value for key, value in spec.items() if key not in NOT_DECIDING_OF_SOURCE}
            for name, spec in values["sources"].items()
        }
        # Their order is their priority in deduplication.
        kept = {key: value for key, value in values.items() if key not in ("engine", "disk_gigabytes")}
        return kept | {"sources": sources, "order": list(sources)}

    def decides(key: str) -> bool:
        return not any(
            key == name or (name[-1] == "*" and key.startswith(name[:-1])) for name in NOT_DECIDING
        )

    return {key: value for key, value in values.items() if decides(key)}


def main() -> None:
    """Check a recipe with the options of run_all.sh; exit 2 with the fault."""
    from recipe.download import source_facts
    from recipe.hardware import glance
    from recipe.instructions import pair_facts  # here: they import this module's names
    from recipe.launch import add_options, launch_of

    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--from", type=int, default=0, dest="first", help="first stage that will run")
    parser.add_argument("--to", type=int, default=99, dest="last", help="last stage that will run")
    add_options(parser)
    arguments = parser.parse_args()

    from recipe.preferences import preference_facts

    try:
        config = load_recipe(arguments.recipe, arguments.overrides)
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
