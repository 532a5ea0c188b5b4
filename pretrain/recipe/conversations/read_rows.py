"""A user's own conversations, from JSON files or from a data set on the Hugging Face hub or in a folder.

`recipe.conversations.dialogues` makes conversations of the rows.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipe.project import ROOT, RecipeError, glob_files

# role (system, user or assistant) and content; `trained`, which is False, if an answer is only context
Message = dict[str, Any]
Row = tuple[str, dict[str, Any]]  # its file and line (for error messages), and its columns


def read_rows(where: str, spec: dict[str, Any]) -> Iterator[Row]:
    """The rows of an entry with a `path` or a `dataset`.

    where: names the entry in messages, such as ``instruction.json: pairs.mine``. Raises RecipeError when a
    file or data set cannot be read, or when a row is not an object.
    """
    if "path" in spec:
        for path in expand_pairs(where, spec["path"]):
            for position, row in json_rows(path):
                if not isinstance(row, dict):
                    raise RecipeError(f"{path}: {position}: expected an object, found {type(row).__name__}")
                yield f"{path}: {position}", row
    else:
        yield from _hub_rows(where, spec)


def expand_pairs(where: str, pattern: str) -> list[Path]:
    """The files that the `path` of an entry matches. Raises RecipeError when it matches none."""
    paths = sorted(glob_files(pattern))
    if not paths:
        raise RecipeError(f"{where}.path: {pattern!r} matches no file (relative paths start at {ROOT})")
    return paths


def byte_order_marks(where: str, spec: dict[str, Any]) -> int:
    """How many files of an entry begin with a byte order mark, which `read_rows` removes."""
    found = 0
    for path in expand_pairs(where, spec["path"]) if "path" in spec else []:
        with path.open("rb") as handle:
            found += handle.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
    return found


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a JSON list or of JSON Lines, each with its position, such as ``line 3``.

    A byte order mark is removed. Raises RecipeError that names the line with invalid JSON or the bad byte.
    """
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 at byte {error.start}. Save the file as UTF-8") from error
    is_list = text.lstrip().startswith("[")
    number = 1
    try:
        if is_list:
            yield from ((f"entry {i}", row) for i, row in enumerate(json.loads(text), 1))
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {number}", json.loads(line)
    except json.JSONDecodeError as error:
        line = error.lineno if is_list else number
        raise RecipeError(f"{path}:{line}: not valid JSON ({error.msg})") from error


def _hub_rows(where: str, spec: dict[str, Any]) -> Iterator[Row]:
    import datasets

    folder = ROOT / Path(spec["dataset"]).expanduser()
    source = str(folder) if folder.is_dir() else spec["dataset"]
    try:
        rows = datasets.load_dataset(
            source,
            name=spec.get("configuration"),
            split=spec.get("split", "train"),
            revision=spec.get("revision"),
            streaming=True,
        )
        for number, row in enumerate(rows):
            yield f"{spec['dataset']}: row {number}", row
    except (OSError, ValueError) as error:
        raise RecipeError(f"{where}: cannot read the data set {spec['dataset']}: {error}") from error
