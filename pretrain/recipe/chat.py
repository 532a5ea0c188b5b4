"""The chat template, and conversations as tokens by it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from transformers import PreTrainedTokenizerFast

from recipe.tokenizer import encode_text

# The Alpaca form (Taori et al., 2023) in Japanese. Answers end with </s>; `generation` marks what is trained,
# for apply_chat_template(return_assistant_tokens_mask=True). SYSTEM is the line used when a conversation
# brings
# none.
_TEMPLATE = """{{- bos_token -}}
{%- if messages[0].role != 'system' -%}
{{- SYSTEM + '\\n\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{- message.content + '\\n\\n' -}}
{%- elif message.role == 'user' -%}
{%- if loop.previtem is defined and loop.previtem.role == 'assistant' -%}{{- '\\n\\n' -}}{%- endif -%}
{{- '### 指示:\\n' + message.content + '\\n\\n### 応答:\\n' -}}
{%- elif message.role == 'assistant' -%}
{%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}
{%- else -%}
{{- raise_exception('unknown role ' + message.role + ': wanted system, user or assistant') -}}
{%- endif -%}
{%- endfor -%}"""
INPUT_HEADING = "\n\n### 入力:\n"


def chat_template(system: str) -> str:
    """The chat template to keep in the tokenizer, with `system` as the line for conversations that bring
    none.
    """
    return _TEMPLATE.replace("SYSTEM", json.dumps(system, ensure_ascii=False))


def user_message(instruction: str, given: str = "") -> str:
    """The content of a user's message: the instruction, and the text to work on in a section of its own."""
    return instruction + (INPUT_HEADING + given if given else "")


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
