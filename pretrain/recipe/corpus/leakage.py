"""Leakage: which validation documents, and which of their lines, also occur in the training side."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recipe.corpus.funnel import SAMPLE_CHARACTERS, Funnel
from recipe.corpus.minhash import fold
from recipe.corpus.shards import shard_rows
from recipe.project import read_json, write_json

LONG_LINE = 30  # folded characters; a shorter line is not compared
_HASHES_AT_ONCE = 1 << 16  # of the training side, looked up together


class Leakage(NamedTuple):
    """What the validation side has in common with the training side.

    same_text: the ids of the validation documents whose folded text equals one in the training side.
    figures: the numbers of validation documents, of those with the same text and with shared lines, of long
    lines and of shared lines.
    """

    same_text: list[str]
    figures: dict[str, int]


def leakage(train_shards: list[Path], valid_shards: list[Path]) -> Leakage:
    """Look for the validation documents, and for their long lines, in the training side.

    A long line has `LONG_LINE` or more folded characters. A text that folds to nothing has no copy. Memory: 8
    bytes (a hash) for each validation document and long line, three times while comparing. The training side
    is read once.
    """
    texts, lines, lengths = array("Q"), array("Q"), array("I")
    for shard in valid_shards:
        for row in shard_rows(shard, ["text"]):
            whole, long_lines = _hashes(row["text"])
            texts.append(whole)
            lines.extend(long_lines)
            lengths.append(len(long_lines))
    text_seen, line_seen = _Seen(texts), _Seen(lines)
    for shard in train_shards:
        for row in shard_rows(shard, ["text"]):
            whole, long_lines = _hashes(row["text"])
            text_seen.add([whole])
            line_seen.add(long_lines)
    same = text_seen.flags() & (np.array(texts, np.uint64) != _EMPTY)
    ends = np.cumsum([0, *lengths])
    found = np.diff(np.concatenate([[0], np.cumsum(line_seen.flags())])[ends])
    ids = (row["id"] for shard in valid_shards for row in shard_rows(shard, ["id"]))
    same_text = [id for id, is_same in zip(ids, same, strict=True) if is_same]
    figures = {
        "valid_documents": len(texts),
        "with_same_text": len(same_text),
        "with_shared_lines": int((found > 0).sum()),
        "long_lines": len(lines),
        "shared_lines": int(found.sum()),
    }
    return Leakage(same_text, figures)


class _Seen:
    """Which of some 64-bit hashes occur in another stream of hashes."""

    def __init__(self, hashes: array[int]) -> None:
        self._hashes = np.array(hashes, np.uint64)
        self._known = np.unique(self._hashes)
        self._found = np.zeros(len(self._known), bool)
        self._waiting = array("Q")

    def add(self, hashes: list[int]) -> None:
        """Add hashes of the other stream."""
        self._waiting.extend(hashes)
        if len(self._waiting) >= _HASHES_AT_ONCE:
            self._look_up()

    def flags(self) -> np.ndarray:
        """For each of the first hashes, in their order, whether it occurs in the stream."""
        self._look_up()
        return self._found[np.searchsorted(self._known, self._hashes)]

    def _look_up(self) -> None:
        waiting = np.array(self._waiting, np.uint64)
        start, end = (np.searchsorted(self._known, waiting, side) for side in ("left", "right"))
        self._found[start[start < end]] = True
        self._waiting = array("Q")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


_EMPTY = _hash("")


def _hashes(text: str) -> tuple[int, list[int]]:
    """64-bit hashes of the folded text and of its long lines."""
    lines = [fold(line) for line in text.split("\n")]
    return _hash("".join(lines)), [_hash(line) for line in lines if len(line) >= LONG_LINE]


def drop_leaks(folder: Path, clean: Path, funnels: dict[str, Funnel]) -> dict[str, int]:
    """Remove validation documents whose folded text occurs in the training side; return `Leakage.figures`.

    folder: the shards of the dataset. clean: the folder of the clean shards. The record ``leaks.json`` is
    written there before a shard is changed, so that a run that was killed counts the same documents.
    """
    record = clean / "leaks.json"
    shards = sorted(folder.glob("valid-*.parquet"))
    if not record.exists():
        found = leakage(sorted(folder.glob("train-*.parquet")), shards)
        ids = pa.array(found.same_text, pa.string())
        rows: dict[str, dict[str, Any]] = {}
        for path in sorted(clean.glob("*.parquet")) if found.same_text else ():
            for row in _leaked(path, ids):
                # Of equal texts, the first one was kept.
                rows.setdefault(row["id"], row)
        write_json(record, {"rows": list(rows.values()), "figures": found.figures})
    leaks = read_json(record)
    for row in leaks["rows"]:
        funnel = funnels[row["source"]]
        funnel.documents_out -= 1
        funnel.bytes_out -= row["bytes"]
        funnel.bytes_trimmed -= row["raw_bytes"] - row["bytes"]
        funnel.lines_in -= row["raw_lines"]
        funnel.lines_out -= row["lines"]
        funnel.drop("in the training side", row["raw_bytes"], row["name"], row["text"])
    ids = pa.array([row["id"] for row in leaks["rows"]], pa.string())
    for path in shards if leaks["rows"] else ():
        table = pq.read_table(path)
        leaked = pc.is_in(table["id"], ids)
        if pc.any(leaked).as_py():
            part = path.with_name(f".{path.name}.part")
            pq.write_table(table.filter(pc.invert(leaked)), part, compression="zstd")
            part.replace(path)
    return leaks["figures"]


def _leaked(path: Path, ids: pa.Array) -> Iterator[dict[str, Any]]:
    """What the funnel counts of the rows of a clean shard that have one of these ids."""
    table = pq.read_table(path)
    for row in table.filter(pc.is_in(table["id"], ids)).to_pylist():
        text = row.pop("text")
        size, lines = len(text.encode("utf-8")), text.count("\n") + 1
        yield row | {"text": text[:SAMPLE_CHARACTERS], "bytes": size, "lines": lines}
