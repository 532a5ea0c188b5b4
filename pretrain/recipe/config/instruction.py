"""The keys of instruction.json and their checks."""

from __future__ import annotations

from typing import Any

from recipe.config.chat_templates import FORMS
from recipe.config.keys import check_keys, require, show, type_name
from recipe.config.ranges import (
    BETWEEN_0_AND_1,
    FROM_0_TO_1,
    check_ranges,
)
from recipe.corpus.packaged_pairs import PACKAGED_PAIRS, TRANSLATIONS
from recipe.project import Refused, nearest

VALID_SHARE = 0.05  # of the pairs, where valid_share is left out
INSTRUCTION = {
    "template": "str",
    "system": "str",
    "pairs": "dict",
    "translation_share": "float",
    "valid_share": "float",
}

# The keys of a user's own pairs: files (path), or a data set on the hub or in a folder (dataset).
OWN_PAIRS = {"path": "str", "dataset": "str", "configuration": "str", "split": "str", "revision": "str"}

# The origins of pairs, and the keys that are read next to each.
ORIGINS = {
    "path": (),
    "dataset": ("configuration", "split", "revision"),
    "source": ("directions",),
}

# In instruction.json, pairs can also be made from packaged text (source).
PAIRS = OWN_PAIRS | {"source": "str", "directions": "list"}


def check_instruction(values: dict[str, Any], where: str) -> None:
    """Check instruction.json by itself (see also `check_pair`). Raises Refused at the first error."""
    check_keys(values, INSTRUCTION, where)
    require(values, ("pairs",), where, 'Add it, or write "pairs": {} to leave out tuning')
    check_pairs(values, PAIRS, "`source` (a source of dataset.json), `path` or `dataset`", where)
    template = values.get("template", FORMS[0])
    if template not in FORMS:
        raise Refused(
            f"{where}: template: {show(template)}, expected one of {', '.join(FORMS)}."
            f"{nearest(template, FORMS)}"
        )
    check_ranges(values, {"translation_share": FROM_0_TO_1}, where)


def check_pairs(values: dict[str, Any], known: dict[str, str], origins: str, where: str) -> None:
    """Check the keys `pairs` and `valid_share`. known: the keys of an entry; origins: in words."""
    require(values, ("pairs",), where)
    check_ranges(values, {"valid_share": BETWEEN_0_AND_1}, where)
    for name, pair in values["pairs"].items():
        if not isinstance(pair, dict):
            raise Refused(f"{where}: pairs.{name}: {show(pair)} is {type_name(pair)}, expected an object")
        check_keys(pair, known, f"{where}: pairs.{name}")
        given = ORIGINS.keys() & pair.keys()
        if len(given) != 1:
            raise Refused(f"{where}: pairs.{name}: {show(pair)}, expected exactly one of {origins}")
        (origin,) = given
        for key in sorted(pair.keys() - {origin, *ORIGINS[origin]}):
            raise Refused(f"{where}: pairs.{name}: {key}: nothing reads it next to `{origin}`. Leave it out")


def check_pair(name: str, pair: dict[str, Any], sources: dict[str, Any], here: str) -> None:
    """Check an entry of `pairs` against the sources of dataset.json. Raises Refused.

    here: names the entry in messages.
    """
    unknown = [direction for direction in pair.get("directions", []) if direction not in list(TRANSLATIONS)]
    if unknown:
        raise Refused(f"{here}.directions: {show(unknown)}, expected {' or '.join(TRANSLATIONS)}")
    if "source" not in pair:
        return
    if "directions" in pair and name != "translation":
        raise Refused(f"{here}.directions: only the pairs `translation` read it. Leave it out")
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
