"""Instruction pairs: real ones from the packaged sources, or conversations of a user's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from recipe.config.chat_templates import INPUT_HEADING, user_message
from recipe.conversations.read_rows import Message, expand_pairs, read_dialogues, read_rows
from recipe.corpus.packaged import read_descriptions, read_manpages, read_tatoeba
from recipe.corpus.rules import japanese_share
from recipe.corpus.source_files import file_facts
from recipe.corpus.sources import licence
from recipe.corpus.splitting import is_valid_side, text_hash
from recipe.project import DATA, ROOT

TRANSLATIONS = {"ja-en": "次の文を英語に翻訳してください。", "en-ja": "次の文を日本語に翻訳してください。"}
_SENTENCE = re.compile(r"[^。\n]{20,}")  # what counts as the same text in `pretraining_overlap`


class Pair(NamedTuple):
    """One instruction with its answer; in a longer conversation the last one, with `history` before it.

    Pairs of one `headword` always stand on the same side of the split. `dropped`: why it cannot be used.
    """

    instruction: str
    input: str
    output: str
    source: str
    headword: str
    history: tuple[Message, ...] = ()
    dropped: str = ""


def messages_of(row: dict[str, Any]) -> list[Message]:
    """The whole conversation of a row of stage 11 (or of ``pair._asdict()``), the answer last."""
    return [
        *({"role": message["role"], "content": message["content"]} for message in row["history"]),
        {"role": "user", "content": user_message(row["instruction"], row["input"])},
        {"role": "assistant", "content": row["output"]},
    ]


def read_pairs(kind: str, spec: dict[str, Any], normalize: Callable[[str], str]) -> Iterator[Pair]:
    """The pairs of one entry of instruction.json; `normalize` is what the pretraining text went through."""
    if "source" not in spec:
        for messages in read_dialogues(read_rows(f"instruction.json: pairs.{kind}", spec)):
            yield make_pair(messages, kind, normalize)
        return
    skipped = {TRANSLATIONS[way] for way in TRANSLATIONS if way not in spec.get("directions", TRANSLATIONS)}
    readers = {
        "command-summary": _command_summaries,
        "command-option": _command_options,
        "package-summary": _package_summaries,
        "package-description": _package_descriptions,
        "translation": _translations,
    }
    for instruction, given, output, headword in readers[kind](DATA / spec["source"]):
        if instruction not in skipped:
            yield Pair(instruction, normalize(given), normalize(output), kind, headword)


def make_pair(messages: list[Message], source: str, normalize: Callable[[str], str]) -> Pair:
    """A conversation as a pair; its headword is the first question, which is all that threads share.

    Questions after the last answer train nothing and are cut.
    """
    messages = list(messages)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    try:
        messages = [message | {"content": _clean(message["content"], normalize)} for message in messages]
    except UnicodeError:
        return Pair("", "", "", source, "", dropped="not valid Unicode")
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns:
        return Pair("", "", "", source, "", dropped="no answer")
    if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        return Pair("", "", "", source, "", dropped="turns do not alternate")
    if not all(turn["content"].strip() for turn in messages[:-1]):
        return Pair("", "", "", source, "", dropped="blank turn")
    instruction, _, given = turns[-2]["content"].partition(INPUT_HEADING)
    headword = turns[0]["content"]
    return Pair(instruction, given, turns[-1]["content"], source, headword, tuple(messages[:-2]))


def _clean(content: str, normalize: Callable[[str], str]) -> str:
    """A message as pretraining text is cleaned, around the heading of its input."""
    return INPUT_HEADING.join(normalize(part).strip() for part in content.split(INPUT_HEADING))


def pair_facts(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes and times of a user's own pairs: what, beside the JSON files, makes stage 11 stale."""
    return entry_facts("instruction.json", config["instruction"]["pairs"])


def entry_facts(file: str, pairs: dict[str, Any]) -> dict[str, Any]:
    """Sizes and times of the files of entries with a `path`, or a `dataset` that is a local folder."""
    facts = {}
    for kind, spec in pairs.items():
        if "path" in spec:
            facts[kind] = file_facts(expand_pairs(f"{file}: pairs.{kind}", spec["path"]))
        elif "dataset" in spec and (folder := ROOT / Path(spec["dataset"]).expanduser()).is_dir():
            facts[kind] = file_facts(sorted(path for path in folder.rglob("*") if path.is_file()))
    return facts


def pairs_table(funnel: dict[str, dict[str, Any]], config: dict[str, Any], overlap: dict[str, int]) -> str:
    """What became of the pairs, in Markdown: by entry of instruction.json, with the licences.

    funnel: by entry, counts ``in``, ``out``, ``dropped`` by reason, and ``byte_order_marks`` where there were
    any. config: a whole recipe. overlap: as `pretraining_overlap` counts it.
    """
    lines = ["| pairs | from | licence | in | kept | dropped |", "|---|---|---|---:|---:|---|"]
    for name, counts in funnel.items():
        spec = config["instruction"]["pairs"][name]
        if "source" in spec:
            origin, terms = spec["source"], licence(config["dataset"]["sources"][spec["source"]])
        elif "dataset" in spec:
            local = (ROOT / Path(spec["dataset"]).expanduser()).is_dir()
            origin = Path(spec["dataset"]).name if local else spec["dataset"]
            terms = "as its publisher says"
        else:
            origin, terms = Path(spec["path"]).name, "yours"
        dropped = ", ".join(f"{reason} {n:,}" for reason, n in counts["dropped"].items() if n) or "none"
        lines.append(f"| {name} | {origin} | {terms} | {counts['in']:,} | {counts['out']:,} | {dropped} |")
    marks = sum(counts.get("byte_order_marks", 0) for counts in funnel.values())
    lines += ["", f"Byte order marks were taken off {marks:,} files."] if marks else []
    shared = " and ".join(f"{count:,} of the {side} side" for side, count in overlap.items())
    lines += ["", f"Pairs that share a sentence with the validation text of pretraining: {shared}."]
    return "\n".join(lines) + "\n"


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


def reason_to_drop(pair: Pair, packaged: bool) -> str:
    """Why a pair is not worth training on, empty when it is.

    packaged: made here from other text. Only then an answer is judged; those of a user's own are wanted.
    """
    if pair.dropped:
        return pair.dropped
    if not pair.output.strip():
        return "blank output"
    if packaged and pair.source != "translation":
        if japanese_share(pair.output) < 0.3:
            return "answer not Japanese"
        if len(pair.output) < 4:
            return "answer too short"
    return ""


def pair_side(pair: Pair, valid_share: float) -> str:
    """``train`` or ``valid``, by the hash of the headword."""
    return "valid" if is_valid_side(text_hash(pair.headword), valid_share) else "train"


def identity(pair: Pair) -> bytes:
    """The hash of a whole conversation: what makes a pair a duplicate of another."""
    return text_hash("\0".join(message["content"] for message in messages_of(pair._asdict())))


def pretraining_overlap(sides: dict[str, list[Pair]], texts: Iterable[str]) -> dict[str, int]:
    """How many pairs of each side share text with the validation documents of pretraining.

    Shared text: the same run of at least 20 characters between two ends of a sentence or line. Memory goes
    with the pairs, not with `texts`.
    """

    def runs(pair: Pair) -> set[str]:
        return {
            run for message in messages_of(pair._asdict()) for run in _SENTENCE.findall(message["content"])
        }

    wanted = {run for pairs in sides.values() for pair in pairs for run in runs(pair)}
    found = {run for text in texts for run in _SENTENCE.findall(text) if run in wanted}
    return {side: sum(not found.isdisjoint(runs(pair)) for pair in pairs) for side, pairs in sides.items()}
