"""Blocks of tokens that training and evaluation read: documents end to end, kept apart by position."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from recipe.project import RecipeError
from recipe.tokenization.token_files import TokenFile

IGNORED = -100  # torch's cross entropy leaves such labels out

# (first document, document after the last, weight) of a source in a token file
Source = tuple[int, int, float]


class PackedBlocks(Dataset):
    """A token file as blocks of equal size, documents end to end, nothing left out and nothing twice in an
    epoch.

    Item k is block ``shuffle(k - items before)`` of its epoch: a pure function of (seed, k), so that a
    resumed run, or one on another number of ranks, sees the same samples in the same order. Without a seed
    the blocks come in file order.

    sources: what an epoch holds, where it is not each document once: a source of weight 2 is read twice, of
    weight 0.5 its first half in one epoch and its second half in the next (see `epoch_segments`).
    at_least: items wanted; the dataset offers as many whole epochs as that takes.

    An item holds, each int64 [block_size]: ``input_ids``; ``position_ids`` that restart at 0 with each
    document, by which attention keeps documents apart; ``labels`` and ``shift_labels`` (the same tensor), the
    label of each place being the next token, and -100 where the next token starts another document or lies
    past the end of the epoch. The one short block at an epoch's end is padded.
    """

    def __init__(
        self,
        file: TokenFile,
        block_size: int,
        pad: int,
        seed: int | None = None,
        at_least: int = 1,
        sources: Sequence[Source] | None = None,
    ) -> None:
        self.file, self.block_size, self.pad, self.seed = file, block_size, pad, seed
        sources = sources or [(0, file.documents, 1.0)]
        if not any(begin < end for begin, end, _ in sources):
            raise RecipeError(
                f"{file.prefix}.bin: no tokens: the dataset of stage 02 is empty on this side of the split"
            )
        # Per epoch: the token where each segment begins in the file; where it begins in the epoch, and the
        # epoch's end; items of this and all earlier epochs. Lists: bisect is far quicker on them than numpy.
        self.segments: list[list[int]] = []
        self.places: list[list[int]] = []
        self.ends: list[int] = []
        while not self.ends or self.ends[-1] < at_least:
            segments = epoch_segments(file, sources, len(self.ends))
            places = [0, *itertools.accumulate(end - begin for begin, end in segments)]
            self.segments.append([begin for begin, _ in segments])
            self.places.append(places)
            self.ends.append((self.ends[-1] if self.ends else 0) + -(-places[-1] // block_size))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        epoch = bisect_right(self.ends, item)
        before = self.ends[epoch - 1] if epoch else 0
        index = item - before
        if self.seed is not None:
            index = permuted(index, self.ends[epoch] - before, self.seed * 1_000_003 + epoch)
        # One token more than the block: the last label, so that every token but a document's first is
        # predicted.
        window, starts = self._read(epoch, index * self.block_size, self.block_size + 1)
        return pack(window, starts, self.block_size, self.pad)

    def _read(self, epoch: int, begin: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Up to `count` tokens of an epoch from `begin` on, and where in them documents start."""
        segments, places = self.segments[epoch], self.places[epoch]
        end = min(begin + count, places[-1])
        tokens, starts, place = [], [], begin
        segment = bisect_right(places, begin) - 1
        while place < end:
            stop = min(end, places[segment + 1])
            shift = segments[segment] - places[segment]
            tokens.append(self.file.tokens[place + shift : stop + shift])
            starts.append(self.file.document_starts(place + shift, stop + shift) - (shift + begin))
            place, segment = stop, segment + 1
        if len(tokens) == 1:
            return tokens[0], starts[0]
        return np.concatenate(tokens), np.concatenate(starts)


def epoch_segments(file: TokenFile, sources: Sequence[Source], epoch: int) -> list[tuple[int, int]]:
    """The token ranges [begin, end) that make up an epoch, cut at document bounds; none is empty.

    A source of weight w and n documents is read round and round: epoch e takes the documents from e*w*n on,
    up to (e+1)*w*n. So after e epochs each of its documents was read e*w times, rounded up or down. A
    function of the arguments only.
    """
    segments = []
    for first, end, weight in sources:
        documents = end - first
        here, stop = (math.floor(turn * weight * documents) for turn in (epoch, epoch + 1))
        while here < stop:
            offset = here % documents
            count = min(stop - here, documents - offset)
            bounds = (first + offset, first + offset + count)
            segments.append(tuple(map(file.first_token, bounds)))
            here += count
    return segments


def epoch_tokens(file: TokenFile, sources: Sequence[Source] | None) -> int:
    """Tokens of an epoch by the weights; where a source is read in part, the mean over its epochs."""
    if not sources:
        return len(file.tokens)
    return round(sum(w * (file.first_token(end) - file.first_token(first)) for first, end, w in sources))


def check_vocabulary(file: TokenFile, largest_id: int, vocab_size: int) -> None:
    """Refuse a token file whose largest id, as stage 04 counted it, is no row of the model's embeddings."""
    if largest_id >= vocab_size:
        raise RecipeError(
            f"{file.prefix}.bin: holds the id {largest_id}, but the model's vocabulary has {vocab_size} "
            "entries: it was made with a larger tokenizer. Use the tokenizer of this model, or give the "
            "model the tokenizer's size (leave vocab_size out of model.json)"
        )


def weighted_sources(
    counts: dict[str, dict[str, int]], config: dict[str, dict[str, object]]
) -> list[Source] | None:
    """What `PackedBlocks` takes as sources; None where every source has the weight 1.

    counts: stage 04's figures of a side by source. config: the sources in dataset.json, with their `weight`.
    """
    weights = {name: float(config[name].get("weight", 1)) for name in counts}
    if set(weights.values()) == {1.0}:
        return None
    return [
        (count["first_document"], count["first_document"] + count["documents"], weights[name])
        for name, count in counts.items()
    ]


def pack(window: np.ndarray, starts: np.ndarray, block_size: int, pad: int) -> dict[str, torch.Tensor]:
    """One training sample from up to ``block_size + 1`` tokens and where documents start in them."""
    ids = np.full(block_size, pad, np.int64)
    real = min(len(window), block_size)
    ids[:real] = window[:real]
    labels = np.full(block_size, IGNORED, np.int64)
    labels[: len(window) - 1] = window[1:]
    starts = starts[starts > 0]
    labels[starts - 1] = IGNORED
    positions = np.arange(block_size)
    if real < block_size:
        starts = np.append(starts, real)  # padding is a document of its own
    for begin, end in itertools.pairwise([*starts.tolist(), block_size]):
        positions[begin:end] -= begin
    targets = torch.from_numpy(labels)
    # transformers computes a loss when there are `labels`, and by `shift_labels` where they are given.
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "labels": targets,
        "shift_labels": targets,
    }


def permuted(index: int, size: int, key: int) -> int:
    """Where a keyed random permutation of ``range(size)`` puts `index`: a four-round Feistel network, in O(1)
    memory.

    Cycle walking (Black and Rogaway, 2002) keeps the result below `size`.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_number in range(4):
            left, right = right, left ^ (_mix(right + (key << 3) + round_number) & mask)
        index = (left << half) | right
        if index < size:
            return index


def _mix(value: int) -> int:
    """The SplitMix64 finaliser (Steele, Lea and Flood, 2014)."""
    value = (value * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & (2**64 - 1)
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return value ^ (value >> 31)


class PackedConversations(Dataset):
    """Whole conversations laid into blocks by first fit; labels only where an answer is trained.

    conversations: (ids, trained) pairs, `trained` telling for each id whether it is a target. None is cut:
    whoever calls has dropped those longer than a block. Items are as those of `PackedBlocks`.
    """

    def __init__(
        self,
        conversations: list[tuple[list[int], list[bool]]],
        block_size: int,
        pad: int,
        seed: int | None = None,
        epochs: int = 1,
    ) -> None:
        self.seed, self.epochs, self.pad, self.block_size = seed, epochs, pad, block_size
        order = range(len(conversations))
        if seed is not None:
            order = [permuted(i, len(conversations), seed) for i in order]
        self.bins: list[list[tuple[list[int], list[bool]]]] = []
        open_bins: list[tuple[int, int]] = []  # (room left, bin), the newest few: first fit needs no more
        for place in order:
            length = len(conversations[place][0])
            for slot, (room, target) in enumerate(open_bins):
                if length <= room:
                    self.bins[target].append(conversations[place])
                    open_bins[slot] = (room - length, target)
                    break
            else:
                self.bins.append([conversations[place]])
                open_bins = [*open_bins[-63:], (block_size - length, len(self.bins) - 1)]

    def __len__(self) -> int:
        return len(self.bins) * self.epochs

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        epoch, index = divmod(item, len(self.bins))
        if self.seed is not None:
            index = permuted(index, len(self.bins), self.seed * 1_000_003 + epoch + 1)
        content = self.bins[index]
        window = np.array([i for ids, _ in content for i in ids], dtype=np.int64)
        trained = np.array([t for _, flags in content for t in flags], dtype=bool)
        starts = np.cumsum([0] + [len(ids) for ids, _ in content[:-1]])
        sample = pack(window, starts, self.block_size, self.pad)
        labels = sample["shift_labels"]
        labels[: len(window) - 1][~torch.from_numpy(trained[1:])] = IGNORED
        return sample
