"""Talking to a tuned model: what the terminal and the web page of chat.py share, and the page itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig

from recipe.conversations.chat_template import check_template, encode_conversation
from recipe.conversations.read_rows import Message
from recipe.evaluation.generation import check_room, clean_prompt, generation_config, stream
from recipe.model.build import for_inference, load_model
from recipe.project import RecipeError


class Talker:
    """A tuned model that answers conversations.

    folder: a tuned model with its chat template. config: the whole recipe; `config["generation"]` holds the
    sampling options, and may be replaced between two answers. Raises RecipeError for a model that was never
    tuned to answer (see `check_template`).
    """

    def __init__(self, folder: Path, config: dict[str, dict[str, Any]]) -> None:
        self.config = config
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        check_template(self.tokenizer)
        self.model = for_inference(load_model(folder))
        torch.manual_seed(config["generation"].get("seed", 42))

    def answer(self, messages: list[Message], **options: Any) -> Iterator[str]:
        """The answer to a conversation that ends with a user's message, piece by piece.

        options: sampling options that differ from generation.json. What users wrote is normalised as the
        training text was. The oldest turns are forgotten when the context is full. Raises Refused, before the
        first piece, when the last message alone does not fit or is empty, or an option is out of range.
        """
        sampling = generation_config(self.config["generation"] | options, self.tokenizer)
        return stream(self.model, self.tokenizer, self._prompt(messages, sampling), sampling)

    def _prompt(self, messages: list[Message], sampling: GenerationConfig) -> list[int]:
        """Ids of as many of the last turns as fit beside an answer."""
        messages = [
            m | {"content": clean_prompt(self.config, m["content"])} if m["role"] == "user" else m
            for m in messages
        ]
        system = [m for m in messages[:1] if m["role"] == "system"]
        turns = messages[len(system) :]
        room = self.model.config.max_position_embeddings - sampling.max_new_tokens
        while len(ids := encode_conversation(self.tokenizer, system + turns)[0]) > room and len(turns) > 2:
            turns = turns[2:]
        check_room(self.model, ids, sampling, turns[-1]["content"])
        return ids


def web_page(talker: Talker, title: str) -> Any:
    """A chat page (gradio.Blocks) whose answers stream, with the sampling options below; nothing is sent out.

    The history is the page's own: a talker serves any number of pages, one answer at a time.
    """
    # Set before the import: no usage statistics, no look for a newer version.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import gradio

    values = talker.config["generation"]

    def answer(
        message: str, history: list[dict], temperature: float, top_p: float, length: int
    ) -> Iterator[str]:
        messages = [{"role": turn["role"], "content": _text(turn["content"])} for turn in history]
        messages.append({"role": "user", "content": message})
        options = {"do_sample": temperature > 0, "top_p": top_p, "max_new_tokens": int(length)}
        if temperature > 0:
            options["temperature"] = temperature
        text = ""
        try:
            for piece in talker.answer(messages, **options):
                text += piece
                yield text
        except RecipeError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    sampled = values.get("do_sample", False)
    longest = max(1, talker.model.config.max_position_embeddings // 2)
    options = [
        gradio.Slider(
            0, 2, values.get("temperature", 1.0) if sampled else 0, label="temperature (0: the likeliest)"
        ),
        gradio.Slider(0.05, 1, values.get("top_p", 1.0), label="top_p"),
        gradio.Slider(1, longest, min(values["max_new_tokens"], longest), step=1, label="max_new_tokens"),
    ]
    return gradio.ChatInterface(answer, title=title, additional_inputs=options, api_name="chat")


def _text(content: Any) -> str:
    """A turn's text: Gradio hands back what was said as a list of parts."""
    parts = content if isinstance(content, list) else [content]
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in parts)
