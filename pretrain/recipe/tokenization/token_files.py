"""Token files in Megatron-LM's indexed format: ``.bin`` holds the tokens, ``.idx`` the documents.

The same files feed Megatron-LM and GPT-NeoX. Layout of ``.idx``, little-endian, after
megatron/core/datasets/indexed_dataset.py: ``MMIDIDX\\0\\0``, version uint64 = 1, dtype code uint8, number of
sequences uint64, number of document bounds uint64, lengths int32[sequences], byte offsets int64[sequences],
document bounds int64[documents + 1]. Here every document is one sequence.

A file is written under another name, flushed to disk and then renamed, the index last. So a file that can be
opened is complete. Nothing here imports torch, so that a worker that encodes starts quickly.
"""

from __future__ import annotations

import itertools
import mmap
import shutil
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from recipe.project import RecipeError, written_whole

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_CODES = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
_BATCH = 512  # documents converted to bytes at once
_INDEX_BATCH = 2**20  # documents whose index entries are in memory at once


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 if every id of the vocabulary fits, else int32."""
    return _DTYPE_CODES[8 if vocab_size <= 2**16 else 4]


def write_token_file(
    prefix: Path, documents: Iterable[Sequence[int] | np.ndarray], vocab_size: int
) -> tuple[int, int, int]:
    """Write ``<prefix>.bin`` and ``<prefix>.idx``, one sequence per document.

    Returns (documents, tokens, largest id); the largest id is 0 when there are no documents. Memory grows by
    4 bytes per document. Raises RecipeError for a document without tokens and for an id outside the
    vocabulary; then no file is written.
    """
    dtype, documents = token_dtype(vocab_size), iter(documents)
    lengths, largest = bytearray(), 0
    with written_whole(prefix.with_suffix(".bin")) as handle:
        while batch := list(itertools.islice(documents, _BATCH)):
            sizes = np.fromiter(map(len, batch), "<i4", len(batch))
            first = len(lengths) // 4
            if not sizes.all():
                raise RecipeError(
                    f"{prefix}: document {first + int(sizes.argmin())} has no tokens. "
                    "Run stage 02 with --force"
                )
            tokens = np.concatenate(batch)
            if tokens.min() < 0 or tokens.max() >= vocab_size:
                wrong = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
                raise RecipeError(
                    f"{prefix}: id {wrong} in documents {first} to {first + len(batch) - 1}, but the "
                    f"vocabulary has {vocab_size} entries. Run stage 03 with --force"
                )
            largest = max(largest, int(tokens.max()))
            handle.write(tokens.astype(dtype))
            lengths += sizes.tobytes()
    sizes = np.frombuffer(lengths, "<i4")
    write_index(prefix.with_suffix(".idx"), dtype, len(sizes), lambda: [sizes])
    return len(sizes), int(sizes.sum(dtype=np.int64)), largest


def join_token_files(parts: Sequence[Path], prefix: Path) -> tuple[int, int]:
    """Join token files, in the order of `parts`, into one; return (documents, tokens).

    Memory is constant, and one part is open at a time: there may be more parts than a process may open files.
    Raises RecipeError when a part is incomplete or the parts have different dtypes.
    """
    dtypes, documents, tokens = set(), 0, 0
    for part in parts:
        file = TokenFile(part)
        dtypes.add(file.dtype)
        documents, tokens = documents + file.documents, tokens + len(file.tokens)
    if len(dtypes) != 1:
        raise RecipeError(
            f"{prefix}: its {len(parts)} parts have {len(dtypes)} dtypes, expected 1. "
            "Run stage 04 with --force"
        )
    (dtype,) = dtypes
    size = tokens * dtype.itemsize
    with written_whole(prefix.with_suffix(".bin"), size) as handle:
        for part in parts:
            with part.with_suffix(".bin").open("rb") as source:
                shutil.copyfileobj(source, handle, 2**22)
    index = prefix.with_suffix(".idx")
    write_index(index, dtype, documents, lambda: (TokenFile(part).lengths for part in parts))
    return documents, tokens


def write_index(
    path: Path, dtype: np.dtype, documents: int, lengths: Callable[[], Iterable[np.ndarray]]
) -> None:
    """Write an ``.idx``. lengths: gives the lengths of all documents as arrays of int32, each time anew."""
    code = next(code for code, known in _DTYPE_CODES.items() if known == dtype)

    def batches() -> Iterator[np.ndarray]:
        for part in lengths():
            for first in range(0, len(part), _INDEX_BATCH):
                yield part[first : first + _INDEX_BATCH]

    with written_whole(path, _index_size(documents)) as handle:
        handle.write(_HEADER.pack(_MAGIC, 1, code, documents, documents + 1))
        for batch in batches():
            handle.write(batch.tobytes())
        position = 0
        for batch in batches():
            ends = position + np.cumsum(batch, dtype=np.int64)
            handle.write(((ends - batch) * dtype.itemsize).astype("<i8").tobytes())
            position = int(ends[-1])
        for begin in range(0, documents + 1, _INDEX_BATCH):
            handle.write(np.arange(begin, min(begin + _INDEX_BATCH, documents + 1), dtype="<i8").tobytes())


def _index_size(documents: int) -> int:
    """Bytes of an ``.idx``: header, lengths (int32), offsets and document bounds (int64)."""
    return _HEADER.size + 12 * documents + 8 * (documents + 1)


class TokenFile:
    """A token file, opened as a memory map in O(1) time and memory.

    tokens: [tokens] uint16 or int32. lengths: [documents] int32, tokens of each document. starts:
    [documents] int64, byte offset of each document. documents: their number. dtype: that of `tokens`.

    Raises RecipeError when ``.idx`` or ``.bin`` is missing or damaged, or when they do not belong together.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
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
        _, version, code, documents, bounds = _HEADER.unpack(header)
        if version != 1 or code not in _DTYPE_CODES:
            raise RecipeError(
                f"{index}: version {version} and dtype code {code}, expected version 1 and code 4 (int32) or "
                "8 (uint16). Run stage 04 with --force"
            )
        if bounds != documents + 1:
            raise RecipeError(
                f"{index}: {bounds - 1} documents in {documents} sequences, expected one sequence per "
                "document. Run stage 04 with --force"
            )
        expected = _index_size(documents)
        if size != expected:
            raise RecipeError(
                f"{index}: truncated or damaged: {size} bytes, expected {expected}. Run stage 04 with --force"
            )
        self.dtype, self.documents = _DTYPE_CODES[code], documents
        self.lengths = _map(index, "<i4", _HEADER.size, documents)
        self.starts = _map(index, "<i8", _HEADER.size + 4 * documents, documents)
        end = int(self.starts[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if documents else 0
        if data.stat().st_size != end:
            raise RecipeError(
                f"{data}: {data.stat().st_size} bytes, expected {end} by its index. Run stage 04 with --force"
            )
        self.tokens = _map(data, self.dtype, 0, end // self.dtype.itemsize)

    def __reduce__(self) -> tuple:
        # A process of a data loader opens the file again; the tokens are not copied to it.
        return TokenFile, (self.prefix,)

    def first_token(self, document: int) -> int:
        """The position of a document's first token; the end of the file for ``document == documents``."""
        if document == self.documents:
            return len(self.tokens)
        return int(self.starts[document]) // self.dtype.itemsize

    def document_starts(self, begin: int, end: int) -> np.ndarray:
        """The positions in [begin, end) where a document starts: int64, found in O(log documents)."""
        size = self.dtype.itemsize
        # Not searchsorted: the offsets are not aligned in the file, and it would copy all of them first.
        first = bisect_left(self.starts, begin * size)
        starts = self.starts[first : first + end - begin] // size
        return starts[: starts.searchsorted(end)]


def _map(path: Path, dtype: str | np.dtype, offset: int, count: int) -> np.ndarray:
    """A part of a file as a read-only array; it is read when it is used."""
    if not count:
        return np.zeros(0, dtype)
    with path.open("rb") as handle:
        pages = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    # Blocks are read in random order. Without this, reading a block of 2 KB also reads 128 KB around it.
    pages.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(pages, dtype, count, offset)
