"""Instruction pairs: real ones from the packaged sources, or a user's own Alpaca-form file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from recipe.download import file_facts
from recipe.outputs import DATA, ROOT, RecipeError, glob_files
from recipe.rules import japanese_share
from recipe.sources import read_descriptions, read_manpages, read_tatoeba
from recipe.splitting import is_valid_side, text_hash

TRANSLATIONS = {"ja-en": "次の文を英語に翻訳してください。", "en-ja": "次の文を日本語に翻訳してください。"}


class Pair(NamedTuple):
    """One instruction with its answer. Pairs of one `headword` always stand on the same side of the split."""

    instruction: str
    input: str
    output: str
    source: str
    headword: str


def read_pairs(kind: str, spec: dict[str, Any], normalize: Any) -> Iterator[Pair]:
    """The pairs of one entry of instruction.json; `normalize` is what the pretraining text went through."""
    if "path" in spec:
        yield from _alpaca_pairs(kind, spec["path"])
    else:
        skipped = {
            TRANSLATIONS[way] for way in TRANSLATIONS if way not in spec.get("directions", TRANSLATIONS)
        }
        readers = {
            "command-summary": _command_summaries,
            "command-option": _command_options,
            "package-summary": _package_summaries,
            "package-description": _package_descriptions,
            "translation": _translations,
        }
        for instruction, given, output, headword in readers[kind](DATA / spec["source"]):
            if instruction in skipped:
                continue
            yield Pair(instruction, normalize(given), normalize(output), kind, headword)


def _alpaca_pairs(kind: str, pattern: str) -> Iterator[Pair]:
    """Alpaca form: a JSON list, or one object a line, with instruction, output and perhaps input."""
    for path in expand_pairs(kind, pattern):
        for place, row in _alpaca_rows(path):
            if not isinstance(row, dict):
                raise RecipeError(f"{path}: {place}: wanted an object with instruction and output")
            for key in ("instruction", "output"):
                if not isinstance(row.get(key), str):
                    raise RecipeError(f"{path}: {place}: no text in {key!r}; it has {sorted(row)}")
            given = row.get("input") or ""
            yield Pair(row["instruction"], given, row["output"], kind, f"{row['instruction']}\0{given}")


def _alpaca_rows(path: Path) -> Iterator[tuple[str, Any]]:
    text = path.read_text("utf-8-sig")
    is_list = text.lstrip().startswith("[")
    number = 1
    try:
        if is_list:
            yield from ((f"entry {i}", row) for i, row in enumerate(json.loads(text), 1))
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {number}", json.loads(line)
    except json.JSONDecodeError as error:
        line = error.lineno if is_list else number
        raise RecipeError(f"{path}:{line}: not valid JSON ({error.msg})") from error


def expand_pairs(kind: str, pattern: str) -> list[Path]:
    """The files of an entry with a `path`. Raises RecipeError when there is none."""
    paths = sorted(glob_files(pattern))
    if not paths:
        raise RecipeError(f"instruction.json: pairs.{kind}.path: {pattern!r} matches no file (from {ROOT})")
    return paths


def pair_facts(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes and times of a user's own pairs: what, beside the JSON files, makes stage 11 stale."""
    pairs = config["instruction"]["pairs"]
    return {
        kind: file_facts(expand_pairs(kind, spec["path"])) for kind, spec in pairs.items() if "path" in spec
    }


def no_pairs(config: dict[str, Any]) -> str:
    """The reason for which a recipe does without tuning; empty when it has pairs."""
    return "" if config["instruction"]["pairs"] else "instruction.json names no pairs"


def _command_summaries(folder: Path) -> Iterator[tuple[str, str, str, str]]:
    for name, section, root in _pages(folder):
        summary = _summary(root)
        if summary and section[0] in "168":
            yield f"コマンド {name} は何をしますか?", "", summary, name
        elif summary:
            yield f"{name}({section}) は何ですか?", "", summary, name


def _command_options(folder: Path) -> Iterator[tuple[str, str, str, str]]:
    for name, section, root in _pages(folder):
        if section[0] in "168":
            for term in root.iter("dt"):
                option = " ".join(term.text_content().split())
                body = term.getnext()
                if re.match(r"-{1,2}\w", option) and body is not None and body.tag == "dd":
                    meaning = " ".join(body.text_content().split())
                    # The first sentence says what an option does; what follows are details.
                    yield (
                        f"{name} のオプション {option} の意味は何ですか?",
                        "",
                        re.split(r"(?<=。)", meaning)[0],
                        name,
                    )


def _pages(folder: Path) -> Iterator[tuple[str, str, Any]]:
    from lxml import html

    for page in read_manpages(folder):
        if page.html:
            yield page.name, page.section, html.document_fromstring(page.html)


def _summary(root: Any) -> str:
    """The text after the dash in a page's first section, which is its name section; empty where there is
    none.
    """
    for section in root.iter("section"):
        text = " ".join(section.text_content().split())
        match = re.search(r"\s[-–—]\s(.+)", text)
        return match.group(1) if match else ""
    return ""


def _package_summaries(folder: Path) -> Iterator[tuple[str, str, str, str]]:
    for package, summary, body in read_descriptions(folder):
        if body:
            yield "次のパッケージの説明を一行で要約してください。", body, summary, package


def _package_descriptions(folder: Path) -> Iterator[tuple[str, str, str, str]]:
    for package, _summary_line, body in read_descriptions(folder):
        if body:
            yield (
                f"Debian のパッケージ {package} について説明してください。",
                "",
                body.split("\n")[0],
                package,
            )


def _translations(folder: Path) -> Iterator[tuple[str, str, str, str]]:
    for number, japanese, english in read_tatoeba(folder):
        if english:
            headword = f"tatoeba {number}"
            yield TRANSLATIONS["ja-en"], japanese, english, headword
            yield TRANSLATIONS["en-ja"], english, japanese, headword


def reason_to_drop(pair: Pair) -> str:
    """Why a pair is not worth training on, empty when it is."""
    if not pair.output.strip():
        return "blank output"
    if pair.source != "translation" and japanese_share(pair.output) < 0.3:
        return "answer not Japanese"
    if len(pair.output) < 4 and pair.source != "translation":
        return "answer too short"
    return ""


def pair_side(pair: Pair, valid_share: float) -> str:
    """``train`` or ``valid``, by the hash of the headword."""
    return "valid" if is_valid_side(text_hash(pair.headword), valid_share) else "train"
