"""Normalising the characters of a dialogue, without its layout.

The pretraining text is prose: `recipe.corpus.normalizing` removes spaces and empty lines from it. Dialogues
contain code, lists and tables, where indentation and empty lines have a meaning, so only characters are
replaced here, by those that the model knows from the pretraining text.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import Any

import neologdn

_LINE_ENDS = "\r\x85\u2028\u2029"
# As in the brackets of a pattern: soft hyphens, zero-width spaces, byte order marks, marks of the direction
# of writing, the C1 controls without U+0085, which ends a line, and the code points that are no characters.
INVISIBLE = (
    "\x80-\x84\x86-\x9f\xad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufdd0-\ufdef"
    "\ufffe\uffff"
)
# The last two code points of the other planes, which are no characters either.
LAST_OF_PLANES = "".join(chr(last) + chr(last + 1) for last in range(0x1FFFE, 0x110000, 0x10000))
MARKS = "\u0300-\u036f\u3099\u309a"  # accents and voicing marks that combine with the character before
_INVISIBLE = re.compile(f"[{INVISIBLE}]")
# In one pattern with those above, both are ten times slower.
_LAST_OF_PLANES = re.compile(f"[{LAST_OF_PLANES}]")
_OTHER_PLANES = re.compile("[\U00010000-\U0010ffff]")
_MARK = re.compile(f"[{MARKS}]")
_DECOMPOSED = re.compile(f"[^{MARKS}][{MARKS}]+")
_HALF_WIDTH = re.compile("[\uff61-\uff9f]")
# One at a time, because neologdn shortens runs.
_HALF_WIDTH_KANA = re.compile("[\u3041-\u30ff\uff61-\uff9f][ﾞﾟ]|[\uff61-\uff9f]")
_LEADING_LINES = re.compile(r"(?:[^\S\n]*\n)+")
_FULL_WIDTH_AND_QUOTES = (*map(chr, range(0xFF01, 0xFF5E)), *"‘’“”")
_TILDES = "∼∾〜〰～"


@functools.cache
def _replaced() -> dict[str, str]:
    """What neologdn makes of full-width letters, digits and marks and of curly quotes, and line ends.

    It takes ``－`` for a length mark; here it is a hyphen.
    """
    found = {character: neologdn.normalize(f"a{character}a")[1:-1] for character in _FULL_WIDTH_AND_QUOTES}
    return found | {"－": "-", "～": "〜"} | dict.fromkeys(_LINE_ENDS, "\n")


def has_invisible(text: str) -> bool:
    """Whether a text has a character that `remove_invisible` removes."""
    return bool(_INVISIBLE.search(text) or (_OTHER_PLANES.search(text) and _LAST_OF_PLANES.search(text)))


def remove_invisible(text: str, figures: Counter[str]) -> str:
    """The text without characters that are not visible; their number is added to the figures."""
    text, removed = _INVISIBLE.subn("", text)
    if _OTHER_PLANES.search(text):
        text, more = _LAST_OF_PLANES.subn("", text)
        removed += more
    figures["invisible characters removed"] += removed
    return text


def compose(text: str, figures: Counter[str]) -> str:
    """The text with letters and combining marks composed (NFC); their number is added to the figures."""
    length = len(text)
    text = _DECOMPOSED.sub(lambda match: unicodedata.normalize("NFC", match[0]), text)
    figures["characters composed"] += length - len(text)
    return text


def make_dialogue_normalizer(
    config: dict[str, Any], figures: Counter[str] | None = None
) -> Callable[[str], str]:
    """The normaliser of dialogues that a dataset.json describes; white space and hyphens stay as they are.

    Half-width kana become full-width, full-width letters ASCII, and every line end a line feed. The keys
    ``nfkc``, ``clean_characters``, ``keep_wave_dash`` and ``neologdn.tilde`` have the same effect as on the
    pretraining text (see `make_normalizer`), but an ASCII ``~`` always stays. Empty lines at the beginning
    and white space at the end are removed.

    figures: the numbers of invisible characters removed, and of characters composed, are added to it.
    The normaliser raises UnicodeError for half of a surrogate pair.
    """
    default = "ignore" if config.get("keep_wave_dash", True) else "remove"
    tilde = config.get("neologdn", {}).get("tilde", default)
    replaced = _replaced()
    figures = Counter() if figures is None else figures
    clean = config.get("clean_characters", True)
    if tilde != "ignore":
        to = {"normalize": "~", "normalize_zenkaku": "〜"}.get(tilde, "")
        replaced = replaced | dict.fromkeys(_TILDES, to)
    # str.translate would look up every character.
    to_replace = re.compile(f"[{re.escape(''.join(replaced))}]")

    def normalize(text: str) -> str:
        text.encode("utf-8")
        if config.get("nfkc", False):
            text = unicodedata.normalize("NFKC", text)
        if clean and has_invisible(text):
            text = remove_invisible(text, figures)
        if clean and _MARK.search(text):
            text = compose(text, figures)
        if _HALF_WIDTH.search(text):  # much faster than a substitution that begins at every kana
            text = _HALF_WIDTH_KANA.sub(lambda kana: neologdn.normalize(kana[0], tilde="ignore"), text)
        text = text.replace("\r\n", "\n")
        text = to_replace.sub(lambda character: replaced[character[0]], text)
        # A first line that is not empty keeps its indentation.
        leading = _LEADING_LINES.match(text)
        return text[leading.end() if leading else 0 :].rstrip()

    return normalize
