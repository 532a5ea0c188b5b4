"""The JSON files of a recipe: read, extended, overridden from the command line, checked against each other.

`load_recipe` checks every file before any stage starts and without importing torch: unknown keys (with the
nearest known one), duplicate keys, wrong types, and files that contradict each other.
"""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from recipe.config.dataset import check_dataset
from recipe.config.evaluation import check_evaluation, check_task_source
from recipe.config.generation import check_generation
from recipe.config.initial_model import changed_context, published_config
from recipe.config.instruction import check_instruction, check_pair
from recipe.config.keys import known_keys, parse_json, read_config, show
from recipe.config.model import (
    DEFAULT_KEY,
    FROM_TOKENIZER,
    OWN_TOKENIZER,
    check_model,
    check_shape,
    model_values,
    positions_of,
    with_defaults,
)
from recipe.config.phases import check_phases
from recipe.config.preference import check_preference, uses_rewards
from recipe.config.ranges import check_numbers
from recipe.config.tasks import with_suite
from recipe.config.tokenizer import check_tokenizer, kind_of, special_ids, vocabulary_size
from recipe.config.training import (
    PRETRAINING,
    TUNING,
    check_embedding_rate,
    check_target_modules,
    check_training,
    training_files,
)
from recipe.project import CONFIGS, LONGEST_NAME, Refused, nearest

FILES = ("dataset", "tokenizer", "model", "pretrain", "evaluation", "generation", "instruction", "finetune")
OPTIONAL_FILES = ("preference",)  # without it, stage 13 is skipped


def recipes() -> list[str]:
    """The names of the recipes below configs/."""
    return sorted(path.parent.name for path in CONFIGS.glob("*/dataset.json"))


def recipe_options(doc: str) -> argparse.ArgumentParser:
    """A parser with --recipe and --set (``overrides``), which `load_recipe` takes. doc: the help text."""
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
    return parser


def load_recipe(recipe: str, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """All files of a recipe as one dict by file name, with overrides applied, checked.

    overrides: each ``FILE.KEY=VALUE``. The key ``extends`` is resolved and removed. Raises Refused, naming
    the file, the key, the value seen and the value expected.
    """
    if len(recipe.encode()) > LONGEST_NAME:
        raise Refused(
            f"--recipe: {recipe[:20]}... has {len(recipe.encode())} bytes, expected at most {LONGEST_NAME}"
        )
    folder = CONFIGS / recipe
    # Also a folder whose dataset.json has a misspelt name: the next check names it.
    folders = {path.parent.name for path in CONFIGS.glob("*/*.json") if path.stem in FILES}
    if recipe not in folders:
        raise Refused(
            f"configs/{recipe}: no such recipe.{nearest(recipe, recipes())} Known: {', '.join(recipes())}"
        )
    stray = sorted(path.name for path in folder.glob("*.json") if path.stem not in FILES + OPTIONAL_FILES)
    if stray:
        guess = nearest(stray[0][:-5], FILES + OPTIONAL_FILES)
        raise Refused(f"configs/{recipe}/{stray[0]}: no stage reads this file.{guess}")
    config: dict[str, dict[str, Any]] = {}
    homes: dict[str, dict[str, str]] = {}
    for name in FILES + OPTIONAL_FILES:
        if (folder / f"{name}.json").is_file():
            config[name], homes[name] = _read_extended(recipe, name)
        elif name == "model":
            config[name] = {}  # an initial model brings its own
        elif name in FILES:
            raise _missing(recipe, name)
    for override in overrides:
        file, key = _apply(config, override)
        homes.get(file, {}).pop(key, None)
    if not config["model"] and not config["pretrain"].get("initial_model"):
        raise _missing(recipe, "model")
    try:
        check_recipe(config, f"configs/{recipe}")
    except Refused as error:
        raise Refused(_name_homes(str(error), recipe, homes)) from error
    return config | {"evaluation": with_suite(config["evaluation"])}


def _missing(recipe: str, name: str) -> Refused:
    return Refused(
        f"configs/{recipe}/{name}.json is missing. Copy it from configs/tiny/ and edit it, or write "
        '{"extends": "tiny"} into it'
    )


def _read_extended(
    recipe: str, file: str, extending: tuple[str, ...] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """A file of a recipe, together with the file that it extends.

    extending: the recipes whose file led here. Returns the values, and for each key the recipe whose file
    has it. Raises Refused.
    """
    path = CONFIGS / recipe / f"{file}.json"
    values = read_config(path)
    homes = dict.fromkeys(values, recipe)
    if "extends" not in values:
        return values, homes
    base = values.pop("extends")
    here = f"configs/{recipe}/{file}.json: extends: {show(base)}"
    chain = (*extending, recipe)
    if not isinstance(base, str):
        raise Refused(f'{here}, expected the name of one recipe, such as "mistral-300m"')
    if base in chain:
        raise Refused(
            f"{here}: the file would extend itself ({' -> '.join((*chain, base))}). Remove `extends` "
            "from one of these files and write its keys there"
        )
    if base not in recipes():
        raise Refused(f"{here}: no such recipe.{nearest(base, recipes())} Known: {', '.join(recipes())}")
    if not (CONFIGS / base / f"{file}.json").is_file():
        raise Refused(
            f"{here}: configs/{base}/{file}.json does not exist. Name a recipe that has this file, or remove "
            "`extends` and write the keys here"
        )
    base_values, base_homes = _read_extended(base, file, chain)
    return base_values | values, base_homes | homes


def _name_homes(message: str, recipe: str, homes: dict[str, dict[str, str]]) -> str:
    """The message of a check, in which each ``configs/RECIPE/FILE.json: KEY`` names the file that has the
    key.
    """

    def name_home(found: re.Match[str]) -> str:
        file, key = found.groups()
        home = homes.get(file, {}).get(key, recipe)
        if home == recipe:
            return found[0]
        return f"configs/{home}/{file}.json (configs/{recipe}/{file}.json extends it): {key}"

    return re.sub(rf"configs/{re.escape(recipe)}/(\w+)\.json: (\w+)", name_home, message)


def _apply(config: dict[str, dict[str, Any]], override: str) -> tuple[str, str]:
    """Apply ``FILE.KEY[.KEY]=VALUE``, where VALUE is JSON or plain text. Returns the file and its key."""
    name, equals, text = override.partition("=")
    file, *keys = name.split(".")
    if not equals or not keys or file not in config:
        near = nearest(file, config) if file not in config else ""
        raise Refused(
            f"--set {override}: expected FILE.KEY=VALUE with FILE one of {', '.join(config)}.{near}"
        )
    if keys == ["extends"]:
        raise Refused(f"--set {override}: `extends` works only in the file. Write it into {file}.json")
    value = parse_json(text, f"--set {name}") if _is_json(text) else text
    section = config[file]
    for key in keys[:-1]:
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise Refused(f"--set {override}: {file}.{key} is not an object")
    section[keys[-1]] = value
    return file, keys[0]


def _is_json(text: str) -> bool:
    """Whether a text is JSON, also where it has too many levels or digits to be read."""
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):
        pass
    return True


def check_recipe(config: dict[str, dict[str, Any]], where: str) -> None:
    """Check every key and type, then what the files must agree on. Raises Refused at the first fault."""
    for name, values in config.items():
        for key, value in values.items():
            check_numbers(value, f"{where}/{name}.json: {key}")
    check_dataset(config["dataset"], f"{where}/dataset.json")
    check_tokenizer(config["tokenizer"], f"{where}/tokenizer.json")
    if config["model"] or not config["pretrain"].get("initial_model"):
        check_model(config["model"], f"{where}/model.json")
    check_training(config["pretrain"], PRETRAINING, f"{where}/pretrain.json")
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
    check_phases(config, where)


def _check_agreement(config: dict[str, dict[str, Any]], where: str) -> None:
    """Refuse files that contradict each other."""
    _check_initial(config, where)
    model, initial = model_values(config), config["pretrain"].get("initial_model")
    if not initial or published_config(config["pretrain"]):
        # What model.json leaves out is in the checkpoint, or else a default.
        check_shape(with_defaults(model), f"{where}/model.json")
    if model.get("model_type") in OWN_TOKENIZER and kind_of(config["tokenizer"]).trained:
        raise Refused(
            f"{where}/model.json: model_type: {show(model['model_type'])}, but tokenizer.json trains a "
            "tokenizer, and transformers 5 splits text in folders of this type by Qwen2's rules alone. Use a "
            'published tokenizer of Qwen2 ("kind": "published"), or "model_type": "qwen3"'
        )
    check_special_ids(config, special_ids(config["tokenizer"]), vocabulary_size(config["tokenizer"]), where)
    positions = positions_of(config)
    own = not initial or "max_position_embeddings" in config["model"]
    home = f"{where}/model.json" if own else f"{initial}/config.json"
    if not {"max_position_embeddings", "n_positions"} & model.keys():
        home += DEFAULT_KEY
    for name in training_files(config):
        if positions and config[name]["block_size"] > positions:
            raise Refused(
                f"{where}/{name}.json: block_size: {config[name]['block_size']}, more than the "
                f"{positions} positions of {home}"
            )
        check_target_modules(config, name, where)
        check_embedding_rate(config, name, where)
    new_tokens = config["generation"]["max_new_tokens"]
    if positions and positions <= new_tokens:
        raise Refused(
            f"{where}/generation.json: max_new_tokens: {new_tokens} leaves no room for a prompt in the "
            f"{positions} positions of {home}"
        )
    for name, pair in config["instruction"]["pairs"].items():
        check_pair(name, pair, config["dataset"]["sources"], f"{where}/instruction.json: pairs.{name}")
    if uses_rewards(config):
        for name, pair in config["preference"]["pairs"].items():
            check_pair(name, pair, config["dataset"]["sources"], f"{where}/preference.json: pairs.{name}")
    for name, task in config["evaluation"].get("tasks", {}).items():
        check_task_source(name, task, config["dataset"]["sources"], f"{where}/evaluation.json: tasks")


def _check_initial(config: dict[str, dict[str, Any]], where: str) -> None:
    """Refuse a tokenizer or a model.json that does not belong to the checkpoint to start from."""
    pretrain, tokenizer = config["pretrain"], config["tokenizer"]
    name, here = pretrain.get("initial_model"), f"{where}/pretrain.json"
    if name is None:
        if pretrain.get("initial_revision"):
            raise Refused(
                f"{here}: initial_revision: {show(pretrain['initial_revision'])}, but there is no "
                "initial_model. Add initial_model, or remove initial_revision"
            )
        return
    # A SentencePiece file in the checkpoint's folder is named with its own path.
    source = tokenizer.get("published", "")
    if source != name and not (source.startswith(f"{name}/") and source.endswith(".model")):
        other = f"takes its vocabulary from {source}" if source else "trains a new vocabulary"
        raise Refused(
            f"{here}: initial_model: {name}, but {where}/tokenizer.json {other}. A checkpoint needs the "
            "vocabulary that it was trained with: write "
            f'{{"kind": "published", "published": {show(name)}}} there (new_pieces may extend it)'
        )
    revisions = pretrain.get("initial_revision"), tokenizer.get("revision")
    if source == name and revisions[0] != revisions[1]:
        raise Refused(
            f"{here}: initial_revision: {show(revisions[0])}, but {where}/tokenizer.json has revision "
            f"{show(revisions[1])}. Give both the same"
        )
    published = published_config(pretrain)
    if published and published.get("model_type") not in known_keys()["model"]:
        raise Refused(
            f"{here}: initial_model: {name}/config.json: model_type: {show(published.get('model_type'))}, "
            f"expected one of {', '.join(known_keys()['model'])}. Name a checkpoint of one of these"
        )
    changed = changed_context(config["model"], published)
    for key, value in config["model"].items():
        if key not in (*FROM_TOKENIZER, *changed) and published.get(key, value) != value:
            raise Refused(
                f"{where}/model.json: {key}: {show(value)}, but {name}/config.json has "
                f"{show(published[key])}. Leave it out of model.json, or delete the file: the checkpoint's "
                "own config.json is used"
            )


def check_special_ids(
    config: dict[str, dict[str, Any]], ids: dict[str, int | None], size: int | None, where: str
) -> None:
    """Refuse a vocabulary size or special ids in model.json or generation.json that are not the tokenizer's.

    ids: ``pad_token_id`` and so on. size: the vocabulary's, None while it is unknown.
    """
    if size is not None and config["model"].get("vocab_size", size) != size:
        raise Refused(
            f"{where}/model.json: vocab_size: {config['model']['vocab_size']}, but {where}/tokenizer.json "
            f"has {size}. Leave it out of model.json: it comes from the tokenizer"
        )
    for key, expected in ids.items():
        for file in ("model", "generation"):
            if config[file].get(key, expected) != expected:
                raise Refused(
                    f"{where}/{file}.json: {key}: {config[file][key]}, but the tokenizer has {expected}. "
                    f"Leave it out of {file}.json"
                )
