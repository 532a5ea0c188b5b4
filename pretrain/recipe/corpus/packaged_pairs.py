"""Instruction pairs made from the packaged text: one table that says what each kind is made from, and how.

To add a kind of pairs, add an entry to `PACKAGED_PAIRS` (and its function): the check of instruction.json and
stage 11 both read it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from recipe.corpus.packaged import read_descriptions, read_manpages, read_tatoeba

# Instruction, input ("" for none), output, and headword: pairs of one headword stay on one side of the split.
# It is what several pairs have in common: packages of one source share the first paragraph of their
# descriptions, and several Japanese sentences have the same translation. One-line summaries that packages
# with other descriptions share may still be on both sides.
RawPair = tuple[str, str, str, str]

TRANSLATIONS = {"ja-en": "次の文を英語に翻訳してください。", "en-ja": "次の文を日本語に翻訳してください。"}


class PairKind(NamedTuple):
    """A kind of packaged pairs.

    source: the kind of source (`recipe.corpus.sources.KINDS`) that it is made from.
    make: gives the pairs, from the folder that stage 01 downloaded the source to.
    judged: stage 11 drops answers that are too short or not Japanese.
    """

    source: str
    make: Callable[[Path], Iterator[RawPair]]
    judged: bool = True


def _command_summaries(folder: Path) -> Iterator[RawPair]:
    for name, section, root in _pages(folder):
        summary = _summary(root)
        if summary and section[0] in "168":
            yield f"コマンド {name} は何をしますか?", "", summary, name
        elif summary:
            yield f"{name}({section}) は何ですか?", "", summary, name


def _command_options(folder: Path) -> Iterator[RawPair]:
    for name, section, root in _pages(folder):
        if section[0] not in "168":
            continue
        for term in root.iter("dt"):
            option = " ".join(term.text_content().split())
            body = term.getnext()
            if re.match(r"-{1,2}\w", option) and body is not None and body.tag == "dd":
                meaning = " ".join(body.text_content().split())
                # The first sentence says what an option does; the rest is detail.
                first = re.split(r"(?<=。)", meaning)[0]
                yield f"{name} のオプション {option} の意味は何ですか?", "", first, name


def _pages(folder: Path) -> Iterator[tuple[str, str, Any]]:
    """The name, section and parsed HTML of every manual page."""
    from lxml import html

    for page in read_manpages(folder):
        if page.html:
            yield page.name, page.section, html.document_fromstring(page.html)


def _summary(root: Any) -> str:
    """The text after the dash in a page's first section, which is the name section; else empty."""
    for section in root.iter("section"):
        match = re.search(r"\s[-–—]\s(.+)", " ".join(section.text_content().split()))
        return match.group(1) if match else ""
    return ""


def _package_summaries(folder: Path) -> Iterator[RawPair]:
    for _, summary, body in read_descriptions(folder):
        if body:
            yield "次のパッケージの説明を一行で要約してください。", body, summary, _first_paragraph(body)


def _package_descriptions(folder: Path) -> Iterator[RawPair]:
    for package, _, body in read_descriptions(folder):
        if body:
            question = f"Debian のパッケージ {package} について説明してください。"
            yield question, "", _first_paragraph(body), _first_paragraph(body)


def _first_paragraph(body: str) -> str:
    return body.split("\n")[0]


def _translations(folder: Path) -> Iterator[RawPair]:
    for _, japanese, english in read_tatoeba(folder):
        if english:
            yield TRANSLATIONS["ja-en"], japanese, english, english
            yield TRANSLATIONS["en-ja"], english, japanese, english


PACKAGED_PAIRS = {
    "command-summary": PairKind("manpages", _command_summaries),
    "command-option": PairKind("manpages", _command_options),
    "package-summary": PairKind("descriptions", _package_summaries),
    "package-description": PairKind("descriptions", _package_descriptions),
    "translation": PairKind("tatoeba", _translations, judged=False),
}
