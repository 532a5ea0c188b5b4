"""Deduplication over clean shards: exact by hash, near by MinHash; and what leaks from train into valid.

A shard is a Parquet file with the columns id, source and text. Shards come in the order of priority: of
duplicates, the one with the smallest (shard, row) is kept. The phases run in this order, each a datatrove
pipeline for any of its executors and any number of tasks:

1. `exact` (one task) removes equal documents, by their 16-byte hashes.
2. `signatures`: MinHash of what is left, as one sorted file of keys per band and shard.
3. `buckets`: pairs of documents that share a key in a band.
4. `clusters` (one task): pairs joined to clusters; all but the first document of each is removed.

`removed_rows` then gives each shard's rows with the reason. The files between the phases have the layout of
datatrove's own MinHash steps (one 64-bit hash a bucket), so its steps can read them. All files are named by
shard or band, never by task, so a phase may run with another number of tasks than the one before it.
A folder belongs to one list of shards and one set of settings: let its name hold their hash.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import re
import unicodedata
from array import array
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from datatrove.pipeline.base import PipelineStep

from recipe.project import RecipeError, Refused

# The field's usual numbers for web text (FineWeb, Swallow): documents of Jaccard similarity s are found with
# probability 1 - (1 - s^rows)^bands: .05 at s = .5, .77 at .75, .92 at .8, 1.0 at .9.
MINHASH = {"bands": 14, "rows": 8, "ngram": 5, "seed": 1}
REASONS = ("duplicate", "near duplicate")
LONG_LINE = 30  # characters of a folded line that can leak

_RECORD = np.dtype([("key", "<u8"), ("row", "<u4")])  # of a signature file
_KEY_BITS = 60  # datatrove's reader of 64-bit signatures silently stops at 2^61 - 1
_RECORDS_AT_ONCE = 1 << 23  # sorted in memory together, about 50 bytes each
_SHINGLES_AT_ONCE = 1 << 10  # x 112 hash functions x 4 bytes: stays in the second-level cache
_HASHES_AT_ONCE = 1 << 16  # of train, looked up together
_LETTERS = re.compile(r"[^\W_]+")


def fold(text: str, gap: str = "") -> str:
    """A text with only what distinguishes it: the letters and digits of its NFKC form in lower case.

    `gap` replaces each run of what lies between them: white space, punctuation, symbols. Voiced and unvoiced
    kana stay apart (が is not か); their half-width and decomposed forms become one.
    """
    return gap.join(_LETTERS.findall(unicodedata.normalize("NFKC", text).lower()))


def minhash_settings(config: dict[str, Any]) -> dict[str, int]:
    """The ``minhash`` section of a dataset.json over the defaults `MINHASH`; Refused if it makes no sense."""
    for key, value in config.items():
        if key not in MINHASH:
            raise Refused(f"dataset.json: minhash.{key} is not known. Known: {', '.join(MINHASH)}")
        least = 0 if key == "seed" else 1
        if type(value) is not int or not least <= value < 1 << 32:
            raise Refused(f"dataset.json: minhash.{key} is {value!r}, wanted a whole number from {least} on")
    return MINHASH | config


class MinHash:
    """Signatures of texts: the minima of ``bands * rows`` hash functions over the character n-grams.

    The n-grams are those of the folded text with one space for each gap. Each is hashed once, as a polynomial
    over its code points, and mixed to 32 bits x; hash function i is a_i x + b_i mod 2^32 with a_i odd, a
    permutation of the 32-bit numbers.
    """

    def __init__(self, bands: int, rows: int, ngram: int, seed: int) -> None:
        self.bands, self.rows, self.ngram = bands, rows, ngram
        draw = np.random.RandomState(seed)  # its stream never changes between versions of numpy
        self._a, self._b = draw.randint(0, 1 << 32, (2, bands * rows, 1), np.uint32)
        self._a |= np.uint32(1)
        self._key = draw.randint(0, 1 << 64, (rows,), np.uint64) | np.uint64(1)

    def signature(self, text: str) -> np.ndarray | None:
        """The ``(bands * rows,)`` uint32 minima; None if the folded text is shorter than an n-gram."""
        codes = np.frombuffer(fold(text, " ").encode("utf-32-le"), np.uint32)
        count = len(codes) - self.ngram + 1
        if count < 1:
            return None
        minima = np.full(self.bands * self.rows, 0xFFFFFFFF, np.uint32)
        for start in range(0, count, _SHINGLES_AT_ONCE):
            stop = min(start + _SHINGLES_AT_ONCE, count)
            hashes = self._a * self._shingles(codes[start : stop + self.ngram - 1])
            hashes += self._b
            np.minimum(minima, hashes.min(axis=1), out=minima)
        return minima

    def keys(self, text: str) -> np.ndarray | None:
        """The ``(bands,)`` uint64 keys: each a hash of a band's minima; None as in `signature`."""
        minima = self.signature(text)
        if minima is None:
            return None
        return (minima.reshape(self.bands, self.rows) * self._key).sum(axis=1) >> np.uint64(64 - _KEY_BITS)

    def _shingles(self, codes: np.ndarray) -> np.ndarray:
        """The 32-bit hash of every n-gram of some code points."""
        count = len(codes) - self.ngram + 1
        hashes = codes[:count].astype(np.uint64)
        for i in range(1, self.ngram):
            hashes *= np.uint64(0x9E3779B97F4A7C15)  # odd, of 2^64 / golden ratio
            hashes += codes[i : i + count]
        # A polynomial is linear, and so are the hash functions: shifts between make neighbours independent.
        hashes ^= hashes >> np.uint64(32)
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        return (hashes >> np.uint64(32)).astype(np.uint32)


# ------------------------------------------------------------------------------------------------ phases


def exact(hash_files: list[Path], folder: Path) -> list[PipelineStep]:
    """Phase 1, one task: remove equal documents. `hash_files` as `exact_duplicates` takes them."""
    return [_Exact(hash_files, folder)]


def signatures(shards: list[Path], folder: Path, config: dict[str, Any]) -> list[PipelineStep]:
    """Phase 2, up to one task per shard: the signatures of the documents that `exact` left."""
    return [_Signatures(shards, folder, minhash_settings(config))]


def buckets(shards: list[Path], folder: Path, config: dict[str, Any]) -> list[PipelineStep]:
    """Phase 3, one task per band, or more for many documents: pairs of documents with a key in common."""
    return [_Buckets(shards, folder, minhash_settings(config))]


def clusters(shards: list[Path], folder: Path, config: dict[str, Any]) -> list[PipelineStep]:
    """Phase 4, one task: of each cluster of pairs, remove all but the first document."""
    return [_Clusters(shards, folder, minhash_settings(config))]


def removed_rows(folder: Path, shard: int) -> dict[str, np.ndarray]:
    """The rows to leave out of a shard, by reason: sorted uint32 arrays without a row in common.

    "near duplicate" is there when signatures were made. RecipeError if a phase did not come to its end.
    """
    reasons = REASONS if (folder / "signatures").exists() else REASONS[:1]
    return {reason: _read_removed(folder, reason, shard) for reason in reasons}


class _Exact(PipelineStep):
    type, name = "DEDUP", "exact duplicates"

    def __init__(self, hash_files: list[Path], folder: Path) -> None:
        super().__init__()
        self.hash_files, self.folder = hash_files, folder

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        _want_one_task(self.name, world_size)
        with self.track_time():
            removed = exact_duplicates(self.hash_files)
            self.stat_update("removed", value=sum(map(len, removed)))
            _write_removed(self.folder, "duplicate", removed)


class _Signatures(PipelineStep):
    type, name = "DEDUP", "MinHash signatures"

    def __init__(self, shards: list[Path], folder: Path, settings: dict[str, int]) -> None:
        super().__init__()
        self.shards, self.folder, self.settings = shards, folder, settings

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        minhash = MinHash(**self.settings)
        for shard in range(rank, len(self.shards), world_size):
            with self.track_time():
                self._sign(minhash, shard)

    def _sign(self, minhash: MinHash, shard: int) -> None:
        gone = set(_read_removed(self.folder, "duplicate", shard).tolist())
        keys, rows = array("Q"), array("I")
        for row, (text,) in enumerate(_columns(self.shards[shard], ["text"])):
            signed = None if row in gone else minhash.keys(text)
            if signed is not None:
                keys.frombytes(signed.tobytes())
                rows.append(row)
        self.stat_update("signed", value=len(rows), unit="shard")
        by_band = np.array(keys, np.uint64).reshape(-1, minhash.bands).T
        numbers = np.array(rows, np.uint32)
        records = np.empty(len(rows), _RECORD)
        for band, band_keys in enumerate(by_band):
            order = np.argsort(band_keys, kind="stable")
            records["key"], records["row"] = band_keys[order], numbers[order]
            _write_aside(_signature_path(self.folder, band, shard), records)


class _Buckets(PipelineStep):
    type, name = "DEDUP", "MinHash buckets"

    def __init__(self, shards: list[Path], folder: Path, settings: dict[str, int]) -> None:
        super().__init__()
        self.shards, self.folder, self.settings = shards, folder, settings

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        bands = self.settings["bands"]
        parts = _parts(self.shards, self.folder)
        for work in range(rank, bands * parts, world_size):
            band, part = divmod(work, parts)
            with self.track_time():
                low, high = (((part + i) << _KEY_BITS) // parts for i in (0, 1))
                pairs = self._pairs(band, low, high)
                self.stat_update("pairs", value=len(pairs), unit="range")
                _write_aside(_pairs_path(self.folder, band, part), _swap(pairs))

    def _pairs(self, band: int, low: int, high: int) -> np.ndarray:
        """Pairs ``(n, 2)`` of neighbours among the documents with equal keys in [low, high)."""
        keys, documents = [], []
        for shard, path in enumerate(self.shards):
            records = _open_signatures(self.folder, band, shard, path)
            bounds = [bisect.bisect_left(records["key"], bound) for bound in (low, high)]
            taken = records[slice(*bounds)]
            keys.append(taken["key"])
            documents.append(_document(shard, taken["row"]))
        joined, names = np.concatenate(keys), np.concatenate(documents)
        order = np.argsort(joined, kind="stable")
        joined, names = joined[order], names[order]
        equal = joined[1:] == joined[:-1]
        return np.stack([names[:-1][equal], names[1:][equal]], axis=1)


class _Clusters(PipelineStep):
    type, name = "DEDUP", "MinHash clusters"

    def __init__(self, shards: list[Path], folder: Path, settings: dict[str, int]) -> None:
        super().__init__()
        self.shards, self.folder, self.settings = shards, folder, settings

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        _want_one_task(self.name, world_size)
        with self.track_time():
            nodes = roots = np.empty(0, np.uint64)  # clusters so far; memory grows with duplicates only
            parts = _parts(self.shards, self.folder)
            for work in range(self.settings["bands"] * parts):
                path = _pairs_path(self.folder, *divmod(work, parts))
                if not path.exists():
                    raise RecipeError(f"{path} is missing: the phase `buckets` did not end. Run it again")
                pairs = _swap(np.fromfile(path, "<u8").reshape(-1, 2))
                nodes, roots = first_of_cluster(
                    np.concatenate([nodes, pairs[:, 0]]), np.concatenate([roots, pairs[:, 1]])
                )
            removed = nodes[nodes != roots]
            self.stat_update("removed", value=len(removed))
            _write_removed(self.folder, "near duplicate", _by_shard(removed, len(self.shards)))


# --------------------------------------------------------------------------------------------- algorithms


def exact_duplicates(hash_files: list[Path]) -> list[np.ndarray]:
    """For each file of hashes, the sorted rows (uint32) whose hash stands earlier, in it or a file before.

    A file is a ``.npy`` of 16 bytes a row, evenly spread. Each pass over the files sorts the hashes of one
    range of first bytes, so memory stays bounded; no more than 256 passes are made.
    """
    files = [_open_hashes(path) for path in hash_files]
    passes = min(sum(map(len, files)) // _RECORDS_AT_ONCE + 1, 256)
    removed = [np.empty(0, np.uint64)]
    for number in range(passes):
        low, high = (256 * (number + i) // passes for i in (0, 1))
        halves, documents = [np.empty((0, 2), np.uint64)], [np.empty(0, np.uint64)]
        for shard, hashes in enumerate(files):
            rows = np.flatnonzero((hashes[:, 0] >= low) & (hashes[:, 0] < high))
            halves.append(hashes[rows].view(np.uint64))
            documents.append(_document(shard, rows))
        joined = np.concatenate(halves)
        order = np.lexsort((joined[:, 1], joined[:, 0]))  # stable: the earlier of equals comes first
        joined = joined[order]
        equal = (joined[1:] == joined[:-1]).all(axis=1)
        removed.append(np.concatenate(documents)[order[1:][equal]])
    return _by_shard(np.sort(np.concatenate(removed)), len(files))


def first_of_cluster(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nodes of the edges ``left[i] - right[i]``, sorted, and for each the smallest node it is tied to.

    Each round hooks the trees of every edge's ends onto the smaller root and halves the paths to it.
    """
    nodes, ends = np.unique(np.concatenate([left, right]), return_inverse=True)
    left, right = np.split(ends, 2)
    root = np.arange(len(nodes))
    while (apart := root[left] != root[right]).any():
        left, right = left[apart], right[apart]
        smaller = np.minimum(root[left], root[right])
        np.minimum.at(root, root[left], smaller)
        np.minimum.at(root, root[right], smaller)
        while (root != root[root]).any():
            root = root[root]
    return nodes, nodes[root]


# ------------------------------------------------------------------------------------------------ leakage


class Leakage(NamedTuple):
    """What of the validation side stands in train.

    same_text: ids of the valid documents whose folded text equals one in train.
    shared_lines: share of long lines that stand in train, for each valid document that has any such line.
    figures: the counts: valid documents, with same text, with shared lines; long lines, shared lines.
    """

    same_text: list[str]
    shared_lines: dict[str, float]
    figures: dict[str, int]


def leakage(train_shards: list[Path], valid_shards: list[Path]) -> Leakage:
    """Look for valid documents, and their lines of `LONG_LINE` or more folded characters, in train.

    Remembers 8 bytes (a hash) for each valid document and long line, three times while comparing; reads train
    once. A text that folds to nothing is no one's copy.
    """
    texts, lines, lengths = array("Q"), array("Q"), array("I")
    for shard in valid_shards:
        for (text,) in _columns(shard, ["text"]):
            whole, long_lines = _hashes(text)
            texts.append(whole)
            lines.extend(long_lines)
            lengths.append(len(long_lines))
    text_seen, line_seen = _Seen(texts), _Seen(lines)
    for shard in train_shards:
        for (text,) in _columns(shard, ["text"]):
            whole, long_lines = _hashes(text)
            text_seen.add([whole])
            line_seen.add(long_lines)
    same = text_seen.flags() & (np.array(texts, np.uint64) != _EMPTY)
    ends = np.cumsum([0, *lengths])
    found = np.diff(np.concatenate([[0], np.cumsum(line_seen.flags())])[ends])
    ids = (id for shard in valid_shards for (id,) in _columns(shard, ["id"]))
    same_text, shared_lines = [], {}
    for id, is_same, hits, count in zip(ids, same, found.tolist(), lengths, strict=True):
        if is_same:
            same_text.append(id)
        if hits:
            shared_lines[id] = hits / count
    figures = {
        "valid_documents": len(texts),
        "with_same_text": len(same_text),
        "with_shared_lines": len(shared_lines),
        "long_lines": len(lines),
        "shared_lines": int(found.sum()),
    }
    return Leakage(same_text, shared_lines, figures)


class _Seen:
    """Which of some 64-bit hashes were met again."""

    def __init__(self, hashes: array[int]) -> None:
        self._hashes = np.array(hashes, np.uint64)
        self._known = np.unique(self._hashes)
        self._met = np.zeros(len(self._known), bool)
        self._waiting = array("Q")

    def add(self, hashes: list[int]) -> None:
        """Meet some hashes."""
        self._waiting.extend(hashes)
        if len(self._waiting) >= _HASHES_AT_ONCE:
            self._look_up()

    def flags(self) -> np.ndarray:
        """For each of the hashes, in their order, whether it was met."""
        self._look_up()
        return self._met[np.searchsorted(self._known, self._hashes)]

    def _look_up(self) -> None:
        waiting = np.array(self._waiting, np.uint64)
        place, end = (np.searchsorted(self._known, waiting, side) for side in ("left", "right"))
        self._met[place[place < end]] = True
        self._waiting = array("Q")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


_EMPTY = _hash("")


def _hashes(text: str) -> tuple[int, list[int]]:
    """64-bit hashes of the folded text and of its long lines."""
    lines = [fold(line) for line in text.split("\n")]
    return _hash("".join(lines)), [_hash(line) for line in lines if len(line) >= LONG_LINE]


# ------------------------------------------------------------------------------------ documents and files


def _document(shard: int, rows: np.ndarray) -> np.ndarray:
    """Rows of a shard as uint64 numbers, in order of priority over all shards."""
    return np.uint64(shard << 32) | rows.astype(np.uint64)


def _by_shard(documents: np.ndarray, shards: int) -> list[np.ndarray]:
    """Sorted documents as one uint32 array of rows per shard."""
    bounds = np.searchsorted(documents, np.arange(shards + 1, dtype=np.uint64) << np.uint64(32))
    return [documents[start:stop].astype(np.uint32) for start, stop in pairwise(bounds)]


def _swap(pairs: np.ndarray) -> np.ndarray:
    """Documents to and from a file of pairs, where the shard stands before the row."""
    return pairs << np.uint64(32) | pairs >> np.uint64(32)


def _columns(shard: Path, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    """The rows of a Parquet shard, as tuples of some columns."""
    for batch in pq.ParquetFile(shard).iter_batches(512, columns=columns):
        yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)


def _open_hashes(path: Path) -> np.ndarray:
    """The hashes in a file as ``(documents, 16)`` bytes, mapped."""
    hashes = np.load(path, mmap_mode="r")
    if hashes.nbytes != 16 * len(hashes):
        raise RecipeError(
            f"{path}: {hashes.nbytes:,} bytes in {len(hashes):,} rows, wanted 16 bytes a row. "
            "Clean that shard again"
        )
    return hashes.view(np.uint8).reshape(-1, 16)


def _signature_path(folder: Path, band: int, shard: int) -> Path:
    return folder / "signatures" / f"bucket_{band:03d}" / f"{shard:05d}.minhash.sig"


def _open_signatures(folder: Path, band: int, shard: int, name: Path) -> np.ndarray:
    path = _signature_path(folder, band, shard)
    if not path.exists():
        raise RecipeError(f"{path} is missing: {name} was not signed. Run the phase `signatures` again")
    empty = path.stat().st_size == 0  # cannot be mapped
    return np.empty(0, _RECORD) if empty else np.memmap(path, _RECORD, "r")


def _parts(shards: list[Path], folder: Path) -> int:
    """Into how many ranges of keys a band is cut. Keys are evenly spread, so ranges are equally full."""
    signed = (len(_open_signatures(folder, 0, shard, path)) for shard, path in enumerate(shards))
    return sum(signed) // _RECORDS_AT_ONCE + 1


def _pairs_path(folder: Path, band: int, part: int) -> Path:
    return folder / "pairs" / f"{band:05d}_{part:02d}.dups"


def _removed_path(folder: Path, reason: str, shard: int) -> Path:
    return folder / reason.replace(" ", "-") / f"{shard:06d}.remove"


def _write_removed(folder: Path, reason: str, rows_of_shards: list[np.ndarray]) -> None:
    for shard, rows in enumerate(rows_of_shards):
        _write_aside(_removed_path(folder, reason, shard), rows.astype("<u4"))


def _read_removed(folder: Path, reason: str, shard: int) -> np.ndarray:
    path = _removed_path(folder, reason, shard)
    if not path.exists():
        raise RecipeError(f"{path} is missing: the search for {reason}s did not end. Run it again")
    return np.fromfile(path, "<u4")


def _write_aside(path: Path, records: np.ndarray) -> None:
    """Write an array's bytes under another name and rename, so that no half file is ever found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    records.tofile(part)
    os.replace(part, path)


def _want_one_task(name: str, tasks: int) -> None:
    if tasks != 1:
        raise RecipeError(f"{name}: run by {tasks} tasks, wanted 1. Give its executor tasks=1")
