"""The Parquet shards that stage 02 writes, read back as a stream."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

SIDES = ("train", "valid")
_NAME = re.compile(r"(train|valid)-(.+)-(\d{5})\.parquet")


class Shard(NamedTuple):
    """A shard ``<side>-<source>-<number>.parquet``. Sorted, shards stand by side, source and number."""

    side: str
    source: str
    number: int
    path: Path


def list_shards(folder: Path, side: str | None = None, source: str | None = None) -> list[Shard]:
    """The shards in stage 02's folder, of one side or both, of one source or all, in their fixed order."""
    matches = [(path, _NAME.fullmatch(path.name)) for path in folder.glob("*.parquet")]
    shards = sorted(Shard(match[1], match[2], int(match[3]), path) for path, match in matches if match)
    return [s for s in shards if side in (None, s.side) and source in (None, s.source)]


def side_sources(folder: Path, side: str) -> list[str]:
    """The sources that have a shard on a side (``train`` or ``valid``), sorted."""
    return sorted({shard.source for shard in list_shards(folder, side)})


def read_texts(
    folder: Path, side: str, source: str | None = None, most_bytes: int | None = None
) -> Iterator[str]:
    """Texts of a side, of one source or of all, until `most_bytes` of UTF-8 are passed."""
    size = 0
    for shard in list_shards(folder, side, source):
        for batch in pq.ParquetFile(shard.path).iter_batches(512, columns=["text"]):
            for text in batch.column(0).to_pylist():
                if most_bytes is not None and size >= most_bytes:
                    return
                size += len(text.encode("utf-8"))
                yield text


def document_bytes(folder: Path, side: str) -> int:
    """UTF-8 bytes of all texts of a side."""
    return sum(len(text.encode("utf-8")) for text in read_texts(folder, side))


def count_documents(folder: Path, side: str, source: str | None = None) -> int:
    """Documents of a side, of one source or of all, from the shards' own footers."""
    return sum(pq.read_metadata(shard.path).num_rows for shard in list_shards(folder, side, source))
