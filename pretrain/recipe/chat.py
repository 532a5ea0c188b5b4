"""Conversations as tokens, by the chat template."""

from __future__ import annotations

import re
from collections.abc import Iterator

from transformers import PreTrainedTokenizerFast

from recipe.tokenizer import encode_text


def encode_conversation(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation by the tokenizer's chat template, and for each id whether it is trained (the
    answers).

    Special-token strings inside a message are text: they are replaced by private-use characters while the
    template is applied, and spelt out when the pieces between the real control tokens are encoded.
    """
    specials = tokenizer.all_special_tokens
    hidden = {token: chr(0xF0000 + i) for i, token in enumerate(specials)}
    shown = {mark: token for token, mark in hidden.items()}
    pattern = re.compile("|".join(map(re.escape, specials)))
    safe = [m | {"content": pattern.sub(lambda found: hidden[found.group()], m["content"])} for m in messages]
    ids: list[int] = []
    trained: list[bool] = []
    for text, is_answer in _rendered(tokenizer, safe):
        for part in re.split(f"({pattern.pattern})", text):
            if part in hidden:
                new = [tokenizer.convert_tokens_to_ids(part)]
            else:
                new = encode_text(tokenizer, "".join(shown.get(character, character) for character in part))
            ids += new
            trained += [is_answer] * len(new)
    return ids, trained


def _rendered(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]
) -> Iterator[tuple[str, bool]]:
    """What each message adds to the rendered conversation, and whether it is an answer."""
    before = ""
    for count, message in enumerate(messages, 1):
        text = str(tokenizer.apply_chat_template(messages[:count], tokenize=False))
        yield text.removeprefix(before), message["role"] == "assistant"
        before = text
