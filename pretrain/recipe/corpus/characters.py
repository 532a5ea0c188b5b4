"""Normalising the characters of a dialogue, without its layout.

The pretraining text is prose: `recipe.corpus.normalizing` removes spaces and empty lines from it. Dialogues
contain code, lists and tables, where indentation and empty lines have a meaning, so only characters are
replaced here, by those that the model knows from the pretraining text.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable
from typing import Any

import neologdn

_LINE_ENDS = re.compile("\r\n?|[\x85\u2028\u2029]")
_DECOMPOSED = re.compile("[\u3041-\u30ff][\u3099\u309a]")  # kana and a combining voicing mark
# One at a time, because neologdn shortens runs.
_HALF_WIDTH_KANA = re.compile("[\u3041-\u30ff\uff61-\uff9f][ﾞﾟ]|[\uff61-\uff9f]")
_LEADING_LINES = re.compile(r"(?:[^\S\n]*\n)+")
_FULL_WIDTH_AND_QUOTES = (*map(chr, range(0xFF01, 0xFF5E)), *"‘’“”")
_TILDES = "∼∾〜〰～"


@functools.cache
def _replaced() -> dict[int, str]:
    """What neologdn makes of full-width letters, digits and marks and of curly quotes, by code point.

    It takes ``－`` for a length mark; here it is a hyphen.
    """
    found = {
        ord(character): neologdn.normalize(f"a{character}a")[1:-1] for character in _FULL_WIDTH_AND_QUOTES
    }
    return found | {ord("－"): "-", ord("～"): "〜"}


def make_dialogue_normalizer(config: dict[str, Any]) -> Callable[[str], str]:
    """The normaliser of dialogues that a dataset.json describes; white space and hyphens stay as they are.

    Half-width kana become full-width, full-width letters ASCII, decomposed kana composed, and every line end
    a line feed. The keys ``nfkc``, ``keep_wave_dash`` and ``neologdn.tilde`` have the same effect as on the
    pretraining text (see `make_normalizer`), but an ASCII ``~`` always stays. Empty lines at the beginning
    and white space at the end are removed.

    The normaliser raises UnicodeError for half of a surrogate pair.
    """
    default = "ignore" if config.get("keep_wave_dash", True) else "remove"
    tilde = config.get("neologdn", {}).get("tilde", default)
    replaced = _replaced()
    if tilde != "ignore":
        to = {"normalize": "~", "normalize_zenkaku": "〜"}.get(tilde, "")
        replaced = replaced | dict.fromkeys(map(ord, _TILDES), to)

    def normalize(text: str) -> str:
        text.encode("utf-8")
        if config.get("nfkc", False):
            text = unicodedata.normalize("NFKC", text)
        text = _HALF_WIDTH_KANA.sub(lambda kana: neologdn.normalize(kana[0], tilde="ignore"), text)
        text = _DECOMPOSED.sub(lambda kana: unicodedata.normalize("NFC", kana[0]), text)
        text = _LINE_ENDS.sub("\n", text).translate(replaced)
        # A first line that is not empty keeps its indentation.
        leading = _LEADING_LINES.match(text)
        return text[leading.end() if leading else 0 :].rstrip()

    return normalize
