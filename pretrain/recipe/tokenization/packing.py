"""Blocks of tokens for training and evaluation: documents end to end, separated by their positions."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from recipe.project import RecipeError
from recipe.tokenization.token_files import TokenFile

IGNORED = -100  # the label that torch's cross entropy leaves out

# A source in a token file: (first document, document after the last, weight).
Source = tuple[int, int, float]


class PackedBlocks(Dataset):
    """A token file as blocks of equal size; in an epoch, each token occurs in exactly one block.

    Item k is a random block of its epoch, chosen by (seed, k) alone. So a continued run, or a run on another
    number of ranks, sees the same samples in the same order. Without a seed, blocks come in file order.

    sources: what an epoch contains, if not every document once. A source of weight 2 is read twice; of a
    source of weight 0.5, one epoch reads the first half, the next one the second half (`epoch_segments`).
    at_least: the number of items that are needed; the dataset has as many whole epochs as that takes.

    An item has four tensors, each int64 [block_size]. ``input_ids``. ``position_ids``: they restart at 0 with
    each document, and attention separates documents by them. ``labels`` and ``shift_labels``, the same
    tensor: the label of a position is the next token; it is IGNORED when the next token starts another
    document or is after the end of the epoch. The last block of an epoch may be short; then it is padded.

    Raises RecipeError when there is no document.
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
                f"{file.prefix}.bin: no tokens: the dataset of stage 02 is empty on this side of the split. "
                "Add text, or change dataset.valid_share"
            )
        # For each epoch: the position in the file where each segment begins; its position in the epoch, and
        # the end of the epoch; the number of items up to its end. Lists, because bisect is much faster on
        # them than on arrays.
        self.segments: list[list[int]] = []
        self.offsets: list[list[int]] = []
        self.ends: list[int] = []
        while not self.ends or self.ends[-1] < at_least:
            segments = epoch_segments(file, sources, len(self.ends))
            offsets = [0, *itertools.accumulate(end - begin for begin, end in segments)]
            self.segments.append([begin for begin, _ in segments])
            self.offsets.append(offsets)
            self.ends.append((self.ends[-1] if self.ends else 0) + -(-offsets[-1] // block_size))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        epoch = bisect_right(self.ends, item)
        before = self.ends[epoch - 1] if epoch else 0
        index = item - before
        if self.seed is not None:
            index = permuted(index, self.ends[epoch] - before, self.seed * 1_000_003 + epoch)
        # One more token than the block has: it is the last label. So every token is predicted, except the
        # first of a document.
        window, starts = self._read(epoch, index * self.block_size, self.block_size + 1)
        return pack(window, starts, self.block_size, self.pad)

    def _read(self, epoch: int, begin: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Up to `count` tokens of an epoch from `begin` on, and where in them documents start."""
        segments, offsets = self.segments[epoch], self.offsets[epoch]
        end = min(begin + count, offsets[-1])
        tokens, starts, position = [], [], begin
        segment = bisect_right(offsets, begin) - 1
        while position < end:
            stop = min(end, offsets[segment + 1])
            shift = segments[segment] - offsets[segment]
            tokens.append(self.file.tokens[position + shift : stop + shift])
            starts.append(self.file.document_starts(position + shift, stop + shift) - (shift + begin))
            position, segment = stop, segment + 1
        if len(tokens) == 1:
            return tokens[0], starts[0]
        return np.concatenate(tokens), np.concatenate(starts)


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of samples of a packed dataset: each tensor int64 [rows, block_size].

    A sample is one row or, in a run with phases, several rows: [block_size] or [rows, block_size].
    """
    return {
        key: torch.cat([sample[key].reshape(-1, sample[key].shape[-1]) for sample in samples])
        for key in samples[0]
    }


def collate_with_bounds(samples: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """`collate`, and where documents begin, for attention that needs no mask, by transformers' names.

    ``cu_seq_lens_q``, ``cu_seq_lens_k``: the same tensor, int32 [capacity + 1]: where in rows x block_size
    each document begins, then the end again and again. The capacity is the next power of two, so that there
    are few shapes and few empty documents: FlashAttention starts thread blocks for each of them.
    ``max_length_q``, ``max_length_k``: block_size.
    """
    batch: dict[str, Any] = collate(samples)
    positions = batch["position_ids"].flatten()
    starts = (positions == 0).nonzero().flatten()
    capacity = 1 << (len(starts) - 1).bit_length()
    bounds = torch.full((capacity + 1,), len(positions), dtype=torch.int32)
    bounds[: len(starts)] = starts
    block = batch["position_ids"].shape[1]
    return (
        batch
        | dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds)
        | dict.fromkeys(("max_length_q", "max_length_k"), block)
    )


def epoch_segments(file: TokenFile, sources: Sequence[Source], epoch: int) -> list[tuple[int, int]]:
    """The token ranges [begin, end) of an epoch, each of whole documents and not empty.

    The documents of a source are read again and again: with weight w and n documents, epoch e reads those
    from e*w*n to (e+1)*w*n, counted modulo n. So after e epochs each document was read e*w times, rounded up
    or down. The result depends on the arguments only.
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
    """The tokens of an epoch, by weight; if a source is read in part, the mean over the epochs."""
    if not sources:
        return len(file.tokens)
    return round(sum(w * (file.first_token(end) - file.first_token(first)) for first, end, w in sources))


def check_vocabulary(file: TokenFile, largest_id: int, vocab_size: int) -> None:
    """Raise RecipeError if the largest id of a token file has no row in the model's embeddings.

    largest_id: as stage 04 counted it.
    """
    if largest_id >= vocab_size:
        raise RecipeError(
            f"{file.prefix}.bin: contains the id {largest_id}, but the model's vocabulary has {vocab_size} "
            "entries: the file was made with a larger tokenizer. Use the tokenizer of this model, or leave "
            "vocab_size out of model.json, so that the model takes it from the tokenizer"
        )


def weighted_sources(
    counts: dict[str, dict[str, int]], config: dict[str, dict[str, object]]
) -> list[Source] | None:
    """The argument `sources` of `PackedBlocks`; None when every source has the weight 1.

    counts: figures of stage 04 for a side, by source. config: the sources of dataset.json with their weight.
    """
    weights = {name: float(config[name].get("weight", 1)) for name in counts}
    if set(weights.values()) == {1.0}:
        return None
    return [
        (count["first_document"], count["first_document"] + count["documents"], weights[name])
        for name, count in counts.items()
    ]


def pack(window: np.ndarray, starts: np.ndarray, block_size: int, pad: int) -> dict[str, torch.Tensor]:
    """A sample from up to ``block_size + 1`` tokens and the positions in them where documents start.

    The tensors are those of `PackedBlocks`.
    """
    ids = np.full(block_size, pad, np.int64)
    real = min(len(window), block_size)
    ids[:real] = window[:real]
    labels = np.full(block_size, IGNORED, np.int64)
    labels[: len(window) - 1] = window[1:]
    starts = starts[starts > 0]
    labels[starts - 1] = IGNORED
    positions = np.arange(block_size)
    if real < block_size:
        # Padding is like a document of its own.
        starts = np.append(starts, real)
    for begin, end in itertools.pairwise([*starts.tolist(), block_size]):
        positions[begin:end] -= begin
    targets = torch.from_numpy(labels)
    # transformers computes a loss when there are `labels`, and uses `shift_labels` for it if given.
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "labels": targets,
        "shift_labels": targets,
    }


def permuted(index: int, size: int, key: int) -> int:
    """The position of `index` in a random permutation of ``range(size)`` chosen by `key`, in O(1) memory.

    A Feistel network of four rounds; cycle walking (Black and Rogaway, 2002) keeps the result below `size`.
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
    """Whole conversations, packed into blocks by first fit; only the trained tokens have labels.

    conversations: pairs (ids, trained) of equal length; `trained` says for each id whether it is a target.
    None may be longer than a block, and none is cut. Items are like those of `PackedBlocks`.
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
        # (room left, index of the bin) of the newest 64 bins: older ones have hardly any room left.
        open_bins: list[tuple[int, int]] = []
        for number in order:
            length = len(conversations[number][0])
            for slot, (room, target) in enumerate(open_bins):
                if length <= room:
                    self.bins[target].append(conversations[number])
                    open_bins[slot] = (room - length, target)
                    break
            else:
                self.bins.append([conversations[number]])
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
