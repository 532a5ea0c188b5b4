"""Reads a JSON file that a user edits, and checks its keys and types against a table.

The native keys (of TrainingArguments, model and generation configs, DeepSpeed) are in ``known_keys.json``.
This command writes that file from the installed libraries:

    python -m recipe.config.known_keys
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recipe.project import Refused, differ_in_one_letter, nearest

# Native keys that are refused because something else decides the value, and what decides it.
ELSEWHERE = {
    "gradient_accumulation_steps": "global_batch_size, per_device_train_batch_size and the ranks",
    "output_dir": "recipe/run/decision.py",
    "hub_token": "the environment variable HF_TOKEN, or `hf auth login` (a token in a file gets published)",
    "deepspeed": "the option --deepspeed zero2 and configs/deepspeed/",
    "resume_from_checkpoint": "the stage, which always continues from its newest valid checkpoint",
    "remove_unused_columns": "recipe/training/prepare.py",
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
    "prediction_loss_only": "the stage, whose evaluation measures the loss and nothing else",
    "eval_do_concat_batches": "the stage, whose evaluation measures the loss and nothing else",
    "do_train": "the stage, which trains, and evaluates by eval_strategy",
    "do_eval": "the stage, which trains, and evaluates by eval_strategy",
    "do_predict": "the stage, which trains, and evaluates by eval_strategy",
    "enable_jit_checkpoint": "the stage, which always saves a checkpoint on a signal",
    "gradient_checkpointing": "activation_checkpointing, its present name in transformers",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs, its present name in transformers",
    "ignore_data_skip": "the stage, which continues with the sample after the last one",
    "save_only_model": "the stage, which could not continue from such a checkpoint",
    "save_on_each_node": "the stage, which keeps one folder for all nodes",
    "disable_tqdm": "the stage, which shows its own progress",
    "dataloader_pin_memory": "the hardware: memory is pinned for a GPU",
    **dict.fromkeys(
        ("hub_strategy", "hub_revision", "hub_always_push"), "stage 16, which pushes once, to the main branch"
    ),
}

LEVELS = 50  # of objects and lists in each other; a file of a recipe has five


@functools.cache
def known_keys() -> dict[str, Any]:
    """The native keys with their types: training_arguments, generation, model.<type>, deepspeed."""
    return json.loads(Path(__file__).with_name("known_keys.json").read_text("utf-8"))


def read_config(path: Path) -> dict[str, Any]:
    """Read one JSON object from a file that a user edits. Raises Refused (see `parse_json`)."""
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(f"{short(path)}: not UTF-8 ({error.reason}). Save the file as UTF-8") from error
    except OSError as error:
        raise Refused(f"{short(path)}: cannot be read ({error.strerror})") from error
    value = parse_json(text, short(path))
    if not isinstance(value, dict):
        raise Refused(f"{short(path)}: expected a JSON object {{...}}, found {type_name(value)}")
    return value


def parse_json(text: str, where: str) -> Any:
    """A JSON value that a user wrote. where: the file, for messages.

    Raises Refused for bad JSON (with its line), a key that occurs twice, more than LEVELS levels, a number of
    thousands of digits, and half of a surrogate pair, which is not text.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise Refused(f"{where}: {key}: occurs twice. Remove one of the two")
            result[key] = value
        return result

    too_deep = Refused(f"{where}: objects and lists in more than {LEVELS} levels. Remove some levels")
    try:
        value = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise Refused(
            f"{where}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})"
        ) from error
    except RecursionError:
        raise too_deep from None
    except ValueError as error:  # the limit of Python for the digits of a whole number
        raise Refused(f"{where}: a number has more than {sys.get_int_max_str_digits():,} digits") from error
    level, depth = [value], 0
    while level:
        if depth > LEVELS:
            raise too_deep
        level = [part for item in level if isinstance(item, dict | list) for part in _parts(item)]
        depth += 1
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refused(f"{where}: half of a surrogate pair (\\ud800 to \\udfff), which is not text") from error
    return value


def _parts(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


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


def require(values: dict[str, Any], keys: tuple[str, ...], where: str, solution: str = "Add it") -> None:
    """Refuse a file in which one of `keys` is missing; a misspelt one is named as such.

    solution: what to do about a missing key.
    """
    for key in keys:
        if key not in values:
            for near in (name for name in values if differ_in_one_letter(key, name)):
                raise Refused(
                    f"{where}: {near}: unknown key (value {show(values[near])}). Did you mean {key!r}?"
                )
            raise Refused(f"{where}: {key}: missing. {solution}")
