"""A user's own conversations, from JSON files or from a data set on the Hugging Face hub or in a folder.

`recipe.conversations.dialogues` makes conversations of the rows.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec

from recipe.corpus.data_sets import data_set_files, naming_data_set
from recipe.corpus.web_pages import refuse_web_page
from recipe.project import ROOT, RecipeError, glob_files

# role (system, user or assistant) and content; `trained`, which is False, if an answer is only context
Message = dict[str, Any]
# How files begin that people give in place of JSON.
_OTHER_FORMS = {
    "gzip": b"\x1f\x8b",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ",
    "zstandard": b"\x28\xb5\x2f\xfd",
    "zip": b"PK\x03\x04",
    "Parquet": b"PAR1",
}
Row = tuple[str, dict[str, Any]]  # its file and line (for error messages), and its columns


def read_rows(where: str, spec: dict[str, Any]) -> Iterator[Row]:
    """The rows of an entry with a `path` or a `dataset`.

    where: names the entry in messages, such as ``instruction.json: pairs.mine``. Raises RecipeError when a
    file or data set cannot be read, or when a row is not an object.
    """
    if "path" not in spec:
        yield from _data_set_rows(where, spec)
        return
    for path in expand_pairs(where, spec["path"]):
        yield from _objects(str(path), json_rows(path))


def _objects(file: str, values: Iterable[tuple[str, Any]]) -> Iterator[Row]:
    """The values of a JSON file as rows. Raises RecipeError for a value that is not an object."""
    for position, row in values:
        if not isinstance(row, dict):
            raise RecipeError(f"{file}: {position}: expected an object, found {type(row).__name__}")
        yield f"{file}: {position}", row


def expand_pairs(where: str, pattern: str) -> list[Path]:
    """The files that the `path` of an entry matches. Raises RecipeError when it matches none."""
    paths = sorted(glob_files(pattern))
    if not paths:
        raise RecipeError(f"{where}.path: {pattern!r} matches no file (relative paths start at {ROOT})")
    for path in paths:
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "a link to nothing" if path.is_symlink() else "no file"
            raise RecipeError(f"{where}.path: {pattern!r} matches {path}, {kind}. Name files of JSON only")
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

    A byte order mark is removed. Raises RecipeError that names the line with invalid JSON or the bad byte, or
    what else the file is: empty, a web page, compressed, Parquet.
    """
    content = path.read_bytes()
    if not content.removeprefix(codecs.BOM_UTF8).strip():
        raise RecipeError(f"{path}: an empty file: there is no row in it. Write rows into it or leave it out")
    return _parse(str(path), content)


def _parse(file: str, content: bytes) -> Iterator[tuple[str, Any]]:
    refuse_web_page(content, file)
    for form, begin in _OTHER_FORMS.items():
        if content.startswith(begin):
            raise RecipeError(
                f"{file}: a file of {form}, expected JSON. "
                "Unpack it, or name its folder as `dataset` instead: that reads .json.gz and .parquet, too"
            )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 at byte {error.start}. Save the file as UTF-8") from error
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
        raise RecipeError(f"{file}:{line}: not valid JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of levels
        raise RecipeError(f"{file}:{number}: JSON that cannot be read ({error})") from error


def _data_set_rows(where: str, spec: dict[str, Any]) -> Iterator[Row]:
    """The rows of a data set, file by file, because the types and names of columns may differ between files.

    JSON is parsed here: datasets takes the type of a column from the first rows of a file, and fails when
    they are null and later ones are texts.
    """
    for file in data_set_files(where, spec):
        with naming_data_set(where, spec, file.path):
            if file.form == "json":
                with fsspec.open(file.path, "rb", compression="infer") as handle:
                    content = handle.read()
                yield from _objects(file.path, _parse(file.path, content))
            else:
                for number, row in enumerate(file.rows(), 1):
                    yield f"{file.path}: row {number}", row
