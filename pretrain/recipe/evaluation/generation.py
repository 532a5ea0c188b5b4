"""From prompts to text: many in batches or one as a stream, seeded, read and written as the model was
trained.

What a user writes goes the way the training text went: `recipe.corpus.normalizing` by the recipe's
dataset.json, then the tokenizer's word segmenter, if it has one. What the model writes comes back as
text: a tokenizer over segmented words joins them itself when it decodes.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers import (
    GenerationConfig,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from recipe.config.generation import GENERATION
from recipe.corpus.normalizing import make_normalizer
from recipe.project import Refused, markdown_text
from recipe.tokenization.encode_text import BYTE_TOKEN

BATCH_SIZE = 8  # prompts at a time: tests/bench/generation.py
CONTEXT = 8  # ids before a continuation that are decoded with it, so that its first space is seen
# The ranges of values are checked where transformers makes use of them, and nowhere before.
_CHECKS = {
    "temperature": TemperatureLogitsWarper,
    "top_p": TopPLogitsWarper,
    "top_k": TopKLogitsWarper,
    "min_p": MinPLogitsWarper,
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
}
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty")


class Answer(NamedTuple):
    """What a model wrote, and whether it ended by itself with </s> rather than at the length limit."""

    text: str
    stopped: bool


def generation_config(values: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """The native part of generation.json, with the tokenizer's special ids.

    ``num_return_sequences`` is left out: a stage that wants several samples gives the prompt several times.
    Raises Refused for values that transformers refuses, such as a temperature below 0.
    """
    native = {k: v for k, v in values.items() if k not in GENERATION and k != "num_return_sequences"}
    # JSON, a slider and a user write 1 for 1.0, which transformers' own checks of these keys refuse.
    native |= {key: float(native[key]) for key in _FLOATS if type(native.get(key)) is int}
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    try:
        for key, check in _CHECKS.items():
            if native.get(key):  # None and 0 switch it off, but for the temperature
                check(native[key])
        config = GenerationConfig(**native | ids)
        config.validate()
    except (ValueError, TypeError) as error:
        raise Refused(f"generation.json: {error}") from error
    if config.do_sample and native.get("temperature") == 0:
        raise Refused(
            "generation.json: temperature: 0 cannot be sampled with. For the likeliest token at every place, "
            "set do_sample to false"
        )
    return config


def clean_prompt(config: dict[str, Any], text: str) -> str:
    """A user's text as stage 02 would have kept it: normalised by the recipe's dataset.json.

    config: a whole recipe. Raises Refused when nothing is left.
    """
    clean = make_normalizer(config["dataset"])(text)
    if not clean:
        raise Refused(f"the prompt {text[:40]!r} is empty after normalising. Write some text")
    return clean


def decode_continuation(tokenizer: PreTrainedTokenizerFast, prompt: list[int], ids: list[int]) -> str:
    """The text of ids that follow a prompt, with the space before the first word, if there is one.

    Decoded alone, ids lose it: SentencePiece takes the first space of what it decodes for its own.
    """
    context = prompt[-CONTEXT:]
    start, whole, alone = tokenizer.batch_decode([context, context + ids, ids], skip_special_tokens=True)
    return whole[len(start) :] if whole.startswith(start) else alone


def check_room(model: PreTrainedModel, prompt: list[int], config: GenerationConfig, shown: str = "") -> None:
    """Raise Refused when a prompt and its answer do not fit into the model's positions, or it has no token.

    shown: the prompt's text, for the message.
    """
    room = model.config.max_position_embeddings - config.max_new_tokens
    name = f"the prompt {shown[:40]!r}" if shown else "a prompt"
    if not prompt:
        raise Refused(f"{name} has no token: write some text (this tokenizer has no start token of its own)")
    if len(prompt) > room:
        raise Refused(
            f"{name} has {len(prompt)} tokens; the model has {model.config.max_position_embeddings} "
            f"positions, so {max(room, 0)} fit beside generation.max_new_tokens {config.max_new_tokens}. "
            "Shorten the prompt or lower max_new_tokens"
        )


@torch.no_grad()  # no inference_mode: what ZeRO-3 gathers in it would be lost for training
def generate_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    config: GenerationConfig,
    seed: int,
    batch_size: int = BATCH_SIZE,
) -> list[Answer]:
    """Continue prompts (lists of ids), `batch_size` at a time; the same for the same seed.

    Prompts of like length share a batch, padded on the left. The answers stand in the order of the prompts.
    Raises Refused for a prompt that is empty or does not fit, before any is continued.
    """
    for prompt in prompts:
        check_room(model, prompt, config)
    model.eval()
    torch.manual_seed(seed)
    answers: list[Answer] = [Answer("", False)] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        for i, row in zip(places, _continue(model, [prompts[i] for i in places], config), strict=True):
            stopped = tokenizer.eos_token_id in row
            row = row[: row.index(tokenizer.eos_token_id)] if stopped else row
            answers[i] = Answer(decode_continuation(tokenizer, prompts[i], row), stopped)
    return answers


def _continue(model: PreTrainedModel, prompts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
    """The new ids of each prompt of a batch, with padding behind an end token."""
    longest = max(map(len, prompts))
    ids = [[config.pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    output = model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        generation_config=config,
    )
    return output[:, longest:].tolist()


def stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: list[int], config: GenerationConfig
) -> Iterator[str]:
    """Continue one prompt and yield the text piece by piece, a token or so at a time.

    transformers' own TextStreamer waits for a space or a kanji, so that a line in kana would appear at once.
    Nothing that a later token may change is yielded: half a character, a run of byte tokens that goes on.
    When the caller stops listening, generating stops. An error in generating is raised here.
    Raises Refused for a prompt that is empty or does not fit.
    """
    check_room(model, prompt, config)
    tokens: queue.Queue[list[int] | None | Exception] = queue.Queue()
    stop = threading.Event()

    def run() -> None:
        try:
            ids = torch.tensor([prompt], device=model.device)
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=_Tokens(tokens),
                stopping_criteria=StoppingCriteriaList([_Stop(stop)]),
            )
            tokens.put(None)
        except Exception as error:  # handed over: in this thread nobody would see it
            tokens.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    new: list[int] = []
    shown = 0
    try:
        while (found := tokens.get()) is not None:
            if isinstance(found, Exception):
                raise found
            new += [i for i in found if i != tokenizer.eos_token_id]
            end = len(new)
            while end and BYTE_TOKEN.fullmatch(str(tokenizer.convert_ids_to_tokens(new[end - 1]))):
                end -= 1
            text = decode_continuation(tokenizer, prompt, new[:end]).rstrip("\ufffd")
            if len(text) > shown:
                yield text[shown:]
                shown = len(text)
        text = decode_continuation(tokenizer, prompt, new)
        if len(text) > shown:
            yield text[shown:]
    finally:
        stop.set()
        thread.join()


class _Tokens(BaseStreamer):
    """Puts each new token into a queue; the first call brings the prompt, which is left out."""

    def __init__(self, tokens: queue.Queue) -> None:
        self.tokens, self.is_prompt = tokens, True

    def put(self, value: torch.Tensor) -> None:
        """Called by generate() with the prompt, then with each token."""
        if not self.is_prompt:
            self.tokens.put(value.flatten().tolist())
        self.is_prompt = False

    def end(self) -> None:
        """Called by generate() at the end; `stream` itself marks it, after errors too."""


class _Stop(StoppingCriteria):
    """Stops generating when an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """One flag for each row of the batch."""
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def side_by_side(rows: list[dict[str, Any]]) -> str:
    """Samples as a Markdown table: a row for each prompt, a column for each version.

    rows: each has ``prompt`` and the versions, all the same ones; a version is a text or several. A text
    is shown as it was written, also where it holds Markdown.
    """
    columns = list(rows[0])
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [found if isinstance(found, list) else [found] for found in row.values()]
        lines.append("| " + " | ".join("<br>".join(map(markdown_text, texts)) for texts in cells) + " |")
    return "\n".join(lines) + "\n"
