"""The keys of instruction.json and preference.json and their checks."""

from __future__ import annotations

from typing import Any

from recipe.config.chat_templates import FORMS
from recipe.config.keys import check_keys, nearest, require, show, type_name
from recipe.config.ranges import ABOVE_0, BETWEEN_0_AND_1, FROM_0_TO_1, Range, check_ranges, one_of
from recipe.config.training import TUNING, check_training
from recipe.corpus.packaged_pairs import PACKAGED_PAIRS, TRANSLATIONS
from recipe.project import Refused

INSTRUCTION = {
    "template": "str",
    "system": "str",
    "pairs": "dict",
    "translation_share": "float",
    "valid_share": "float",
}

# The keys of a user's own pairs: files (path), or a data set on the hub or in a folder (dataset).
OWN_PAIRS = {"path": "str", "dataset": "str", "configuration": "str", "split": "str", "revision": "str"}

# In instruction.json, pairs can also be made from packaged text (source).
PAIRS = OWN_PAIRS | {"source": "str", "directions": "list"}

# The keys of preference.json in addition to TRAINING and TUNING. The last three have the names of DPOConfig.
PREFERENCE = {
    "pairs": "dict",
    "valid_share": "float",
    "beta": "float",
    "loss_type": "str",
    "label_smoothing": "float",
}

# The losses of trl's DPOTrainer.
LOSS_TYPES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
    *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)


PREFERENCE_RANGES = {
    "beta": ABOVE_0,
    "loss_type": one_of(*LOSS_TYPES),
    "label_smoothing": Range("a number from 0 to below 0.5", lambda x: 0 <= x < 0.5),
}


def check_instruction(values: dict[str, Any], where: str) -> None:
    """Check instruction.json by itself (see also `check_pair`). Raises Refused at the first error."""
    check_keys(values, INSTRUCTION, where)
    require(values, ("pairs",), where, 'Add it, or write "pairs": {} to leave out tuning')
    _check_pairs(values, PAIRS, "`source` (a source of dataset.json), `path` or `dataset`", where)
    template = values.get("template", FORMS[0])
    if template not in FORMS:
        raise Refused(
            f"{where}: template: {show(template)}, expected one of {', '.join(FORMS)}."
            f"{nearest(template, FORMS)}"
        )
    check_ranges(values, {"translation_share": FROM_0_TO_1}, where)


def _check_pairs(values: dict[str, Any], known: dict[str, str], origins: str, where: str) -> None:
    """Check the keys `pairs` and `valid_share`. known: the keys of an entry; origins: in words."""
    require(values, ("pairs",), where)
    check_ranges(values, {"valid_share": BETWEEN_0_AND_1}, where)
    for name, pair in values["pairs"].items():
        if not isinstance(pair, dict):
            raise Refused(f"{where}: pairs.{name}: {show(pair)} is {type_name(pair)}, expected an object")
        check_keys(pair, known, f"{where}: pairs.{name}")
        if len({"source", "path", "dataset"} & pair.keys()) != 1:
            raise Refused(f"{where}: pairs.{name}: {show(pair)}, expected exactly one of {origins}")


def check_preference(config: dict[str, dict[str, Any]], where: str) -> None:
    """Check preference.json of a whole recipe. Raises Refused at the first error."""
    values = config["preference"]
    check_training(values, TUNING | PREFERENCE, where)
    _check_pairs(values, OWN_PAIRS, "`path` or `dataset`", where)
    if not values["pairs"]:
        raise Refused(f"{where}: pairs: empty. Add an entry, or delete the file to leave out stage 13")
    if not config["instruction"]["pairs"]:
        raise Refused(
            f"{where}: stage 13 trains a model that was tuned on instructions, but instruction.json names no "
            "pairs. Add pairs there, or delete preference.json"
        )
    if values.get("muon_learning_rate"):
        raise Refused(f"{where}: muon_learning_rate: stage 13 trains with AdamW. Remove the key")
    for key in ("z_loss", "sample_steps", "eval_blocks"):
        if values.get(key):
            raise Refused(f"{where}: {key}: {show(values[key])}: stage 13 does not read it. Remove the key")
    if values.get("torch_compile"):
        raise Refused(
            f"{where}: torch_compile: true: stage 13 cannot compile, because the lengths of its batches "
            "differ. Remove the key"
        )
    check_ranges(values, PREFERENCE_RANGES, where)
    loss, smoothing = values.get("loss_type", "sigmoid"), values.get("label_smoothing", 0.0)
    if loss == "exo_pair" and not smoothing:
        raise Refused(f"{where}: label_smoothing: 0, but loss_type exo_pair needs a number above 0")


def check_pair(name: str, pair: dict[str, Any], sources: dict[str, Any], here: str) -> None:
    """Check an entry of `pairs` against the sources of dataset.json. Raises Refused.

    here: names the entry in messages.
    """
    unknown = [direction for direction in pair.get("directions", []) if direction not in list(TRANSLATIONS)]
    if unknown:
        raise Refused(f"{here}.directions: {show(unknown)}, expected {' or '.join(TRANSLATIONS)}")
    if "source" not in pair:
        return
    if name not in PACKAGED_PAIRS:
        raise Refused(
            f"{here}: there are no packaged pairs of this name.{nearest(name, PACKAGED_PAIRS)} Known: "
            f"{', '.join(PACKAGED_PAIRS)}. For your own pairs, give `path` or `dataset` instead of `source`"
        )
    if pair["source"] not in sources:
        raise Refused(
            f"{here}.source: {show(pair['source'])} is not a source of dataset.json."
            f"{nearest(pair['source'], sources)} Remove the entry, give the `path` of your own pairs, or "
            'write "pairs": {} to leave out tuning'
        )
    kind, expected = sources[pair["source"]]["source"], PACKAGED_PAIRS[name].source
    if kind != expected:
        raise Refused(
            f"{here}.source: {show(pair['source'])} has the kind {kind}, expected a source of kind {expected}"
        )
