"""Talking to a model: conversations as tokens, generation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from threading import Thread
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, TextIteratorStreamer

from recipe.config import GENERATION
from recipe.tokenizer import encode_text


class Answer(NamedTuple):
    """What a model wrote, and whether it ended by itself with </s> rather than at the length limit."""

    text: str
    stopped: bool


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


def generation_config(values: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """The native part of generation.json, with the tokenizer's special ids."""
    native = {key: value for key, value in values.items() if key not in GENERATION}
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return GenerationConfig(**native | ids)


@torch.inference_mode()
def generate_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    config: GenerationConfig,
    seed: int,
) -> list[Answer]:
    """Continue prompts (lists of ids) in one batch, padded on the left; the same for the same seed."""
    model.eval()
    torch.manual_seed(seed)
    longest = max(map(len, prompts))
    room = model.config.max_position_embeddings - config.max_new_tokens
    if longest > room:
        raise ValueError(
            f"a prompt has {longest} tokens; with max_new_tokens {config.max_new_tokens} at most {room} fit"
        )
    ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
    )
    answers = []
    for row in output[:, longest:].tolist():
        stopped = tokenizer.eos_token_id in row
        row = row[: row.index(tokenizer.eos_token_id)] if stopped else row
        answers.append(Answer(tokenizer.decode(row, skip_special_tokens=True), stopped))
    return answers


def stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: list[int], config: GenerationConfig
) -> Iterator[str]:
    """Continue one prompt and yield the text piece by piece as it is made."""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = torch.tensor([prompt], device=model.device)
    arguments = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "generation_config": config,
        "streamer": streamer,
    }
    thread = Thread(target=model.generate, kwargs=arguments, daemon=True)
    thread.start()
    yield from streamer
    thread.join()


def side_by_side(rows: list[dict[str, str]]) -> str:
    """Samples as Markdown: the prompt as a heading, then each version."""
    lines = []
    for row in rows:
        lines.append(f"## {row['prompt']}\n")
        lines += [
            f"**{name}**: {' '.join(str(text).split())}\n" for name, text in row.items() if name != "prompt"
        ]
    return "\n".join(lines)
