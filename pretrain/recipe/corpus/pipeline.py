"""The phases of stage 02: read, clean, find duplicates, write.

Every phase is a set of tasks for `recipe.corpus.engine`. A task writes its files under another name and
renames them, so that every file is complete.

1. `Read`, a task per source: its documents as they are, in Parquet shards of SHARD_BYTES; and what the
   dropped ones tell about the others (redirects of templates).
2. `Clean`, a task per shard: extraction, normalising, rules; and the hash of every text that remains.
3. `recipe.corpus.dedup`: exact and near duplicates over all shards. A source that comes earlier in
   dataset.json has priority.
4. `Write`, a task per shard: all but the duplicates, to the training or the validation side by their hash.
5. `recipe.corpus.leakage`: validation documents that also occur in the training side are removed.

Memory is that of a few batches per worker, for any size of the corpus; deduplication keeps its records on
disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from recipe.corpus import dedup
from recipe.corpus.cleaning import make_cleaner
from recipe.corpus.engine import Engine, engine
from recipe.corpus.funnel import Funnel, from_record, to_record
from recipe.corpus.leakage import drop_leaks
from recipe.corpus.minhash import MINHASH
from recipe.corpus.readers import cap_bad
from recipe.corpus.shards import ShardWriter, shard_rows
from recipe.corpus.sources import KINDS, read
from recipe.corpus.splitting import VALID_SHARE, is_valid_side, text_hash
from recipe.project import RecipeError, read_json, write_json, written_whole

SHARD_BYTES = 64_000_000  # UTF-8 text in a raw shard: about ten seconds of cleaning
RAW = pa.schema([("name", pa.string()), ("text", pa.large_string()), ("dropped", pa.string())])
CLEAN = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("text", pa.large_string()),
        ("name", pa.string()),
        ("raw_bytes", pa.int64()),
        ("raw_lines", pa.int64()),
    ]
)
DATASET = pa.schema([("id", pa.string()), ("source", pa.string()), ("text", pa.large_string())])


# The rows to remove from a clean shard, by reason.
Removed = Callable[[int], dict[str, np.ndarray]]


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A new folder to fill, which replaces `path` when the block ends without an error."""
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    shutil.rmtree(path, ignore_errors=True)
    part.rename(path)


@dataclass
class Read:
    """Task k: read source k of dataset.json into ``<folder>/<source>/<shard>.parquet``."""

    config: dict[str, Any]
    data: Path
    folder: Path

    def __call__(self, _: object, rank: int, tasks: int) -> None:
        name, spec = list(self.config["sources"].items())[rank]
        with _replacing(self.folder / name) as part:
            writer, size, shard = None, 0, 0
            reached: list[str] = []
            make_learn = KINDS[spec["source"]].learn
            learn, learned = make_learn and make_learn(spec), dict[str, str]()
            documents = capped(read(name, spec, self.data), spec, reached)
            for document in cap_bad(documents, f"sources.{name}", spec.get("maximum_bad_share", 0.0)):
                if writer is None:
                    writer, size, shard = ShardWriter(part / f"{shard:05d}.parquet", RAW), 0, shard + 1
                writer.write(raw_row(document))
                if learn and document.dropped and (fact := learn(document)):
                    learned.update([fact])
                size += len(document.text)
                if size * 3 >= SHARD_BYTES:  # a Japanese character is 3 bytes
                    writer.close()
                    writer = None
            if writer is not None:
                writer.close()
            write_json(part / "capped.json", reached)
            write_json(part / "learned.json", learned)


def raw_row(document: Any) -> dict[str, str]:
    """A document as a row of a raw shard.

    JSON can contain halves of surrogate pairs, which are not text: such a document is dropped.
    """
    text, dropped = document.text, document.dropped
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text, dropped = text.encode("utf-8", errors="replace").decode("utf-8"), dropped or "lone surrogates"
    return {"name": document.name, "text": text, "dropped": dropped}


def capped(documents: Iterable[Any], spec: dict[str, Any], reached: list[str]) -> Iterator[Any]:
    """The documents of a source up to its ``maximum_documents`` or ``maximum_megabytes`` of usable text.

    The name of a limit that is reached is added to `reached`.
    """
    most = spec.get("maximum_documents") or float("inf")
    room = (spec.get("maximum_megabytes") or float("inf")) * 1e6
    for document in documents:
        if not document.dropped:
            size = len(document.text.encode("utf-8", errors="replace"))
            if most < 1 or room < size:
                reached.append("maximum_documents" if most < 1 else "maximum_megabytes")
                return
            most, room = most - 1, room - size
        yield document


@dataclass
class Clean:
    """Task k: clean raw shard k.

    Writes ``<folder>/<k>.parquet``, ``<k>.npy`` (hashes) and ``<k>.json`` (counts).
    """

    config: dict[str, Any]
    shards: list[tuple[str, Path]]
    folder: Path

    def __call__(self, _: object, rank: int, tasks: int) -> None:
        source, path = self.shards[rank]
        funnel, hashes = Funnel(), bytearray()
        learned = read_json(path.parent / "learned.json")
        clean = make_extractor(self.config, self.config["sources"][source], learned, funnel)
        writer = ShardWriter(self.folder / f"{rank:05d}.parquet", CLEAN)
        for row in shard_rows(path):
            raw, name = row["text"], row["name"]
            size = len(raw.encode("utf-8"))
            funnel.documents_in += 1
            funnel.bytes_in += size
            text, reason = ("", row["dropped"]) if row["dropped"] else clean(name, raw)
            if reason:
                funnel.drop(reason, size, name, raw)
                continue
            identity = text_hash(text)
            hashes += identity
            lines = raw.count("\n") + 1
            writer.write(
                {
                    "id": identity.hex(),
                    "source": source,
                    "text": text,
                    "name": name,
                    "raw_bytes": size,
                    "raw_lines": lines,
                }
            )
        writer.close()
        funnel.close_templates()
        with written_whole(self.folder / f"{rank:05d}.npy", len(hashes)) as handle:
            np.save(handle, np.frombuffer(bytes(hashes), "V16"))
        write_json(self.folder / f"{rank:05d}.json", to_record(funnel))


def make_extractor(
    config: dict[str, Any], spec: dict[str, Any], learned: dict[str, str], funnel: Funnel
) -> Callable[[str, str], tuple[str, str]]:
    """From (name, raw text) to (clean text, reason for dropping it or ""): the extractor of the kind, then
    cleaning.

    learned: what the kind's `learn` found. The counts of the extractor and of the normaliser are added to the
    funnel.
    """
    clean = make_cleaner(config, spec, funnel.extraction)
    make_extract = KINDS[spec["source"]].extract
    if make_extract is None:
        return lambda name, text: clean(text)
    extract = make_extract(spec, learned, funnel.templates)

    def extract_and_clean(name: str, text: str) -> tuple[str, str]:
        prose, reason, counts = extract(name, text)
        funnel.extraction.update(counts)
        return ("", reason) if reason else clean(prose)

    return extract_and_clean


@dataclass
class Write:
    """Task k: write the rows of clean shard k that are not duplicates.

    Writes ``<folder>/{train,valid}-<source>-<number>.parquet``.
    """

    config: dict[str, Any]
    shards: list[tuple[str, int]]  # source, and number of the shard in it
    clean: Path
    removed: Removed
    folder: Path

    def __call__(self, _: object, rank: int, tasks: int) -> None:
        source, number = self.shards[rank]
        spec = self.config["sources"][source]
        reasons = {int(row): reason for reason, rows in self.removed(rank).items() for row in rows}
        funnel = from_record(read_json(self.clean / f"{rank:05d}.json"))
        writers = {
            side: ShardWriter(
                self.folder / f"{side}-{source}-{number:05d}.parquet", DATASET, keep_empty=False
            )
            for side in ("train", "valid")
        }
        for row_number, row in enumerate(shard_rows(self.clean / f"{rank:05d}.parquet")):
            if row_number in reasons:
                funnel.drop(reasons[row_number], row["raw_bytes"], row["name"], row["text"])
                continue
            size = len(row["text"].encode("utf-8"))
            funnel.documents_out += 1
            funnel.bytes_out += size
            funnel.bytes_trimmed += row["raw_bytes"] - size
            funnel.lines_in += row["raw_lines"]
            funnel.lines_out += row["text"].count("\n") + 1
            valid = spec.get("held_out") or is_valid_side(
                bytes.fromhex(row["id"]), self.config.get("valid_share", VALID_SHARE)
            )
            writers["valid" if valid else "train"].write({key: row[key] for key in DATASET.names})
        for writer in writers.values():
            writer.close()
        write_json(self.clean / f"{rank:05d}.funnel.json", to_record(funnel))


def build(config: dict[str, Any], data: Path, folder: Path) -> tuple[dict[str, Funnel], dict[str, int]]:
    """Run all phases; return each source's funnel and the figures of leakage.

    config: dataset.json. data: the folder that stage 01 downloaded to. folder: where the shards of the
    dataset go. A run that was killed is continued.
    """
    sources, raw, clean = config["sources"], folder / "raw", folder / "clean"
    clean.mkdir(exist_ok=True)
    with engine(config.get("engine", {}), folder) as phases:
        phases.run("read", [Read(config, data, raw)], len(sources))
        shards = [(name, path) for name in sources for path in sorted((raw / name).glob("*.parquet"))]
        phases.run("clean", [Clean(config, shards, clean)], len(shards))
        if not shards:
            for name in sources:
                check_size(name, sources[name], Funnel())
        removed = _find_duplicates(phases, config, clean, len(shards))
        numbered = [(name, int(path.stem)) for name, path in shards]
        phases.run("write", [Write(config, numbered, clean, removed, folder)], len(shards))
    funnels = _merge_funnels(clean, numbered, sources)
    leaks = drop_leaks(folder, clean, funnels)
    for name, funnel in funnels.items():
        funnel.capped = ", ".join(read_json(raw / name / "capped.json"))
        funnel.check(name)
        check_size(name, sources[name], funnel)
    return funnels, leaks


def _find_duplicates(phases: Engine, config: dict[str, Any], clean: Path, shards: int) -> Removed:
    """Run the phases of `recipe.corpus.dedup`; the result gives the rows to remove from a shard."""
    files = [clean / f"{rank:05d}.parquet" for rank in range(shards)]
    folder = clean / "duplicates"
    folder.mkdir(exist_ok=True)
    phases.run("exact", dedup.exact([path.with_suffix(".npy") for path in files], folder), 1)
    minhash = config.get("minhash", {})
    if minhash is not None:
        phases.run("signatures", dedup.signatures(files, folder, minhash), shards)
        phases.run("buckets", dedup.buckets(files, folder, minhash), (MINHASH | minhash)["bands"])
        phases.run("clusters", dedup.clusters(files, folder, minhash), 1)
    return partial(dedup.removed_rows, folder)


def _merge_funnels(clean: Path, shards: list[tuple[str, int]], sources: Iterable[str]) -> dict[str, Funnel]:
    """The funnel of every source, from those that `Write` wrote for its shards."""
    funnels = {source: Funnel() for source in sources}
    for rank, (source, _) in enumerate(shards):
        funnels[source].add(from_record(read_json(clean / f"{rank:05d}.funnel.json")))
    return funnels


def check_size(name: str, spec: dict[str, Any], funnel: Funnel) -> None:
    """Raise RecipeError when too little of a source is left, for example after an incomplete download."""
    least = spec.get("minimum_megabytes", 0)
    if not funnel.documents_out:
        raise RecipeError(
            f"sources.{name}: nothing is left of {funnel.documents_in} documents, dropped "
            f"{dict(funnel.documents_dropped)}. Check data/{name}/, its rules and limits, or remove the "
            "source from dataset.json"
        )
    if funnel.bytes_out < least * 1e6:
        raise RecipeError(
            f"sources.{name}: only {funnel.bytes_out / 1e6:.2f} MB are left, expected at least "
            f"minimum_megabytes {least}: {funnel.documents_in} documents in, dropped "
            f"{dict(funnel.documents_dropped)}. Check data/{name}/, lower the minimum, or remove "
            "the source from dataset.json"
        )
