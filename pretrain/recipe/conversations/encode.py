"""Conversations as tokens: by the chat template, with the answers as the trained part."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from recipe.conversations.chat_template import check_template, encode_conversation
from recipe.conversations.instructions import messages_of
from recipe.conversations.read_rows import Message
from recipe.project import RecipeError

Conversation = tuple[list[int], list[bool]]


def load_conversations(
    path: Path, tokenizer: Any, block_size: int
) -> tuple[list[Conversation], dict[str, int]]:
    """Every pair of a file of stage 11 as ids and trained flags; what was left out or shortened, by reason.

    A conversation longer than `block_size` loses its last turns until it fits; one whose first answer does
    not fit is left out. Raises RecipeError when a conversation trains nothing, or when none fits, and for a
    tokenizer or chat template that cannot train answers (see `check_template`).
    """
    check_template(tokenizer)
    conversations: list[Conversation] = []
    counts = Counter({"longer than block_size": 0})
    for row in pq.read_table(path).to_pylist():
        messages = messages_of(row)
        conversation = encode_trained(tokenizer, messages, str(path))
        if len(conversation[0]) > block_size:
            conversation = _shortened(tokenizer, messages, block_size, str(path))
            counts["shortened" if conversation else "longer than block_size"] += 1
        if conversation:
            conversations.append(conversation)
    if not conversations:
        raise RecipeError(f"{path}: no pair fits into block_size {block_size}. Raise finetune.block_size")
    return conversations, dict(counts)


def encode_trained(tokenizer: Any, messages: list[Message], where: str) -> Conversation:
    """A conversation as `encode_conversation` gives it. Raises RecipeError when an answer in it is empty."""
    for message in messages:
        if message["role"] == "assistant" and not message["content"].strip():
            raise RecipeError(
                f"{where}: the pair {messages[-2]['content'][:60]!r} has no trained token: an answer is "
                "empty. Redo stage 11, which drops such pairs"
            )
    ids, trained = encode_conversation(tokenizer, messages)
    if not any(trained):
        raise RecipeError(
            f"{where}: the pair {messages[0]['content'][:60]!r} has no trained token: it has no answer"
        )
    return ids, trained


def _shortened(tokenizer: Any, messages: list[Message], block_size: int, where: str) -> Conversation | None:
    """The longest beginning of a conversation that ends with an answer and fits; None where none does."""
    for end in range(len(messages) - 2, 1, -2):
        conversation = encode_trained(tokenizer, messages[:end], where)
        if len(conversation[0]) <= block_size:
            return conversation
    return None


def preview(conversations: list[Conversation], tokenizer: Any) -> str:
    """A few conversations as they are trained: what stands in 【】 is learnt, the rest is only read."""
    return "\n--- ".join(["--- example (【】 is trained)", *(_marked(c, tokenizer) for c in conversations)])


def _marked(conversation: Conversation, tokenizer: Any) -> str:
    shown, begin = "", 0
    ids, trained = conversation
    for place in range(1, len(ids) + 1):
        if place == len(ids) or trained[place] != trained[begin]:
            text = tokenizer.decode(ids[begin:place])
            shown += f"【{text}】" if trained[begin] else text
            begin = place
    return shown
