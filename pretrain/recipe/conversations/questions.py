"""Questions for training by rewards (GRPO, stage 13): the model writes the answers, and rewards judge them.

They are read like the pairs of instruction.json, so that the same files serve. The answer of a pair is not
trained: it is what the reward ``answer`` expects.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from recipe.config.rewards import reads_answer
from recipe.conversations.instructions import counts_of, identity, messages_of, pair_side, read_pairs
from recipe.conversations.read_rows import Message
from recipe.corpus.characters import make_dialogue_normalizer
from recipe.corpus.normalizing import make_normalizer
from recipe.project import DATA, RecipeError
from recipe.tokenization.packing import permuted


class Question(NamedTuple):
    """The messages up to a user's question, and the expected answer, which may be empty."""

    messages: list[Message]
    expected: str


def load_questions(
    values: dict[str, Any], dataset: dict[str, Any]
) -> tuple[dict[str, list[Question]], dict[str, Any]]:
    """The questions by side (train, valid), and the counts of each entry: in, out, dropped by reason.

    values: of `with_valid_share`. dataset: dataset.json, by which texts are normalised as in stage 11.
    Questions with the same headword (in own pairs: the same first question) are on the same side. Raises
    RecipeError when a side is empty, and for files or rows that cannot be read.
    """
    characters: Counter[str] = Counter()
    corpus, dialogue = make_normalizer(dataset, characters), make_dialogue_normalizer(dataset, characters)
    sides: dict[str, list[Question]] = {"train": [], "valid": []}
    funnel: dict[str, Any] = {}
    seen: set[bytes] = set()
    for name, spec in values["pairs"].items():
        dropped: Counter[str] = Counter()
        unused: Counter[str] = Counter()
        out = 0
        if "source" in spec and not any((DATA / spec["source"]).glob("*")):
            raise RecipeError(
                f"preference.json: pairs.{name}.source: {DATA / spec['source']} has no files, from which the "
                "questions are made. Run stage 01 again: pretrain/01_download.py --force"
            )
        normalize = corpus if "source" in spec else dialogue
        for pair in read_pairs(name, spec, normalize, unused, "preference.json"):
            reason = pair.dropped
            if not reason and not pair.output.strip() and reads_answer(values["rewards"]):
                reason = "blank output"
            if not reason and (hashed := identity(pair)) in seen:
                reason = "duplicate"
            if reason:
                dropped[reason] += 1
                continue
            seen.add(hashed)
            *messages, _ = messages_of(pair._asdict())
            side = pair_side(pair, values["valid_share"])
            sides[side].append(Question(messages, pair.output))
            out += 1
        funnel[name] = counts_of(out, dropped, unused, characters)
    for side, questions in sides.items():
        if not questions:
            raise RecipeError(
                f"preference.json: there are no questions on the {side} side (counts: {funnel}). Add "
                "questions, or change valid_share"
            )
    return sides, funnel


def encode_questions(
    questions: list[Question],
    encode: Callable[[list[Message]], list[int]],
    longest: int,
    seed: int,
    count: int | None = None,
    epochs: int | None = None,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows for `GroupTrainer` in the order of training, and the counts of the questions that are left out.

    A row has ``prompt`` (ids by the chat template) and ``answer`` (the expected text). Each epoch is another
    permutation, a function of (seed, epoch) only. It ends after `count` rows or `epochs`, whichever is first,
    and encodes no other questions: 100,000 of them take a minute and 1 GB. Questions longer than `longest`
    tokens, which leave no room for an answer, are left out.
    """
    rows: list[dict[str, Any]] = []
    known: dict[int, list[int]] = {}
    for epoch in itertools.count() if epochs is None else range(epochs):
        for index in range(len(questions)):
            number = permuted(index, len(questions), seed * 1_000_003 + epoch + 1)
            if len(rows) == count:
                break
            if number not in known:
                known[number] = encode(questions[number].messages)
            if len(known[number]) <= longest:
                rows.append({"prompt": known[number], "answer": questions[number].expected})
        if not rows or len(rows) == count:
            break
    too_long = sum(len(ids) > longest for ids in known.values())
    return rows, {"question too long": too_long, "not asked": len(questions) - len(known)}
