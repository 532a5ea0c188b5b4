"""Text to ids: what every stage that uses a saved tokenizer shares.

A tokenizer folder of stage 03 says everything by itself: AutoTokenizer loads it, its ``bos_token`` is the
token that stands before every document (None where nothing does), and ``segmenter`` in its configuration
names the word segmenter that text passes first, if there is one.
"""

from __future__ import annotations

import functools
import json
import re
import weakref
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from recipe.project import DATA, RecipeError

if TYPE_CHECKING:  # workers that only encode do without its weight
    from transformers import PreTrainedTokenizerFast

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece spells the 256 bytes
_encoders: weakref.WeakKeyDictionary[PreTrainedTokenizerFast, Tokenizer] = weakref.WeakKeyDictionary()


def text_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The same tokenizer without its control tokens, see `without_control_tokens`."""
    if tokenizer not in _encoders:
        _encoders[tokenizer] = without_control_tokens(tokenizer.backend_tokenizer.to_str())
    return _encoders[tokenizer]


def without_control_tokens(tokenizer_json: str) -> Tokenizer:
    """A tokenizer to which everything in a text is text: it never finds ``</s>`` and its like.

    tokenizer_json: the content of a ``tokenizer.json``. Ids are the same; symbols of the user's stay what
    they are.
    """
    state = json.loads(tokenizer_json)
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["special"]]
    state["post_processor"] = None
    return Tokenizer.from_str(json.dumps(state))


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Ids of texts that are only text, with nothing before or behind them, on all cores.

    Texts go through the tokenizer's word segmenter, if it has one. Raises RecipeError for a text that is not
    valid Unicode.
    """
    for text in texts:
        check_unicode(text)
    name = tokenizer.init_kwargs.get("segmenter")
    if name:
        texts = segmenter(name).segment(texts)
    return [encoding.ids for encoding in text_encoder(tokenizer).encode_batch_fast(texts)]


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of one text, as `encode_texts`."""
    return encode_texts(tokenizer, [text])[0]


def prompt_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of the beginning of a document: the start token, if the tokenizer has one, then the text."""
    return document_start(tokenizer) + encode_text(tokenizer, text)


def document_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of a whole document: the start token, if the tokenizer has one, the text, and one end token."""
    return [*prompt_ids(tokenizer, text), tokenizer.eos_token_id]


def document_start(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """What stands before every document: the one id of ``bos_token``, or nothing."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def check_unicode(text: str) -> None:
    """Raise RecipeError for a lone surrogate, half of a UTF-16 pair, which no UTF-8 text can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        before = text[max(0, error.start - 20) : error.start]
        raise RecipeError(
            f"not valid Unicode: a lone surrogate {text[error.start]!r} at character {error.start}, after "
            f"{before!r}. Mend the text: write the character itself, not half of its UTF-16 form"
        ) from error


@functools.cache
def segmenter(name: str) -> Any:
    """The word segmenter of that name (`recipe.tokenization.word_segmenter`), started once in a process."""
    from recipe.tokenization.word_segmenter import make_segmenter

    return make_segmenter(name, DATA)
