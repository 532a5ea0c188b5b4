"""Instruction pairs: from packaged text, or from conversations of a user's own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from recipe.config.chat_templates import INPUT_HEADING, user_message
from recipe.config.instruction import VALID_SHARE
from recipe.conversations.dialogues import read_dialogues
from recipe.conversations.read_rows import Message, expand_pairs, read_rows
from recipe.corpus.characters import make_dialogue_normalizer
from recipe.corpus.packaged_pairs import PACKAGED_PAIRS, TRANSLATIONS
from recipe.corpus.rules import japanese_share
from recipe.corpus.source_files import file_facts, files_below, is_own, local_data_set
from recipe.corpus.sources import licence
from recipe.corpus.splitting import is_valid_side, text_hash
from recipe.project import DATA, RecipeError, listed, markdown_table

_SENTENCE = re.compile(r"[^。\n]{20,}")  # see `pretraining_overlap`


class Pair(NamedTuple):
    """One instruction with its answer: the last one of a conversation, with `history` before it.

    source: the entry of instruction.json. headword: pairs that share it stay on one side of the split.
    dropped: why the pair cannot be used; empty if it can.
    """

    instruction: str
    input: str
    output: str
    source: str
    headword: str
    history: tuple[Message, ...] = ()
    dropped: str = ""


Sides = dict[str, list[Pair]]  # by side: train, valid


def messages_of(row: dict[str, Any]) -> list[Message]:
    """The whole conversation of a row of stage 11 (or of ``pair._asdict()``), the answer last."""
    return [
        *(
            {key: value for key, value in message.items() if key != "trained" or value is False}
            for message in row["history"]
        ),
        {"role": "user", "content": user_message(row["instruction"], row["input"])},
        {"role": "assistant", "content": row["output"]},
    ]


def read_pairs(
    kind: str,
    spec: dict[str, Any],
    normalize: Callable[[str], str],
    unused: Counter[str],
    file: str = "instruction.json",
) -> Iterator[Pair]:
    """The pairs of one entry of `pairs` in instruction.json, or in another `file` of the recipe.

    kind, spec: the entry's name and values. normalize: `make_dialogue_normalizer` for a user's own
    conversations; `make_normalizer` for packaged text, which is part of the pretraining text. unused: see
    `read_dialogues`. Raises RecipeError for files or rows that cannot be read.
    """
    if "source" not in spec:
        for dialogue in read_dialogues(read_rows(f"{file}: pairs.{kind}", spec), unused):
            yield (
                Pair("", "", "", kind, "", dropped=dialogue.dropped)
                if dialogue.dropped
                else make_pair(dialogue.messages, kind, normalize)
            )
        return
    skipped = {TRANSLATIONS[way] for way in TRANSLATIONS if way not in spec.get("directions", TRANSLATIONS)}
    for instruction, given, output, headword in PACKAGED_PAIRS[kind].make(DATA / spec["source"]):
        if instruction not in skipped:
            yield Pair(instruction, normalize(given), normalize(output), kind, headword)


def make_pair(messages: list[Message], source: str, normalize: Callable[[str], str]) -> Pair:
    """A conversation as a pair, whose headword is the first question.

    What follows the last trained answer is cut: nothing about it is trained. Of two equal system messages at
    the beginning, one is cut, and blank ones are cut as well.
    """

    def unusable(reason: str) -> Pair:
        return Pair("", "", "", source, "", dropped=reason)

    trained = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("trained", True)]
    if not trained:
        answered = any(message["role"] == "assistant" for message in messages)
        return unusable("no trained answer" if answered else "no answer")
    messages = messages[: trained[-1] + 1]
    try:
        messages = [message | {"content": _clean(message["content"], normalize)} for message in messages]
    except UnicodeError:
        return unusable("not valid Unicode")
    messages = [message for message in messages if message["role"] != "system" or message["content"].strip()]
    while [message["role"] for message in messages[:2]] == ["system", "system"]:
        if messages[0]["content"] != messages[1]["content"]:
            return unusable("two system messages")
        del messages[0]
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        return unusable("turns do not alternate")
    if not all(turn["content"].strip() for turn in messages[:-1]):
        return unusable("blank turn")
    instruction, _, given = turns[-2]["content"].partition(INPUT_HEADING)
    headword = turns[0]["content"]
    return Pair(instruction, given, turns[-1]["content"], source, headword, tuple(messages[:-2]))


def _clean(content: str, normalize: Callable[[str], str]) -> str:
    """A normalised message; the heading of its input stays."""
    return INPUT_HEADING.join(map(normalize, content.split(INPUT_HEADING)))


def pair_facts(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes and times of the files of a user's own pairs: a change makes stage 11 stale."""
    return entry_facts("instruction.json", config["instruction"]["pairs"])


def entry_facts(file: str, pairs: dict[str, Any]) -> dict[str, Any]:
    """Sizes and times of the files of entries that have a `path`, or a `dataset` that is a local folder.

    file: the file of the recipe that has the entries, for messages.
    """
    facts = {}
    for kind, spec in pairs.items():
        if "path" in spec:
            facts[kind] = file_facts(expand_pairs(f"{file}: pairs.{kind}", spec["path"]))
        elif folder := local_data_set(spec):
            facts[kind] = file_facts(files_below(folder))
    return facts


def pairs_table(funnel: dict[str, dict[str, Any]], config: dict[str, Any], overlap: dict[str, int]) -> str:
    """How many pairs of each entry were read, kept and dropped, as a Markdown table with the licences.

    funnel: by entry, the counts ``in``, ``out``, ``dropped`` (by reason), and if there were any,
    ``byte_order_marks``, ``characters`` (by what the normaliser did to them) and ``unused_columns`` (by
    column, the rows with a value). config: a whole recipe.
    overlap: the counts of `pretraining_overlap`.
    """
    rows = []
    for name, counts in funnel.items():
        spec = config["instruction"]["pairs"][name]
        if "source" in spec:
            origin, terms = spec["source"], licence(config["dataset"]["sources"][spec["source"]])
        elif "dataset" in spec:
            folder = local_data_set(spec)
            origin = folder.name if folder else spec["dataset"]
            terms = "as its publisher says"
        else:
            origin, terms = Path(spec["path"]).name, "yours"
        dropped = listed(counts["dropped"])
        rows.append([name, origin, terms, f"{counts['in']:,}", f"{counts['out']:,}", dropped])
    lines = markdown_table(("pairs", "from", "licence", "in", "kept", "dropped"), rows, "lllrrl")
    marks = sum(counts.get("byte_order_marks", 0) for counts in funnel.values())
    lines += ["", f"Byte order marks were removed from {marks:,} files."] if marks else []
    lines += [*repaired_characters(funnel), *unused_columns(funnel)]
    shared = " and ".join(f"{count:,} of the {side} side" for side, count in overlap.items())
    lines += [
        "",
        f"Pairs that share a sentence with the validation text of pretraining, and are kept: {shared}.",
    ]
    return "\n".join(lines) + "\n"


def counts_of(
    out: int, dropped: Counter[str], unused: Counter[str], characters: Counter[str] | None
) -> dict[str, Any]:
    """A funnel's entry: rows ``in`` and ``out``, ``dropped`` by reason, and what else was seen.

    unused: rows with a value, by column that is not read. characters: what the normaliser did to them; it is
    emptied, for the next entry.
    """
    counts: dict[str, Any] = {"in": out + dropped.total(), "out": out, "dropped": dict(+dropped)}
    if unused:
        counts["unused_columns"] = dict(unused)
    if characters:
        counts["characters"] = dict(+characters)
        characters.clear()
    return counts


def unused_columns(funnel: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of Markdown that list the columns that were not read; none if all were read.

    funnel: by entry, its counts, among them ``unused_columns`` if there were any.
    """
    found = [
        f"- {name}: " + ", ".join(f"`{column}` {rows:,}" for column, rows in counts["unused_columns"].items())
        for name, counts in funnel.items()
        if counts.get("unused_columns")
    ]
    return (
        ["", "Columns that are not used, with the number of rows that have a value:", "", *found]
        if found
        else []
    )


def repaired_characters(funnel: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of Markdown with the counts of the normaliser: ``characters`` of each entry of the funnel."""
    lines = []
    for name, counts in funnel.items():
        if found := counts.get("characters"):
            lines += ["", f"Found in {name}: {', '.join(f'{what} {n:,}' for what, n in found.items())}."]
    return lines


def no_pairs(config: dict[str, Any]) -> str:
    """Why a recipe has no tuning; empty when it has pairs."""
    return "" if config["instruction"]["pairs"] else "instruction.json names no pairs"


def select(
    pairs: Iterable[Pair], judged: bool, valid_share: float, seen: set[bytes]
) -> tuple[Sides, Counter[str]]:
    """The pairs that are kept, by side, and the numbers of dropped ones by reason.

    judged: see `reason_to_drop`. seen: the hashes of all conversations kept so far; gets the new ones.
    """
    kept: Sides = {"train": [], "valid": []}
    dropped: Counter[str] = Counter()
    for pair in pairs:
        reason = reason_to_drop(pair, judged)
        if not reason and (hashed := identity(pair)) in seen:
            reason = "duplicate"
        if reason:
            dropped[reason] += 1
            continue
        seen.add(hashed)
        kept[pair_side(pair, valid_share)].append(pair)
    return kept, dropped


def require_sides(sides: Sides) -> None:
    """Raise RecipeError when there are no pairs on a side."""
    for side, pairs in sides.items():
        if not pairs:
            change = "raise" if side == "valid" else "lower"
            raise RecipeError(
                f"there are no pairs on the {side} side. Add pairs, or {change} instruction.valid_share"
            )


def check_own_pairs(config: dict[str, Any]) -> None:
    """Read the pairs that are in files of this machine as stage 11 will, which may be hours later.

    config: a whole recipe. Raises RecipeError for files or rows that cannot be read, and, when the recipe has
    no other pairs, for a side without pairs.
    """
    values = config["instruction"]
    own = {name: spec for name, spec in values["pairs"].items() if is_own(spec)}
    normalize = make_dialogue_normalizer(config["dataset"])
    sides: Sides = {"train": [], "valid": []}
    seen: set[bytes] = set()
    for name, spec in own.items():
        pairs = read_pairs(name, spec, normalize, Counter())
        kept, _ = select(pairs, False, values.get("valid_share", VALID_SHARE), seen)
        for side, found in kept.items():
            sides[side] += found
    if own and own == values["pairs"]:
        require_sides(sides)


def reason_to_drop(pair: Pair, judged: bool) -> str:
    """Why a pair is dropped; empty when it is kept.

    judged: drop answers that are too short or not Japanese, too (see `PairKind`). The answers of a user's own
    pairs are not judged.
    """
    if pair.dropped:
        return pair.dropped
    if not pair.output.strip():
        return "blank output"
    if judged:
        if japanese_share(pair.output) < 0.3:
            return "answer not Japanese"
        if len(pair.output) < 4:
            return "answer too short"
    return ""


def pair_side(pair: Pair, valid_share: float) -> str:
    """``train`` or ``valid``, by the hash of the headword."""
    return "valid" if is_valid_side(text_hash(pair.headword), valid_share) else "train"


def cap_share(pairs: Sides, others: Sides, share: float) -> int:
    """Remove pairs until they are at most `share` of all pairs on each side; returns how many are removed.

    Without other pairs on a side, all pairs of that side stay.
    """
    removed = 0
    for side, found in pairs.items():
        number = len(others[side])
        most = int(number * share / (1 - share)) if number and share < 1 else len(found)
        # By hash, so that the choice does not depend on the order of the pairs.
        found.sort(key=identity)
        removed += len(found[most:])
        del found[most:]
    return removed


def identity(pair: Pair) -> bytes:
    """The hash of a whole conversation: two pairs with the same hash are duplicates."""
    before = (message["content"] for message in pair.history)
    return text_hash("\0".join([*before, user_message(pair.instruction, pair.input), pair.output]))


def pretraining_overlap(
    sides: dict[str, list[Pair]], texts: Iterable[str], normalize: Callable[[str], str]
) -> dict[str, int]:
    """How many pairs of each side share a sentence with the validation documents of pretraining.

    A sentence is a run of 20 or more characters without ``。`` or a line break. normalize: cleans a text as
    `texts` were cleaned. Memory grows with the pairs, not with `texts`.
    """

    def sentences(pair: Pair) -> set[str]:
        messages = messages_of(pair._asdict())
        # Normalising makes no text longer: most messages are too short for a sentence.
        contents = [normalize(m["content"]) for m in messages if _SENTENCE.search(m["content"])]
        return {sentence for content in contents for sentence in _SENTENCE.findall(content)}

    of_pairs = {side: [sentences(pair) for pair in pairs] for side, pairs in sides.items()}
    known = {sentence for found in of_pairs.values() for sentence in set().union(*found)}
    shared = {sentence for text in texts for sentence in _SENTENCE.findall(text) if sentence in known}
    return {side: sum(not shared.isdisjoint(found) for found in pairs) for side, pairs in of_pairs.items()}
