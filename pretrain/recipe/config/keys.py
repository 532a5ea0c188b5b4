"""A JSON object that a user edits: read strictly, its keys and types checked against a table.

What upstream libraries know (TrainingArguments, model and generation configs, DeepSpeed) stands in
``known_keys.json``, made by

    python -m recipe.config.known_keys
"""

from __future__ import annotations

import difflib
import functools
import json
from pathlib import Path
from typing import Any

from recipe.project import Refused

# What has one home elsewhere, and where.
ELSEWHERE = {
    "gradient_accumulation_steps": "global_batch_size, per_device_train_batch_size and the ranks",
    "output_dir": "recipe/run/stage.py",
    "hub_token": "the environment variable HF_TOKEN, or `hf auth login`: a token in a file gets published",
    "deepspeed": "the option --deepspeed zero2 and configs/deepspeed/",
    "resume_from_checkpoint": "the stage itself: it always continues from its newest good checkpoint",
    "remove_unused_columns": "recipe/training/training.py",
    "train_sampling_strategy": "the order of samples is a function of seed and epoch",
    "data_seed": "seed, which decides the order of samples, too",
    "use_cpu": "the hardware (CUDA_VISIBLE_DEVICES= hides the GPUs)",
    "use_cache": "a cache in training would let a document see the one before it",
    "fsdp": "the option --fsdp",
    "fsdp_config": "the option --fsdp",
    "parallelism_config": "the options --fsdp and --tensor-parallel",
    "accelerator_config": "global_batch_size, and the options of the launcher",
    "local_rank": "the launcher",
    "average_tokens_across_devices": "the loss is the same on any number of ranks",
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


@functools.cache
def known_keys() -> dict[str, Any]:
    """The table of native keys and types: training_arguments, generation, model.<type>, deepspeed."""
    return json.loads(Path(__file__).with_name("known_keys.json").read_text("utf-8"))


def read_config(path: Path) -> dict[str, Any]:
    """One JSON object from a file a user edits. Raises Refused for bad JSON (with the line) and duplicate
    keys.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise Refused(f"{short(path)}: {key}: stands there twice. Keep one of them")
            result[key] = value
        return result

    try:
        value = json.loads(path.read_text("utf-8"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise Refused(
            f"{short(path)}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})"
        ) from error
    except UnicodeDecodeError as error:
        raise Refused(f"{short(path)}: not UTF-8 ({error.reason}). Save the file as UTF-8") from error
    if not isinstance(value, dict):
        raise Refused(f"{short(path)}: wanted a JSON object {{...}}, found {type(value).__name__}")
    return value


def short(path: Path) -> str:
    """A file of a recipe as a user types it."""
    return f"configs/{path.parent.name}/{path.name}"


def check_keys(values: dict[str, Any], known: dict[str, str], where: str) -> None:
    """Refuse a key that is not in the table `known`, or a value of another type than it names there."""
    for key, value in values.items():
        if key not in known:
            home = f" It follows from {ELSEWHERE[key]}." if key in ELSEWHERE else nearest(key, known)
            raise Refused(f"{where}: {key}: unknown key (value {show(value)}).{home}")
        if not is_type(value, known[key]):
            raise Refused(f"{where}: {key}: {show(value)} is {type_name(value)}, wanted {known[key]}")


def nearest(key: str, known: Any) -> str:
    """`` Did you mean X?`` for the nearest known key, or nothing."""
    close = difflib.get_close_matches(key, list(known), 1, 0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def show(value: Any) -> str:
    """A value as JSON, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 80 else text[:77] + "..."


def type_name(value: Any) -> str:
    """The name that the tables here have for the type of a JSON value."""
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


def is_type(value: Any, wanted: str) -> bool:
    """True when a JSON value has one of the types in ``int|null``; an int serves as a float, a bool is no
    int.
    """
    if wanted == "any":
        return True
    name = type_name(value)
    return name in wanted.split("|") or (name == "int" and "float" in wanted.split("|"))


def require(values: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    """Refuse when one of `keys` is missing."""
    for key in keys:
        if key not in values:
            raise Refused(f"{where}: {key}: missing")
