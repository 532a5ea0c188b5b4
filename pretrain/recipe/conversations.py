"""Instruction pairs as tokens: by the chat template, with the answer as the trained part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from recipe.chat import encode_conversation, user_message
from recipe.outputs import RecipeError

Conversation = tuple[list[int], list[bool]]


def load_conversations(
    path: Path, tokenizer: Any, block_size: int
) -> tuple[list[Conversation], dict[str, int]]:
    """Every pair of a file of stage 11 as ids and trained flags, and how many were left out, by reason.

    Raises RecipeError when a conversation trains nothing, or when none fits.
    """
    conversations, too_long = [], 0
    for row in pq.read_table(path).to_pylist():
        messages = [
            {"role": "user", "content": user_message(row["instruction"], row["input"])},
            {"role": "assistant", "content": row["output"]},
        ]
        ids, trained = encode_conversation(tokenizer, messages)
        if not any(trained):
            raise RecipeError(
                f"{path}: the pair {row['instruction'][:60]!r} has no trained token: its answer is empty"
            )
        if len(ids) > block_size:
            too_long += 1
        else:
            conversations.append((ids, trained))
    if not conversations:
        raise RecipeError(f"{path}: no pair fits into block_size {block_size}. Raise finetune.block_size")
    return conversations, {"longer than block_size": too_long}


def preview(conversations: list[Conversation], tokenizer: Any) -> str:
    """A few conversations as they are trained: what stands in 【】 is learnt, the rest is only read."""
    shown = []
    for ids, trained in conversations:
        shown.append(
            tokenizer.decode(ids[: trained.index(True)])
            + "【"
            + tokenizer.decode([i for i, flag in zip(ids, trained, strict=True) if flag])
            + "】"
        )
    return "\n--- ".join(["--- example (【】 is trained)", *shown])
