"""Token files and the blocks that training reads from them.

Token files are in Megatron-LM's indexed format (``.bin`` the tokens, ``.idx`` the documents), so the same
files feed Megatron-LM and GPT-NeoX. Layout of ``.idx``, little-endian, after
megatron/core/datasets/indexed_dataset.py: ``MMIDIDX\\0\\0``, version uint64 = 1, dtype code uint8, number of
sequences uint64, number of document bounds uint64, lengths int32[sequences], byte offsets int64[sequences],
document bounds int64[documents + 1].
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from recipe.outputs import RecipeError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_CODES = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
IGNORED = -100  # torch's cross entropy leaves such labels out


def write_token_file(prefix: Path, documents: Iterable[list[int]], vocab_size: int) -> tuple[int, int]:
    """Write ``<prefix>.bin`` and ``<prefix>.idx``, one sequence per document; return (documents, tokens).

    The dtype is uint16 where every id fits, else int32. Memory grows by 4 bytes a document only.
    """
    code = 8 if vocab_size <= 2**16 else 4
    dtype = _DTYPE_CODES[code]
    lengths = bytearray()
    with prefix.with_suffix(".bin").open("wb") as handle:
        for ids in documents:
            handle.write(np.asarray(ids, dtype=dtype).tobytes())
            lengths += struct.pack("<i", len(ids))
    sizes = np.frombuffer(lengths, dtype="<i4")
    ends = np.cumsum(sizes, dtype=np.int64)
    with prefix.with_suffix(".idx").open("wb") as handle:
        handle.write(_HEADER.pack(_MAGIC, 1, code, len(sizes), len(sizes) + 1))
        handle.write(sizes.tobytes())
        handle.write(((ends - sizes) * dtype.itemsize).astype("<i8").tobytes())
        handle.write(np.arange(len(sizes) + 1, dtype="<i8").tobytes())
    return len(sizes), int(ends[-1]) if len(ends) else 0


class TokenFile:
    """A token file opened by memory map: `tokens` [n] of uint16 or int32, `starts` [documents] byte offsets
    int64.

    Raises RecipeError when the two files are not whole or do not belong together.
    """

    def __init__(self, prefix: Path) -> None:
        index, data = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
        for path in (index, data):
            if not path.is_file():
                raise RecipeError(f"{path}: missing. Run stage 04")
        size = index.stat().st_size
        with index.open("rb") as handle:
            header = handle.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise RecipeError(
                f"{index}: not a Megatron-LM index (version 1). Run stage 04 again with --force"
            )
        _, version, code, sequences, bounds = _HEADER.unpack(header)
        if version != 1 or code not in _DTYPE_CODES or size < _HEADER.size + 12 * sequences + 8 * bounds:
            raise RecipeError(
                f"{index}: truncated or of another version ({size} bytes). Run stage 04 with --force"
            )
        self.dtype = _DTYPE_CODES[code]
        self.documents = sequences
        self.starts = (
            np.memmap(index, "<i8", "r", _HEADER.size + 4 * sequences, (sequences,)) if sequences else []
        )
        lengths_end = _HEADER.size + 4 * sequences
        last = np.memmap(index, "<i4", "r", lengths_end - 4, (1,))[0] if sequences else 0
        wanted = int(self.starts[-1]) + int(last) * self.dtype.itemsize if sequences else 0
        if data.stat().st_size != wanted:
            raise RecipeError(
                f"{data}: {data.stat().st_size} bytes, but its index wants {wanted}. "
                "Run stage 04 with --force"
            )
        self.tokens = np.memmap(data, self.dtype, "r") if wanted else np.zeros(0, self.dtype)

    def document_starts(self, begin: int, end: int) -> np.ndarray:
        """The places in [begin, end) where a document starts, int64, by bisection in O(log documents)."""
        if not self.documents:
            return np.zeros(0, np.int64)
        size = self.dtype.itemsize
        first, last = np.searchsorted(self.starts, [begin * size, end * size])
        return np.asarray(self.starts[first:last]) // size


class PackedBlocks(Dataset):
    """A token file as blocks of equal size, documents end to end, nothing left out and nothing twice in an
    epoch.

    Item k is block ``shuffle(k mod blocks)`` of epoch ``k // blocks``: a pure function of (seed, k), so that
    a resumed run, or one on another number of ranks, sees the same samples in the same order. Without a seed
    the blocks come in file order.

    An item holds, each int64 [block_size]: ``input_ids``; ``position_ids`` that restart at 0 with each
    document, by which attention keeps documents apart; ``shift_labels``, the label of each place being the
    next token, and -100 where the next token starts another document or lies past the end of the file. The
    one short block at the end is padded.
    """

    def __init__(
        self, file: TokenFile, block_size: int, pad: int, seed: int | None = None, epochs: int = 1
    ) -> None:
        self.file, self.block_size, self.pad, self.seed = file, block_size, pad, seed
        self.blocks = -(-len(file.tokens) // block_size)
        self.epochs = epochs
        if not self.blocks:
            raise RecipeError(
                "a token file without tokens: the dataset of stage 02 is empty on this side of the split"
            )

    def __len__(self) -> int:
        return self.blocks * self.epochs

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        epoch, index = divmod(item, self.blocks)
        if self.seed is not None:
            index = permuted(index, self.blocks, self.seed * 1_000_003 + epoch)
        begin = index * self.block_size
        # One token more than the block: the last label, so that every token but a document's first is
        # predicted.
        window = np.asarray(self.file.tokens[begin : begin + self.block_size + 1], dtype=np.int64)
        starts = self.file.document_starts(begin, begin + self.block_size + 1) - begin
        return pack(window, starts, self.block_size, self.pad)


def pack(window: np.ndarray, starts: np.ndarray, block_size: int, pad: int) -> dict[str, torch.Tensor]:
    """One training sample from up to ``block_size + 1`` tokens and the documents' starts in them."""
    ids = np.full(block_size, pad, np.int64)
    real = min(len(window), block_size)
    ids[:real] = window[:real]
    labels = np.full(block_size, IGNORED, np.int64)
    labels[: len(window) - 1] = window[1:]
    labels[starts[starts > 0] - 1] = IGNORED
    places = np.arange(block_size)
    origin = np.zeros(block_size, np.int64)
    inner = starts[(starts > 0) & (starts < real)]
    origin[inner] = inner
    if real < block_size:
        origin[real] = real  # padding is a document of its own
    positions = places - np.maximum.accumulate(origin)
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
