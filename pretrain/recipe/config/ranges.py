"""The ranges of values. Each table of ranges is next to the table of types, with one entry for a key."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from recipe.config.keys import show
from recipe.project import Refused, nearest


class Range(NamedTuple):
    """words: the range in a message, after "expected". holds: whether a value is in it."""

    words: str
    holds: Callable[[Any], bool]
    names: tuple[str, ...] = ()


ABOVE_0 = Range("more than 0", lambda x: x > 0)
FROM_0 = Range("0 or more", lambda x: x >= 0)
FROM_1 = Range("1 or more", lambda x: x >= 1)
BELOW_1 = Range("0 or more and below 1", lambda x: 0 <= x < 1)
ABOVE_0_TO_100 = Range("more than 0 and at most 100", lambda x: 0 < x <= 100)
FROM_0_TO_100 = Range("a number from 0 to 100", lambda x: 0 <= x <= 100)
BETWEEN_0_AND_1 = Range("a number above 0 and below 1", lambda x: 0 < x < 1)
ABOVE_0_TO_1 = Range("more than 0 and at most 1", lambda x: 0 < x <= 1)
FROM_0_TO_1 = Range("a number from 0 to 1", lambda x: 0 <= x <= 1)
LARGEST = 10**12  # of any number in a recipe
# What numpy and torch both take as a seed.
SEED = Range("a whole number from 0 to 2^32 - 1", lambda x: 0 <= x < 2**32)
HASH = Range("a whole number from 1 to 2^32 - 1", lambda x: 1 <= x < 2**32)
# A share of the steps of a run, or a number of steps.
STEPS_OR_SHARE = Range(
    "more than 0; from 1 on a whole number of steps", lambda x: 0 < x < 1 or x == x // 1 >= 1
)
TEXTS = Range(
    "a list of texts, none of them empty", lambda x: bool(x) and all(isinstance(t, str) and t for t in x)
)


def whole(least: int, most: int) -> Range:
    """The range of a size. most: above every model and corpus that exists, so that a typo is found."""
    return Range(f"a whole number from {least:,} to {most:,}", lambda x: least <= x <= most)


# Numbers of vocabularies and of layers, widths and heads: far above any model, and below what overflows.
VOCABULARY, SIZE, POSITIONS = whole(1, 10**7), whole(1, 10**6), whole(2, 10**8)


def one_of(*names: str) -> Range:
    """The range of a key that takes one of these names."""
    return Range(f"one of {', '.join(names)}", lambda x: x in names, names)


def only(value: Any, reason: str) -> Range:
    """The range of a key that works with one value only. reason: why."""
    return Range(f"{show(value)}, or leave the key out: {reason}", lambda x: x == value)


def check_ranges(values: Mapping[str, Any], ranges: Mapping[str, Range], where: str) -> None:
    """Refuse a value that is not in the range of its key. Types are checked before; null has no range.

    Raises Refused with the key, the value, the range, and the nearest name where the range is of names.
    """
    for key, (words, holds, names) in ranges.items():
        value = values.get(key)
        if value is not None and not holds(value):
            near = nearest(str(value), names) if names else ""
            raise Refused(f"{where}: {key}: {show(value)}, expected {words}.{near}".removesuffix("."))


def check_numbers(value: Any, where: str) -> None:
    """Refuse Infinity and NaN, which Python reads from JSON, and numbers beyond LARGEST.

    where: begins the message.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise Refused(f"{where}: {value}, expected a finite number")
    if isinstance(value, int | float) and abs(value) > LARGEST:
        raise Refused(f"{where}: {show(value)}, expected a number of at most {LARGEST:,}")
    if isinstance(value, dict):
        for key, item in value.items():
            check_numbers(item, f"{where}: {key}")
    elif isinstance(value, list):
        for item in value:
            check_numbers(item, where)
