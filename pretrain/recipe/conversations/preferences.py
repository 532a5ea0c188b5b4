"""Preferences: a question with a chosen and a rejected answer, for direct preference optimisation (stage 13).

Rows of JSON files or of a data set have the columns ``prompt``, ``chosen`` and ``rejected``, each a text or a
list of messages. Without ``prompt``, chosen and rejected are whole conversations with the same beginning. The
columns ``system`` (or ``system_prompt``) and ``history`` are as in `recipe.conversations.dialogues`. Only the
last answers are compared, so a mark such as ``weight`` has no effect on an answer before them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from recipe.config.preference import uses_rewards, with_valid_share
from recipe.conversations.dialogues import (
    BEFORE,
    ROW_MARKS,
    chat_messages,
    check_columns,
    is_trained,
    prepend,
    said_before,
)
from recipe.conversations.instructions import (
    counts_of,
    entry_facts,
    make_pair,
    messages_of,
    no_pairs,
    repaired_characters,
    unused_columns,
)
from recipe.conversations.read_rows import Message, read_rows
from recipe.corpus.characters import make_dialogue_normalizer
from recipe.corpus.source_files import is_own
from recipe.corpus.splitting import is_valid_side, text_hash
from recipe.project import RecipeError, listed, markdown_table


class Preference(NamedTuple):
    """The messages up to the user's question, and the two answers."""

    messages: list[Message]
    chosen: str
    rejected: str


def no_preference(config: dict[str, Any]) -> str:
    """Why a recipe has no stage 13; empty when it has preferences."""
    return "" if "preference" in config else "there is no preference.json"


def skipped_stages(config: dict[str, Any]) -> tuple[str, ...]:
    """The stages that a recipe does not have; their folders may be left from before it was changed."""
    if no_pairs(config):
        return ("11_dataset", "12_finetune", "13_preference", "14_evaluate", "15_generate")
    return ("13_preference",) if no_preference(config) else ()


def preference_facts(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes and times of the files of a user's preferences: a change makes stage 13 stale."""
    return entry_facts("preference.json", config.get("preference", {}).get("pairs", {}))


def check_own_preferences(config: dict[str, Any]) -> None:
    """Read preferences, or questions for rewards, as stage 13 will, if all are in files of this machine.

    config: a whole recipe. Raises RecipeError for files or rows that cannot be read, and for an empty side.
    """
    if no_preference(config) or not all(map(is_own, config["preference"]["pairs"].values())):
        return
    if uses_rewards(config):
        from recipe.conversations.questions import load_questions  # it imports torch

        load_questions(with_valid_share(config), config["dataset"])
        return
    load_preferences(with_valid_share(config), make_dialogue_normalizer(config["dataset"]))


def load_preferences(
    values: dict[str, Any], normalize: Callable[[str], str], figures: Counter[str] | None = None
) -> tuple[dict[str, list[Preference]], dict[str, Any]]:
    """The preferences by side (train, valid), and the counts of each entry: in, out, dropped by reason,
    and unused_columns if there were any.

    values: of `with_valid_share`. normalize, figures: see `make_dialogue_normalizer`. Preferences with the
    same first question are on the same side. Raises RecipeError when a side is empty.
    """
    sides: dict[str, list[Preference]] = {"train": [], "valid": []}
    funnel: dict[str, Any] = {}
    seen: set[bytes] = set()
    for name, spec in values["pairs"].items():
        dropped: Counter[str] = Counter()
        unused: Counter[str] = Counter()
        out = 0
        for row in read_rows(f"preference.json: pairs.{name}", spec):
            preference, reason = _preference(_conversations(*row, unused), normalize)
            if preference:
                parts = [message["content"] for message in preference.messages]
                identity = text_hash("\0".join([*parts, preference.chosen, preference.rejected]))
                reason = "duplicate" if identity in seen else ""
                seen.add(identity)
            if not preference or reason:
                dropped[reason] += 1
                continue
            first = next(m["content"] for m in preference.messages if m["role"] == "user")
            valid = is_valid_side(text_hash(first), values["valid_share"])
            sides["valid" if valid else "train"].append(preference)
            out += 1
        funnel[name] = counts_of(out, dropped, unused, figures)
    for side, preferences in sides.items():
        if not preferences:
            raise RecipeError(
                f"preference.json: there are no preferences on the {side} side (counts: {funnel}). Add "
                "preferences, or change valid_share"
            )
    return sides, funnel


def _conversations(
    where: str, row: dict[str, Any], unused: Counter[str]
) -> tuple[list[Message], list[Message]]:
    """The two whole conversations of a row."""
    for key in ("chosen", "rejected"):
        if row.get(key) is None:
            raise RecipeError(
                f"{where}: no column {key!r}; it has {sorted(row)}. Expected prompt, chosen and rejected"
            )
    check_columns(where, row, ("prompt", "chosen", "rejected", *BEFORE, *ROW_MARKS), unused)
    prompt, chosen, rejected = (
        _messages(f"{where}: {key}", row.get(key), role, unused)
        for key, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
    )
    before = said_before(where, row, unused)
    if not prompt and len(chosen) < 2:
        raise RecipeError(
            f"{where}: no column 'prompt', and chosen is not a whole conversation. Add the column"
        )
    trained = is_trained(where, row, ROW_MARKS)
    for answer in (chosen, rejected):
        if answer and not trained:
            answer[-1]["trained"] = False
    return tuple(prepend(before, _whole(prompt, answer)) for answer in (chosen, rejected))


def _messages(where: str, value: Any, role: str, unused: Counter[str]) -> list[Message]:
    """The messages of a column: a text is one message; null is none."""
    if value is None:
        return []
    return (
        [{"role": role, "content": value}] if isinstance(value, str) else chat_messages(where, value, unused)
    )


def _whole(prompt: list[Message], answer: list[Message]) -> list[Message]:
    """The conversation of a prompt and an answer, which may repeat the prompt, or the end of it.

    A system message may be in either of them. White space around the messages does not count.
    """

    def stripped(messages: list[Message]) -> list[tuple[str, str]]:
        return [(m["role"], m["content"].strip()) for m in messages if m["role"] != "system"]

    asked, answered = stripped(prompt), stripped(answer)
    repeats = len(answered) > 1 and (answered[: len(asked)] == asked or answered[:-1][-len(asked) :] == asked)
    first = 1 if answer and answer[0]["role"] == "system" else 0
    if repeats:
        systems = [message for message in prompt if message["role"] == "system"]
        return systems + answer
    if len(answered) > 1 and asked[-len(answered[:-1]) :] == answered[:-1]:
        return prepend(prompt, [*answer[:first], answer[-1]])
    return prepend(prompt, answer)


def _preference(
    conversations: tuple[list[Message], list[Message]], normalize: Callable[[str], str]
) -> tuple[Preference | None, str]:
    """A preference, or None and the reason why it is dropped."""
    if any(messages[-1].get("trained") is False for messages in conversations if messages):
        return None, "answer not trained"
    chosen, rejected = (
        make_pair([{"role": m["role"], "content": m["content"]} for m in messages], "", normalize)
        for messages in conversations
    )
    for pair in (chosen, rejected):
        if pair.dropped or not pair.output.strip():
            return None, pair.dropped or "blank output"
    *messages, _ = messages_of(chosen._asdict())
    if messages != messages_of(rejected._asdict())[:-1]:
        return None, "chosen and rejected answer different questions"
    if chosen.output == rejected.output:
        return None, "chosen equals rejected"
    return Preference(messages, chosen.output, rejected.output), ""


def preferences_table(funnel: dict[str, dict[str, Any]]) -> str:
    """How many preferences of each entry were read, kept and dropped, as a Markdown table.

    funnel: as `load_preferences` returns it.
    """
    rows = []
    for name, counts in funnel.items():
        dropped = listed(counts["dropped"])
        rows.append([name, f"{counts['in']:,}", f"{counts['out']:,}", dropped])
    lines = markdown_table(("preferences", "in", "kept", "dropped"), rows, "lrrl")
    return "\n".join([*lines, *repaired_characters(funnel), *unused_columns(funnel)]) + "\n"


def encode_preferences(
    preferences: list[Preference], encode: Callable[[list[Message]], list[int]], block_size: int
) -> Iterator[dict[str, list[int]]]:
    """The ``prompt_ids``, ``chosen_ids`` and ``rejected_ids`` that DPOTrainer trains on.

    encode: gives the ids of a conversation by the chat template. Preferences longer than `block_size` tokens
    are left out.
    """
    for preference in preferences:
        prompt = encode(preference.messages)
        answers = {}
        for key, text in (("chosen_ids", preference.chosen), ("rejected_ids", preference.rejected)):
            whole = encode([*preference.messages, {"role": "assistant", "content": text}])
            answers[key] = whole[len(prompt) :]
        if len(prompt) + max(map(len, answers.values())) <= block_size:
            yield {"prompt_ids": prompt, **answers}
