"""The files of a stage's output: sizes and sha256, recorded at its end and checked before they are read.

You may edit a file of a finished stage on purpose. Then accept the folder as it is now:

    .venv/bin/python -m recipe.run.integrity outputs/NAME/STAGE
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from recipe import host
from recipe.endings import errors_in_one_line
from recipe.project import RECORD, Refused, digest_of, is_finished, read_record, redo, warn, write_json
from recipe.run.publication import SCAFFOLD
from recipe.training.files import CHECKPOINTS, STOP

# Folders that no stage reads, and that a user may delete. Checkpoints have manifests of their own.
UNREAD = (CHECKPOINTS, "tensorboard", "wandb")
# Files of these kinds are found by their ending, so that one that was added would be read, too.
FOUND_BY_ENDING = (".parquet", ".safetensors")
# What a stage reads of an input that it does not read whole.
READS = {
    ("11_dataset", "02_dataset"): ("valid-*",),
    ("16_export", "02_dataset"): (),
    ("16_export", "03_tokenizer"): (),
}


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """For each file of a stage's output its ``bytes`` and ``sha256``; ``files`` in ``stage.json``."""
    paths = list(_output(folder))
    return {
        name: {"bytes": path.stat().st_size, "sha256": digest}
        for (name, path), digest in zip(paths, _digests([path for _, path in paths]), strict=True)
    }


def _output(folder: Path) -> Iterator[tuple[str, Path]]:
    """(path below `folder`, path) of each file of a stage's output, sorted."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        other = (*UNREAD, *SCAFFOLD, RECORD, STOP)
        if path.is_file() and name.parts[0] not in other and name.parts[0][0] != ".":
            yield name.as_posix(), path


def _digests(paths: list[Path]) -> list[str]:
    with ThreadPoolExecutor(min(8, host.cores())) as pool:
        return list(pool.map(digest_of, paths))


def parts_read(stage: str, inputs: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The patterns (`fnmatch`) of the files that a stage reads, for each of its inputs."""
    parts = {name: READS.get((stage, name), ("*",)) for name in inputs}
    if stage in ("06_evaluate", "14_evaluate") and "01_download" not in parts:
        # Only tasks that are made from a source read the training side.
        parts["02_dataset"] = ("valid-*",)
    return parts


def damage(
    folder: Path, record: Mapping[str, Any], parts: tuple[str, ...] = ("*",), hashes: bool = True
) -> str:
    """How a stage's files differ from its record, with the path of the first such file; empty if they agree.

    parts: patterns of the files to check. hashes: False compares only the sizes. The record of an earlier
    release names no files: a warning says that they are not checked.
    """
    if not isinstance(files := record.get("files"), dict):
        if parts and record.get("stage") != "01_download":
            warn(f"{folder}: made by an earlier release, which recorded no hashes: its files are not checked")
        return ""
    chosen = {name: facts for name, facts in files.items() if any(fnmatchcase(name, part) for part in parts)}
    for name, facts in chosen.items():
        if not (path := folder / name).is_file():
            return f"{path}: missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{path}: {path.stat().st_size:,} bytes, expected {facts['bytes']:,}"
    for path in folder.iterdir():
        if path.suffix in FOUND_BY_ENDING and path.name not in files:
            return f"{path}: not a file that this stage has written"
    if not hashes:
        return ""
    try:
        digests = _digests([folder / name for name in chosen])
    except OSError as error:
        return f"{error.filename}: cannot be read ({error.strerror})"
    for (name, facts), digest in zip(chosen.items(), digests, strict=True):
        if digest != facts["sha256"]:
            return f"{folder / name}: damaged or changed: its sha256 is not the recorded one"
    return ""


def how_to_repair(folder: Path) -> str:
    """What to do about a stage whose files differ from its record."""
    accept = f".venv/bin/python -m recipe.run.integrity outputs/{folder.parent.name}/{folder.name}"
    return f"{redo(folder)}. If you changed it on purpose, accept it: {accept}"


def require_whole(folder: Path, parts: tuple[str, ...] = ("*",)) -> None:
    """Raise Refused unless the files of a finished stage have the recorded sizes and hashes."""
    if reason := damage(folder, read_record(folder), parts):
        raise Refused(f"{reason}. {how_to_repair(folder)}")


def main() -> None:
    """Record the files of a stage's folder as they are now, and say which have changed."""
    with errors_in_one_line("integrity"):
        if len(sys.argv) != 2:
            raise Refused("expected the folder of one finished stage, such as outputs/tiny/03_tokenizer")
        folder = Path(sys.argv[1]).absolute()
        if not is_finished(folder):
            raise Refused(f"{sys.argv[1]}: expected the folder of a finished stage, but it has no {RECORD}")
        record = read_record(folder)
        before, now = record.get("files") or {}, describe_files(folder)
        changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if changed:
            write_json(folder / RECORD, record | {"files": now})
        print(f"{folder}: accepted: {', '.join(changed) or 'no file has changed'}")
        if changed:
            print("Stages that were made from this one are now stale.")


if __name__ == "__main__":
    main()
