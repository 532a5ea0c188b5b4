"""The keys of instruction.json and preference.json and their checks."""

from __future__ import annotations

from typing import Any

from recipe.config.chat_templates import FORMS
from recipe.config.keys import check_keys, nearest, require, show, type_name
from recipe.config.training import TUNING, check_training
from recipe.project import Refused

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


def check_instruction(values: dict[str, Any], where: str) -> None:
    check_keys(values, INSTRUCTION, where)
    _check_own_pairs(values, PAIRS, "`source` (a source of dataset.json), `path` or `dataset`", where)
    if values.get("template", FORMS[0]) not in FORMS:
        raise Refused(
            f"{where}: template: {show(values['template'])}, wanted one of {', '.join(FORMS)}."
            f"{nearest(values['template'], FORMS)}"
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


def check_preference(config: dict[str, dict[str, Any]], where: str) -> None:
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


def check_pair(name: str, pair: dict[str, Any], sources: dict[str, Any], here: str) -> None:
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
