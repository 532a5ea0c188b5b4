"""Turns text into ids, in the same way in every stage that uses a saved tokenizer.

The folder of stage 03 contains everything that is needed: AutoTokenizer loads it; its ``bos_token`` is the
token before every document, or None; ``segmenter`` in its configuration names the word segmenter that text
passes through first, if there is one.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
import weakref
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from recipe.project import DATA, RecipeError

# Workers that only encode do not load transformers.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # the names of SentencePiece's tokens for the 256 bytes
_encoders: weakref.WeakKeyDictionary[PreTrainedTokenizerFast, Tokenizer] = weakref.WeakKeyDictionary()


def text_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The tokenizer without its control tokens: see `without_control_tokens`."""
    if tokenizer not in _encoders:
        _encoders[tokenizer] = without_control_tokens(tokenizer.backend_tokenizer.to_str())
    return _encoders[tokenizer]


def without_control_tokens(tokenizer_json: str) -> Tokenizer:
    """A tokenizer that reads ``</s>`` and other control tokens in a text as plain text.

    tokenizer_json: the content of a ``tokenizer.json``. The ids stay the same; user symbols stay tokens.

    A token that is not in the model's vocabulary gets the next free id when the tokenizer is made: such a
    control token is not left out, which would move the ids of those behind it (Qwen's ``<think>``), but
    gets a name that no text has.
    """
    tokenizer, state = Tokenizer.from_str(tokenizer_json), json.loads(tokenizer_json)
    inside = tokenizer.get_vocab(with_added_tokens=False)
    added = state["added_tokens"]
    added = [token for token in added if not token["special"] or token["content"] not in inside]
    for token in added:
        if token["special"]:
            token["content"] = f"\ufdd0{secrets.token_hex(8)}"
    state["added_tokens"], state["post_processor"] = added, None
    return Tokenizer.from_str(json.dumps(state))


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Ids of texts, without control tokens before or after them; uses all cores.

    Text first passes through the word segmenter of the tokenizer, if it has one. Raises RecipeError for a
    text that is not valid Unicode.
    """
    for text in texts:
        check_unicode(text)
    name = tokenizer.init_kwargs.get("segmenter")
    if name:
        texts = segmenter(name).segment(texts)
    return [encoding.ids for encoding in text_encoder(tokenizer).encode_batch_fast(texts)]


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of one text: see `encode_texts`."""
    return encode_texts(tokenizer, [text])[0]


def prompt_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of the beginning of a document: the start token, if the tokenizer has one, then the text."""
    return document_start(tokenizer) + encode_text(tokenizer, text)


def document_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of a whole document: the start token, if the tokenizer has one, the text, and one end token."""
    return [*prompt_ids(tokenizer, text), tokenizer.eos_token_id]


def document_start(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids before every document: that of ``bos_token``, or none."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def check_unicode(text: str) -> None:
    """Raise RecipeError for a lone surrogate, which is half of a UTF-16 pair and not valid in UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        before = text[max(0, error.start - 20) : error.start]
        raise RecipeError(
            f"not valid Unicode: a lone surrogate {text[error.start]!r} at character {error.start}, after "
            f"{before!r}. Fix the text: write the character itself, not half of its UTF-16 form"
        ) from error


@functools.cache
def segmenter(name: str) -> Any:
    """The word segmenter of that name (recipe.tokenization.word_segmenter), started once per process."""
    from recipe.tokenization.word_segmenter import make_segmenter

    return make_segmenter(name, DATA)
