"""Deduplication over clean shards: exact by hash, near by MinHash.

A shard is a Parquet file with the columns id, source and text. The order of the shards is their priority: of
duplicates, the one with the smallest (shard, row) is kept. The phases run in this order. Each is a datatrove
pipeline, for any of its executors and any number of tasks:

1. `exact` (one task) removes equal documents, by their 16-byte hashes.
2. `signatures` computes the MinHash of the remaining documents: a sorted file of keys per band and shard.
3. `buckets` finds the pairs of documents that share a key in a band.
4. `clusters` (one task) merges pairs into clusters, and removes all but the first document of each.

`removed_rows` then gives each shard's rows with the reason. The files between the phases have the layout of
datatrove's own MinHash steps (one 64-bit hash a bucket), so that its steps can read them. They are named by
shard or band, never by task, so that a phase may run with another number of tasks than the one before it.
A folder belongs to one list of shards and one set of settings.
"""

from __future__ import annotations

import bisect
from array import array
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep

from recipe.corpus.minhash import KEY_BITS, MINHASH, MinHash
from recipe.corpus.shards import shard_rows
from recipe.project import RecipeError, written_whole

REASONS = ("duplicate", "near duplicate")
RECORD = np.dtype([("key", "<u8"), ("row", "<u4")])  # of a signature file

_RECORDS_AT_ONCE = 1 << 23  # sorted in memory together, about 50 bytes each

# ------------------------------------------------------------------------------------------------ phases


def exact(hash_files: list[Path], folder: Path) -> list[PipelineStep]:
    """Phase 1, one task: remove equal documents. hash_files: see `exact_duplicates`."""
    return [_Exact(hash_files, folder)]


def signatures(shards: list[Path], folder: Path, config: dict[str, Any]) -> list[PipelineStep]:
    """Phase 2, up to one task per shard: the signatures of the documents that `exact` kept."""
    return [_Signatures(shards, folder, MINHASH | config)]


def buckets(shards: list[Path], folder: Path, config: dict[str, Any]) -> list[PipelineStep]:
    """Phase 3, one task per band, or more for many documents: pairs of documents with a key in common."""
    return [_Buckets(shards, folder, MINHASH | config)]


def clusters(shards: list[Path], folder: Path, config: dict[str, Any]) -> list[PipelineStep]:
    """Phase 4, one task: remove all but the first document of each cluster of pairs."""
    return [_Clusters(shards, folder, MINHASH | config)]


def removed_rows(folder: Path, shard: int) -> dict[str, np.ndarray]:
    """The rows to remove from a shard, by reason: sorted uint32 arrays with no row in common.

    The reason "near duplicate" is missing when no signatures were made. Raises RecipeError if a phase has not
    finished.
    """
    reasons = REASONS if (folder / "signatures").exists() else REASONS[:1]
    return {reason: _read_removed(folder, reason, shard) for reason in reasons}


class _Exact(PipelineStep):
    type, name = "DEDUP", "exact duplicates"

    def __init__(self, hash_files: list[Path], folder: Path) -> None:
        super().__init__()
        self.hash_files, self.folder = hash_files, folder

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        _require_one_task(self.name, world_size)
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
        removed = set(_read_removed(self.folder, "duplicate", shard).tolist())
        keys, rows = array("Q"), array("I")
        for row, document in enumerate(shard_rows(self.shards[shard], ["text"])):
            signed = None if row in removed else minhash.keys(document["text"])
            if signed is not None:
                keys.frombytes(signed.tobytes())
                rows.append(row)
        self.stat_update("signed", value=len(rows), unit="shard")
        by_band = np.array(keys, np.uint64).reshape(-1, minhash.bands).T
        numbers = np.array(rows, np.uint32)
        records = np.empty(len(rows), RECORD)
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
                low, high = (((part + i) << KEY_BITS) // parts for i in (0, 1))
                pairs = self._pairs(band, low, high)
                self.stat_update("pairs", value=len(pairs), unit="range")
                _write_aside(_pairs_path(self.folder, band, part), _swap(pairs))

    def _pairs(self, band: int, low: int, high: int) -> np.ndarray:
        """Pairs ``(n, 2)`` of documents with equal keys in [low, high): each with the next one."""
        keys, documents = [], []
        for shard, path in enumerate(self.shards):
            records = _open_signatures(self.folder, band, shard, path)
            bounds = [bisect.bisect_left(records["key"], bound) for bound in (low, high)]
            taken = records[slice(*bounds)]
            keys.append(np.array(taken["key"]))  # a copy: a view would keep every file open
            documents.append(_document(shard, taken["row"]))
        all_keys, all_documents = np.concatenate(keys), np.concatenate(documents)
        order = np.argsort(all_keys, kind="stable")
        all_keys, all_documents = all_keys[order], all_documents[order]
        equal = all_keys[1:] == all_keys[:-1]
        return np.stack([all_documents[:-1][equal], all_documents[1:][equal]], axis=1)


class _Clusters(PipelineStep):
    type, name = "DEDUP", "MinHash clusters"

    def __init__(self, shards: list[Path], folder: Path, settings: dict[str, int]) -> None:
        super().__init__()
        self.shards, self.folder, self.settings = shards, folder, settings

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        _require_one_task(self.name, world_size)
        with self.track_time():
            # The clusters so far: memory grows with the number of duplicates only.
            nodes = roots = np.empty(0, np.uint64)
            parts = _parts(self.shards, self.folder)
            for work in range(self.settings["bands"] * parts):
                path = _pairs_path(self.folder, *divmod(work, parts))
                if not path.exists():
                    raise RecipeError(f"{path} is missing: the phase `buckets` did not finish. Run it again")
                pairs = _swap(np.fromfile(path, "<u8").reshape(-1, 2))
                nodes, roots = first_of_cluster(
                    np.concatenate([nodes, pairs[:, 0]]), np.concatenate([roots, pairs[:, 1]])
                )
            removed = nodes[nodes != roots]
            self.stat_update("removed", value=len(removed))
            _write_removed(self.folder, "near duplicate", _by_shard(removed, len(self.shards)))


# --------------------------------------------------------------------------------------------- algorithms


def exact_duplicates(hash_files: list[Path]) -> list[np.ndarray]:
    """For each file of hashes, the sorted rows (uint32) whose hash occurs earlier, in it or a file before.

    hash_files: ``.npy`` files of 16 bytes a row, whose values are evenly distributed. Each pass over the
    files sorts the hashes whose first byte is in one range, so that memory is bounded. There are at most 256
    passes. One file is open at a time: there may be more of them than a process may open.
    """
    passes = min(sum(len(_open_hashes(path)) for path in hash_files) // _RECORDS_AT_ONCE + 1, 256)
    removed = [np.empty(0, np.uint64)]
    for number in range(passes):
        low, high = (256 * (number + i) // passes for i in (0, 1))
        halves, documents = [np.empty((0, 2), np.uint64)], [np.empty(0, np.uint64)]
        for shard, path in enumerate(hash_files):
            hashes = _open_hashes(path)
            rows = np.flatnonzero((hashes[:, 0] >= low) & (hashes[:, 0] < high))
            halves.append(hashes[rows].view(np.uint64))
            documents.append(_document(shard, rows))
        hashes = np.concatenate(halves)
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: of equal ones the earlier comes first
        hashes = hashes[order]
        equal = (hashes[1:] == hashes[:-1]).all(axis=1)
        removed.append(np.concatenate(documents)[order[1:][equal]])
    return _by_shard(np.sort(np.concatenate(removed)), len(hash_files))


def first_of_cluster(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sorted nodes of the edges ``left[i] - right[i]``, and for each the smallest node of its cluster.

    left, right: uint64 arrays of equal length. Each round attaches the trees of both ends of every edge to
    the smaller root, and then shortens the paths to it.
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


# ------------------------------------------------------------------------------------ documents and files


def _document(shard: int, rows: np.ndarray) -> np.ndarray:
    """Rows of a shard as uint64 numbers, whose order is the priority over all shards."""
    return np.uint64(shard << 32) | rows.astype(np.uint64)


def _by_shard(documents: np.ndarray, shards: int) -> list[np.ndarray]:
    """Sorted documents as one uint32 array of rows per shard."""
    bounds = np.searchsorted(documents, np.arange(shards + 1, dtype=np.uint64) << np.uint64(32))
    return [documents[start:stop].astype(np.uint32) for start, stop in pairwise(bounds)]


def _swap(pairs: np.ndarray) -> np.ndarray:
    """Convert documents to and from the form in a file of pairs, where the shard comes before the row."""
    return pairs << np.uint64(32) | pairs >> np.uint64(32)


def _open_hashes(path: Path) -> np.ndarray:
    """The hashes in a file as ``(documents, 16)`` bytes, mapped."""
    hashes = np.load(path, mmap_mode="r")
    if hashes.nbytes != 16 * len(hashes):
        raise RecipeError(
            f"{path}: {hashes.nbytes:,} bytes in {len(hashes):,} rows, expected 16 bytes a row. "
            "Clean that shard again"
        )
    return hashes.view(np.uint8).reshape(-1, 16)


def _signature_path(folder: Path, band: int, shard: int) -> Path:
    return folder / "signatures" / f"bucket_{band:03d}" / f"{shard:05d}.minhash.sig"


def _open_signatures(folder: Path, band: int, shard: int, name: Path) -> np.ndarray:
    path = _signature_path(folder, band, shard)
    if not path.exists():
        raise RecipeError(f"{path} is missing: {name} has no signatures. Run the phase `signatures` again")
    # An empty file cannot be mapped.
    return np.memmap(path, RECORD, "r") if path.stat().st_size else np.empty(0, RECORD)


def _parts(shards: list[Path], folder: Path) -> int:
    """The number of key ranges that a band is split into; keys are evenly distributed over them."""
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
        raise RecipeError(f"{path} is missing: the search for {reason}s did not finish. Run it again")
    return np.fromfile(path, "<u4")


def _write_aside(path: Path, records: np.ndarray) -> None:
    """Write an array's bytes, so that a file is complete or missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, records.nbytes) as handle:
        records.tofile(handle)


def _require_one_task(name: str, tasks: int) -> None:
    if tasks != 1:
        raise RecipeError(f"{name}: runs as {tasks} tasks, expected 1. Give its executor tasks=1")
