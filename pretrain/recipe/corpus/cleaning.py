"""Cleaning one text: normalise it, and apply the rules that may drop it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from recipe.corpus.normalizing import make_normalizer
from recipe.corpus.rules import RULES, make_rules

# Control characters, and halves of surrogate pairs.
_NOT_TEXT = re.compile("[\x00-\x08\x0e-\x1b\x7f\ud800-\udfff]")


def _without_layout(text: str) -> str:
    """The lines of a text that are not empty, without indentation, and one space for each run of spaces."""
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)


def make_cleaner(
    config: dict[str, Any], source: dict[str, Any], figures: Counter[str] | None = None
) -> Callable[[str], tuple[str, str]]:
    """A function from a text to the clean text and the reason to drop it, or "".

    config: a dataset.json. source: one of its sources. Its key ``rules`` names the set of rules; it may be
    null or missing. ``config["rules"][SET]`` changes the thresholds of a set. minimum_characters and
    minimum_japanese_share of the config apply to every source: a set can only raise them. figures: the counts
    of the normaliser are added to it.
    """
    normalize = make_normalizer(config, figures)
    kind = source.get("rules")
    changes = dict(config.get("rules", {}).get(kind, {}))
    for rule in ("minimum_characters", "minimum_japanese_share"):
        own = (RULES[kind] | changes)[rule] if kind else None
        changes[rule] = max(own or 0, config.get(rule, 0)) or None
    first_failure = make_rules(kind, changes)
    keeps_layout = config.get("layout") == "keep"

    def clean_text(text: str) -> tuple[str, str]:
        if _NOT_TEXT.search(text):
            return text, "control characters"
        text = normalize(text)
        if not text:
            return text, "empty"
        # The thresholds of the rules are for text without a layout: indentation is no repetition.
        return text, first_failure(_without_layout(text) if keeps_layout else text)

    return clean_text
