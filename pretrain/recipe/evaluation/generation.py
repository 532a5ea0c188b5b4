"""From prompts to text: many prompts in batches, or one prompt as a stream.

A prompt is prepared as the training text was: it is normalised by the recipe's dataset.json, then split by
the tokenizer's word segmenter, if it has one. A tokenizer with a word segmenter puts the words together again
when it decodes.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from recipe.config.generation import GENERATION, NATIVE, RANGES
from recipe.config.keys import check_keys
from recipe.config.ranges import check_ranges
from recipe.corpus.characters import make_dialogue_normalizer
from recipe.corpus.normalizing import make_normalizer
from recipe.model.build import special_ids
from recipe.project import Refused, markdown_table, markdown_text
from recipe.tokenization.encode_text import BYTE_TOKEN

BATCH_SIZE = 8  # prompts at a time: tests/bench/generation.py
CONTEXT = 8  # ids before a continuation that are decoded with it, so that its first space is kept
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty")


class Answer(NamedTuple):
    """What a model wrote, and whether it ended with the end token rather than at the length limit."""

    text: str
    stopped: bool


def generation_config(values: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """The native part of generation.json, with the tokenizer's special ids.

    ``num_return_sequences`` is left out: a stage that wants several samples gives the prompt several times.
    Raises Refused for a key, a type or a value that generation.json may not have, such as a temperature of 0,
    and for another special id than the tokenizer's.
    """
    # transformers checks most ranges only when it generates.
    check_keys(values, NATIVE | GENERATION, "generation.json")
    check_ranges(values, RANGES, "generation.json")
    native = {k: v for k, v in values.items() if k not in GENERATION and k != "num_return_sequences"}
    # transformers refuses an int for these keys, but JSON, a slider and a user write 1 for 1.0.
    native |= {key: float(native[key]) for key in _FLOATS if type(native.get(key)) is int}
    if "top_k" in native and native["top_k"] is None:
        native["top_k"] = 0  # transformers would take its default, 50
    ids = special_ids(tokenizer)
    for key, expected in ids.items():
        if native.get(key, expected) != expected:
            raise Refused(
                f"generation.json: {key}: {native[key]}, but the tokenizer has {expected}. Remove the key"
            )
    try:
        config = GenerationConfig(**native | ids)
        config.validate()
    except (ValueError, TypeError) as error:
        raise Refused(f"generation.json: {error}") from error
    return config


def clean_prompt(config: dict[str, Any], text: str) -> str:
    """The beginning of a document as stage 02 would have kept it: normalised by the recipe's dataset.json.

    config: a whole recipe. Raises Refused when nothing is left.
    """
    return _not_empty(text, make_normalizer(config["dataset"])(text))


def clean_question(config: dict[str, Any], text: str) -> str:
    """A user's message as stage 11 would have kept it, with its layout (see `make_dialogue_normalizer`).

    config: a whole recipe. Raises Refused when nothing is left.
    """
    return _not_empty(text, make_dialogue_normalizer(config["dataset"])(text))


def _not_empty(text: str, clean: str) -> str:
    if not clean:
        raise Refused(f"the prompt {text[:40]!r} is empty after normalising. Write some text")
    return clean


def decode_continuation(tokenizer: PreTrainedTokenizerFast, prompt: list[int], ids: list[int]) -> str:
    """The text of ids that follow a prompt, with the space before the first word, if there is one.

    Ids that are decoded alone lose this space, because SentencePiece removes the first space of a text.
    """
    context = prompt[-CONTEXT:]
    start, whole, alone = tokenizer.batch_decode([context, context + ids, ids], skip_special_tokens=True)
    return whole[len(start) :] if whole.startswith(start) else alone


def check_room(model: PreTrainedModel, prompt: list[int], config: GenerationConfig, shown: str = "") -> None:
    """Raise Refused for a prompt without a token, or one that leaves no room for an answer.

    shown: the prompt's text, for the message.
    """
    room = model.config.max_position_embeddings - config.max_new_tokens
    name = f"the prompt {shown[:40]!r}" if shown else "a prompt"
    if not prompt:
        raise Refused(f"{name} has no token: write some text (this tokenizer has no start token of its own)")
    if len(prompt) > room:
        raise Refused(
            f"{name} has {len(prompt)} tokens; the model has {model.config.max_position_embeddings} "
            f"positions, and generation.max_new_tokens {config.max_new_tokens} of them are for the answer: "
            f"{max(room, 0)} are left. Shorten the prompt or lower max_new_tokens"
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
    """Continue prompts (lists of ids), `batch_size` at a time. The same seed gives the same answers.

    Prompts of similar length share a batch, padded on the left. The answers are in the order of the prompts.
    Raises Refused for a prompt that is empty or too long, before any prompt is continued.
    """
    for prompt in prompts:
        check_room(model, prompt, config)
    model.eval()
    torch.manual_seed(seed)
    answers: list[Answer] = [Answer("", False)] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        rows = _continue(model, tokenizer, [prompts[i] for i in batch], config)
        for i, row in zip(batch, rows, strict=True):
            row, stopped = _until_end(row, tokenizer)
            answers[i] = Answer(decode_continuation(tokenizer, prompts[i], row), stopped)
    return answers


def _until_end(row: list[int], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], bool]:
    """The ids before the end token, and whether there is one."""
    end = tokenizer.eos_token_id
    return (row[: row.index(end)], True) if end in row else (row, False)


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    config: GenerationConfig,
) -> list[list[int]]:
    """The new ids of each prompt of a batch, with padding after an end token."""
    longest = max(map(len, prompts))
    ids = [[config.pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    output = model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        generation_config=config,
        tokenizer=tokenizer,  # for stop_strings
    )
    return output[:, longest:].tolist()


def stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: list[int], config: GenerationConfig
) -> Iterator[str]:
    """Continue one prompt and yield the text in parts, about one token at a time.

    The TextStreamer of transformers waits for a space or a kanji, so that a line in kana appears only when it
    is complete. Here only that is held back which a later token can change: an incomplete character of byte
    tokens. Generation stops when the caller closes the iterator. An error in the generating thread is raised
    here. With several beams, the text is known only at the end, and comes as one part. Raises Refused for a
    prompt that is empty or too long.
    """
    check_room(model, prompt, config)
    if (config.num_beams or 1) > 1:
        with torch.no_grad():
            row, _ = _until_end(_continue(model, tokenizer, [prompt], config)[0], tokenizer)
        yield decode_continuation(tokenizer, prompt, row)
        return
    tokens: queue.Queue[list[int] | None | Exception] = queue.Queue()
    stop = threading.Event()

    def run() -> None:
        try:
            ids = torch.tensor([prompt], device=model.device)
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                tokenizer=tokenizer,  # for stop_strings
                streamer=_Tokens(tokens),
                stopping_criteria=StoppingCriteriaList([_Stop(stop)]),
            )
            tokens.put(None)
        except Exception as error:
            # An error in this thread would be lost: the reader of the queue raises it.
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
    """Puts each new token into a queue. The first call gets the prompt, which is left out."""

    def __init__(self, tokens: queue.Queue) -> None:
        self.tokens, self.is_prompt = tokens, True

    def put(self, value: torch.Tensor) -> None:
        """Called by generate() with the prompt, then with each token."""
        if not self.is_prompt:
            self.tokens.put(value.flatten().tolist())
        self.is_prompt = False

    def end(self) -> None:
        """Called by generate() at the end. Nothing to do: `stream` marks the end, after an error as well."""


class _Stop(StoppingCriteria):
    """Stops generating when an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """One flag for each row of the batch."""
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def evenly(rows: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the rows, from all parts of them: sources and shards follow one another."""
    count = min(most, len(rows))
    return [rows[number * len(rows) // count] for number in range(count)]


def side_by_side(rows: list[dict[str, Any]]) -> str:
    """Samples as a Markdown table: a row for each prompt, a column for each version.

    rows: each has ``prompt`` and the versions, all the same ones; a version is a text or several. A text
    is shown as it was written, also where it holds Markdown.
    """
    columns = list(rows[0])
    cells = [[found if isinstance(found, list) else [found] for found in row.values()] for row in rows]
    shown = [["<br>".join(map(markdown_text, texts)) for texts in row] for row in cells]
    return "\n".join(markdown_table(columns, shown, "l")) + "\n"
