"""Normalising text: what neologdn does line by line, done for a whole text at once in numpy.

What neologdn does with a character depends on that character and on its neighbours only: half-width kana and
full-width letters are mapped, spaces beside Japanese go, hyphens, length marks and tildes are unified, runs
of them shortened, a voicing mark is joined to its kana. So neologdn itself is asked once what becomes of each
of the 63,488 characters of the Basic Multilingual Plane, and of a space before and after it. With the answers
as tables, a text takes a dozen array operations in place of a loop over its characters. The result is
identical (tests/unit/test_normalizing.py), the speed is measured by tests/bench/cleaning.py.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable
from typing import Any, NamedTuple

import neologdn
import numpy as np

from recipe.project import RecipeError

TILDES = ("remove", "ignore", "normalize", "normalize_zenkaku")

_BREAKS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # where str.splitlines ends a line
_SPACE, _NEWLINE = 0x20, 0x0A
_SHORT = 64  # characters; below it, the fixed cost of the array operations is more than neologdn's loop


class _Tables(NamedTuple):
    """Arrays of 65,536: what neologdn makes of each UTF-16 unit. Surrogates are left as they are."""

    mapped: np.ndarray  # uint16: the unit it becomes
    removed: np.ndarray  # bool: it is deleted wherever it stands
    merged: np.ndarray  # bool: it is deleted after what it would itself become
    space_before: np.ndarray  # bool: a space before it can stay
    space_after: np.ndarray  # bool: a space after it can stay


@functools.cache
def _tables(tilde: str) -> _Tables:
    """Ask neologdn about every character, in the middle of a line of Latin letters."""
    ask = functools.partial(neologdn.normalize, tilde=tilde)
    mapped = np.arange(0x10000, dtype=np.uint16)
    removed, merged, before, after = (np.zeros(0x10000, dtype=bool) for _ in range(4))
    for code in (*range(0xD800), *range(0xE000, 0x10000)):
        character = chr(code)
        became = ask(f"a{character}a")[1:-1]
        if not became:
            removed[code] = True
            continue
        mapped[code] = ord(became)
        before[code] = ask(f"a {character}a")[1] == " "
        after[code] = ask(f"a{character} a")[-2] == " "
        merged[code] = became in "-ー" and ask(f"a{became}{character}a") == f"a{became}a"
    before[0xD800:0xE000] = ask("a 😀a")[1] == " "  # what lies beyond the plane, as two surrogates
    after[0xD800:0xE000] = ask("a😀 a")[-2] == " "
    for code in map(ord, _BREAKS):  # lines are lines, and an empty one is left out
        mapped[code], merged[code], before[code], after[code] = _NEWLINE, True, False, False
    return _Tables(mapped, removed, merged, before, after)


@functools.cache
def _voiced() -> tuple[re.Pattern[str], dict[str, str]]:
    """The pattern of all kana with a voicing mark behind it that neologdn joins, and what each becomes."""
    pairs = (chr(kana) + mark for kana in range(0x3041, 0x30FF) for mark in "ﾞﾟ")
    joined = {pair: neologdn.normalize(pair) for pair in pairs if len(neologdn.normalize(pair)) == 1}
    return re.compile("|".join(joined)), joined


def make_normalizer(config: dict[str, Any]) -> Callable[[str], str]:
    """The normaliser that a dataset.json describes: neologdn line by line, lines that become empty left out.

    ``keep_wave_dash`` (on by default): 〜 (U+301C) and its look-alike ～ (U+FF5E) stay, as 〜. neologdn
    alone deletes both, which turns 10〜20時 into 1020時. An ASCII ``~`` is left alone, it stands in paths.
    ``neologdn``: its own options repeat, remove_space, max_repeat_substr_length and tilde (which decides
    before keep_wave_dash). ``nfkc`` (off by default): Unicode's NFKC first, which also turns ～ into ``~``,
    ① into 1 and ㍿ into 株式会社.

    Raises RecipeError for an unknown tilde; the normaliser raises UnicodeError for half a surrogate pair.
    """
    options = {"tilde": "ignore" if config.get("keep_wave_dash", True) else "remove"}
    options |= config.get("neologdn", {})
    if options["tilde"] not in TILDES:
        raise RecipeError(f"neologdn.tilde: {options['tilde']!r}, wanted one of {', '.join(TILDES)}")
    repeat, longest = options.get("repeat", 0), options.get("max_repeat_substr_length", 8)
    remove_space = options.get("remove_space", True)
    tables = _tables(options["tilde"])

    def normalize(text: str) -> str:
        if config.get("nfkc", False):
            text = unicodedata.normalize("NFKC", text)
        text = text.replace("～", "〜")
        if len(text) < _SHORT:
            lines = (neologdn.normalize(line, **options) for line in text.splitlines())
            return "\n".join(line for line in lines if line)
        text = _normalize(text, tables, remove_space)
        return _shorten_repeats(text, repeat, longest) if repeat else text

    return normalize


def _normalize(text: str, tables: _Tables, remove_space: bool) -> str:
    """All of neologdn but the shortening of repeats, on all lines of a text."""
    units = np.frombuffer(f"\n{text}\n".encode("utf-16-le"), dtype=np.uint16)
    removed = tables.removed[units]
    if removed.any():
        units = units[~removed]
    mapped = tables.mapped[units]
    keep = np.ones(len(units), dtype=bool)
    spaces = np.flatnonzero(mapped == _SPACE)
    if len(spaces) and remove_space:
        # A run of spaces becomes one space, where both of its neighbours let a space stay.
        first = spaces[mapped[spaces - 1] != _SPACE]
        last = spaces[mapped[spaces + 1] != _SPACE]
        keep[spaces] = False
        keep[first] = tables.space_after[units[first - 1]] & tables.space_before[units[last + 1]]
    elif len(spaces):
        keep[spaces] = mapped[spaces + 1] != _NEWLINE  # neologdn takes one space from the end of a line
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
    if "\ufeff" in result:  # neologdn takes it for a byte order mark where a line begins with it
        lines = (line.removeprefix("\ufeff") for line in result.split("\n"))
        result = "\n".join(line for line in lines if line)
    return result


def _shorten_repeats(text: str, repeat: int, longest: int) -> str:
    """neologdn's shorten_repeat on each line that holds a repeat of at most `longest` characters (0: any)."""
    found = re.compile(rf"(.{{1,{longest or ''}}})\1{{{repeat}}}")
    lines = text.split("\n")
    return "\n".join(
        neologdn.shorten_repeat(line, repeat, longest) if found.search(line) else line for line in lines
    )
