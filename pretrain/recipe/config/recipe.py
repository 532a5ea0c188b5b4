"""The JSON files of a recipe: read, checked against each other, overridden from the command line.

`load_recipe` checks every file of the recipe before any stage starts and without importing torch: an unknown
key (with the nearest known one), a duplicate key, a wrong type, and files that contradict each other.
"""

from __future__ import annotations

import json
from typing import Any

from recipe.config.dataset import check_dataset
from recipe.config.evaluation import (
    PACKAGED_TASKS,
    check_evaluation,
    check_task,
)
from recipe.config.generation import check_generation
from recipe.config.initial_model import published_config
from recipe.config.instruction import (
    check_instruction,
    check_pair,
    check_preference,
)
from recipe.config.keys import known_keys, nearest, read_config, show
from recipe.config.model import FROM_TOKENIZER, check_model, model_values
from recipe.config.tokenizer import check_tokenizer, special_ids, vocabulary_size
from recipe.config.training import INITIAL, TUNING, check_training, training_files
from recipe.project import CONFIGS, Refused

FILES = ("dataset", "tokenizer", "model", "pretrain", "evaluation", "generation", "instruction", "finetune")
OPTIONAL_FILES = ("preference",)  # stage 13 is skipped without it


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
    check_dataset(config["dataset"], f"{where}/dataset.json")
    check_tokenizer(config["tokenizer"], f"{where}/tokenizer.json")
    if config["model"] or not config["pretrain"].get("initial_model"):
        check_model(config["model"], f"{where}/model.json")
    check_training(config["pretrain"], INITIAL, f"{where}/pretrain.json")
    check_training(config["finetune"], TUNING, f"{where}/finetune.json")
    check_evaluation(config["evaluation"], f"{where}/evaluation.json")
    check_generation(config["generation"], f"{where}/generation.json")
    if config["finetune"].get("sample_steps") is not None and not config["generation"].get("questions"):
        raise Refused(
            f"{where}/finetune.json: sample_steps: {config['finetune']['sample_steps']}, but generation.json "
            "has no questions to answer. Add `questions` there, or leave sample_steps out"
        )
    check_instruction(config["instruction"], f"{where}/instruction.json")
    if "preference" in config:
        check_preference(config, f"{where}/preference.json")
    _check_agreement(config, where)


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
        check_pair(name, pair, config["dataset"]["sources"], f"{where}/instruction.json: pairs.{name}")
    for name, task in config["evaluation"].get("tasks", {}).items():
        if name in PACKAGED_TASKS:
            check_task(name, task["source"], config["dataset"]["sources"], f"{where}/evaluation.json: tasks")


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
