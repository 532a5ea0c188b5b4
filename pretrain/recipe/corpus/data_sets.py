"""The files of a data set on the Hugging Face hub, or in a local folder, so that each is read on its own.

datasets takes the names and types of the columns from the first file, or from the card, and refuses a file
with other columns, or with text where the first rows of the first file have null.
"""

from __future__ import annotations

import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from recipe.corpus.source_files import is_hidden, local_data_set
from recipe.project import RecipeError

# Certainly data; .json and .txt may be notes.
_DATA = re.compile(r"\.(jsonl|csv|parquet)(\.(gz|bz2|xz|zst))?$")
# What libraries raise for a compressed file that is damaged; some raise EOFError where it ends too early.
DECOMPRESSION_ERRORS = (OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
_JSON = re.compile(r"\.jsonl?(\.(gz|bz2|xz|zst))?$")


class DataFile(NamedTuple):
    """A file of a data set.

    path: of a local file, or a URL that fsspec opens. form: "json" (a list, or JSON Lines), "parquet", or ""
    for a form that only `datasets` reads. rows: opens the file by `datasets`, as an IterableDataset.
    """

    path: str
    form: str
    rows: Callable[[], Any]


def data_set_files(where: str, spec: dict[str, Any]) -> Iterator[DataFile]:
    """The files of one split of a data set, in the order of `datasets`.

    where: names the entry in messages. spec: ``dataset``, and optionally ``configuration``, ``split`` (train)
    and ``revision``. A local folder without a card (README.md) is a plain copy of data files: there a
    configuration is a subfolder (wikimedia/wikipedia has one for each dump).
    Raises RecipeError for a data set or a split that cannot be found, and for a file that no split has.
    """
    import datasets

    split, configuration = spec.get("split", "train"), spec.get("configuration")
    folder = local_data_set(spec)
    bare = folder is not None and not (folder / "README.md").exists()
    with naming_data_set(where, spec):
        builder = datasets.load_dataset_builder(
            str(folder or spec["dataset"]),
            name=None if bare else configuration,
            data_dir=configuration if bare else None,
            revision=spec.get("revision"),
        )
        files = builder.config.data_files or {}
        if split not in files:
            raise ValueError(f"it has no split {split!r}, only {', '.join(map(str, files))}")
    if bare:
        _refuse_unread(
            where, folder / (configuration or ""), [file for part in files.values() for file in part]
        )
    declared = builder.info.features

    def rows(file: str) -> Any:
        builder.config.data_files, builder.info.features = {split: [file]}, None
        found = builder.as_streaming_dataset(split)
        if declared is not None and set(next(iter(found), ())) == set(declared):
            builder.info.features = declared  # the card's types: digits in a .csv can be text
            found = builder.as_streaming_dataset(split)
        return found

    for file in files[split]:
        form = "json" if builder.name == "json" and _JSON.search(file) else ""
        if file.endswith(".parquet"):
            form = "parquet"
        yield DataFile(file, form, lambda file=file: rows(file))


def _refuse_unread(where: str, folder: Path, files: list[str]) -> None:
    """Raise RecipeError when a folder has data that no split has: `datasets` leaves them out silently."""
    known = set(map(os.path.realpath, files))
    for path in sorted(folder.rglob("*")):
        if _DATA.search(path.name) and not is_hidden(path, folder) and os.path.realpath(path) not in known:
            raise RecipeError(
                f"{where}: {path} would not be read: the files of a folder have one form, and names like "
                "train.jsonl and test.jsonl choose the split. Convert or rename it, or move it out of the "
                "folder"
            )


@contextmanager
def naming_data_set(where: str, spec: dict[str, Any], file: str = "") -> Iterator[None]:
    """Every error names the entry, `where`. Those of `datasets` also name the data set or the file, with what
    to do.
    """
    import pyarrow as pa

    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
    except (OSError, ValueError, TypeError, pa.ArrowException, EOFError, *DECOMPRESSION_ERRORS) as error:
        raise unreadable(where, spec["dataset"], error, file) from error


def unreadable(where: str, name: str, error: Exception, file: str = "") -> RecipeError:
    """The error for a data set that `datasets` cannot read, with what to do. where: its entry."""
    said, advice = str(error).removesuffix("."), ""
    if "is a gated dataset" in said:
        advice = ". Accept its terms on that page, then `hf auth login` (or set HF_TOKEN)"
    elif "doesn't exist on the Hub" in said:
        advice = (
            f". Look for {name!r} on huggingface.co: it may have another name now. A private one needs "
            "`hf auth login`"
        )
    elif "Couldn't reach" in said:
        advice = (
            f". Check the network. Without one, fetch it elsewhere (`hf download --repo-type dataset {name} "
            "--local-dir FOLDER`) and write the folder's path as `dataset`"
        )
    return RecipeError(f"{where}: cannot read the data set {file or name}: {said}{advice}")
