"""The Parquet shards that stage 02 writes, read back as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq


def _shards(folder: Path, side: str) -> list[Path]:
    return sorted(folder.glob(f"{side}-*.parquet"))


def side_sources(folder: Path, side: str) -> list[str]:
    """The sources that have a shard on a side (``train`` or ``valid``), sorted."""
    return [path.stem.removeprefix(f"{side}-") for path in _shards(folder, side)]


def read_texts(
    folder: Path, side: str, source: str | None = None, most_bytes: int | None = None
) -> Iterator[str]:
    """Texts of a side, of one source or of all, until `most_bytes` of UTF-8 are passed."""
    size = 0
    for path in _shards(folder, side):
        if source in (None, path.stem.removeprefix(f"{side}-")):
            for batch in pq.ParquetFile(path).iter_batches(512, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    if most_bytes is not None and size >= most_bytes:
                        return
                    size += len(text.encode("utf-8"))
                    yield text


def document_bytes(folder: Path, side: str) -> int:
    """UTF-8 bytes of all texts of a side."""
    return sum(len(text.encode("utf-8")) for text in read_texts(folder, side))


def count_documents(folder: Path, side: str) -> int:
    """Documents of a side, from the shards' own footers."""
    return sum(pq.read_metadata(path).num_rows for path in _shards(folder, side))
