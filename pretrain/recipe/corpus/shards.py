"""Parquet shards: written whole or not at all, and read as a stream."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from recipe.project import RecipeError, naming_full_disk

SIDES = ("train", "valid")
BATCH = 1024  # documents in a row group: a worker holds so many at once
_NAME = re.compile(r"(train|valid)-(.+)-(\d{5})\.parquet")


class ShardWriter:
    """Writes rows into one Parquet file, which gets its name when `close` has completed it."""

    def __init__(self, path: Path, schema: pa.Schema, keep_empty: bool = True) -> None:
        self.path, self.schema, self.keep_empty = path, schema, keep_empty
        self.part = path.with_name(f".{path.name}.part")
        self.rows: list[dict[str, Any]] = []
        self.writer: pq.ParquetWriter | None = None

    def write(self, row: dict[str, Any]) -> None:
        """Add a row."""
        self.rows.append(row)
        if len(self.rows) == BATCH:
            self._flush()

    def _flush(self) -> None:
        with naming_full_disk(self.path):
            if self.writer is None:
                self.writer = pq.ParquetWriter(self.part, self.schema, compression="zstd")
            self.writer.write_table(pa.Table.from_pylist(self.rows, self.schema))
        self.rows.clear()

    def close(self) -> None:
        """Complete the file and rename it. Without rows there is no file, unless `keep_empty`."""
        if self.rows or (self.keep_empty and self.writer is None):
            self._flush()
        if self.writer is not None:
            with naming_full_disk(self.path):
                self.writer.close()
                # A power cut after the rename would otherwise leave an empty file under the final name.
                with self.part.open("rb") as file:
                    os.fsync(file.fileno())
            self.part.replace(self.path)


def shard_rows(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, with all or some of its columns; `BATCH` rows are in memory at once."""
    for batch in pq.ParquetFile(path).iter_batches(BATCH, columns=columns):
        yield from batch.to_pylist()


class Shard(NamedTuple):
    """A shard ``<side>-<source>-<number>.parquet``. Shards sort by side, source and number."""

    side: str
    source: str
    number: int
    path: Path


def list_shards(folder: Path, side: str | None = None, source: str | None = None) -> list[Shard]:
    """The shards in stage 02's folder, of one side or both and of one source or all, sorted."""
    matches = [(path, _NAME.fullmatch(path.name)) for path in folder.glob("*.parquet")]
    shards = sorted(Shard(match[1], match[2], int(match[3]), path) for path, match in matches if match)
    return [s for s in shards if side in (None, s.side) and source in (None, s.source)]


def read_shard(path: Path, batch: int) -> Iterator[pa.RecordBatch]:
    """The columns id and text of a shard, at most `batch` documents at once.

    Raises RecipeError for a shard that cannot be read and for a text that is null.
    """
    with _naming(path):
        file = pq.ParquetFile(path)
        for rows in file.iter_batches(batch, columns=["id", "text"]):
            rows["text"].validate(full=True)  # UTF-8
            if rows["text"].null_count:
                name = rows["id"][rows["text"].is_null().index(True).as_py()]
                raise RecipeError(f"{path}: document {name}: its text is null. Run stage 02 with --force")
            yield rows


def count_rows(path: Path) -> int:
    """Documents in a shard, from its footer. Raises RecipeError for a shard that cannot be read."""
    with _naming(path):
        return pq.read_metadata(path).num_rows


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Raise a RecipeError with the path when pyarrow cannot read a shard."""
    try:
        yield
    except (OSError, KeyError, pa.ArrowException) as error:
        raise RecipeError(f"{path}: cannot be read: {error}. Run stage 02 again with --force") from error


def side_sources(folder: Path, side: str) -> list[str]:
    """The sources that have a shard on a side (``train`` or ``valid``), sorted."""
    return sorted({shard.source for shard in list_shards(folder, side)})


def read_texts(
    folder: Path, side: str, source: str | None = None, most_bytes: int | None = None
) -> Iterator[str]:
    """Texts of a side, of one source or of all, until `most_bytes` of UTF-8 are exceeded."""
    size = 0
    for shard in list_shards(folder, side, source):
        for batch in read_shard(shard.path, 512):
            for text in batch["text"].to_pylist():
                if most_bytes is not None and size >= most_bytes:
                    return
                size += len(text.encode("utf-8"))
                yield text


def document_bytes(folder: Path, side: str, source: str | None = None) -> int:
    """UTF-8 bytes of the texts of a side, of one source or of all."""
    return sum(len(text.encode("utf-8")) for text in read_texts(folder, side, source))


def count_documents(folder: Path, side: str, source: str | None = None) -> int:
    """Documents of a side, of one source or of all, from the shards' own footers."""
    return sum(count_rows(shard.path) for shard in list_shards(folder, side, source))
