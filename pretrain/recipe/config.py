"""The JSON files of a recipe: read, checked against each other, overridden from the command line.

`load_recipe` checks every file of the recipe before any stage starts and without importing torch: an unknown
key (with the nearest known one), a duplicate key, a wrong type, and files that contradict each other. What
upstream libraries know (TrainingArguments, model and generation configs, DeepSpeed) comes from
``known_keys.json``, made by

    python -m recipe.known_keys
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import sys
from pathlib import Path
from typing import Any

from recipe.outputs import CONFIGS, EXIT_REFUSED, RecipeError, Refused

FILES = ("dataset", "tokenizer", "model", "pretrain", "evaluation", "generation", "instruction", "finetune")

# Our own keys, with the JSON types they take. Everything else is native and comes from known_keys.json.
DATASET = {
    "sources": "dict",
    "neologdn": "dict",
    "keep_wave_dash": "bool",
    "minimum_characters": "int",
    "minimum_japanese_share": "float",
    "valid_share": "float",
}
NEOLOGDN = {"repeat": "int", "remove_space": "bool", "max_repeat_substr_length": "int"}
SOURCE = {"source": "str", "held_out": "bool", "weight": "float", "minimum_megabytes": "float"}
SOURCE_KINDS = {
    "manpages": {"packages": "list"},
    "html-help": {"packages": "list"},
    "descriptions": {},
    "tatoeba": {"requirement": "str", "sha256": "str", "lines_per_document": "int"},
    "files": {"paths": "list", "column": "str"},
    "hub": {"dataset": "str", "configuration": "str", "split": "str", "column": "str", "revision": "str"},
}
OPTIONAL = {"column", "lines_per_document", "configuration", "split", "revision"}
TOKENIZER = {
    "model_type": "str",
    "vocab_size": "int",
    "character_coverage": "float",
    "split_digits": "bool",
    "training_megabytes": "float",
    "seed": "int",
}
TRAINING = {
    "global_batch_size": "int",
    "block_size": "int",
    "muon_learning_rate": "float|null",
    "attn_implementation": "str",
    "eval_blocks": "int",
}
EVALUATION = {"batch_size": "int", "megabytes_per_source": "float"}
INSTRUCTION = {"system": "str", "pairs": "dict", "translation_share": "float", "valid_share": "float"}
PAIRS = {"source": "str", "path": "str", "directions": "list"}
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
    "project",
    "minimum_megabytes",
    "weight",  # of a source: only stages that draw by it depend on it, and say so by their facts
)
# What has one home elsewhere, and where.
ELSEWHERE = {
    "gradient_accumulation_steps": "global_batch_size, per_device_train_batch_size and the ranks",
    "output_dir": "recipe/outputs.py",
    "deepspeed": "the option --deepspeed zero2 and configs/deepspeed/",
    "resume_from_checkpoint": "the stage itself: it always continues from its newest good checkpoint",
    "remove_unused_columns": "recipe/training.py",
    "use_cpu": "the hardware (CUDA_VISIBLE_DEVICES= hides the GPUs)",
}
# The ids of the special tokens in every tokenizer that stage 03 trains; model and generation configs follow
# them.
SPECIAL_IDS = {"pad_token_id": 0, "unk_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
ATTENTION = ("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3")


def recipes() -> list[str]:
    """The names of the recipes below configs/."""
    return sorted(path.parent.name for path in CONFIGS.glob("*/dataset.json"))


@functools.cache
def known_keys() -> dict[str, Any]:
    """The table of native keys and types: training_arguments, generation, model.<type>, deepspeed."""
    return json.loads(Path(__file__).with_name("known_keys.json").read_text("utf-8"))


def load_recipe(recipe: str, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """All files of a recipe as one dict by file name, checked, with ``FILE.KEY=VALUE`` overrides applied.

    Raises Refused, naming file, key, the value seen and the value wanted.
    """
    folder = CONFIGS / recipe
    if not (folder / "dataset.json").is_file():
        raise Refused(
            f"configs/{recipe}: no such recipe.{_nearest(recipe, recipes())} Known: {', '.join(recipes())}"
        )
    config = {}
    for name in FILES:
        path = folder / f"{name}.json"
        if not path.is_file():
            raise Refused(f"configs/{recipe}/{name}.json is missing. Copy it from configs/tiny/ and edit it")
        config[name] = read_config(path)
    stray = sorted(path.name for path in folder.glob("*.json") if path.stem not in FILES)
    if stray:
        raise Refused(
            f"configs/{recipe}/{stray[0]}: no stage reads this file.{_nearest(stray[0][:-5], FILES)}"
        )
    for override in overrides:
        _apply(config, override)
    check_recipe(config, f"configs/{recipe}")
    return config


def read_config(path: Path) -> dict[str, Any]:
    """One JSON object from a file a user edits. Raises Refused for bad JSON (with the line) and duplicate
    keys.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise Refused(f"{_short(path)}: {key}: stands there twice. Keep one of them")
            result[key] = value
        return result

    try:
        value = json.loads(path.read_text("utf-8"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise Refused(
            f"{_short(path)}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})"
        ) from error
    except UnicodeDecodeError as error:
        raise Refused(f"{_short(path)}: not UTF-8 ({error.reason}). Save the file as UTF-8") from error
    if not isinstance(value, dict):
        raise Refused(f"{_short(path)}: wanted a JSON object {{...}}, found {type(value).__name__}")
    return value


def _short(path: Path) -> str:
    return f"configs/{path.parent.name}/{path.name}"


def _apply(config: dict[str, dict[str, Any]], override: str) -> None:
    """Apply ``FILE.KEY[.KEY]=VALUE``; VALUE is JSON, or a plain string."""
    target, equals, text = override.partition("=")
    file, *keys = target.split(".")
    if not equals or not keys or file not in config:
        raise Refused(
            f"--set {override}: wanted FILE.KEY=VALUE with FILE one of {', '.join(FILES)}."
            f"{_nearest(file, FILES)}"
        )
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


# ------------------------------------------------------------------------------------------------ checks


def check_recipe(config: dict[str, dict[str, Any]], where: str) -> None:
    """Check every key and type, then what the files must agree on. Raises Refused at the first fault."""
    native = known_keys()
    _check_dataset(config["dataset"], f"{where}/dataset.json")
    _check_tokenizer(config["tokenizer"], f"{where}/tokenizer.json")
    _check_model(config["model"], f"{where}/model.json")
    for name in ("pretrain", "finetune"):
        _check_training(config[name], f"{where}/{name}.json")
    _check_keys(config["evaluation"], EVALUATION, f"{where}/evaluation.json")
    _check_keys(config["generation"], native["generation"] | GENERATION, f"{where}/generation.json")
    _require(config["generation"], ("prompts", "max_new_tokens"), f"{where}/generation.json")
    _check_instruction(config["instruction"], f"{where}/instruction.json")
    _check_agreement(config, where)


def _check_keys(values: dict[str, Any], known: dict[str, str], where: str) -> None:
    for key, value in values.items():
        if key not in known:
            home = f" It follows from {ELSEWHERE[key]}." if key in ELSEWHERE else _nearest(key, known)
            raise Refused(f"{where}: {key}: unknown key (value {_show(value)}).{home}")
        if not _is_type(value, known[key]):
            raise Refused(f"{where}: {key}: {_show(value)} is {_type_name(value)}, wanted {known[key]}")


def _nearest(key: str, known: Any) -> str:
    """`` Did you mean X?`` for the nearest known key, or nothing."""
    close = difflib.get_close_matches(key, list(known), 1, 0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 80 else text[:77] + "..."


def _type_name(value: Any) -> str:
    names = {
        bool: "bool",
        int: "int",
        float: "float",
        str: "str",
        list: "list",
        dict: "dict",
        type(None): "null",
    }
    return names[type(value)]


def _is_type(value: Any, wanted: str) -> bool:
    """True when a JSON value has one of the types in ``int|null``; an int serves as a float, a bool is no
    int.
    """
    if wanted == "any":
        return True
    name = _type_name(value)
    return name in wanted.split("|") or (name == "int" and "float" in wanted.split("|"))


def _require(values: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in keys:
        if key not in values:
            raise Refused(f"{where}: {key}: missing")


def _check_dataset(values: dict[str, Any], where: str) -> None:
    _check_keys(values, DATASET, where)
    _require(values, ("sources",), where)
    _check_keys(values.get("neologdn", {}), NEOLOGDN, f"{where}: neologdn")
    for name, source in values["sources"].items():
        here = f"{where}: sources.{name}"
        if not isinstance(source, dict):
            raise Refused(
                f"{here}: {_show(source)} is {_type_name(source)}, wanted an object with the key `source`"
            )
        if not name.replace("-", "").replace("_", "").isalnum():
            raise Refused(f"{here}: the name becomes a file name: use letters, digits, - and _")
        _require(source, ("source",), here)
        kind = source["source"]
        if not isinstance(kind, str) or kind not in SOURCE_KINDS:
            raise Refused(
                f"{here}: source: unknown kind {_show(kind)}.{_nearest(str(kind), SOURCE_KINDS)} "
                f"Known: {', '.join(SOURCE_KINDS)}"
            )
        _check_keys(source, SOURCE | SOURCE_KINDS[kind], here)
        _require(source, tuple(set(SOURCE_KINDS[kind]) - OPTIONAL), here)
        if source.get("weight", 1) <= 0:
            raise Refused(
                f"{here}: weight: {source['weight']}, wanted above 0 (2 = twice an epoch, 0.5 = half of it "
                "an epoch). Remove the source to do without it"
            )
    if not any(not source.get("held_out") for source in values["sources"].values()):
        raise Refused(f"{where}: sources: every source is held_out, so there is nothing to train on")
    for key in ("minimum_japanese_share", "valid_share"):
        if not 0 <= values.get(key, 0) < 1:
            raise Refused(f"{where}: {key}: {values[key]} wanted 0 or more and below 1")


def _check_tokenizer(values: dict[str, Any], where: str) -> None:
    _check_keys(values, TOKENIZER, where)
    _require(values, ("vocab_size",), where)
    if values.get("model_type", "unigram") != "unigram":
        raise Refused(f"{where}: model_type: {_show(values['model_type'])}, wanted unigram")


def _check_model(values: dict[str, Any], where: str) -> None:
    models = known_keys()["model"]
    _require(values, ("model_type",), where)
    kind = values["model_type"]
    if kind not in models:
        raise Refused(
            f"{where}: model_type: unknown {_show(kind)}.{_nearest(str(kind), models)} "
            f"Known: {', '.join(sorted(models))}"
        )
    _check_keys(values, models[kind], where)
    hidden, heads = values.get("hidden_size") or values.get("n_embd"), _heads(values)
    if hidden and heads and "head_dim" not in values and hidden % heads:
        raise Refused(f"{where}: hidden size {hidden} does not divide by {heads} attention heads")
    groups = values.get("num_key_value_heads")
    if groups and heads and heads % groups:
        raise Refused(f"{where}: num_attention_heads {heads} does not divide by num_key_value_heads {groups}")


def _heads(model: dict[str, Any]) -> int | None:
    return model.get("num_attention_heads") or model.get("n_head")


def _check_training(values: dict[str, Any], where: str) -> None:
    known = {key: kind for key, kind in known_keys()["training_arguments"].items() if key not in ELSEWHERE}
    _check_keys(values, known | TRAINING, where)
    _require(values, ("global_batch_size", "per_device_train_batch_size", "block_size"), where)
    for key in ("global_batch_size", "per_device_train_batch_size", "block_size"):
        if values[key] < 1:
            raise Refused(f"{where}: {key}: {values[key]}, wanted 1 or more")
    if values.get("attn_implementation", "auto") not in ATTENTION:
        raise Refused(
            f"{where}: attn_implementation: {_show(values['attn_implementation'])}, wanted one of "
            f"{', '.join(ATTENTION)}"
        )
    if values.get("bf16") and values.get("fp16"):
        raise Refused(
            f"{where}: bf16 and fp16 are both true: keep one, or neither to let the hardware decide"
        )
    if values.get("muon_learning_rate") and "optim" in values:
        raise Refused(f"{where}: optim: muon_learning_rate chooses Muon with AdamW. Remove one of the two")
    for key, options in known_keys()["choices"].items():
        if key in values and values[key] not in options:
            raise Refused(
                f"{where}: {key}: {_show(values[key])} is not known.{_nearest(str(values[key]), options)}"
            )


def _check_instruction(values: dict[str, Any], where: str) -> None:
    _check_keys(values, INSTRUCTION, where)
    _require(values, ("pairs",), where)
    if not 0 < values.get("valid_share", 0.05) < 1:
        raise Refused(f"{where}: valid_share: {values['valid_share']}, wanted above 0 and below 1")
    for name, pair in values["pairs"].items():
        if not isinstance(pair, dict):
            raise Refused(f"{where}: pairs.{name}: {_show(pair)} is {_type_name(pair)}, wanted an object")
        _check_keys(pair, PAIRS, f"{where}: pairs.{name}")
        if ("source" in pair) == ("path" in pair):
            raise Refused(
                f"{where}: pairs.{name}: wanted either `source` (a source of dataset.json) or `path`"
            )


def _check_agreement(config: dict[str, dict[str, Any]], where: str) -> None:
    """Facts that stand in two files must be the same fact."""
    model, tokenizer = config["model"], config["tokenizer"]
    if "vocab_size" in model and model["vocab_size"] != tokenizer["vocab_size"]:
        raise Refused(
            f"{where}/model.json: vocab_size: {model['vocab_size']}, but {where}/tokenizer.json has "
            f"{tokenizer['vocab_size']}. Leave it out of model.json: it comes from the tokenizer"
        )

    for key, wanted in SPECIAL_IDS.items():
        for file in ("model", "generation"):
            if config[file].get(key, wanted) != wanted:
                raise Refused(
                    f"{where}/{file}.json: {key}: {config[file][key]}, but the tokenizer has {wanted}. "
                    f"Leave it out of {file}.json"
                )
    positions = model.get("max_position_embeddings") or model.get("n_positions")
    for name in ("pretrain", "finetune"):
        if positions and config[name]["block_size"] > positions:
            raise Refused(
                f"{where}/{name}.json: block_size: {config[name]['block_size']}, more than the "
                f"{positions} positions of {where}/model.json"
            )
    new_tokens = config["generation"]["max_new_tokens"]
    if positions and positions <= new_tokens:
        raise Refused(
            f"{where}/generation.json: max_new_tokens: {new_tokens} leaves no room for a prompt in the "
            f"{positions} positions of {where}/model.json"
        )
    for name, pair in config["instruction"]["pairs"].items():
        _check_pair(name, pair, config["dataset"]["sources"], f"{where}/instruction.json: pairs.{name}")


def _check_pair(name: str, pair: dict[str, Any], sources: dict[str, Any], here: str) -> None:
    unknown = sorted(set(pair.get("directions", [])) - {"ja-en", "en-ja"})
    if unknown:
        raise Refused(f"{here}.directions: {_show(unknown)}, wanted ja-en or en-ja")
    if "path" in pair:
        return
    if name not in PAIR_SOURCES:
        raise Refused(
            f"{here}: no packaged pairs of this name.{_nearest(name, PAIR_SOURCES)} Known: "
            f"{', '.join(PAIR_SOURCES)}. For pairs of your own give `path`"
        )
    if pair["source"] not in sources:
        raise Refused(
            f"{here}.source: {_show(pair['source'])} is no source of dataset.json."
            f"{_nearest(pair['source'], sources)} Remove the entry, give a `path` to pairs of your own, "
            'or write "pairs": {} to do without tuning'
        )
    kind = sources[pair["source"]]["source"]
    if kind != PAIR_SOURCES[name]:
        raise Refused(f"{here}.source: a source of kind {kind}, wanted {PAIR_SOURCES[name]}")


def check_deepspeed(name: str) -> Path:
    """The path of a DeepSpeed file by its short name (``zero2``), checked.

    Refuses an optimizer or a scheduler in it, because DeepSpeed would silently use it instead of the
    Trainer's.
    """
    path = CONFIGS / "deepspeed" / f"{name}.json"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.json"))
        raise Refused(
            f"--deepspeed {name}: no such file {_short(path)}.{_nearest(name, known)} Known: "
            f"{', '.join(known)}"
        )
    values = read_config(path)
    for key in ("scheduler", "optimizer"):
        if key in values:
            raise Refused(
                f"{_short(path)}: {key}: it would silently replace the Trainer's. Remove it, and set "
                "learning_rate, lr_scheduler_type and optim in pretrain.json"
            )
    tables = known_keys()["deepspeed"]
    _check_keys(values, tables["top"], _short(path))
    for section in ("zero_optimization", "bf16", "fp16"):
        _check_keys(values.get(section, {}), tables[section], f"{_short(path)}: {section}")
    return path


def batch_layout(global_batch: int, most: int, ranks: int) -> tuple[int, int]:
    """(micro-batch, accumulation steps) of each rank; `most` is per_device_train_batch_size.

    Raises Refused when the global batch does not divide.
    """
    share, rest = divmod(global_batch, ranks)
    micro = min(most, share)
    if rest or share % micro:
        raise Refused(
            f"global_batch_size: {global_batch} sequences do not divide into {ranks} ranks with "
            f"per_device_train_batch_size {most}. Change one of the three (--nproc sets the ranks)"
        )
    return micro, share // micro


def check_launch(values: dict[str, Any], file: str, deepspeed: str | None, ranks: int) -> Path | None:
    """Check what a training file and a launcher ask of each other; return the path of the DeepSpeed file.

    file: ``pretrain`` or ``finetune``. deepspeed: a short name, or None. Raises Refused.
    """
    batch_layout(values["global_batch_size"], values["per_device_train_batch_size"], ranks)
    if not deepspeed:
        return None
    path = check_deepspeed(deepspeed)
    if values.get("muon_learning_rate"):
        raise Refused(
            f"{file}.json: muon_learning_rate: under DeepSpeed's ZeRO the Trainer would silently use "
            f"AdamW instead of "
            f"Muon. Add --set {file}.muon_learning_rate=null, or drop --deepspeed"
        )
    if values.get("torch_compile"):
        raise Refused(f"{file}.json: torch_compile: true does not work under --deepspeed. Leave the key out")
    return path


def deciding_keys(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """The part of a file that can change a result: what a stage's freshness is judged by."""

    def decides(key: str) -> bool:
        return not any(
            key == name or (name[-1] == "*" and key.startswith(name[:-1])) for name in NOT_DECIDING
        )

    return {
        key: deciding_keys(section, value) if isinstance(value, dict) else value
        for key, value in values.items()
        if decides(key)
    }


def main() -> None:
    """Check a recipe with the options of run_all.sh; exit 2 with the fault."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--nproc", type=int, default=0)
    parser.add_argument("--deepspeed")
    arguments = parser.parse_args()
    from recipe.download import source_facts
    from recipe.instructions import pair_facts  # here: they import this module's names
    from recipe.launch import default_ranks

    try:
        config = load_recipe(arguments.recipe, arguments.overrides)
        for file in ("pretrain", "finetune"):
            check_launch(config[file], file, arguments.deepspeed, arguments.nproc or default_ranks())
        source_facts(config)
        pair_facts(config)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)  # nothing has started yet, whatever it is


if __name__ == "__main__":
    main()
