"""The rewards that stage 13 can train by (GRPO): each judges one answer, and none needs another model.

A reward is a pure function with one entry in `REWARDS`. To add one, write both, and its row in the table of
rewards in configs/README.md.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import Any, NamedTuple

from recipe.config.keys import check_keys, show, type_name
from recipe.config.ranges import ABOVE_0_TO_1, FROM_0, FROM_1, Range, check_ranges
from recipe.corpus.rules import japanese_share
from recipe.project import Refused, nearest


class Attempt(NamedTuple):
    """An answer that the model wrote in training.

    text: without special tokens. ended: by the end token, not by the length limit. expected: the answer of
    the question's row; empty where the row has none.
    """

    text: str
    ended: bool
    expected: str = ""


def equals(attempt: Attempt) -> float:
    """1 for the expected answer, else 0. Width of characters (NFKC) and white space do not count."""
    return float(bool(attempt.expected) and _plain(attempt.text) == _plain(attempt.expected))


def _plain(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def follows(attempt: Attempt, pattern: str) -> float:
    """1 for an answer that matches a regular expression as a whole, else 0. A dot also matches a line end."""
    return float(bool(re.fullmatch(pattern, attempt.text.strip(), re.DOTALL)))


def fits(attempt: Attempt, minimum: int = 1, maximum: int | None = None) -> float:
    """1 for an answer that ends within `max_completion_length` and has so many characters, else 0."""
    characters = len(attempt.text.strip())
    return float(attempt.ended and minimum <= characters and (maximum is None or characters <= maximum))


def is_japanese(attempt: Attempt, minimum: float = 0.5) -> float:
    """1 for a share of Japanese letters of at least `minimum`; a smaller share counts in proportion.

    The share is that of the characters that are not white space; an empty answer has the share 0.
    """
    return min(1.0, japanese_share(attempt.text) / minimum)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return bool(pattern)


class Reward(NamedTuple):
    """function: of an `Attempt` and the options; its value is from 0 to 1. options: their JSON types.

    ranges: of the options. required: options that have no default. reads_answer: whether every row needs an
    expected answer.
    """

    function: Callable[..., float]
    options: dict[str, str]
    ranges: dict[str, Range]
    required: tuple[str, ...] = ()
    reads_answer: bool = False


REWARDS = {
    "answer": Reward(equals, {}, {}, reads_answer=True),
    "format": Reward(
        follows,
        {"pattern": "str"},
        {"pattern": Range("a regular expression of Python, not empty", _compiles)},
        required=("pattern",),
    ),
    "length": Reward(fits, {"minimum": "int", "maximum": "int"}, {"minimum": FROM_0, "maximum": FROM_1}),
    "japanese": Reward(is_japanese, {"minimum": "float"}, {"minimum": ABOVE_0_TO_1}),
}
WEIGHT = Range("a number above 0 and at most 1,000", lambda x: 0 < x <= 1000)


def check_rewards(rewards: dict[str, Any], where: str) -> None:
    """Check the value of `rewards`. where: names it in messages. Raises Refused at the first error."""
    known = ", ".join(REWARDS)
    if not rewards:
        raise Refused(f"{where}: empty, so there is nothing to train by. Name one or more of {known}")
    for name, options in rewards.items():
        here = f"{where}.{name}"
        if name not in REWARDS:
            raise Refused(f"{here}: there is no such reward.{nearest(name, REWARDS)} Known: {known}")
        if not isinstance(options, dict):
            raise Refused(f"{here}: {show(options)} is {type_name(options)}, expected an object")
        reward = REWARDS[name]
        check_keys(options, {"weight": "float"} | reward.options, here)
        check_ranges(options, {"weight": WEIGHT} | reward.ranges, here)
        for option in reward.required:
            if option not in options:
                raise Refused(f"{here}.{option}: missing. Add it, or remove the reward")
    length = rewards.get("length", {})
    if length.get("minimum", 1) > length.get("maximum", float("inf")):
        raise Refused(
            f"{where}.length: minimum {length.get('minimum', 1)} is above maximum {length['maximum']}, so "
            "that no answer is rewarded. Lower minimum"
        )


def reads_answer(rewards: dict[str, Any]) -> bool:
    """Whether one of the rewards compares with an expected answer."""
    return any(REWARDS[name].reads_answer for name in rewards)


def score(rewards: dict[str, Any], attempt: Attempt) -> list[float]:
    """The value of each reward for one answer, without the weights, in the order of `rewards`."""
    return [
        REWARDS[name].function(attempt, **{key: value for key, value in options.items() if key != "weight"})
        for name, options in rewards.items()
    ]


def weights(rewards: dict[str, Any]) -> list[float]:
    """The weight of each reward, 1 by default."""
    return [float(options.get("weight", 1.0)) for options in rewards.values()]
