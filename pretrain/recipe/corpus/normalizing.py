"""Normalising text: neologdn's rules, applied to a whole text at once in numpy.

neologdn works line by line, and what it does with a character depends only on that character and its
neighbours: half-width kana and full-width letters are mapped, spaces next to Japanese are removed, hyphens,
length marks and tildes are unified and runs of them shortened, a voicing mark is combined with its kana. So
neologdn is run once on each of the 63,488 characters of the Basic Multilingual Plane, and on a space before
and after it. The results are kept in tables; a text then needs a dozen array operations instead of a loop
over its characters. The output is identical (tests/unit/corpus/test_normalizing.py); tests/bench/cleaning.py
measures the speed.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable
from typing import Any, NamedTuple

import neologdn
import numpy as np

_BREAKS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # where str.splitlines splits
_SPACE, _NEWLINE = 0x20, 0x0A
# Characters. For shorter texts, neologdn's own loop is faster than the array operations.
_SHORT = 64


class _Tables(NamedTuple):
    """Arrays of 65,536: what neologdn does with each UTF-16 unit. Surrogates are not changed."""

    mapped: np.ndarray  # uint16: the unit it becomes
    removed: np.ndarray  # bool: it is always deleted
    merged: np.ndarray  # bool: it is deleted after a unit that becomes the same
    space_before: np.ndarray  # bool: a space before it may stay
    space_after: np.ndarray  # bool: a space after it may stay


@functools.cache
def _tables(tilde: str) -> _Tables:
    """Run neologdn on every character, in the middle of a line of Latin letters."""
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
    before[0xD800:0xE000] = ask("a 😀a")[1] == " "  # characters outside the plane, as two surrogates
    after[0xD800:0xE000] = ask("a😀 a")[-2] == " "
    for code in map(ord, _BREAKS):  # the ends of lines; empty lines are removed
        mapped[code], merged[code], before[code], after[code] = _NEWLINE, True, False, False
    return _Tables(mapped, removed, merged, before, after)


@functools.cache
def _voiced() -> tuple[re.Pattern[str], dict[str, str]]:
    """A pattern of all kana with a voicing mark that neologdn combines, and what each becomes."""
    pairs = (chr(kana) + mark for kana in range(0x3041, 0x30FF) for mark in "ﾞﾟ")
    joined = {pair: neologdn.normalize(pair) for pair in pairs if len(neologdn.normalize(pair)) == 1}
    return re.compile("|".join(joined)), joined


def make_normalizer(config: dict[str, Any]) -> Callable[[str], str]:
    """The normaliser that a dataset.json describes: neologdn line by line, without the empty lines.

    ``keep_wave_dash`` (on by default): 〜 (U+301C) and its look-alike ～ (U+FF5E) stay, as 〜. neologdn
    alone deletes both, which turns 10〜20時 into 1020時. An ASCII ``~`` is never changed, because
    paths contain it.
    ``neologdn``: its own options repeat, remove_space, max_repeat_substr_length and tilde (which decides
    before keep_wave_dash). ``nfkc`` (off by default): Unicode's NFKC first, which also turns ～ into ``~``,
    ① into 1 and ㍿ into 株式会社.

    The normaliser raises UnicodeError for half of a surrogate pair.
    """
    options = {"tilde": "ignore" if config.get("keep_wave_dash", True) else "remove"}
    options |= config.get("neologdn", {})
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
    """All of neologdn except the shortening of repeats, on all lines of a text."""
    units = np.frombuffer(f"\n{text}\n".encode("utf-16-le"), dtype=np.uint16)
    removed = tables.removed[units]
    if removed.any():
        units = units[~removed]
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
    if "\ufeff" in result:  # neologdn removes it at the begin of a line, as a byte order mark
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
