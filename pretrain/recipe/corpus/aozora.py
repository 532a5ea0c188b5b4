"""Works of Aozora Bunko (青空文庫): its raw files, and the prose in them.

`read_works` reads a ``.txt`` (Shift_JIS or UTF-8) or a ``.zip`` with one, and splits a file that has several
works. `prose` removes the notation of Aozora Bunko, which https://www.aozora.gr.jp/annotation/ describes.
"""

from __future__ import annotations

import contextlib
import functools
import html
import importlib.util
import itertools
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipe.corpus.archives import HostileArchive, zip_members
from recipe.corpus.readers import MAXIMUM_BYTES, Document, fault
from recipe.project import RecipeError, Refused

GETA = "〓"  # replaces a character that cannot be shown, as in print
MAXIMUM_BAD_SHARE = 0.01  # of the characters; a file with more undecodable bytes is not Shift_JIS

# What cp932 gives for bytes that Shift_JIS leaves undefined: private use, and one control character.
_UNDEFINED = re.compile("[\ue000-\uf8ff\x80]")

# ------------------------------------------------------------------------------------------------- files


class _Unusable(Exception):
    """Why an archive cannot be read: one of `readers.FAULTS`, and the details."""


def read_works(path: Path, tolerant: bool = False) -> Iterator[Document]:
    """The works in a .txt file, or in a .zip with exactly one .txt, with their notation.

    Most files have one work, which is named by the path. If a file has several (joined with cat), each is a
    document, named ``path:line`` by its first line. Line ends become line feeds.
    A file is read as UTF-8 if it is valid UTF-8, otherwise as Shift_JIS (cp932). Archives are read in memory
    by `archives.zip_members`, which refuses hostile ones. Texts above `readers.MAXIMUM_BYTES` are a fault.
    Strict: raises RecipeError for any fault, also for a single byte that is not Shift_JIS. Tolerant: gives a
    document dropped with one of `readers.FAULTS`. Single bytes that are not Shift_JIS become U+FFFD, which
    `prose` counts; if their share is above MAXIMUM_BAD_SHARE, the work is dropped.
    """
    name = str(path)
    try:
        raw = _read_bytes(path)
    except _Unusable as error:
        reason, advice = error.args
        yield fault(name, reason, "", advice, tolerant)
        return
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = _line_feeds(_UNDEFINED.sub("\ufffd", raw.decode("cp932", errors="replace")))
        bad = text.count("\ufffd")
        if bad > (MAXIMUM_BAD_SHARE * len(text) if tolerant else 0):
            line = text.count("\n", 0, text.index("\ufffd")) + 1
            advice = f"{bad:,} of {len(text):,} characters. Get the file again or convert it"
            yield fault(f"{path}:{line}", "bad Shift_JIS", text, advice, tolerant)
            return
    text = _line_feeds(text)
    if not text.strip():
        yield fault(name, "empty file", text, "no text in it. Delete it or get it again", tolerant)
        return
    starts = [0, *_next_works(text), len(text)]
    for start, end in itertools.pairwise(starts):
        line = text.count("\n", 0, start) + 1
        yield Document(name if len(starts) == 2 else f"{name}:{line}", text[start:end])


def _line_feeds(text: str) -> str:
    """The text with \\n for \\r\\n and for \\r alone."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_bytes(path: Path) -> bytes:
    """The bytes of the text. Raises _Unusable."""
    kind = path.suffix.lower()
    if kind not in (".txt", ".zip"):
        raise RecipeError(f"{path}: unknown kind of file {path.suffix!r}; expected .txt or .zip")
    if kind == ".zip":
        raw = _read_zip(path)
    else:
        with path.open("rb") as file:
            raw = file.read(MAXIMUM_BYTES + 1)
    if len(raw) > MAXIMUM_BYTES:
        raise _Unusable("too long", f"more than {MAXIMUM_BYTES:,} bytes of text")
    return raw


def _read_zip(path: Path) -> bytes:
    """The bytes of the one .txt in an archive; other members (pictures) are never read."""
    try:
        texts = [content for _, content in zip_members(path, re.compile(r"\.txt$", re.IGNORECASE))]
    except RecipeError as error:
        reason = "unusable archive" if isinstance(error, HostileArchive) else "damaged archive"
        raise _Unusable(reason, str(error).removeprefix(f"{path}: ")) from error
    if len(texts) != 1:
        raise _Unusable("unusable archive", f"it has {len(texts)} .txt files, expected one")
    return texts[0]


# ------------------------------------------------------------------------------------------------- prose

_LEGEND = re.compile(
    r"^-{20,}[ 　]*\n【テキスト中に現れる記号について】.*?\n-{20,}[ 　]*\n", re.MULTILINE | re.DOTALL
)
# A colophon: a line 底本：, and within 40 lines one that says who made the file.
_ORIGINAL = r"[ 　]*(?:[^\s「」。]{1,6}の)?底本(?:の親本)?[ 　]*[：:]"
_MAKER = (
    r"[ 　]*(?:[^\s「」。：]{0,6}(?:入力|校正)者?|青空文庫作成ファイル|青空文庫ファイル作成|ファイル作成)"
    r"[ 　]*[：:].*"
)
_COLOPHON = re.compile(rf"(?m)^{_ORIGINAL}.*\n(?:(?!(?:[ 　]*\n)+{_ORIGINAL}).*\n){{0,40}}?{_MAKER}$")
_COLOPHON_ALONE = re.compile(rf"\n[ 　]*\n{_ORIGINAL}")  # without a maker, only after an empty line
_COLOPHON_LINE = re.compile(
    rf"(?m)^(?:{_MAKER}|[ 　]*[\d元]+年.*(?:公開|作成|修正|更新|入力)|"
    r"[ 　]*このファイルは、.*|.*ボランティアの皆さんです。.*)$"
)
_BODY_END = "［＃本文終わり］"
_HIGH_SHARE = 0.5  # of a text: a longer colophon may contain prose
_GAIJI = re.compile(r"※(［＃(?!「※)[^［］\n]*］)")  # ※［＃「※」は小書き］ is a ※ with a note
_JIS_CODE = re.compile(r"(?<![\d-])([12])-(\d{1,2})-(\d{1,2})(?![\d-])")  # plane, row, cell
_UNICODE = re.compile(r"U\+([0-9A-Fa-f]{4,6})")
_WARICHU = re.compile(r"［＃(?:ここ(?:から|で))?割り注(終わり)?］")
_NOTE_LINE = re.compile(r"(?m)^[ 　]*(?:［＃[^［］\n]*］[ 　]*)+\n")
_NOTE = re.compile(r"［＃[^［］\n]*］")
_MARKED_RUBY = re.compile(r"｜([^｜《》\n]+)《[^《》\n]*》")
# 《 》 after a character that can have a reading. Elsewhere they are brackets of the text itself.
_RUBY = re.compile(r"(?<=[^\s、。，．・「」『』（）〈〉《》！？])《[^《》\n]*》")
_ACCENTED = re.compile(r"〔[^〔〕\n]*[A-Za-z][`'^~:&,/_@][^〔〕\n]*〕")
_TAG = re.compile(r"<[^>]*>")
_BLANK_LINES = re.compile(r"\n(?:[ 　]*\n){2,}")
FIGURES = (
    "heading lines",
    "colophon lines",
    "colophons above half of the text",  # short poems; or prose that was taken for a colophon
    "ruby",
    "notes",
    "notes unclosed",  # left in the text
    "gaiji",
    "gaiji unresolved",
    "accents",  # 〔…〕 with accented letters
    "bad bytes",  # U+FFFD
)
# Characters of the notation that are text (given by a note) are moved to private use until the end.
_HIDDEN = {ord(character): 0xF0000 + number for number, character in enumerate("《》｜※［］＃〔〕／＼″")}
_SHOWN = {hidden: character for character, hidden in _HIDDEN.items()}


def require_notation() -> None:
    """Raise Refused if the library for the notation is not installed."""
    if not importlib.util.find_spec("aozora"):
        raise Refused(
            "the source kind aozora needs the package aozora, which has ready wheels for x86_64 only. With "
            "Rust installed, `pip install aozora` (as pinned in requirements.txt) builds it on other machines"
        )


@functools.cache
def _notation() -> Any:
    """The parser of the notation: a class whose objects are texts."""
    require_notation()
    # Not at the top: only this kind of source needs it, and it is not there for every machine.
    from aozora import Document as Notation

    return Notation


def prose(text: str) -> tuple[str, dict[str, int]]:
    """The prose of a work, and a count for each of FIGURES.

    Removed: the heading (title, author), the legend of the notation between two lines of hyphens, the
    colophon, readings 《…》, the ｜ that marks where their base begins, and notes ［＃…］.

    The colophon begins at ［＃本文終わり］, or at a line 底本： that is followed by a line 入力：, 校正： or
    青空文庫作成ファイル：, or at a line 底本： after an empty line. It goes to the end. Without a legend, the
    heading is the first two to six lines before an empty line, if there is a colophon.

    Replaced: ※［＃…］ by its character (from the code point, the JIS X 0213 code or the description), or by
    〓 if it is not known; 〔e'〕 by é; ／＼ by 〳〵; notes within a line (割り注) by （…）; U+FFFD by 〓;
    a run of empty lines by one empty line.
    """
    figures = dict.fromkeys(FIGURES, 0)
    head, body, colophon = _parts(_line_feeds(text))
    figures["heading lines"] = len(head.splitlines())
    figures["colophon lines"] = len(colophon.strip().splitlines())
    share = len(colophon) / max(1, len(body) + len(colophon))
    figures["colophons above half of the text"] = int(share > _HIGH_SHARE)
    body = body.replace("／″＼", "〴〵").replace("／＼", "〳〵")

    def gaiji(match: re.Match[str]) -> str:
        character = _character(match[1])
        figures["gaiji" if character else "gaiji unresolved"] += 1
        return (character or GETA).translate(_HIDDEN)

    while (resolved := _GAIJI.sub(gaiji, body)) != body:  # a description may contain another one
        body = resolved
    body = _WARICHU.sub(lambda match: "）" if match[1] else "（", body)
    figures["notes"] = body.count("［＃")
    body = _NOTE_LINE.sub("", body)
    while (without := _NOTE.sub("", body)) != body:  # notes may contain notes
        body = without
    figures["notes unclosed"] = body.count("［＃")
    figures["notes"] -= figures["notes unclosed"]
    body, marked = _MARKED_RUBY.subn(r"\1", body)
    body, plain = _RUBY.subn("", body)
    figures["ruby"] = marked + plain

    def accents(match: re.Match[str]) -> str:
        letters = _accented(match[0])
        figures["accents"] += letters != match[0]
        return letters

    body = _ACCENTED.sub(accents, body)
    figures["bad bytes"] = body.count("\ufffd")
    body = _BLANK_LINES.sub("\n\n", body.replace("\ufffd", GETA).translate(_SHOWN))
    return body.strip("\n"), figures


def _parts(text: str) -> tuple[str, str, str]:
    """Heading, body and colophon of a work; "" for a part that it does not have."""
    colophon = ""
    end = text.find(_BODY_END)
    if end < 0 and (found := _COLOPHON.search(text) or _COLOPHON_ALONE.search(text)):
        end = found.start()
    if end >= 0:
        text, colophon = text[:end], text[end:]
    if legend := _LEGEND.search(text):
        return text[: legend.start()].strip(), text[legend.end() :], colophon
    head, gap, body = text.lstrip("\n").partition("\n\n")
    if colophon and gap and 2 <= head.count("\n") + 1 <= 6:
        return head, body, colophon
    return "", text, colophon


def _next_works(text: str) -> list[int]:
    """Where the second, third, … work of a text begins.

    A work begins between a colophon and a legend, between two legends, and between two colophons with two
    or more lines of other text between them.
    """
    legends = [(found.start(), found.end(), True) for found in _LEGEND.finditer(text)]
    colophons = [(found.start(), found.end(), False) for found in _COLOPHON.finditer(text)]
    starts = []
    for (_, end, left_is_legend), (begin, _, is_legend) in itertools.pairwise(sorted(legends + colophons)):
        if left_is_legend and not is_legend:
            continue
        if left_is_legend:  # no colophon: the heading begins after an empty line
            end = max(end, text.rfind("\n\n", end, len(text[:begin].rstrip())) + 1)
        for line in _COLOPHON_LINE.finditer(text, end, begin):
            end = line.end()
        end += len(text[end:begin]) - len(text[end:begin].lstrip("\n"))
        if is_legend or len(text[end:begin].split("\n")) > 2:
            starts.append(end)
    return starts


@functools.lru_cache(2**16)
def _character(note: str) -> str:
    """The character that a note ［＃…］ describes, or an empty string."""
    character = ""
    if (code := _UNICODE.search(note)) and int(code[1], 16) <= 0x10FFFF:
        character = chr(int(code[1], 16))
    elif code := _JIS_CODE.search(note):
        plane, row, cell = map(int, code.groups())
        with contextlib.suppress(ValueError):  # no such code
            # EUC: row and cell plus A0, after 8F for the second plane.
            character = (b"\x8f" * (plane - 1) + bytes([row + 0xA0, cell + 0xA0])).decode("euc_jis_2004")
    if not _is_text(character):
        found = _notation()(f"※{note}").gaiji()
        character = (found[0].resolved or "") if found else ""
    return character if _is_text(character) else ""


def _is_text(characters: str) -> bool:
    """Whether there are any characters, and none of them is a control, surrogate or private one."""
    return bool(characters) and all(unicodedata.category(c) not in ("Cc", "Cs", "Co") for c in characters)


def _accented(bracketed: str) -> str:
    """〔Ve'rite'〕 as Vérité; unchanged, with its brackets, if it has no accents."""
    rendered = html.unescape(_TAG.sub("", _notation()(bracketed).to_html())).strip()
    return bracketed if rendered == bracketed else rendered.removeprefix("〔").removesuffix("〕")
