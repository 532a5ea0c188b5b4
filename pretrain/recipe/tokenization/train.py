"""Training a tokenizer: a bounded, seeded sample of the text, then one of the kinds that tokenizer.json
names.
"""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from recipe.config.tokenizer import special_ids, special_tokens, vocabulary_size
from recipe.corpus.shards import read_texts, side_sources
from recipe.project import RecipeError
from recipe.tokenization.convert import as_fast, from_sentencepiece, sentencepiece_tokens
from recipe.tokenization.word_segmenter import ESCAPE, MARKS

LONGEST_SENTENCE = 4000  # characters; it bounds the trainers' memory, not what is learnt
# SentencePiece adds up in as many parts as it has threads: with a fixed number every machine gets the same
# sums.
THREADS = 16
# Resident bytes per byte of the sample.
MEMORY = {"unigram": 30, "bpe": 15, "byte-level-bpe": 30, "word-bpe": 30, "published": 30}


class Trained(NamedTuple):
    """A tokenizer, and the SentencePiece model it was made from, if it was."""

    tokenizer: PreTrainedTokenizerFast
    sentencepiece: bytes | None


class Sample(NamedTuple):
    """Sentences drawn from a corpus of so many bytes; about `drawn` bytes of it."""

    bytes: int
    drawn: float
    lines: Iterator[str]


# ------------------------------------------------------------------------------------------------- sample


def sample_shares(sizes: dict[str, int], weights: dict[str, float], most_bytes: int) -> dict[str, float]:
    """The share of each source to draw, so that about `most_bytes` come in proportion to size x weight.

    sizes: bytes of text by source. weights: 1.0 where a source has none. A source that is used up leaves its
    part to the others.
    """
    shares = dict.fromkeys(sizes, 1.0)
    open_sources = {name for name in sizes if sizes[name]}
    while open_sources:
        room = most_bytes - sum(sizes[name] for name in sizes if name not in open_sources)
        wanted = sum(sizes[name] * weights.get(name, 1.0) for name in open_sources)
        if wanted <= 0:
            return shares | dict.fromkeys(open_sources, 0.0)
        rate = max(0.0, room / wanted)
        full = {name for name in open_sources if rate * weights.get(name, 1.0) >= 1}
        if not full:
            return shares | {name: rate * weights.get(name, 1.0) for name in open_sources}
        open_sources -= full
    return shares


def sample_lines(texts: Iterable[str], share: float, draw: random.Random) -> Iterator[str]:
    """Lines of texts, each drawn with the probability `share`, cut after 。 and at LONGEST_SENTENCE."""
    for text in texts:
        for line in text.split("\n"):
            if draw.random() < share:
                for sentence in re.split(r"(?<=。)", line):
                    for begin in range(0, len(sentence), LONGEST_SENTENCE):
                        yield sentence[begin : begin + LONGEST_SENTENCE]


def draw_sample(dataset: Path, weights: dict[str, float], most_bytes: int, seed: int) -> Sample:
    """About `most_bytes` of the training side of stage 02, by source weight; the same for the same seed."""
    sizes = {
        source: sum(len(text.encode("utf-8")) for text in read_texts(dataset, "train", source))
        for source in side_sources(dataset, "train")
    }
    shares = sample_shares(sizes, weights, most_bytes)
    lines = (
        line
        for source, share in shares.items()
        for line in sample_lines(
            read_texts(dataset, "train", source), share, random.Random(f"{seed} {source}")
        )
    )
    return Sample(sum(sizes.values()), sum(sizes[name] * share for name, share in shares.items()), lines)


def expected_memory(kind: str, sample_bytes: int) -> int:
    """An upper bound of the resident bytes of training on a sample, the program itself included.

    It follows from the sample alone, whatever the size of the corpus: measured by tests/bench/tokenizer.py at
    10 and 50 MB, with a fifth to spare.
    """
    return 1_300_000_000 + MEMORY[kind] * sample_bytes


# --------------------------------------------------------------------------------------------------- kinds


def train_tokenizer(sentences: Iterable[str], config: dict[str, Any]) -> Trained:
    """Train the kind that tokenizer.json names, except ``published``.

    sentences: text; for ``word-bpe`` segmented text. Raises RecipeError when there is none, or when it does
    not support so large a vocabulary.
    """
    kind, tokens = config.get("kind", "unigram"), special_tokens(config)
    if kind in ("unigram", "bpe"):
        model = train_sentencepiece(sentences, config)
        core = from_sentencepiece(model)
        found = sentencepiece_tokens(spm.SentencePieceProcessor(model_proto=model))
        return Trained(as_fast(core, found), model)
    core = train_bpe(sentences, config)
    return Trained(as_fast(core, tokens, config.get("segmenter") if kind == "word-bpe" else None), None)


def train_sentencepiece(sentences: Iterable[str], config: dict[str, Any], strict: bool = True) -> bytes:
    """A SentencePiece model, serialised, of the kind ``unigram`` or ``bpe``.

    strict: refuse a text that does not support the vocabulary; otherwise make a smaller one.
    """
    ids, tokens, size = special_ids(config), special_tokens(config), vocabulary_size(config)
    control: dict[str, Any] = {}
    for key, token in tokens.items():
        name = key.removesuffix("_token")
        control[f"{name}_id"] = -1 if token is None else ids[f"{key}_id"]
        if token is not None:
            control[f"{name}_piece"] = token
    counted, model = _Counting(sentences), io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(counted),
            model_writer=model,
            minloglevel=2,
            num_threads=THREADS,
            model_type=config.get("kind", "unigram"),
            vocab_size=size,
            hard_vocab_limit=strict,
            byte_fallback=True,
            character_coverage=config.get("character_coverage", 0.9995),
            split_digits=config.get("split_digits", True),
            user_defined_symbols=config.get("user_symbols", []),
            # The text is normalised once, in stage 02; here nothing may change it, so that decoding is exact.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # Pieces also where the sample has none: a space, which spelt in bytes would come back as U+2581,
            # and whatever names of control and byte pieces are spelt with in a text.
            required_chars="".join(
                sorted({*"▁<0x123456789ABCDEF>", *"".join(filter(None, tokens.values()))})
            ),
            max_sentence_length=2**30,  # longer ones would be skipped silently
            # The defaults start from a million candidates and take ten times as long; fewer of the most
            # frequent ones compress better (tests/bench/tokenizer.py).
            seed_sentencepiece_size=max(10_000, 2 * size),
            num_sub_iterations=1,
            shrinking_factor=0.5,
            **control,
        )
    except (RuntimeError, OSError) as error:
        counted.refuse_empty()
        raise _wrong_size(size, str(error)) from error
    return exact_scores(model.getvalue()) if config.get("kind", "unigram") == "unigram" else model.getvalue()


def exact_scores(model: bytes) -> bytes:
    """The same Unigram model with its scores rounded to eighths, which no compression shows.

    Of two ways to cut a text SentencePiece keeps the better one by sums in float32, the fast class by sums in
    float64; ``ccc`` as ``cc c`` or ``c cc`` is decided by rounding errors alone. Sums of eighths are exact in
    both up to 2^21, a line of a megabyte, so that both decide alike.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for piece in proto.pieces:
        piece.score = round(piece.score * 8) / 8
    return proto.SerializeToString()


def _wrong_size(size: int, error: str) -> RecipeError:
    # SentencePiece's own words are about its source lines; what helps is the limit in them.
    most, least = re.search(r"value <= (\d+)", error), re.search(r"required_chars\. \d+ vs (\d+)", error)
    if least:
        reason = f"its characters, the 256 bytes and the control tokens need {least[1]}. Raise"
        return RecipeError(
            f"cannot train a vocabulary of {size}: {reason} tokenizer.vocab_size or lower character_coverage"
        )
    reason = f"it supports at most {most[1]} pieces" if most else error.strip()
    return RecipeError(
        f"cannot train a vocabulary of {size} on this text: {reason}. Lower tokenizer.vocab_size or add text"
    )


def train_bpe(sentences: Iterable[str], config: dict[str, Any]) -> Tokenizer:
    """A BPE of the kind ``byte-level-bpe`` or ``word-bpe``, without its control tokens being marked as such.

    Byte-level (Radford et al., 2019): text becomes bytes, so nothing is unknown and nothing is lost. Over
    words: what the pre-tokenizer Whitespace finds in segmented text; what decoding gives is text again.
    """
    tokens, ids, size = special_tokens(config), special_ids(config), vocabulary_size(config)
    byte_level = config["kind"] == "byte-level-bpe"
    named = sorted((key for key, token in tokens.items() if token is not None), key=lambda k: ids[f"{k}_id"])
    symbols = config.get("user_symbols", [])
    tokenizer = Tokenizer(models.BPE(unk_token=tokens["unk_token"]))
    steps = [pre_tokenizers.Digits(individual_digits=True)] if config.get("split_digits", True) else []
    steps.append(
        pre_tokenizers.ByteLevel(add_prefix_space=False) if byte_level else pre_tokenizers.Whitespace()
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if byte_level:
        tokenizer.decoder = decoders.ByteLevel()
    else:
        read = [decoders.Replace(mark, character) for character, mark in MARKS.items()]
        tokenizer.decoder = decoders.Sequence([decoders.Fuse(), *read])
    # A word BPE always knows how the segmented form writes white space, and decodes it.
    alphabet: dict[str, Any] = {
        "initial_alphabet": pre_tokenizers.ByteLevel.alphabet() if byte_level else [*MARKS.values(), ESCAPE]
    }
    if "limit_alphabet" in config:
        alphabet["limit_alphabet"] = config["limit_alphabet"]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=config.get("min_frequency", 1),
        **alphabet,
        special_tokens=[*(tokens[key] for key in named), *symbols],
        show_progress=False,
    )
    counted = _Counting(sentences)
    tokenizer.train_from_iterator(counted, trainer)
    counted.refuse_empty()
    found = tokenizer.get_vocab_size()
    if found != size:
        raise RecipeError(
            f"cannot train a vocabulary of {size} on this text: it gives {found} pieces. Lower "
            "tokenizer.vocab_size, lower min_frequency or add text"
        )
    # The trainer marks the user's symbols as control tokens; only the tokens named above are.
    clean = Tokenizer(tokenizer.model)
    clean.pre_tokenizer, clean.decoder = tokenizer.pre_tokenizer, tokenizer.decoder
    clean.add_tokens([AddedToken(symbol, normalized=False) for symbol in symbols])
    return clean


class _Counting:
    """An iterable that knows whether anything came out of it."""

    def __init__(self, items: Iterable[str]) -> None:
        self.items, self.seen = items, False

    def __iter__(self) -> Iterator[str]:
        for item in self.items:
            self.seen = True
            yield item

    def refuse_empty(self) -> None:
        """Raise RecipeError when nothing came."""
        if not self.seen:
            raise RecipeError("no text to train a tokenizer on. Add text to the training side of stage 02")
