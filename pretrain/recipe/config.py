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
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from recipe import rules
from recipe.initial import published_config
from recipe.outputs import CONFIGS, EXIT_REFUSED, RecipeError, Refused
from recipe.templates import FORMS

FILES = ("dataset", "tokenizer", "model", "pretrain", "evaluation", "generation", "instruction", "finetune")
OPTIONAL_FILES = ("preference",)  # stage 13 is skipped without it

# Our own keys, with the JSON types they take. Everything else is native and comes from known_keys.json.
DATASET = {
    "sources": "dict",
    "neologdn": "dict",
    "keep_wave_dash": "bool",
    "nfkc": "bool",
    "minimum_characters": "int",
    "minimum_japanese_share": "float",
    "rules": "dict",
    "minhash": "dict|null",
    "valid_share": "float",
    "disk_gigabytes": "float",
    "engine": "dict",
}
NEOLOGDN = {"repeat": "int", "remove_space": "bool", "max_repeat_substr_length": "int", "tilde": "str"}
SOURCE = {
    "source": "str",
    "held_out": "bool",
    "rules": "str|null",
    "weight": "float",
    "licence": "str",
    "minimum_megabytes": "float",
    "maximum_megabytes": "float",
    "maximum_documents": "int",
    "maximum_bad_share": "float",
}
# Files of a user's own (`paths`), or fetched from `url` and checked against a hash.
FILES_OR_URL = {
    "paths": "list",
    "url": "str|list",
    "sha256": "str|list",
    "sha1": "str|list",
    "md5": "str|list",
}
SOURCE_KINDS = {
    "manpages": {"packages": "list"},
    "html-help": {"packages": "list"},
    "descriptions": {},
    "tatoeba": {"requirement": "str", "sha256": "str", "lines_per_document": "int"},
    "files": FILES_OR_URL | {"column": "str"},
    "wikipedia": FILES_OR_URL,
    "aozora": FILES_OR_URL,
    "datasets-folder": {"path": "str", "column": "str"},
    "hub": {"dataset": "str", "configuration": "str", "split": "str", "column": "str", "revision": "str"},
}
OPTIONAL = {"column", "lines_per_document", "configuration", "split", "revision"} | set(FILES_OR_URL)
MINHASH = {"bands": "int", "rows": "int", "ngram": "int", "seed": "int"}
TILDES = ("remove", "ignore", "normalize", "normalize_zenkaku")  # of neologdn
SEGMENTERS = ("jumanpp", "mecab", "sudachi")
ENGINES = {
    "local": {"workers": "int"},
    "slurm": {
        "workers": "int",
        "partition": "str",
        "time": "str",
        "mem_per_cpu_gb": "int",
        "env_command": "str",
        "sbatch_args": "dict",
    },
    "ray": {"workers": "int", "address": "str", "mem_per_cpu_gb": "float"},
}
# The kinds of tokenizers, with the keys that each takes beside TOKENIZER and, where it is trained, TRAINED.
TOKENIZER_KINDS = {
    "unigram": {"character_coverage": "float", "split_digits": "bool"},
    "bpe": {"character_coverage": "float", "split_digits": "bool"},
    "byte-level-bpe": {"min_frequency": "int", "split_digits": "bool"},
    "word-bpe": {
        "min_frequency": "int",
        "limit_alphabet": "int",
        "split_digits": "bool",
        "segmenter": "str|null",
    },
    "published": {"published": "str", "revision": "str", "new_pieces": "int"},
}
TOKENIZER = {
    "kind": "str",
    "pad_token": "str|null",
    "unk_token": "str|null",
    "bos_token": "str|null",
    "eos_token": "str",
    "round_to": "int",
    "training_megabytes": "float",
    "seed": "int",
    "compare": "list",
}
TRAINED = {
    "vocab_size": "int",
    "pad_token_id": "int",
    "unk_token_id": "int",
    "bos_token_id": "int",
    "eos_token_id": "int",
    "user_symbols": "list",
}
# The control tokens of a tokenizer that is trained here; without ids of their own they get 0, 1, ... in this
# order.
SPECIAL_TOKENS = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
TRAINING = {
    "global_batch_size": "int",
    "block_size": "int",
    "muon_learning_rate": "float|null",
    "attn_implementation": "str",
    "eval_blocks": "int",
    "z_loss": "float",
    "sample_steps": "int|list|null",
}
FROM_TOKENIZER = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")  # of a model's facts
# Beside TRAINING in pretrain.json: a published checkpoint to start from.
INITIAL = {"initial_model": "str|null", "initial_revision": "str|null"}
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
# Beside TRAINING in finetune.json and preference.json: an adapter in place of all weights, by LoraConfig's
# names.
TUNING = {"lora": "dict|null"}
LORA = {
    "r": "int",
    "lora_alpha": "int|float",
    "lora_dropout": "float",
    "target_modules": "str|list",
    "use_rslora": "bool",
    "quantization": "str|null",
}
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
# What has one home elsewhere, and where.
ELSEWHERE = {
    "gradient_accumulation_steps": "global_batch_size, per_device_train_batch_size and the ranks",
    "output_dir": "recipe/outputs.py",
    "hub_token": "the environment variable HF_TOKEN, or `hf auth login`: a token in a file gets published",
    "deepspeed": "the option --deepspeed zero2 and configs/deepspeed/",
    "resume_from_checkpoint": "the stage itself: it always continues from its newest good checkpoint",
    "remove_unused_columns": "recipe/training.py",
    "train_sampling_strategy": "recipe/packing.py: the order of samples is a function of seed and epoch",
    "data_seed": "seed, which decides the order of samples, too",
    "use_cpu": "the hardware (CUDA_VISIBLE_DEVICES= hides the GPUs)",
    "use_cache": "recipe/training.py: in training a cache would let a document see the one before it",
    "fsdp": "the option --fsdp",
    "fsdp_config": "the option --fsdp",
    "parallelism_config": "the options --fsdp and --tensor-parallel",
    "accelerator_config": "global_batch_size, and the options of the launcher",
    "local_rank": "the launcher",
    "average_tokens_across_devices": "recipe/training.py: the loss is the same on any number of ranks",
    "do_train": "the stage: it trains, and evaluates by eval_strategy",
    "do_eval": "the stage: it trains, and evaluates by eval_strategy",
    "do_predict": "the stage: it trains, and evaluates by eval_strategy",
    "enable_jit_checkpoint": "the stage: on a signal it always saves a checkpoint",
    "gradient_checkpointing": "activation_checkpointing, the name that transformers has for it now",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs, as transformers calls them now",
    "ignore_data_skip": "the stage: it continues with the sample after the last one",
    "save_only_model": "the stage: it could not continue from such a checkpoint",
    "save_on_each_node": "the stage: several nodes share one folder",
}
# Native keys that would break what a recipe promises or that nothing here reads, and why.
UNFIT = {
    "label_smoothing_factor": "the Trainer's smoothing would shift the labels a second time",
    "auto_find_batch_size": "it would change the global batch in silence; set per_device_train_batch_size",
    "load_best_model_at_end": "the model of the last step is what later stages expect",
    "metric_for_best_model": "the model of the last step is what later stages expect",
    "greater_is_better": "the model of the last step is what later stages expect",
    "use_liger_kernel": "its loss would take the place of the one with z_loss",
    "liger_kernel_config": "its loss would take the place of the one with z_loss",
    "bf16_full_eval": "the weights that are saved would be rounded to bf16",
    "fp16_full_eval": "the weights that are saved would be rounded to fp16",
    "dataloader_drop_last": "the last blocks of the validation side would be left out",
    "batch_eval_metrics": "an evaluation measures the loss and nothing else",
    "include_for_metrics": "an evaluation measures the loss and nothing else",
    "eval_use_gather_object": "an evaluation measures the loss and nothing else",
    "label_names": "the labels are those of packed blocks",
    "optim_args": "none of the optimizers that can be chosen here reads it",
    "optim_target_modules": "none of the optimizers that can be chosen here reads it",
}
# Keys that do nothing unless another one has one of these values, and that other's default.
NEEDS = {
    "eval_steps": ("eval_strategy", ("steps",), "no"),
    "eval_delay": ("eval_strategy", ("steps",), "no"),
    "save_steps": ("save_strategy", ("steps",), "steps"),
    "logging_steps": ("logging_strategy", ("steps",), "steps"),
    "torch_compile_mode": ("torch_compile", (True,), None),
    "torch_compile_backend": ("torch_compile", (True,), None),
}
# The optimizers whose presence the proof can see, by the name that it gives them (`recipe.callbacks`).
OPTIMIZERS = {
    "adamw_torch": "AdamW",
    "adamw_torch_fused": "AdamW",
    "adamw_8bit": "AdamW 8-bit",
    "adamw_bnb_8bit": "AdamW 8-bit",
    "paged_adamw_8bit": "AdamW 8-bit",
    "paged_adamw_32bit": "AdamW 32-bit",
    "lion_8bit": "Lion 8-bit",
    "lion_32bit": "Lion 32-bit",
    "paged_lion_8bit": "Lion 8-bit",
    "paged_lion_32bit": "Lion 32-bit",
    "adafactor": "Adafactor",
    "adagrad": "Adagrad",
    "rmsprop": "RMSprop",
    "sgd": "SGD",
}
# Schedules that the proof cannot check: `recipe.schedules` has no closed form of them.
UNPROVED_SCHEDULES = ("reduce_lr_on_plateau", "greedy", "cosine_warmup_with_min_lr")
# Boards and the module that each needs.
BOARDS = {"azure_ml": "azureml", "flyte": "flytekit"}
ATTENTION = ("auto", "documents", "eager", "sdpa", "flash_attention_2", "flash_attention_3")


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
        nearest = _nearest(stray[0][:-5], FILES + OPTIONAL_FILES)
        raise Refused(f"configs/{recipe}/{stray[0]}: no stage reads this file.{nearest}")
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
    if config["model"] or not config["pretrain"].get("initial_model"):
        _check_model(config["model"], f"{where}/model.json")
    _check_training(config["pretrain"], INITIAL, f"{where}/pretrain.json")
    _check_training(config["finetune"], TUNING, f"{where}/finetune.json")
    _check_evaluation(config["evaluation"], f"{where}/evaluation.json")
    _check_keys(config["generation"], native["generation"] | GENERATION, f"{where}/generation.json")
    _require(config["generation"], ("prompts", "max_new_tokens"), f"{where}/generation.json")
    _check_instruction(config["instruction"], f"{where}/instruction.json")
    if "preference" in config:
        _check_preference(config, f"{where}/preference.json")
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
        _check_source(source, here)
    if not any(not source.get("held_out") for source in values["sources"].values()):
        raise Refused(f"{where}: sources: every source is held_out, so there is nothing to train on")
    for key in ("minimum_japanese_share", "valid_share"):
        if not 0 <= values.get(key, 0) < 1:
            raise Refused(f"{where}: {key}: {values[key]} wanted 0 or more and below 1")
    for kind, changes in values.get("rules", {}).items():
        rules.check_rules(kind, changes, f"{where}: rules.{kind}")
    _check_keys(values.get("minhash") or {}, MINHASH, f"{where}: minhash")
    for key, value in (values.get("minhash") or {}).items():
        if value < (key != "seed"):
            raise Refused(f"{where}: minhash: {key}: {value}, wanted 1 or more")
    tilde = values.get("neologdn", {}).get("tilde", "ignore")
    if tilde not in TILDES:
        raise Refused(f"{where}: neologdn: tilde: {_show(tilde)}, wanted one of {', '.join(TILDES)}")
    _check_engine(values.get("engine", {}), f"{where}: engine")


def _check_source(source: dict[str, Any], here: str) -> None:
    kind = source["source"]
    _check_keys(source, SOURCE | SOURCE_KINDS[kind], here)
    _require(source, tuple(key for key in SOURCE_KINDS[kind] if key not in OPTIONAL), here)
    if "paths" in SOURCE_KINDS[kind] and ("paths" in source) == ("url" in source):
        raise Refused(f"{here}: wanted either `paths` (files of your own) or `url`")
    if source.get("rules") is not None:
        rules.check_rules(source["rules"], {}, f"{here}: rules")
    for key in ("weight", "maximum_megabytes", "maximum_documents"):
        if source.get(key, 1) <= 0:
            raise Refused(f"{here}: {key}: {source[key]}, wanted more than 0")
    if not 0 <= source.get("maximum_bad_share", 0) < 1:
        raise Refused(
            f"{here}: maximum_bad_share: {source['maximum_bad_share']}, wanted 0 or more and below 1"
        )


def _check_engine(values: dict[str, Any], where: str) -> None:
    executor = values.get("executor", "local")
    if not isinstance(executor, str) or executor not in ENGINES:
        raise Refused(
            f"{where}: executor: unknown {_show(executor)}.{_nearest(str(executor), ENGINES)} "
            f"Known: {', '.join(ENGINES)}"
        )
    _check_keys(values, ENGINES[executor] | {"executor": "str"}, where)
    if executor == "slurm":
        _require(values, ("partition", "time"), where)
    if values.get("workers", 1) < 1:
        raise Refused(f"{where}: workers: {values['workers']}, wanted 1 or more")


def _check_tokenizer(values: dict[str, Any], where: str) -> None:
    kind = values.get("kind", "unigram")
    if kind not in TOKENIZER_KINDS:
        raise Refused(
            f"{where}: kind: unknown {_show(kind)}.{_nearest(str(kind), TOKENIZER_KINDS)} "
            f"Known: {', '.join(TOKENIZER_KINDS)}"
        )
    trained = kind != "published"
    _check_keys(values, TOKENIZER | TOKENIZER_KINDS[kind] | (TRAINED if trained else {}), where)
    _require(values, ("vocab_size",) if trained else ("published",), where)
    for key in ("vocab_size", "round_to", "training_megabytes", "min_frequency", "limit_alphabet"):
        if values.get(key, 1) <= 0:
            raise Refused(f"{where}: {key}: {values[key]}, wanted more than 0")
    if not 0 < values.get("character_coverage", 1.0) <= 1:
        raise Refused(
            f"{where}: character_coverage: {values['character_coverage']}, wanted above 0, at most 1"
        )
    if not trained and "round_to" in values and not values.get("new_pieces"):
        raise Refused(f"{where}: round_to: needs new_pieces: only they can fill the vocabulary up")
    for key in ("user_symbols", "compare"):
        for symbol in values.get(key, []):
            if (
                not isinstance(symbol, str)
                or not symbol
                or (key == "user_symbols" and set(" ▁") & set(symbol))
            ):
                raise Refused(f"{where}: {key}: {_show(symbol)}, wanted a string without spaces")
    if values.get("segmenter") not in (None, *SEGMENTERS):
        near = _nearest(str(values["segmenter"]), SEGMENTERS)
        raise Refused(
            f"{where}: segmenter: unknown {_show(values['segmenter'])}.{near} Known: {', '.join(SEGMENTERS)}"
        )
    _check_special_tokens(values, where)


def _check_special_tokens(values: dict[str, Any], where: str) -> None:
    tokens = special_tokens(values)
    for key, token in tokens.items():
        if token is not None and (len(token) < 2 or set(token) & set(" \t\r\n\u3000▁:$")):
            raise Refused(
                f"{where}: {key}: {_show(token)}, wanted two characters or more, without spaces, ▁, : and $"
            )
    if values.get("kind") == "published":
        return
    named = [token for token in tokens.values() if token is not None]
    for token in named:
        if named.count(token) > 1 or token in values.get("user_symbols", []):
            raise Refused(f"{where}: {_show(token)} stands there twice: every token needs a name of its own")
    if values.get("kind", "unigram") != "byte-level-bpe" and tokens["unk_token"] is None:
        raise Refused(f"{where}: unk_token: null, but only byte-level-bpe can spell every text without it")
    for key, token in tokens.items():
        if token is None and f"{key}_id" in values:
            raise Refused(f"{where}: {key}_id: {values[f'{key}_id']}, but {key} is null. Remove one of them")
    ids = [special_ids(values)[f"{key}_id"] for key, token in tokens.items() if token is not None]
    if sorted(ids) != list(range(len(ids))):
        raise Refused(
            f"{where}: the ids of {', '.join(named)} are {ids}; wanted {list(range(len(ids)))} in any order. "
            "Give all of pad_token_id, unk_token_id, bos_token_id, eos_token_id or none"
        )


def special_tokens(tokenizer: dict[str, Any]) -> dict[str, str | None]:
    """The control tokens by tokenizer.json: ``pad_token`` and so on; None for one that shall not be there.

    For the kind ``published`` only what the file names: the rest is as it was published.
    """
    default = {} if tokenizer.get("kind") == "published" else SPECIAL_TOKENS
    return {
        key: tokenizer.get(key, default.get(key)) for key in SPECIAL_TOKENS if key in tokenizer or default
    }


def special_ids(tokenizer: dict[str, Any]) -> dict[str, int | None]:
    """The ids that a trained tokenizer's control tokens will have: ``pad_token_id`` and so on, or None.

    Padding falls to the end token where there is no padding token. Empty for the kind ``published``: its ids
    are known when it is loaded.
    """
    if tokenizer.get("kind") == "published":
        return {}
    tokens = [key for key, token in special_tokens(tokenizer).items() if token is not None]
    ids = {f"{key}_id": tokenizer.get(f"{key}_id", place) for place, key in enumerate(tokens)}
    missing = {f"{key}_id": None for key in SPECIAL_TOKENS if key not in tokens}
    return missing | {"pad_token_id": ids["eos_token_id"]} | ids


def vocabulary_size(tokenizer: dict[str, Any]) -> int | None:
    """The size that a trained tokenizer will have: vocab_size, rounded up to a multiple of round_to.

    None for the kind ``published``.
    """
    if tokenizer.get("kind") == "published":
        return None
    return round_up(tokenizer["vocab_size"], tokenizer.get("round_to", 1))


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `size`."""
    return -(-size // multiple) * multiple


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
    if values.get("dtype") not in (None, "float32"):
        raise Refused(
            f"{where}: dtype: {_show(values['dtype'])}, but weights are kept in float32, and bf16 or fp16 "
            "in pretrain.json decides what is computed with. Leave it out"
        )
    hidden, heads = values.get("hidden_size") or values.get("n_embd"), _heads(values)
    if hidden and heads and "head_dim" not in values and hidden % heads:
        raise Refused(f"{where}: hidden size {hidden} does not divide by {heads} attention heads")
    groups = values.get("num_key_value_heads")
    if groups and heads and heads % groups:
        raise Refused(f"{where}: num_attention_heads {heads} does not divide by num_key_value_heads {groups}")


def _heads(model: dict[str, Any]) -> int | None:
    return model.get("num_attention_heads") or model.get("n_head")


def _check_training(values: dict[str, Any], more: dict[str, str], where: str) -> None:
    """Check a training file; more: the keys that it takes beside those of every training file."""
    known = {key: kind for key, kind in known_keys()["training_arguments"].items() if key not in ELSEWHERE}
    _check_keys(values, known | TRAINING | more, where)
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
    for key, reason in UNFIT.items():
        if values.get(key):
            raise Refused(f"{where}: {key}: {_show(values[key])}: {reason}. Leave the key out")
    for key, (other, wanted, default) in NEEDS.items():
        if values.get(key) and values.get(other, default) not in wanted:
            raise Refused(
                f"{where}: {key}: {_show(values[key])} does nothing with {other} "
                f"{_show(values.get(other, default))}. Add {other}: {_show(wanted[0])}, or leave {key} out"
            )
    for key in ("eval_strategy", "save_strategy", "logging_strategy"):
        if values.get(key, "steps") not in ("steps", "no"):
            raise Refused(
                f"{where}: {key}: {_show(values[key])}, wanted steps or no: a training is one pass over "
                "blocks that are shuffled before it, and knows no end of an epoch"
            )
    if values.get("activation_checkpointing_kwargs") and not values.get("activation_checkpointing"):
        raise Refused(
            f"{where}: activation_checkpointing_kwargs does nothing without activation_checkpointing: true"
        )
    _check_optimizer(values, where)
    _check_schedule(values, where)
    _check_watching(values, where)
    if values.get("lora"):
        _check_lora(values, where)


def _check_optimizer(values: dict[str, Any], where: str) -> None:
    """An optimizer that the proof can see, and options that are its own."""
    optimizer = values.get("optim", "adamw_torch_fused")
    if optimizer not in OPTIMIZERS:
        raise Refused(
            f"{where}: optim: {optimizer}: nothing here could tell whether it is active. Known: "
            f"{', '.join(OPTIMIZERS)}; or muon_learning_rate"
        )
    stray = sorted(key for key in values if key.startswith("adam_"))
    if stray and "adamw" not in optimizer and not (stray == ["adam_beta1"] and "lion" in optimizer):
        raise Refused(f"{where}: {stray[0]}: optim {optimizer} does not read it. Leave it out")


def _check_schedule(values: dict[str, Any], where: str) -> None:
    """The schedule's options belong to it, and nothing is asked for that it would leave out in silence."""
    kind, options = values.get("lr_scheduler_type", "linear"), values.get("lr_scheduler_kwargs") or {}
    here = f"{where}: lr_scheduler_kwargs"
    if not isinstance(options, dict):
        raise Refused(f"{here}: {_show(options)} is {_type_name(options)}, wanted an object")
    if kind in UNPROVED_SCHEDULES:
        raise Refused(
            f"{where}: lr_scheduler_type: {kind}: nothing here could tell whether it is active. Write "
            "cosine, cosine_with_min_lr, linear, warmup_stable_decay or constant"
        )
    known = known_keys()["scheduler_options"].get(kind, options)
    for key in options:
        if key not in known:
            raise Refused(
                f"{here}: {key}: {kind} has no such option.{_nearest(key, known)} "
                f"Known: {', '.join(known) or 'none'}"
            )
    if kind == "constant" and values.get("warmup_steps"):
        raise Refused(
            f"{where}: warmup_steps: {values['warmup_steps']}, but lr_scheduler_type constant has no "
            "warm-up. Write constant_with_warmup, or leave warmup_steps out"
        )
    if kind == "cosine_with_min_lr":
        floors = [key for key in ("min_lr", "min_lr_rate") if options.get(key) is not None]
        if len(floors) != 1:
            raise Refused(
                f'{here}: {_show(options)}: {kind} wants one floor: {{"min_lr_rate": 0.1}} (a share of '
                'learning_rate) or {"min_lr": 1e-5}'
            )
        floor, most = options[floors[0]], values.get("learning_rate", 5e-5) if "min_lr" in floors else 1
        if not _is_type(floor, "float") or not 0 <= floor < most:
            raise Refused(f"{here}: {floors[0]}: {_show(floor)}, wanted 0 or more and below {most}")
    if kind == "warmup_stable_decay":
        _check_decay(values, options, here)


def _check_decay(values: dict[str, Any], options: dict[str, Any], here: str) -> None:
    decay = options.get("num_decay_steps")
    if not _is_type(decay, "int") or decay < 1:
        raise Refused(
            f"{here}: num_decay_steps: {_show(decay)}: warmup_stable_decay wants the steps over which the "
            'rate falls at the end: {"num_decay_steps": 1000}'
        )
    if "num_stable_steps" in options:
        raise Refused(
            f"{here}: num_stable_steps: it follows from the steps of the run, warmup_steps and "
            "num_decay_steps. Leave it out"
        )
    total, warmup = values.get("max_steps", -1), values.get("warmup_steps", 0)
    warmup = warmup if warmup >= 1 else warmup * total
    if 0 < total < decay + warmup:
        raise Refused(
            f"{here}: num_decay_steps: {decay} and warmup_steps {warmup:g} are more than the {total} of "
            f"max_steps"
        )


def _check_watching(values: dict[str, Any], where: str) -> None:
    """Boards by name, steps of samples, a z-loss that is no negative number."""
    asked = values.get("report_to") or []
    known = [*known_keys()["boards"], "none"]
    for board in [asked] if isinstance(asked, str) else asked:
        if board not in known:
            raise Refused(
                f"{where}: report_to: {_show(board)} is no board.{_nearest(str(board), known)} "
                f"Known: {', '.join(known)}. TensorBoard is written in any case"
            )
    steps = values.get("sample_steps")
    for step in steps if isinstance(steps, list) else [] if steps is None else [steps]:
        if not _is_type(step, "int") or step < 1:
            raise Refused(
                f"{where}: sample_steps: {_show(steps)}, wanted a number of steps or a list of steps, each "
                "1 or more (before the first step and after the last it always samples)"
            )
    if values.get("z_loss", 0) < 0:
        raise Refused(f"{where}: z_loss: {values['z_loss']}, wanted 0 or more (PaLM took 1e-4)")


def _check_lora(values: dict[str, Any], where: str) -> None:
    lora = values["lora"]
    _check_keys(lora, LORA, f"{where}: lora")
    for key in ("r", "lora_alpha"):
        if lora.get(key, 1) <= 0:
            raise Refused(f"{where}: lora.{key}: {lora[key]}, wanted more than 0")
    if not 0 <= lora.get("lora_dropout", 0) < 1:
        raise Refused(f"{where}: lora.lora_dropout: {lora['lora_dropout']}, wanted 0 or more and below 1")
    if lora.get("quantization") not in (None, "nf4"):
        raise Refused(f"{where}: lora.quantization: {_show(lora['quantization'])}, wanted nf4 or null")
    if values.get("muon_learning_rate"):
        raise Refused(
            f"{where}: muon_learning_rate: Muon orthogonalises whole matrices, and LoRA's are halves of a "
            "product. Remove it, or lora"
        )
    if values.get("z_loss"):
        raise Refused(f"{where}: z_loss: an adapter leaves the output matrix alone. Remove it, or lora")


def _check_instruction(values: dict[str, Any], where: str) -> None:
    _check_keys(values, INSTRUCTION, where)
    _check_own_pairs(values, PAIRS, "`source` (a source of dataset.json), `path` or `dataset`", where)
    if values.get("template", FORMS[0]) not in FORMS:
        raise Refused(
            f"{where}: template: {_show(values['template'])}, wanted one of {', '.join(FORMS)}."
            f"{_nearest(values['template'], FORMS)}"
        )


def _check_evaluation(values: dict[str, Any], where: str) -> None:
    _check_keys(values, EVALUATION, where)
    for key in ("batch_size", "megabytes_per_source", "items_per_task"):
        if values.get(key, 1) <= 0:
            raise Refused(f"{where}: {key}: {values[key]}, wanted more than 0")
    for name, task in values.get("tasks", {}).items():
        here = f"{where}: tasks.{name}"
        known = (*PACKAGED_TASKS, *JGLUE_TASKS)
        if name not in known:
            raise Refused(f"{here}: no such task.{_nearest(name, known)} Known: {', '.join(known)}")
        if not isinstance(task, dict):
            raise Refused(f"{here}: {_show(task)} is {_type_name(task)}, wanted an object")
        if name in PACKAGED_TASKS:
            _check_keys(task, {"source": "str"}, here)
            _require(task, ("source",), here)
        else:
            _check_keys(task, {"path": "str"}, here)
            if name == "marc-ja" and "path" not in task:
                raise Refused(
                    f"{here}.path: missing. MARC-ja is no longer given out: give the folder of your own copy "
                    "(train-*.json and valid-*.json), or remove the task"
                )


def _check_own_pairs(values: dict[str, Any], known: dict[str, str], wanted: str, where: str) -> None:
    """Check the key `pairs` of instruction.json or preference.json, and how they are split."""
    _require(values, ("pairs",), where)
    if not 0 < values.get("valid_share", 0.05) < 1:
        raise Refused(f"{where}: valid_share: {values['valid_share']}, wanted above 0 and below 1")
    for name, pair in values["pairs"].items():
        if not isinstance(pair, dict):
            raise Refused(f"{where}: pairs.{name}: {_show(pair)} is {_type_name(pair)}, wanted an object")
        _check_keys(pair, known, f"{where}: pairs.{name}")
        if len({"source", "path", "dataset"} & pair.keys()) != 1:
            raise Refused(f"{where}: pairs.{name}: wanted exactly one of {wanted}")


def _check_preference(config: dict[str, dict[str, Any]], where: str) -> None:
    values = config["preference"]
    _check_training(values, TUNING | PREFERENCE, where)
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
            raise Refused(f"{where}: {key}: {_show(values[key])}: stage 13 does not read it. Remove it")
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


def model_values(config: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is known of the model: model.json, and config.json of the checkpoint that it starts from.

    The latter is missing as long as it has to be fetched from the hub. Raises Refused.
    """
    return config["model"] | published_config(config["pretrain"])


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
            f'{{"kind": "published", "published": {_show(name)}}} there (new_pieces may extend it)'
        )
    revisions = pretrain.get("initial_revision"), tokenizer.get("revision")
    if place == name and revisions[0] != revisions[1]:
        raise Refused(
            f"{here}: initial_revision: {_show(revisions[0])}, but {where}/tokenizer.json has revision "
            f"{_show(revisions[1])}. Give both the same"
        )
    published = published_config(pretrain)
    if published and published.get("model_type") not in known_keys()["model"]:
        raise Refused(
            f"{here}: initial_model: {name}/config.json: model_type: {_show(published.get('model_type'))}, "
            f"wanted one of {', '.join(known_keys()['model'])}"
        )
    for key, value in config["model"].items():
        if key not in FROM_TOKENIZER and published.get(key, value) != value:
            raise Refused(
                f"{where}/model.json: {key}: {_show(value)}, but {name}/config.json has "
                f"{_show(published[key])}. Leave it out of model.json (or delete the file): the checkpoint "
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
        raise Refused(f"{here}.directions: {_show(unknown)}, wanted ja-en or en-ja")
    if "source" not in pair:
        return
    if name not in PAIR_SOURCES:
        raise Refused(
            f"{here}: no packaged pairs of this name.{_nearest(name, PAIR_SOURCES)} Known: "
            f"{', '.join(PAIR_SOURCES)}. For pairs of your own give `path` or `dataset`"
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


def _check_task(name: str, source: str, sources: dict[str, Any], where: str) -> None:
    kind = sources.get(source, {}).get("source")
    if kind != PACKAGED_TASKS[name]:
        raise Refused(
            f"{where}.{name}.source: {_show(source)} is no source of kind {PACKAGED_TASKS[name]} in "
            f"dataset.json.{_nearest(source, sources)} Remove the task, or name such a source"
        )


def training_files(config: dict[str, dict[str, Any]]) -> list[str]:
    """The files of a recipe that a training reads."""
    return [name for name in ("pretrain", "finetune", "preference") if name in config]


def tuned_stage(config: dict[str, dict[str, Any]]) -> str:
    """The stage whose model is the recipe's last: what is evaluated, asked and talked to."""
    return "13_preference" if "preference" in config else "12_finetune"


def check_quantization(values: dict[str, Any], file: str, gpus: int) -> None:
    """Refuse an adapter over 4-bit weights where there is no GPU. file: ``finetune`` or ``preference``."""
    if (values.get("lora") or {}).get("quantization") and not gpus:
        raise Refused(
            f"{file}.json: lora.quantization: nf4 weights are unpacked by CUDA kernels of bitsandbytes, and "
            "no NVIDIA GPU is visible. Tune LoRA over unquantised weights: --set "
            f"{file}.lora.quantization=null"
        )


def check_boards(asked: str | list[str] | None, file: str) -> list[str]:
    """Where the figures go: TensorBoard always, and what `report_to` asks for.

    Raises Refused for a board whose library is not installed.
    """
    names = [asked] if isinstance(asked, str) else asked or []
    names = ["tensorboard", *(name for name in names if name not in ("tensorboard", "none"))]
    for name in names:
        module = BOARDS.get(name, name)
        if importlib.util.find_spec(module) is None:
            raise Refused(
                f"{file}: report_to: {name} is not installed. Install it (.venv/bin/pip install {module}) or "
                "take it out: TensorBoard is written in any case"
            )
    return names


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
    if "activation_checkpointing" in values:
        raise Refused(
            f"{_short(path)}: activation_checkpointing: only models written for it read this section. Remove "
            'it, and set "activation_checkpointing": true in pretrain.json'
        )
    tables = known_keys()["deepspeed"]
    _check_keys(values, tables["top"], _short(path))
    for section in ("zero_optimization", "bf16", "fp16"):
        _check_keys(values.get(section, {}), tables[section], f"{_short(path)}: {section}")
    zero = values.get("zero_optimization", {})
    gathers = [key for key in zero if key.endswith("gather_16bit_weights_on_model_save") and zero[key]]
    if zero.get("stage") == 3 and not gathers:
        raise Refused(
            f"{_short(path)}: zero_optimization.stage3_gather_16bit_weights_on_model_save: without it the "
            "trained model would not be saved. Write true"
        )
    return path


def check_deepspeed_facts(path: Path, facts: dict[str, Any]) -> None:
    """Refuse a DeepSpeed file that says other than the training file, or nothing, where it must say the same.

    facts: what must stand in it, by dotted key; ``auto`` always agrees.
    """
    values = read_config(path)
    for key, wanted in facts.items():
        section, _, name = key.rpartition(".")
        seen = (values.get(section, {}) if section else values).get(name)
        if seen != "auto" and seen != wanted:
            raise Refused(
                f"{_short(path)}: {key}: {_show(seen)}, but the training file and the ranks make it "
                f'{_show(wanted)}. Write "auto"'
            )


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


def check_launch(
    values: dict[str, Any],
    file: str,
    deepspeed: str | None,
    ranks: int,
    fsdp: bool = False,
    tensor_parallel: int = 1,
) -> Path | None:
    """Check what a training file and a launcher ask of each other; return the path of the DeepSpeed file.

    file: ``pretrain``, ``finetune`` or ``preference``. deepspeed: a short name, or None. tensor_parallel:
    ranks that share each matrix. Raises Refused.
    """
    option = "--tensor-parallel" if tensor_parallel > 1 else "--fsdp" if fsdp else ""
    option = "--deepspeed" if deepspeed else option
    if deepspeed and (fsdp or tensor_parallel > 1):
        raise Refused("--deepspeed shards by itself. Drop it, or drop --fsdp and --tensor-parallel")
    if tensor_parallel < 1 or ranks % tensor_parallel:
        raise Refused(
            f"--tensor-parallel {tensor_parallel}: wanted a number that divides the {ranks} ranks (--nproc)"
        )
    if fsdp and ranks // tensor_parallel < 2:
        raise Refused(
            f"--fsdp: nothing to shard over: {ranks} ranks, {tensor_parallel} for --tensor-parallel. "
            "Give more ranks (--nproc), or drop the option"
        )
    micro_batch, accumulation = batch_layout(
        values["global_batch_size"], values["per_device_train_batch_size"], ranks // tensor_parallel
    )
    path = check_deepspeed(deepspeed) if deepspeed else None
    if path:
        facts = {
            "train_batch_size": values["global_batch_size"],
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": values.get("max_grad_norm", 1.0),
            "bf16.enabled": values.get("bf16", "auto"),
            "fp16.enabled": values.get("fp16", "auto"),
        }
        check_deepspeed_facts(path, facts)
    lora = values.get("lora") or {}
    if option in ("--fsdp", "--tensor-parallel") and (lora or file == "preference"):
        raise Refused(
            f"{file}.json: {option} shards a model whose weights are all trained, without an adapter (lora) "
            "and without the reference model of preferences. Give this stage --nproc, with --deepspeed zero2 "
            f"or zero3 if memory is short, and {option} to stage 05 alone (bash pretrain/05_pretrain.sh)"
        )
    if path and lora.get("quantization") and read_config(path)["zero_optimization"]["stage"] == 3:
        raise Refused(
            f"{file}.json: lora.quantization: ZeRO-3 cannot partition nf4 weights. Use --deepspeed zero2, or "
            f"tune LoRA over unquantised weights: --set {file}.lora.quantization=null"
        )
    if option and values.get("muon_learning_rate"):
        raise Refused(
            f"{file}.json: muon_learning_rate: Muon needs whole matrices, and under {option} a rank has "
            "parts of them (under ZeRO the Trainer would silently use AdamW). "
            f"Add --set {file}.muon_learning_rate=null, or drop {option}"
        )
    if option and values.get("torch_compile"):
        raise Refused(f"{file}.json: torch_compile: true does not work under {option}. Leave the key out")
    return path


def check_tensor_parallel(model: dict[str, Any], tensor_parallel: int) -> None:
    """Raise Refused when the heads of model.json do not divide among the ranks that share each matrix."""
    heads = model.get("num_key_value_heads") or _heads(model)
    if heads and heads % tensor_parallel:
        raise Refused(
            f"--tensor-parallel {tensor_parallel}: the {heads} key-value heads of model.json do not divide "
            "among so many ranks"
        )


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
    add_options(parser)
    arguments = parser.parse_args()

    from recipe.preferences import preference_facts

    try:
        config = load_recipe(arguments.recipe, arguments.overrides)
        for file in training_files(config):
            launch_of(arguments).check(config, file, glance())
        source_facts(config)
        pair_facts(config)
        preference_facts(config)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)  # nothing has started yet, whatever it is


if __name__ == "__main__":
    main()
