"""Preferences: a question with a chosen and a rejected answer, for direct preference optimisation (stage 13).

Rows of JSON files or of a data set have the columns ``prompt``, ``chosen`` and ``rejected``, each a text or a
list of messages. Without ``prompt``, chosen and rejected are whole conversations with the same beginning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from recipe.conversations.instructions import entry_facts, make_pair, messages_of
from recipe.conversations.read_rows import Message, chat_messages, read_rows
from recipe.corpus.splitting import is_valid_side, text_hash
from recipe.project import RecipeError


class Preference(NamedTuple):
    """The messages up to the user's question, and the two answers."""

    messages: list[Message]
    chosen: str
    rejected: str


def no_preference(config: dict[str, Any]) -> str:
    """Why a recipe has no stage 13; empty when it has preferences."""
    return "" if "preference" in config else "there is no preference.json"


def preference_facts(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes and times of the files of a user's preferences: a change makes stage 13 stale."""
    return entry_facts("preference.json", config.get("preference", {}).get("pairs", {}))


def load_preferences(
    values: dict[str, Any], normalize: Callable[[str], str]
) -> tuple[dict[str, list[Preference]], dict[str, Any]]:
    """The preferences by side (train, valid), and the counts of each entry: in, out, dropped by reason.

    values: preference.json. normalize: cleans a text as the pretraining text was cleaned. Preferences with
    the same first question are on the same side. Raises RecipeError when a side is empty.
    """
    sides: dict[str, list[Preference]] = {"train": [], "valid": []}
    funnel: dict[str, Any] = {}
    seen: set[bytes] = set()
    for name, spec in values["pairs"].items():
        dropped: Counter[str] = Counter()
        out = 0
        for row in read_rows(f"preference.json: pairs.{name}", spec):
            preference, reason = _preference(_conversations(*row), normalize)
            if preference:
                parts = [message["content"] for message in preference.messages]
                identity = text_hash("\0".join([*parts, preference.chosen, preference.rejected]))
                reason = "duplicate" if identity in seen else ""
                seen.add(identity)
            if not preference or reason:
                dropped[reason] += 1
                continue
            first = next(m["content"] for m in preference.messages if m["role"] == "user")
            valid = is_valid_side(text_hash(first), values.get("valid_share", 0.05))
            sides["valid" if valid else "train"].append(preference)
            out += 1
        funnel[name] = {"in": out + dropped.total(), "out": out, "dropped": dict(dropped)}
    for side, preferences in sides.items():
        if not preferences:
            raise RecipeError(
                f"preference.json: there are no preferences on the {side} side (counts: {funnel}). Add "
                "preferences, or change valid_share"
            )
    return sides, funnel


def _conversations(where: str, row: dict[str, Any]) -> tuple[list[Message], list[Message]]:
    """The two whole conversations of a row."""
    for key in ("chosen", "rejected"):
        if row.get(key) is None:
            raise RecipeError(
                f"{where}: no column {key!r}; it has {sorted(row)}. Expected prompt, chosen and rejected"
            )
    before = _messages(f"{where}: prompt", row["prompt"], "user") if row.get("prompt") is not None else []
    chosen, rejected = (_messages(f"{where}: {key}", row[key], "assistant") for key in ("chosen", "rejected"))
    if not before and len(chosen) < 2:
        raise RecipeError(
            f"{where}: no column 'prompt', and chosen is not a whole conversation. Add the column"
        )
    # Some data sets repeat the prompt in both answers.
    if before and chosen[: len(before)] == before:
        before = []
    return before + chosen, before + rejected


def _messages(where: str, value: Any, role: str) -> list[Message]:
    return [{"role": role, "content": value}] if isinstance(value, str) else chat_messages(where, value)


def _preference(
    conversations: tuple[list[Message], list[Message]], normalize: Callable[[str], str]
) -> tuple[Preference | None, str]:
    """A preference, or None and the reason why it is dropped."""
    chosen, rejected = (make_pair(messages, "", normalize) for messages in conversations)
    for pair in (chosen, rejected):
        if pair.dropped or not pair.output.strip():
            return None, pair.dropped or "blank output"
    *messages, _ = messages_of(chosen._asdict())
    if messages != messages_of(rejected._asdict())[:-1]:
        return None, "chosen and rejected answer different questions"
    if chosen.output == rejected.output:
        return None, "chosen equals rejected"
    return Preference(messages, chosen.output, rejected.output), ""


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
