"""Talking to a model: what the terminal and the web page of chat.py share, and the page itself."""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from recipe.conversations.encode import check_template, encode_conversation
from recipe.conversations.read_rows import Message
from recipe.evaluation.generation import check_room, clean_prompt, clean_question, generation_config, stream
from recipe.model.build import for_inference, load_model
from recipe.project import RecipeError, Refused
from recipe.tokenization.encode_text import prompt_ids
from recipe.tokenization.save import load_tokenizer

CHARACTERS = 32  # of a text that are read for each position of a model: more than any token holds


class Talker:
    """A tuned model that answers conversations, or a pretrained (base) model that continues text.

    folder: the model with its tokenizer. config: the whole recipe; `config["generation"]` holds the sampling
    options and may be replaced between two answers. base: the model was not tuned. Raises RecipeError unless
    a tuned model has a chat template (see `check_template`). What users write is normalised as what the
    model was trained on.
    """

    def __init__(self, folder: Path, config: dict[str, dict[str, Any]], base: bool = False) -> None:
        self.config, self.base = config, base
        self.tokenizer = load_tokenizer(folder)
        if not base:
            check_template(self.tokenizer)
        self.model = for_inference(load_model(folder))
        self.parameters: int = self.model.num_parameters()
        self.longest = CHARACTERS * self.model.config.max_position_embeddings
        self.seed()

    def seed(self) -> None:
        """Begin anew with the seed of generation.json, 42 by default."""
        torch.manual_seed(self.config["generation"].get("seed", 42))

    def answer(self, messages: list[Message], **options: Any) -> Iterator[str]:
        """The answer to a conversation that ends with a user's message, in parts of about one token.

        options: sampling options that differ from generation.json. The oldest turns are left out when the
        context is full. Raises Refused, before the first part, when the last message is empty or too long for
        the model, or when an option is out of range.
        """
        sampling = generation_config(self.config["generation"] | options, self.tokenizer)
        return stream(self.model, self.tokenizer, self._prompt(messages, sampling), sampling)

    def continue_text(self, text: str, **options: Any) -> Iterator[str]:
        """What follows the beginning of a document, in parts as `answer`, with its options and errors."""
        self._check_length(text)
        sampling = generation_config(self.config["generation"] | options, self.tokenizer)
        ids = prompt_ids(self.tokenizer, clean_prompt(self.config, text))
        check_room(self.model, ids, sampling, text)
        return stream(self.model, self.tokenizer, ids, sampling)

    def _check_length(self, text: str) -> None:
        """Raise Refused for a text that cannot fit into the model, before any work is done with it."""
        if len(text) > self.longest:
            raise Refused(
                f"the prompt {text[:40]!r} has {len(text):,} characters; this model with "
                f"{self.model.config.max_position_embeddings:,} positions reads at most {self.longest:,}. "
                "Shorten it"
            )

    def _prompt(self, messages: list[Message], sampling: GenerationConfig) -> list[int]:
        """The ids of as many of the last turns as leave room for an answer."""
        system = [m for m in messages[:1] if m["role"] == "system"]
        turns = messages[len(system) :]
        while sum(len(m["content"]) for m in system + turns) > self.longest and len(turns) > 2:
            turns = turns[2:]
        self._check_length("".join(m["content"] for m in [*turns, *system]))
        turns = [
            m | {"content": clean_question(self.config, m["content"])} if m["role"] == "user" else m
            for m in turns
        ]
        room = self.model.config.max_position_embeddings - sampling.max_new_tokens
        ids = encode_conversation(self.tokenizer, system + turns)[0]
        if len(ids) > room and len(turns) > 2:
            starts = range(2, len(turns), 2)
            # The first start from which the rest fits, or the last one.
            first = bisect.bisect_left(
                starts[:-1],
                True,
                key=lambda start: len(encode_conversation(self.tokenizer, system + turns[start:])[0]) <= room,
            )
            turns = turns[starts[first] :]
            ids = encode_conversation(self.tokenizer, system + turns)[0]
        check_room(self.model, ids, sampling, turns[-1]["content"])
        return ids


# What tuning or training made the model, for the title of the page.
STAGES = {"05_pretrain": "事前学習", "12_finetune": "指示チューニング", "13_preference": "選好学習"}


def web_page(talker: Talker, recipe: str, stage: str) -> Any:
    """A page in Japanese (gradio.Blocks): a chat, or for a base model a field whose text is continued.

    recipe, stage: named on the page, with the number of parameters. The questions (or prompts) of
    generation.json are examples to click. Text streams; the sampling options are sliders. Nothing is sent to
    other machines. The history is the page's own: a talker serves several pages, one answer at a time.
    """
    # Set before gradio is imported: no usage statistics, no check for a newer version.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    facts = f"レシピ: {recipe}、パラメータ数: {talker.parameters:,}、段階: {stage} ({STAGES[stage]})"
    return (_continuation_page if talker.base else _chat_page)(talker, recipe, facts)


def _chat_page(talker: Talker, recipe: str, facts: str) -> Any:
    import gradio

    def answer(
        message: str, history: list[dict], temperature: float, top_p: float, max_new_tokens: int
    ) -> Iterator[str]:
        messages = [{"role": turn["role"], "content": _text(turn["content"])} for turn in history]
        messages.append({"role": "user", "content": message})
        # Without the questions that have no answer: they were refused, or stopped before its first part.
        asked = [m for m, after in itertools.pairwise(messages) if "assistant" in (m["role"], after["role"])]
        options = _options(temperature, top_p, max_new_tokens)
        yield from _growing(talker.answer, [*asked, messages[-1]], options)

    questions = talker.config["generation"].get("questions", [])
    return gradio.ChatInterface(
        answer,
        title=f"{recipe} と話す",
        description=facts,
        # Gradio's third button would publish the conversation.
        chatbot=gradio.Chatbot(
            label="会話",
            placeholder="質問を入力するか、例を選んでください",
            buttons=["copy", "copy_all"],
            scale=1,
        ),
        textbox=gradio.Textbox(
            label="質問",
            placeholder="質問を入力してください",
            scale=7,
            autofocus=True,
            submit_btn="送信",
            stop_btn="停止",
        ),
        examples=[[question] for question in questions] or None,
        examples_label="質問の例",
        additional_inputs=_sliders(talker),
        additional_inputs_accordion=gradio.Accordion("生成の設定", open=False, render=False),
        api_name="chat",
    )


def _continuation_page(talker: Talker, recipe: str, facts: str) -> Any:
    import gradio

    def continuation(text: str, temperature: float, top_p: float, max_new_tokens: int) -> Iterator[str]:
        options = _options(temperature, top_p, max_new_tokens)
        yield from _growing(talker.continue_text, text, options, text)

    with gradio.Blocks(title=f"{recipe} に続きを書かせる") as page:
        gradio.Markdown(f"# {page.title}\n\n{facts}")
        text = gradio.Textbox(label="書き出し", placeholder="文章の書き出しを入力してください", lines=3)
        with gradio.Row():
            write, stop = gradio.Button("続きを書く", variant="primary"), gradio.Button("停止")
        result = gradio.Textbox(label="書き出しと続き", lines=10)
        prompts = talker.config["generation"]["prompts"]
        gradio.Examples([[prompt] for prompt in prompts], text, label="書き出しの例")
        with gradio.Accordion("生成の設定", open=False):
            sliders = _sliders(talker)
        writing = write.click(continuation, [text, *sliders], result, api_name="continue")
        stop.click(None, cancels=writing, api_visibility="private")
    return page


def _growing(
    generate: Callable[..., Iterator[str]], prompt: Any, options: dict[str, Any], text: str = ""
) -> Iterator[str]:
    """`text` with the generated parts so far, after each part and at the end.

    generate: a method of a Talker, called with prompt and options. A RecipeError is shown on the page.
    """
    import gradio

    try:
        for part in generate(prompt, **options):
            text += part
            yield text
    except RecipeError as error:
        raise gradio.Error(str(error), title="エラー", print_exception=False) from error
    yield text


def _sliders(talker: Talker) -> list[Any]:
    """The sampling options, set as in generation.json; of max_new_tokens, at most half of the positions."""
    import gradio

    values = talker.config["generation"]
    temperature, top_p = (1.0 if values.get(key) is None else values[key] for key in ("temperature", "top_p"))
    if not values.get("do_sample", False):
        temperature = 0
    longest = max(1, talker.model.config.max_position_embeddings // 2)
    length = min(values["max_new_tokens"], longest)
    return [
        gradio.Slider(
            0,
            max(2, temperature),
            temperature,
            label="温度 (temperature): 0 は最も確率の高いトークンだけを選ぶ",
        ),
        gradio.Slider(min(0.05, top_p), 1, top_p, label="top_p: 候補にする確率の合計"),
        gradio.Slider(1, longest, length, step=1, label="生成する最大トークン数 (max_new_tokens)"),
    ]


def _options(temperature: float, top_p: float, max_new_tokens: int) -> dict[str, Any]:
    """The positions of the page's sliders as sampling options."""
    options = {"do_sample": temperature > 0, "top_p": top_p, "max_new_tokens": int(max_new_tokens)}
    return options | ({"temperature": temperature} if temperature > 0 else {})


def _text(content: Any) -> str:
    """The text of a turn, which Gradio gives back as a list of parts."""
    parts = content if isinstance(content, list) else [content]
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in parts)
