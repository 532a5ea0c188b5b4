"""Conversations as tokens, by the chat template."""

from __future__ import annotations

import re
from collections.abc import Iterator

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from recipe.project import RecipeError
from recipe.tokenization.encode_text import encode_text


def check_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise RecipeError unless a tokenizer's special tokens and chat template can train answers.

    Wanted: an end and a padding token; between a question and its answer a mark, by which the model knows
    that it is to answer; the answer and the end token behind it; and nothing in what was said that changes
    when more is said.
    """
    missing = [name for name in ("eos_token", "pad_token") if getattr(tokenizer, name) is None]
    if missing:
        raise RecipeError(
            f"the tokenizer has no {' and no '.join(missing)}: answers could not end, or batches not be "
            "filled. Redo stage 03, whose tokenizers have both, or name the tokens in tokenizer_config.json"
        )
    way_out = (
        "Take one of recipe/config/chat_templates.py (instruction.json: template), and redo stage 12 with "
        "--force"
    )
    if not tokenizer.chat_template:
        raise RecipeError(f"the tokenizer has no chat template: it was never tuned. {way_out}")
    question, answer, other = "山は高いか", "はい、高い", "海は深いか"
    roles = {question: "user", answer: "assistant", other: "user"}
    said = [{"role": role, "content": text} for text, role in roles.items()]
    try:
        parts = [text for text, _ in _rendered(tokenizer, said)]
    except TemplateError as error:
        raise RecipeError(f"the chat template cannot be rendered: {error}. {way_out}") from error
    for before, text in ((question, parts[0]), (other, parts[2])):
        if not text.partition(before)[2]:
            raise RecipeError(
                f"the chat template has no response mark: a question ends as {text[-20:]!r}, with nothing "
                f"behind it that calls for an answer. {way_out}"
            )
    if parts[1] != answer + str(tokenizer.eos_token):
        raise RecipeError(
            f"the chat template writes the answer {answer!r} as {parts[1]!r}, wanted it with "
            f"{tokenizer.eos_token!r} behind it and nothing else: the model would not learn to end. {way_out}"
        )


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
    """What each message adds to the rendered conversation, and whether it is an answer.

    Raises RecipeError when a message changes what stood before it.
    """
    before = ""
    for count, message in enumerate(messages, 1):
        text = str(tokenizer.apply_chat_template(messages[:count], tokenize=False))
        if not text.startswith(before):
            raise RecipeError(
                f"the chat template renders {before[-20:]!r} otherwise when {message['content'][:20]!r} "
                "follows: what was trained would not be what is asked. Take one of "
                "recipe/config/chat_templates.py "
                "(instruction.json: template)"
            )
        yield text.removeprefix(before), message["role"] == "assistant"
        before = text
