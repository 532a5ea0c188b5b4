"""Trains a tokenizer of the kind that tokenizer.json names."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from recipe.config.tokenizer import kind_of, required_characters, special_ids, special_tokens, vocabulary_size
from recipe.project import RecipeError
from recipe.tokenization.convert import as_fast, from_sentencepiece, sentencepiece_tokens
from recipe.tokenization.word_segmenter import ESCAPE, MARKS

# The sums of SentencePiece depend on the number of threads; a fixed number gives every machine the same sums.
THREADS = 16


class Trained(NamedTuple):
    """A tokenizer, and the SentencePiece model it was made from, or None."""

    tokenizer: PreTrainedTokenizerFast
    sentencepiece: bytes | None = None


def train_tokenizer(sentences: Iterable[str], config: dict[str, Any]) -> Trained:
    """Train the kind of tokenizer that `config`, the content of tokenizer.json, names.

    sentences: text; segmented text for a kind with a segmenter. Raises RecipeError when there is no text, or
    when the text is too small for the vocabulary.
    """
    return TRAINERS[config.get("kind", "unigram")](sentences, config)


def expected_memory(config: dict[str, Any]) -> int:
    """An upper bound of the resident bytes of stage 03, given the content of tokenizer.json.

    It depends on the size of the sample, not on that of the corpus. It is a fifth above what
    tests/bench/tokenizer.py measured with samples of 10 and 50 MB.
    """
    return 1_300_000_000 + kind_of(config).memory * sample_bytes(config)


def sample_bytes(config: dict[str, Any]) -> int:
    """The most bytes of text to train on: ``training_megabytes`` of tokenizer.json."""
    return int(config.get("training_megabytes", 10) * 1e6)


# ------------------------------------------------------------------------------ SentencePiece: unigram, bpe


def _train_unigram_or_bpe(sentences: Iterable[str], config: dict[str, Any]) -> Trained:
    model = train_sentencepiece(sentences, config)
    tokens = sentencepiece_tokens(spm.SentencePieceProcessor(model_proto=model))
    return Trained(as_fast(from_sentencepiece(model), tokens), model)


def train_sentencepiece(sentences: Iterable[str], config: dict[str, Any], strict: bool = True) -> bytes:
    """A serialised SentencePiece model of the kind ``unigram`` or ``bpe``.

    strict: raise RecipeError when the text is too small for the vocabulary; otherwise make a smaller one.
    """
    kind, size = config.get("kind", "unigram"), vocabulary_size(config)
    counted, model = _Counting(sentences), io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(counted),
            model_writer=model,
            minloglevel=2,
            num_threads=THREADS,
            model_type=kind,
            vocab_size=size,
            hard_vocab_limit=strict,
            byte_fallback=True,
            character_coverage=config.get("character_coverage", 0.9995),
            split_digits=config.get("split_digits", True),
            user_defined_symbols=config.get("user_symbols", []),
            # Stage 02 has normalised the text. Nothing may change it here, so that decoding is exact.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # Indentation costs one token, where the text has any (dataset.json, layout).
            allow_whitespace_only_pieces=True,
            required_chars="".join(sorted(required_characters(config))),
            # SentencePiece silently skips longer sentences.
            max_sentence_length=2**30,
            # The default begins with a million candidates: it takes ten times as long and compresses less
            # (tests/bench/tokenizer.py).
            seed_sentencepiece_size=max(10_000, 2 * size),
            num_sub_iterations=1,
            shrinking_factor=0.5,
            **_control_tokens(config),
        )
    except (RuntimeError, OSError) as error:
        counted.refuse_empty()
        raise _wrong_size(size, str(error)) from error
    return exact_scores(model.getvalue()) if kind == "unigram" else model.getvalue()


def _control_tokens(config: dict[str, Any]) -> dict[str, Any]:
    """The control tokens as arguments of SentencePiece's trainer: ``pad_id``, ``pad_piece`` and so on."""
    ids, arguments = special_ids(config), {}
    for key, token in special_tokens(config).items():
        name = key.removesuffix("_token")
        arguments[f"{name}_id"] = -1 if token is None else ids[f"{key}_id"]
        if token is not None:
            arguments[f"{name}_piece"] = token
    return arguments


def exact_scores(model: bytes) -> bytes:
    """The same Unigram model with its scores rounded to multiples of 1/8; compression stays the same.

    SentencePiece compares two ways to cut a text by sums in float32, the fast tokenizer by sums in float64.
    For ``ccc`` as ``cc c`` or ``c cc`` only rounding errors would decide. Sums of eighths are exact in both
    types up to 2^21, the score of a line of a megabyte, so that both decide alike.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for piece in proto.pieces:
        piece.score = round(piece.score * 8) / 8
    return proto.SerializeToString()


def _wrong_size(size: int, error: str) -> RecipeError:
    """SentencePiece's message names its source lines; the user needs the limit that is in it."""
    most, least = re.search(r"value <= (\d+)", error), re.search(r"required_chars\. \d+ vs (\d+)", error)
    if least:
        reason = f"its characters, the 256 bytes and the control tokens need {least[1]}. Raise"
        return RecipeError(
            f"cannot train a vocabulary of {size}: {reason} tokenizer.vocab_size or lower character_coverage"
        )
    reason = f"it supports at most {most[1]} tokens" if most else error.strip()
    return RecipeError(
        f"cannot train a vocabulary of {size} on this text: {reason}. Lower tokenizer.vocab_size or add text"
    )


# ----------------------------------------------------------------------- tokenizers: byte-level-bpe, word-bpe


def _train_byte_level(sentences: Iterable[str], config: dict[str, Any]) -> Trained:
    """BPE over bytes (Radford et al., 2019): no text is unknown and nothing is lost."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _train_bpe(sentences, config, split, decoders.ByteLevel(), alphabet)


def _train_words(sentences: Iterable[str], config: dict[str, Any]) -> Trained:
    """BPE inside the words of segmented text; decoding removes the spaces between words again."""
    spaces = [decoders.Replace(mark, character) for character, mark in MARKS.items()]
    decoder = decoders.Sequence([decoders.Fuse(), *spaces])
    # The marks for white space always have a token.
    return _train_bpe(sentences, config, pre_tokenizers.Whitespace(), decoder, [*MARKS.values(), ESCAPE])


def _train_bpe(
    sentences: Iterable[str], config: dict[str, Any], split: Any, decoder: Any, alphabet: list[str]
) -> Trained:
    """Train a BPE; `split` is its pre-tokenizer, `alphabet` the characters that always have a token."""
    tokens, ids, size = special_tokens(config), special_ids(config), vocabulary_size(config)
    present = [key for key, token in tokens.items() if token is not None]
    control = [tokens[key] for key in sorted(present, key=lambda key: ids[f"{key}_id"])]
    symbols = config.get("user_symbols", [])
    tokenizer = Tokenizer(models.BPE(unk_token=tokens["unk_token"]))
    digits = [pre_tokenizers.Digits(individual_digits=True)] if config.get("split_digits", True) else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, split])
    limit = {"limit_alphabet": config["limit_alphabet"]} if "limit_alphabet" in config else {}
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=config.get("min_frequency", 1),
        initial_alphabet=alphabet,
        special_tokens=[*control, *symbols],
        show_progress=False,
        **limit,
    )
    counted = _Counting(sentences)
    tokenizer.train_from_iterator(counted, trainer)
    counted.refuse_empty()
    found = tokenizer.get_vocab_size()
    if found != size:
        raise RecipeError(
            f"cannot train a vocabulary of {size} on this text: it gives {found} tokens. Lower "
            "tokenizer.vocab_size, lower min_frequency or add text"
        )
    # The trainer marks user symbols as control tokens, too. The new object has them as plain tokens.
    clean = Tokenizer(tokenizer.model)
    clean.pre_tokenizer, clean.decoder = tokenizer.pre_tokenizer, decoder
    clean.add_tokens([AddedToken(symbol, normalized=False) for symbol in symbols])
    return Trained(as_fast(clean, tokens, config.get("segmenter")))


class _Counting:
    """An iterable that remembers whether it gave anything."""

    def __init__(self, items: Iterable[str]) -> None:
        self.items, self.seen = items, False

    def __iter__(self) -> Iterator[str]:
        for item in self.items:
            self.seen = True
            yield item

    def refuse_empty(self) -> None:
        """Raise RecipeError when it gave nothing."""
        if not self.seen:
            raise RecipeError("no text to train a tokenizer on. Add text to the training side of stage 02")


# How the trained kinds of TOKENIZER_KINDS (recipe/config/tokenizer.py) are trained, from (sentences, config).
TRAINERS: dict[str, Callable[[Iterable[str], dict[str, Any]], Trained]] = {
    "unigram": _train_unigram_or_bpe,
    "bpe": _train_unigram_or_bpe,
    "byte-level-bpe": _train_byte_level,
    "word-bpe": _train_words,
}
