"""Conversations as tokens: the chat template turns messages into ids, and the answers are what is trained."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
from jinja2 import Environment, TemplateSyntaxError
from transformers import PreTrainedTokenizerFast

from recipe.conversations.instructions import messages_of
from recipe.conversations.read_rows import Message
from recipe.project import RecipeError
from recipe.tokenization.encode_text import encode_text

Conversation = tuple[list[int], list[bool]]  # ids, and for each id whether it is trained

SECONDS = 10  # for each 100 messages begun; the templates of the project need about 0.1 for the first 100
_SOLUTION = (
    "Use a template of recipe/config/chat_templates.py (`template` in instruction.json), and redo stage 12 "
    "with --force"
)


def check_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise RecipeError unless a tokenizer's special tokens and chat template can train answers.

    Needed: an end token and a padding token; text between a question and its answer, so that the model knows
    when to answer; the answer followed by the end token and nothing else; and no message that is rendered
    differently when another one follows.
    """
    missing = [name for name in ("eos_token", "pad_token") if getattr(tokenizer, name) is None]
    if missing:
        raise RecipeError(
            f"the tokenizer has no {' and no '.join(missing)}, but answers must end and batches must be "
            "padded. Redo stage 03, whose tokenizers have both, or add the tokens to tokenizer_config.json"
        )
    if not tokenizer.chat_template:
        raise RecipeError(
            f"the tokenizer has no chat template: this model was not tuned on instructions. {_SOLUTION}"
        )
    question, answer, other = "山は高いか", "はい、高い", "海は深いか"
    roles = {question: "user", answer: "assistant", other: "user"}
    messages = [{"role": role, "content": text} for text, role in roles.items()]
    if _has_power(tokenizer):
        # Nothing can stop Python while it computes a power such as 10 ** 10 ** 9.
        raise RecipeError(f"the chat template computes a power (**), which no template needs. {_SOLUTION}")
    parts = [text for text, _ in _parts(tokenizer, messages)]
    for before, text in ((question, parts[0]), (other, parts[2])):
        if not text.partition(before)[2]:
            raise RecipeError(
                f"the chat template has no response mark: after a question, which ends with {text[-20:]!r}, "
                f"it writes nothing that asks for an answer. {_SOLUTION}"
            )
    if parts[1] != answer + str(tokenizer.eos_token):
        raise RecipeError(
            f"the chat template writes the answer {answer!r} as {parts[1]!r}; expected: the answer, then "
            f"{tokenizer.eos_token!r}, and nothing else. Otherwise the model "
            f"does not learn to stop. {_SOLUTION}"
        )


def encode_conversation(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> Conversation:
    """The ids of a conversation by the tokenizer's chat template; the answers are marked as trained.

    An answer whose message has ``trained`` False is context: it is not marked.
    Special-token strings inside a message are text: private-use characters that no message has replace them
    while the template is applied, and they are restored before the text between the real control tokens is
    encoded. Raises RecipeError when the template renders a message differently once another one follows.
    """
    return _joined(_encoded(tokenizer, messages))


def _joined(parts: list[tuple[list[int], bool]]) -> Conversation:
    """The parts of `_encoded` as one conversation."""
    ids = [token for new, _ in parts for token in new]
    return ids, [is_trained for new, is_trained in parts for _ in new]


def _encoded(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> list[tuple[list[int], bool]]:
    """The ids that each message adds to a conversation, and whether they are trained."""
    specials = tokenizer.all_special_tokens
    used = set().union(*(message["content"] for message in messages))
    unused = itertools.filterfalse(used.__contains__, map(chr, itertools.count(0xF0000)))
    hidden = dict(zip(specials, unused, strict=False))
    restored = {mark: token for token, mark in hidden.items()}
    pattern = re.compile("|".join(map(re.escape, specials)))
    safe = [m | {"content": pattern.sub(lambda found: hidden[found.group()], m["content"])} for m in messages]
    parts = []
    for text, is_trained in _parts(tokenizer, safe):
        ids: list[int] = []
        for part in re.split(f"({pattern.pattern})", text):
            if part in hidden:
                ids.append(tokenizer.convert_tokens_to_ids(part))
            else:
                ids += encode_text(
                    tokenizer, "".join(restored.get(character, character) for character in part)
                )
        parts.append((ids, is_trained))
    return parts


def _parts(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> list[tuple[str, bool]]:
    """The list of `_rendered`. Raises RecipeError for every exception of a template, and for a slow one."""
    seconds = SECONDS * math.ceil(len(messages) / 100)
    try:
        with time_limit(seconds):
            return list(_rendered(tokenizer, messages))
    except RecipeError:
        raise
    except TimeoutError as error:
        raise RecipeError(
            f"the chat template needs more than {seconds} seconds for {len(messages)} messages. {_SOLUTION}"
        ) from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:300]
        raise RecipeError(f"the chat template cannot be rendered: {reason}. {_SOLUTION}") from error


def _has_power(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the chat template has the operator ``**``. A template with a syntax error is found later."""
    with contextlib.suppress(ValueError, TemplateSyntaxError):
        tokens = Environment().lex(tokenizer.get_chat_template())
        return any(kind == "operator" and value == "**" for _, kind, value in tokens)
    return False


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the calling thread, whichever it is, after some seconds.

    It is raised between two steps of Python: not within one operation of C, however long that takes.
    """
    caller = threading.get_ident()
    with _lock:
        _ends[caller] = time.monotonic() + seconds
        if not (_watchers and _watchers[-1].is_alive()):  # none yet, or this process was forked
            _watchers.append(threading.Thread(target=_watch, daemon=True))
            _watchers[-1].start()
    try:
        yield
    finally:
        with _lock:
            _ends.pop(caller, None)


# When the limit of each thread ends, and the one thread that looks: a timer for each conversation would
# double the time of encoding it.
_ends: dict[int, float] = {}
_watchers: list[threading.Thread] = []
_lock = threading.Lock()


def _watch() -> None:
    while True:
        time.sleep(0.2)
        with _lock:
            for thread in [thread for thread, end in _ends.items() if end < time.monotonic()]:
                del _ends[thread]
                late = ctypes.py_object(TimeoutError)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), late)


def _rendered(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> Iterator[tuple[str, bool]]:
    """The text that each message adds to the rendered conversation, and whether it is trained."""
    before = ""
    for count, message in enumerate(messages, 1):
        text = str(tokenizer.apply_chat_template(messages[:count], tokenize=False))
        if not text.startswith(before):
            raise RecipeError(
                f"the chat template renders {before[-20:]!r} differently when {message['content'][:20]!r} "
                f"follows: a prompt would differ from what was trained. {_SOLUTION}"
            )
        yield text.removeprefix(before), message["role"] == "assistant" and message.get("trained", True)
        before = text


def load_conversations(
    path: Path, tokenizer: PreTrainedTokenizerFast, block_size: int
) -> tuple[list[Conversation], dict[str, int]]:
    """Every pair of a Parquet file of stage 11 as a conversation; and the numbers of those left out or cut.

    A conversation longer than `block_size` tokens loses its last turns until it fits; it is left out when its
    first trained answer does not fit. Raises RecipeError when an answer is empty, when no conversation fits,
    and when the chat template cannot train answers (see `check_template`).
    """
    check_template(tokenizer)
    conversations: list[Conversation] = []
    counts = Counter({"longer than block_size": 0})
    for row in pq.read_table(path).to_pylist():
        messages = messages_of(row)
        _check_answers(messages, path)
        parts = _encoded(tokenizer, messages)
        if kept := _fitting(parts, block_size):
            conversations.append(_joined(parts[:kept]))
            if kept < len(parts):
                counts["shortened"] += 1
        else:
            counts["longer than block_size"] += 1
    if not conversations:
        raise RecipeError(f"{path}: no pair fits into block_size {block_size}. Raise finetune.block_size")
    return conversations, dict(counts)


def _check_answers(messages: list[Message], path: Path) -> None:
    """Raise RecipeError when an answer of a conversation is empty."""
    for question, message in zip(messages, messages[1:], strict=False):
        if message["role"] == "assistant" and not message["content"].strip():
            raise RecipeError(
                f"{path}: the pair {question['content'][:60]!r} has no trained token: its answer is empty. "
                "Redo stage 11 with --force: it drops such pairs"
            )


def _fitting(parts: list[tuple[list[int], bool]], block_size: int) -> int:
    """How many messages the longest beginning has that ends with an answer and fits; 0 if none fits.

    At least one of its answers is trained. parts: a conversation from `_encoded`.
    """
    lengths = list(itertools.accumulate(len(ids) for ids, _ in parts))
    trained = list(itertools.accumulate((is_trained for _, is_trained in parts), max))
    ends = range(len(parts), 1, -2)
    return next((end for end in ends if lengths[end - 1] <= block_size and trained[end - 1]), 0)


def preview(conversations: list[Conversation], tokenizer: PreTrainedTokenizerFast) -> str:
    """Conversations for people to read: the text in 【】 is trained, the rest is only read."""
    return "\n--- ".join(["--- example (【】 is trained)", *(_marked(c, tokenizer) for c in conversations)])


def _marked(conversation: Conversation, tokenizer: PreTrainedTokenizerFast) -> str:
    text, begin = "", 0
    ids, trained = conversation
    for end in range(1, len(ids) + 1):
        if end == len(ids) or trained[end] != trained[begin]:
            part = str(tokenizer.decode(ids[begin:end]))
            text += f"【{part}】" if trained[begin] else part
            begin = end
    return text
