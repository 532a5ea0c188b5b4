"""Normalising text: neologdn's rules, applied to a whole text at once in numpy.

neologdn works line by line, and what it does with a character depends only on that character and its
neighbours: half-width kana and full-width letters are mapped, spaces next to Japanese are removed, hyphens,
length marks and tildes are unified and runs of them shortened, a voicing mark is combined with its kana. So
neologdn is run once on each of the 63,488 characters of the Basic Multilingual Plane, and on a space before
and after it. The results are kept in tables; a text then needs a dozen array operations instead of a loop
over its characters.

neologdn also changes what is not the same character: it deletes wave dashes and turns long dashes into length
marks. keep_wave_dash and keep_dashes keep these, and clean_characters repairs what neologdn leaves. With the
three options off, the output is identical (tests/unit/corpus/test_normalizing.py). tests/bench/cleaning.py
measures the speed.

``"layout": "keep"`` uses none of this: only single characters are replaced (`recipe.corpus.characters`).
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import neologdn
import numpy as np

from recipe.corpus.characters import (
    INVISIBLE,
    LAST_OF_PLANES,
    MARKS,
    compose,
    has_invisible,
    make_dialogue_normalizer,
    remove_invisible,
)

_BREAKS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # where str.splitlines splits
_SPACE, _NEWLINE = 0x20, 0x0A
# Characters. For shorter texts, neologdn's own loop is faster than the array operations.
_SHORT = 64

_DASHES = "—―─━"
# A full-width hyphen that is not the length mark of a kana.
_HYPHEN = re.compile("(?<![ぁ-ゖァ-ヺーヽヾゝゞ゛゜ｦ-ﾟ－])－+")

# What is rare in a text; these are bits.
_DELETED, _IS_HYPHEN, _IS_INVISIBLE, _IS_MARK, _IS_LAST = 1, 2, 4, 8, 16


class _Tables(NamedTuple):
    """Arrays of 65,536: what neologdn does with each UTF-16 unit. Surrogates are not changed."""

    rare: np.ndarray  # uint8: _DELETED, or what `_fix` must look at; 0 for most units
    mapped: np.ndarray  # uint16: the unit it becomes
    merged: np.ndarray  # bool: it is deleted after a unit that becomes the same
    space_before: np.ndarray  # bool: a space before it may stay
    space_after: np.ndarray  # bool: a space after it may stay


@functools.cache
def _tables(tilde: str, keep_dashes: bool, clean_characters: bool) -> _Tables:
    """Run neologdn on every character, in the middle of a line of Latin letters."""
    ask = functools.partial(neologdn.normalize, tilde=tilde)
    mapped = np.arange(0x10000, dtype=np.uint16)
    rare = np.zeros(0x10000, dtype=np.uint8)
    merged, before, after = (np.zeros(0x10000, dtype=bool) for _ in range(3))
    for code in (*range(0xD800), *range(0xE000, 0x10000)):
        character = chr(code)
        became = ask(f"a{character}a")[1:-1]
        if not became:
            rare[code] = _DELETED
            continue
        mapped[code] = ord(became)
        before[code] = ask(f"a {character}a")[1] == " "
        after[code] = ask(f"a{character} a")[-2] == " "
        merged[code] = became in "-ー" and ask(f"a{became}{character}a") == f"a{became}a"
    before[0xD800:0xE000] = ask("a 😀a")[1] == " "  # characters outside the plane, as two surrogates
    after[0xD800:0xE000] = ask("a😀 a")[-2] == " "
    for code in map(ord, _BREAKS):  # the ends of lines; empty lines are removed
        mapped[code], merged[code], before[code], after[code] = _NEWLINE, True, False, False
    for code in map(ord, _DASHES if keep_dashes else ""):
        mapped[code], merged[code], before[code], after[code] = code, False, True, True
    for bit, characters in _to_fix(keep_dashes, clean_characters).items():
        found = re.compile(f"[{characters}]")
        rare |= np.array([bit * bool(found.match(chr(code))) for code in range(0x10000)], dtype=np.uint8)
    if clean_characters:  # the last two characters of a plane end with these surrogates
        rare[0xDFFE:0xE000] = _IS_LAST
    return _Tables(rare, mapped, merged, before, after)


def _to_fix(keep_dashes: bool, clean_characters: bool) -> dict[int, str]:
    """The characters that `_fix` may change, as in the brackets of a pattern, by their bit."""
    characters = {_IS_HYPHEN: "－"} if keep_dashes else {}
    return characters | (
        {_IS_INVISIBLE: INVISIBLE, _IS_MARK: MARKS, _IS_LAST: LAST_OF_PLANES} if clean_characters else {}
    )


@functools.cache
def _voiced() -> tuple[re.Pattern[str], dict[str, str]]:
    """A pattern of all kana with a voicing mark that neologdn combines, and what each becomes."""
    pairs = (chr(kana) + mark for kana in range(0x3041, 0x30FF) for mark in "ﾞﾟ")
    joined = {pair: neologdn.normalize(pair) for pair in pairs if len(neologdn.normalize(pair)) == 1}
    return re.compile("|".join(joined)), joined


def make_normalizer(config: dict[str, Any], figures: Counter[str] | None = None) -> Callable[[str], str]:
    """The normaliser that a dataset.json describes: neologdn line by line, without the empty lines.

    ``layout``: with ``keep`` only characters are replaced, as in dialogues (`make_dialogue_normalizer`):
    indentation, empty lines, spaces, list marks and dashes stay as they are. The default is ``neologdn``.
    ``keep_wave_dash`` (on by default): 〜 (U+301C) and its look-alike ～ (U+FF5E) stay, as 〜. neologdn
    alone deletes both, which turns 10〜20時 into 1020時. An ASCII ``~`` is never changed, because
    paths contain it.
    ``keep_dashes`` (on by default): long dashes stay, and a full-width hyphen becomes a hyphen unless it
    follows a kana. neologdn alone makes length marks of all: それは――いや becomes それはーいや, and
    ０３－１２３４ becomes 03ー1234.
    ``clean_characters`` (on by default): letters and combining marks are composed (NFC), as in か + U+3099,
    and invisible characters are removed: zero-width spaces, soft hyphens, byte order marks, marks of the
    direction of writing, C1 controls and code points that are no characters.
    ``neologdn``: its own options repeat, remove_space, max_repeat_substr_length and tilde (which decides
    before keep_wave_dash). ``nfkc`` (off by default): Unicode's NFKC first, which also turns ～ into ``~``,
    ① into 1 and ㍿ into 株式会社.

    figures: the numbers of invisible characters removed, and of characters composed, are added to it.
    The normaliser raises UnicodeError for half of a surrogate pair.
    """
    figures = Counter() if figures is None else figures
    if config.get("layout") == "keep":
        return make_dialogue_normalizer(config, figures)
    options = {"tilde": "ignore" if config.get("keep_wave_dash", True) else "remove"}
    options |= config.get("neologdn", {})
    repeat, longest = options.get("repeat", 0), options.get("max_repeat_substr_length", 8)
    remove_space = options.get("remove_space", True)
    fixes = config.get("keep_dashes", True), config.get("clean_characters", True)
    tables = _tables(options["tilde"], *fixes)
    visible = re.compile(f"[{('－' + _DASHES) * fixes[0] + MARKS * fixes[1]}]" if any(fixes) else "(?!)")

    def is_special(text: str) -> bool:
        """Whether neologdn's own loop cannot be used. No invisible character is printable."""
        return bool(visible.search(text)) or (fixes[1] and not text.isprintable() and has_invisible(text))

    def normalize(text: str) -> str:
        if config.get("nfkc", False):
            text = unicodedata.normalize("NFKC", text)
        text = text.replace("～", "〜")
        if len(text) < _SHORT and not is_special(text):
            lines = (neologdn.normalize(line, **options) for line in text.splitlines())
            return "\n".join(line for line in lines if line)
        units = _utf16(text)
        rare = tables.rare[units]
        if rare.any():
            found = int(np.bitwise_or.reduce(rare))
            if found > _DELETED:
                units = _utf16(_fix(text, found, figures))
            units = units[tables.rare[units] != _DELETED]
        text = _normalize(units, tables, remove_space)
        return _shorten_repeats(text, repeat, longest) if repeat else text

    return normalize


def _fix(text: str, found: int, figures: Counter[str]) -> str:
    """The text with what neologdn must not see replaced. found: the bits of what may be in it."""
    if found & (_IS_INVISIBLE | _IS_LAST):
        text = remove_invisible(text, figures)
    if found & _IS_MARK:
        text = compose(text, figures)
    return _HYPHEN.sub("-", text) if found & _IS_HYPHEN else text


def _utf16(text: str) -> np.ndarray:
    """The UTF-16 units of a text between two line feeds."""
    return np.frombuffer(f"\n{text}\n".encode("utf-16-le"), dtype=np.uint16)


def _normalize(units: np.ndarray, tables: _Tables, remove_space: bool) -> str:
    """All of neologdn except the shortening of repeats, on `_utf16` without the units that it deletes."""
    mapped = tables.mapped[units]
    keep = np.ones(len(units), dtype=bool)
    spaces = np.flatnonzero(mapped == _SPACE)
    if len(spaces) and remove_space:
        # A run of spaces becomes one space if both of its neighbours allow a space.
        first = spaces[mapped[spaces - 1] != _SPACE]
        last = spaces[mapped[spaces + 1] != _SPACE]
        keep[spaces] = False
        keep[first] = tables.space_after[units[first - 1]] & tables.space_before[units[last + 1]]
    elif len(spaces):
        keep[spaces] = mapped[spaces + 1] != _NEWLINE  # neologdn removes one space at the end of a line
    if not keep.all():
        units, mapped = units[keep], mapped[keep]
    same = np.flatnonzero(mapped[1:] == mapped[:-1]) + 1
    same = same[tables.merged[units[same]]]
    if len(same):
        mapped = np.delete(mapped, same)
    result = mapped[1:-1].tobytes().decode("utf-16-le")
    if "ﾞ" in result or "ﾟ" in result:
        pattern, joined = _voiced()
        result = pattern.sub(lambda match: joined[match[0]], result)
    if "\ufeff" in result:  # neologdn removes it at the beginning of a line, as a byte order mark
        lines = (line.removeprefix("\ufeff") for line in result.split("\n"))
        result = "\n".join(line for line in lines if line)
    return result


def _shorten_repeats(text: str, repeat: int, longest: int) -> str:
    """neologdn's shorten_repeat on each line with a repeat of at most `longest` characters (0: any)."""
    found = re.compile(rf"(.{{1,{longest or ''}}})\1{{{repeat}}}")
    lines = text.split("\n")
    return "\n".join(
        neologdn.shorten_repeat(line, repeat, longest) if found.search(line) else line for line in lines
    )
