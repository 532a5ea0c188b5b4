"""Reads a JSON file that a user edits, and checks its keys and types against a table.

The native keys (of TrainingArguments, model and generation configs, DeepSpeed) are in ``known_keys.json``.
This command writes that file from the installed libraries:

    python -m recipe.config.known_keys
"""

from __future__ import annotations

import difflib
import functools
import json
import os
from pathlib import Path
from typing import Any

from recipe.project import Refused

# Native keys that are refused because something else decides the value, and what decides it.
ELSEWHERE = {
    "gradient_accumulation_steps": "global_batch_size, per_device_train_batch_size and the ranks",
    "output_dir": "recipe/run/stage.py",
    "hub_token": "the environment variable HF_TOKEN, or `hf auth login` (a token in a file gets published)",
    "deepspeed": "the option --deepspeed zero2 and configs/deepspeed/",
    "resume_from_checkpoint": "the stage, which always continues from its newest valid checkpoint",
    "remove_unused_columns": "recipe/training/training.py",
    "train_sampling_strategy": "seed and epoch, which alone decide the order of samples",
    "data_seed": "seed, which also decides the order of samples",
    "use_cpu": "the hardware (CUDA_VISIBLE_DEVICES= hides the GPUs)",
    "use_cache": "the stage, which trains without a cache: with one, a document would see the one before it",
    "fsdp": "the option --fsdp",
    "fsdp_config": "the option --fsdp",
    "parallelism_config": "the options --fsdp and --tensor-parallel",
    "accelerator_config": "global_batch_size, and the options of the launcher",
    "local_rank": "the launcher",
    "logging_nan_inf_filter": "the stage, which logs the true loss",
    "average_tokens_across_devices": "the stage, whose loss is the same on any number of ranks",
    "do_train": "the stage, which trains, and evaluates by eval_strategy",
    "do_eval": "the stage, which trains, and evaluates by eval_strategy",
    "do_predict": "the stage, which trains, and evaluates by eval_strategy",
    "enable_jit_checkpoint": "the stage, which always saves a checkpoint on a signal",
    "gradient_checkpointing": "activation_checkpointing, its present name in transformers",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs, its present name in transformers",
    "ignore_data_skip": "the stage, which continues with the sample after the last one",
    "save_only_model": "the stage, which could not continue from such a checkpoint",
    "save_on_each_node": "the stage, which keeps one folder for all nodes",
}


@functools.cache
def known_keys() -> dict[str, Any]:
    """The native keys with their types: training_arguments, generation, model.<type>, deepspeed."""
    return json.loads(Path(__file__).with_name("known_keys.json").read_text("utf-8"))


def read_config(path: Path) -> dict[str, Any]:
    """Read one JSON object from a file that a user edits.

    Raises Refused for bad JSON (with its line) and for a key that occurs twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise Refused(f"{short(path)}: {key}: occurs twice. Remove one of the two")
            result[key] = value
        return result

    try:
        value = json.loads(path.read_text("utf-8"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise Refused(
            f"{short(path)}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})"
        ) from error
    except RecursionError as error:
        raise Refused(f"{short(path)}: not valid: its objects or lists are nested too deeply") from error
    except UnicodeDecodeError as error:
        raise Refused(f"{short(path)}: not UTF-8 ({error.reason}). Save the file as UTF-8") from error
    except ValueError as error:
        # Python reads integers of at most 4,300 digits.
        raise Refused(f"{short(path)}: a number has too many digits ({error})") from error
    if not isinstance(value, dict):
        raise Refused(f"{short(path)}: expected a JSON object {{...}}, found {type_name(value)}")
    return value


def short(path: Path) -> str:
    """The path of a recipe's file, relative to the project."""
    return f"configs/{path.parent.name}/{path.name}"


def check_keys(values: dict[str, Any], known: dict[str, str], where: str) -> None:
    """Refuse a key that is not in the table `known`, and a value whose type is not the one given there."""
    for key, value in values.items():
        if key not in known:
            home = f" It is decided by {ELSEWHERE[key]}." if key in ELSEWHERE else nearest(key, known)
            raise Refused(f"{where}: {key}: unknown key (value {show(value)}).{home}")
        if not is_type(value, known[key]):
            raise Refused(f"{where}: {key}: {show(value)} is {type_name(value)}, expected {known[key]}")


def nearest(key: str, known: Any) -> str:
    """The text `` Did you mean X?`` for the nearest known key; empty when no key is near.

    All keys are named that differ in one letter only.
    """
    close = [name for name in known if _differ_in_one_letter(key, name)]
    close = close or difflib.get_close_matches(key, list(known), 1, 0.6)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _differ_in_one_letter(a: str, b: str) -> bool:
    """Whether one letter is replaced, missing, added, or swapped with the next."""
    head = len(os.path.commonprefix([a, b]))
    a, b = a[head:], b[head:]
    tail = len(os.path.commonprefix([a[::-1], b[::-1]]))
    a, b = a[: len(a) - tail], b[: len(b) - tail]
    return max(len(a), len(b)) == 1 or (len(a) == 2 and a == b[::-1])


def show(value: Any) -> str:
    """A value as JSON, at most 80 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 80 else text[:77] + "..."


def type_name(value: Any) -> str:
    """The type of a JSON value, by its name in the tables of known keys."""
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


def is_type(value: Any, expected: str) -> bool:
    """Whether a JSON value has one of the expected types, written as ``int|null``.

    An int is accepted as a float; a bool is not an int. ``any`` accepts everything.
    """
    if expected == "any":
        return True
    name, types = type_name(value), expected.split("|")
    return name in types or (name == "int" and "float" in types)


def require(values: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    """Refuse a file in which one of `keys` is missing; a misspelt one is named as such."""
    for key in keys:
        if key not in values:
            for near in (name for name in values if _differ_in_one_letter(key, name)):
                raise Refused(
                    f"{where}: {near}: unknown key (value {show(values[near])}). Did you mean {key!r}?"
                )
            raise Refused(f"{where}: {key}: missing. Add it")
