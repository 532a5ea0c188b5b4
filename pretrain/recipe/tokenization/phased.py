"""The samples of a pretraining whose mixture or block size changes on the way."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from recipe.config.phases import Phase
from recipe.project import RecipeError
from recipe.tokenization.packing import PackedBlocks, Source, collate, weighted_sources
from recipe.tokenization.token_files import TokenFile


class Part(NamedTuple):
    """The samples of a phase: `rows` blocks in each, from the block `first` of `blocks` on."""

    blocks: PackedBlocks
    first: int
    rows: int


class PhasedBlocks(Dataset):
    """The samples of all phases, one phase after the other.

    Item k is a function of (seed, k) and of the phases up to its own, so a continued run, or a longer one,
    sees the same samples in the same order. An item is like one of `PackedBlocks`, with a dimension more:
    each tensor is int64 [rows, block_size of the phase]. All items have the same number of tokens.

    parts: of each phase. counts: the samples of each phase.
    """

    def __init__(self, parts: Sequence[Part], counts: Sequence[int]) -> None:
        self.parts, self.ends = parts, list(itertools.accumulate(counts))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        number = bisect_right(self.ends, item)
        blocks, first, rows = self.parts[number]
        first += (item - (self.ends[number - 1] if number else 0)) * rows
        return collate([blocks[first + row] for row in range(rows)])


def phased_blocks(
    file: TokenFile,
    phases: Sequence[Phase],
    samples_per_step: int,
    tokens: int,
    pad: int,
    seed: int,
    counts: dict[str, dict[str, int]],
    config: dict[str, dict[str, Any]],
) -> PhasedBlocks:
    """The samples of a run of these phases. A mixture that returns goes on where it has stopped.

    tokens: of a sample. counts: figures of stage 04 by source. config: the sources of dataset.json. Raises
    RecipeError for a source of a phase without documents.
    """
    samples = [(phase.end - phase.begin) * samples_per_step for phase in phases]
    rows = [tokens // phase.block_size for phase in phases]
    needed: dict[str, int] = {}
    firsts = []
    for phase, count, each in zip(phases, samples, rows, strict=True):
        firsts.append(needed.get(phase.mixture, 0))
        needed[phase.mixture] = firsts[-1] + count * each
    blocks: dict[str, PackedBlocks] = {}
    for phase in phases:
        if phase.mixture not in blocks:
            sources = mixture_of(phase, counts, config)
            at_least = needed[phase.mixture]
            blocks[phase.mixture] = PackedBlocks(file, phase.block_size, pad, seed, at_least, sources)
    parts = [
        Part(blocks[phase.mixture], first, each)
        for phase, first, each in zip(phases, firsts, rows, strict=True)
    ]
    return PhasedBlocks(parts, samples)


def mixture_of(
    phase: Phase, counts: dict[str, dict[str, int]], config: dict[str, dict[str, Any]]
) -> list[Source] | None:
    """The argument `sources` of `PackedBlocks` for a phase; None for every document once."""
    if phase.sources is None:
        return weighted_sources(counts, config)
    found = []
    for name, weight in phase.sources.items():
        if not counts.get(name, {}).get("documents"):
            raise RecipeError(
                f"pretrain.json: phases: sources: {name}: stage 04 has no training document of it. Leave the "
                "source out of the phase, or change its rules in dataset.json"
            )
        begin = counts[name]["first_document"]
        found.append((begin, begin + counts[name]["documents"], float(weight)))
    return found
