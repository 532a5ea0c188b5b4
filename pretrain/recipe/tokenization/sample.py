"""The sample of text that a tokenizer is trained on: bounded, and the same for the same seed."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from recipe.corpus.shards import document_bytes, read_texts, side_sources

LONGEST_SENTENCE = 4000  # characters; it bounds the memory of the trainers, not what they learn


class Sample(NamedTuple):
    """Sentences drawn from a corpus of `bytes` bytes; together they have about `drawn` bytes."""

    bytes: int
    drawn: float
    lines: Iterator[str]


def draw_sample(dataset: Path, weights: dict[str, float], most_bytes: int, seed: int) -> Sample:
    """About `most_bytes` bytes of the training side of stage 02, by source weight.

    dataset: the folder of stage 02. weights: by source; 1.0 where a source has none.
    """
    sizes = {source: document_bytes(dataset, "train", source) for source in side_sources(dataset, "train")}
    shares = sample_shares(sizes, weights, most_bytes)
    lines = (
        line
        for source, share in shares.items()
        for line in sample_lines(
            read_texts(dataset, "train", source), share, random.Random(f"{seed} {source}")
        )
    )
    return Sample(sum(sizes.values()), sum(sizes[name] * share for name, share in shares.items()), lines)


def sample_shares(sizes: dict[str, int], weights: dict[str, float], most_bytes: int) -> dict[str, float]:
    """The share of each source to draw, so that about `most_bytes` come in proportion to size x weight.

    sizes: bytes of text by source. weights: 1.0 where a source has none. When a source is too small for its
    part, the other sources get the rest of it.
    """
    shares = dict.fromkeys(sizes, 1.0)
    open_sources = {name for name in sizes if sizes[name]}
    while open_sources:
        room = most_bytes - sum(sizes[name] for name in sizes if name not in open_sources)
        weighted = sum(sizes[name] * weights.get(name, 1.0) for name in open_sources)
        if weighted <= 0:
            return shares | dict.fromkeys(open_sources, 0.0)
        rate = max(0.0, room / weighted)
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
