"""Readers of text files and data sets: every document is read or reported as a fault.

=============================  ===========================================================================
form                           a document is
=============================  ===========================================================================
``.txt``                       the lines between empty lines (as in CC-100); white space counts as empty
``.jsonl`` ``.json``           a line: one JSON object with the text in a column
``.parquet``                   a row: the text in a column of any string type of Arrow
a folder of ``datasets``       a row, as `datasets.load_from_disk` opens it
a data set on the hub          a row, streamed file by file
=============================  ===========================================================================

The text forms may be compressed: ``.gz``, ``.bz2``, ``.xz``, ``.zst``, by their name (``ja.txt.xz``). Text is
UTF-8. A byte order mark, and carriage returns before line feeds, are removed. Control characters are kept;
cleaning drops such documents.

Faults: strict reading (the default) raises RecipeError at the first one, with file and line or row. Tolerant
reading turns it into a document whose `dropped` is one of `FAULTS` and whose text is its readable form, so
that it is counted; `cap_bad` then stops a source with too many of them. A compressed file that is cut short
or damaged always raises RecipeError: nobody knows how many documents are lost with its rest.

Memory is bounded: at most MAXIMUM_BYTES of one document are held.
"""

from __future__ import annotations

import bz2
import contextlib
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import zstandard

from recipe.corpus.archives import REMEDY
from recipe.corpus.data_sets import DECOMPRESSION_ERRORS, data_set_files, naming_data_set
from recipe.corpus.web_pages import refuse_web_page
from recipe.project import RecipeError

MAXIMUM_BYTES = 64 * 2**20  # of one document; a longer one is a fault ("too long")
FAULTS = frozenset(
    [
        "bad UTF-8",
        "bad JSON",
        "no text",
        "too long",
        "truncated archive",
        "damaged archive",
        "unusable archive",
        "damaged Parquet",
        "bad Shift_JIS",
        "empty file",
    ]
)
_CHUNK = 2**20  # bytes that are read or decompressed at once
_FEED = 2**10  # compressed bytes decompressed at once: at most 32 MB come out (zstd)
_ROWS = 256  # of a Parquet file or a data set, in memory at once
_BOM = b"\xef\xbb\xbf"
_WHITE = b" \t\r\f\v\n\xe3\x80"
_BLANK = rb"(?:[ \t\r\f\v]|\xe3\x80\x80)*\n"  # the rest of a line of white space; E3 80 80 is U+3000
_BLANK_LINES = re.compile(rb"(?:%b)+" % _BLANK)
_EMPTY_LINES = re.compile(rb"\n(?:%b)+" % _BLANK)
_KINDS = (".txt", ".jsonl", ".json")
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),  # 31: with gzip's header and checksum
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj(),
}
_SURROGATE = re.compile("[\ud800-\udfff]")


class Document(NamedTuple):
    """One document as it was read. ``dropped`` is the reason why it cannot be used, or "".

    ``name`` is unique in its source; only the parts of a document that is too long have the same name.
    """

    name: str
    text: str
    dropped: str = ""


class _Damage(Exception):
    """The rest of a compressed file cannot be read: one of `FAULTS`, and what the library says."""


def fault(name: str, reason: str, text: str, advice: str, tolerant: bool) -> Document:
    """The document for a fault, with its readable form as text. Strict: raises RecipeError instead."""
    if not tolerant:
        raise RecipeError(f"{name}: {reason}: {advice}")
    return Document(name, text, reason)


def cap_bad(documents: Iterable[Document], where: str, share: float) -> Iterator[Document]:
    """Pass documents on; stop when more than `share` of them (0.001 is 0.1 %) could not be read.

    Only `FAULTS` count, not what a source leaves out on purpose ("redirect", "empty"). The share is checked
    from document 1,000 on, and at the end.

    Raises RecipeError with the share, the reasons and the first faults.
    """
    total, reasons, first = 0, Counter[str](), []
    for document in documents:
        total += 1
        if document.dropped in FAULTS:
            reasons[document.dropped] += 1
            if len(first) < 5:
                first.append(f"{document.name} ({document.dropped})")
        if total == 1000 or (total > 1000 and document.dropped in FAULTS):
            _check_share(where, total, reasons, first, share)
        yield document
    _check_share(where, total, reasons, first, share)


def _check_share(where: str, total: int, reasons: Counter[str], first: list[str], share: float) -> None:
    bad = reasons.total()
    if bad > share * total:
        counts = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
        raise RecipeError(
            f"{where}: {bad:,} of {total:,} documents cannot be read ({bad / total:.2%}, maximum_bad_share "
            f"allows {share:.2%}): {counts}. The first: {'; '.join(first)}. Fix or leave out the files, or "
            "raise maximum_bad_share"
        )


# -------------------------------------------------------------------------------------------------- files


def read_file(path: Path, column: str = "text", tolerant: bool = False) -> Iterator[Document]:
    """Documents of one file, named ``path:line`` (from 1) or ``path:row`` (from 0), in the file's order.

    column: the name of the text in .jsonl and .parquet. An empty text is dropped as "empty", which is not a
    fault; a file without any document is one.
    Strict: raises RecipeError at the first fault. An unknown kind of file always raises it.
    """
    document = None
    for document in _documents(str(path), column, tolerant):
        yield document
    if document is None:
        yield fault(str(path), "empty file", "", "no document in it. Delete it or get it again", tolerant)


def _documents(path: str, column: str, tolerant: bool) -> Iterator[Document]:
    """As `read_file`, for a path or a URL that fsspec opens. A file without any document is no fault."""
    kind, compression = PurePath(path).suffix, ""
    if kind in _DECOMPRESSORS:
        kind, compression = PurePath(path).with_suffix("").suffix, kind
    if kind == ".parquet" and not compression:
        yield from _read_parquet(path, column, tolerant)
    elif kind in _KINDS:
        yield from _read_text(path, kind, compression, column, tolerant)
    else:
        raise RecipeError(
            f"{path}: unknown kind of file {kind + compression!r}; expected .txt, .jsonl or .json (plain or "
            f"with {', '.join(_DECOMPRESSORS)}) or .parquet"
        )


def _read_text(path: str, kind: str, compression: str, column: str, tolerant: bool) -> Iterator[Document]:
    separators = _empty_lines if kind == ".txt" else _line_ends
    for line, raw, reason, advice in _units(_merged(_decompress(path, compression)), separators):
        if b"\r" in raw:
            raw = raw.replace(b"\r\n", b"\n").removesuffix(b"\r")
        try:
            text = raw.decode("utf-8", errors="replace" if reason else "strict")
        except UnicodeDecodeError as error:
            line += raw.count(b"\n", 0, error.start)
            text, reason = raw.decode("utf-8", errors="replace"), "bad UTF-8"
            advice = (
                f"byte {raw[error.start]:#04x} ({error.reason}). Convert the file, for example with iconv"
            )
        if reason:
            # How much is lost with the rest of an archive is not known, so that no share can be tolerated.
            yield fault(f"{path}:{line}", reason, text, advice, tolerant and "archive" not in reason)
        elif kind == ".txt":
            yield Document(f"{path}:{line}", text)
        elif text and not text.isspace():
            yield _json_document(f"{path}:{line}", text, column, tolerant)


def _json_document(name: str, line: str, column: str, tolerant: bool) -> Document:
    """The document of one line of JSON."""
    expected = f"expected a JSON object with a text in {column!r}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return fault(name, "bad JSON", line, f"{error}; {expected}. Fix or delete it", tolerant)
    if not isinstance(row, dict):
        found = f"found a {type(row).__name__}"
    elif column not in row:
        found = f"it has {sorted(row)}"
    elif not isinstance(row[column], str):
        found = f"{column!r} is {type(row[column]).__name__}, expected a string"
    elif "\\u" in line and _SURROGATE.search(row[column]):
        advice = "half of a surrogate pair, which is not text. Fix or delete the line"
        return fault(name, "bad UTF-8", _SURROGATE.sub("\ufffd", row[column]), advice, tolerant)
    else:
        return Document(name, row[column], "" if row[column] else "empty")
    return fault(name, "no text", line, f"{found}; {expected}. Fix it or set `column`", tolerant)


_Separators = Callable[[bytes, int], Iterator[tuple[int, int]]]  # see `_units`


def _empty_lines(data: bytes, start: int) -> Iterator[tuple[int, int]]:
    return (match.span() for match in _EMPTY_LINES.finditer(data, start))


def _line_ends(data: bytes, start: int) -> Iterator[tuple[int, int]]:
    while (end := data.find(b"\n", start)) >= 0:
        start = end + 1
        yield end, start


def _units(chunks: Iterable[bytes], separators: _Separators) -> Iterator[tuple[int, bytes, str, str]]:
    """Split a stream at its separators: (number of the first line, bytes, fault, what to do about it).

    separators: gives begin and end of each separator in some bytes, from an offset on.

    A unit above MAXIMUM_BYTES comes in parts, each with the fault "too long". Where `chunks` raises _Damage,
    the incomplete rest is the last unit and has that fault. Other units have the fault "".
    """
    rest, line, in_long = b"", 1, False
    advice = f"more than {MAXIMUM_BYTES:,} bytes before the next empty line (.txt) or line (.jsonl)"
    too_long = ("too long", advice)
    last: tuple[str, ...] = ()
    try:
        for chunk in chunks:
            if line == 1 and len(rest) < len(_BOM):
                rest, chunk = b"", (rest + chunk).removeprefix(_BOM)
            data, start = rest + chunk, 0
            # A new separator ends in the new bytes; what was searched before is not searched again.
            search = len(rest.rstrip(_WHITE))
            if not in_long and (blanks := _BLANK_LINES.match(data)):
                start = blanks.end()
                line += data.count(b"\n", 0, start)
            for end, after in separators(data, max(search, start)):
                if in_long or end - start > MAXIMUM_BYTES:
                    yield line, data[start:end], *too_long
                elif end > start:
                    yield line, data[start:end], "", ""
                line += data.count(b"\n", start, after)
                start, in_long = after, False
            rest = data[start:]
            if len(rest) > MAXIMUM_BYTES:
                cut = len(rest.rstrip(_WHITE)) or len(rest)  # the white space may begin a separator
                yield line, rest[:cut], *too_long
                line += rest.count(b"\n", 0, cut)
                rest, in_long = rest[cut:], True
    except _Damage as damage:
        last = damage.args
    before, newline, after = rest.rpartition(b"\n")
    if newline and not after.strip():
        rest = before
    if last or rest.strip(_WHITE):
        yield line, rest, *(last or (too_long if in_long else ("", "")))


def _decompress(path: str, compression: str) -> Iterator[bytes]:
    """The bytes of a plain or compressed file in chunks. Raises _Damage after the last one available.

    All streams of the file are read, and only zeros are skipped between them. (`bz2.open` and `lzma.open`
    ignore unknown bytes there, and zstandard's reader ignores a truncated end.)
    """
    with _open(path) as handle:
        data = handle.read(_FEED if compression else _CHUNK)
        refuse_web_page(data, path)
        if not compression:
            while data:
                yield data
                data = handle.read(_CHUNK)
            return
        decoder, started = None, False
        while data:
            while data:
                if decoder is None:
                    data = data.lstrip(b"\0") if started else data
                    if not data:
                        break
                    decoder, started = _DECOMPRESSORS[compression](), True
                try:
                    yield from _decoded(decoder, data)
                except DECOMPRESSION_ERRORS as error:
                    raise _Damage("damaged archive", f"{error}. {REMEDY}") from error
                data = decoder.unused_data if decoder.eof else b""
                if decoder.eof:
                    decoder = None
            data = handle.read(_FEED)
    if decoder is not None or not started:
        raise _Damage("truncated archive", f"it ends too early. {REMEDY}")


def _open(path: str) -> Any:
    """A local file, or a URL, to read bytes from."""
    if "://" not in path:
        return open(path, "rb")
    import fsspec

    return fsspec.open(path, "rb")


def _merged(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in chunks of at least _CHUNK, except the last."""
    held: list[bytes] = []
    size = 0
    try:
        for chunk in chunks:
            held.append(chunk)
            size += len(chunk)
            if size >= _CHUNK:
                yield b"".join(held)
                held, size = [], 0
    except _Damage:
        yield b"".join(held)
        raise
    yield b"".join(held)


def _decoded(decoder: Any, data: bytes) -> Iterator[bytes]:
    """Decompress some bytes. The decompressors of bz2 and lzma can give the result in parts."""
    if not hasattr(decoder, "needs_input"):
        yield decoder.decompress(data)
        return
    yield decoder.decompress(data, _CHUNK)
    while not (decoder.needs_input or decoder.eof):
        yield decoder.decompress(b"", _CHUNK)


def _read_parquet(path: str, column: str, tolerant: bool) -> Iterator[Document]:
    """A document for each row. If the column is missing or not of strings, every row is a fault.

    A stream that breaks is never tolerated: the rows after it are not damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    row, is_local = 0, "://" not in path
    try:
        with _open(path) as handle:
            refuse_web_page(handle.read(_FEED), path)
        with _open(path) as handle, pq.ParquetFile(handle, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            if column not in names:
                for row in range(file.metadata.num_rows):
                    yield _no_column(f"{path}:{row}", column, names, tolerant)
                return
            for group in range(file.num_row_groups):
                end = row + file.metadata.row_group(group).num_rows
                try:
                    for batch in file.iter_batches(_ROWS, [group], [column]):
                        yield from _column_documents(path, row, column, batch.column(0), tolerant)
                        row += len(batch)
                except (pa.ArrowException, OSError) as error:
                    advice = f"{error}. {REMEDY}"
                    for lost in range(row, end):
                        yield fault(f"{path}:{lost}", "damaged Parquet", "", advice, tolerant and is_local)
                row = end
    except (pa.ArrowException, OSError) as error:
        advice = f"{error}. {REMEDY}"
        yield fault(f"{path}:{row}", "damaged Parquet", "", advice, tolerant and is_local)


def _no_column(name: str, column: str, names: list[str], tolerant: bool) -> Document:
    return fault(name, "no text", "", f"no column {column!r}; it has {names}. Set `column`", tolerant)


def _column_documents(path: str, first: int, column: str, values: Any, tolerant: bool) -> Iterator[Document]:
    """A document for each value of an Arrow array or chunked array, which begins at row `first`."""
    import pyarrow as pa

    kind = values.type
    if coded := pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if is_text:  # Arrow does not check that strings are UTF-8
        if coded:  # Arrow cannot decode a dictionary of string_view
            values = values.cast(pa.dictionary(values.type.index_type, pa.large_binary()))
        values = values.cast(pa.large_binary())
    for row, value in enumerate(values.to_pylist(), first):
        name = f"{path}:{row}"
        if value is None or not is_text:
            readable, seen = ("", "null") if value is None else (str(value), f"of type {kind}")
            advice = f"{column!r} is {seen}, expected a string. Remove the row or set `column`"
            yield fault(name, "no text", readable, advice, tolerant)
        elif len(value) > MAXIMUM_BYTES:
            advice = f"{len(value):,} bytes, at most {MAXIMUM_BYTES:,} are read"
            yield fault(name, "too long", value.decode("utf-8", "replace"), advice, tolerant)
        else:
            try:
                yield Document(name, value.decode("utf-8"), "" if value else "empty")
            except UnicodeDecodeError as error:
                advice = f"byte {error.start} of the value ({error.reason}). Fix or remove the row"
                yield fault(name, "bad UTF-8", value.decode("utf-8", "replace"), advice, tolerant)


# --------------------------------------------------------------------------------------------- data sets


def read_folder(path: Path, column: str = "text", tolerant: bool = False) -> Iterator[Document]:
    """Documents of a folder that `save_to_disk` of ``datasets`` wrote, named ``path:row``; memory-mapped.

    The splits of a folder are read in its own order, and their rows are named ``path/split:row``.
    Raises RecipeError for a folder that cannot be opened or lacks the column.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{path}: not a folder that `datasets` can load from disk: {error}") from error
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {"": loaded}
    for split, rows in splits.items():
        yield from _rows(str(path / split), rows, column, tolerant)


def read_hub(name: str, spec: dict[str, Any]) -> Iterator[Document]:
    """Documents of a data set on the Hugging Face hub, or in a local copy of one, streamed file by file.

    spec: the keys of `recipe.corpus.data_sets.data_set_files`, and optionally ``column`` (text) and
    ``maximum_bad_share`` (above 0: tolerant). A document is named as by `read_file`.
    Raises RecipeError for a data set that cannot be read or a file that lacks the column.
    """
    where, column = f"sources.{name}", spec.get("column", "text")
    tolerant = spec.get("maximum_bad_share", 0.0) > 0
    for file in data_set_files(where, spec):
        with naming_data_set(where, spec, file.path):
            if file.form and not _is_json_list(file.path):
                yield from _documents(file.path, column, tolerant)
            else:
                yield from _rows(file.path, file.rows(), column, tolerant)


def _is_json_list(path: str) -> bool:
    """Whether a file named .json is one JSON list, which `datasets` reads as a whole."""
    if not re.search(r"\.json(\.\w+)?$", path):
        return False
    compression = path.rpartition(".json")[2]
    # The rest is not decompressed. Damage is named when the file is read.
    with contextlib.suppress(_Damage):
        first = next((chunk for chunk in _decompress(path, compression) if chunk.strip()), b"")
        return first.removeprefix(_BOM).lstrip().startswith(b"[")
    return False


def _rows(where: str, rows: Any, column: str, tolerant: bool) -> Iterator[Document]:
    """The documents of a `datasets.Dataset` or `IterableDataset`."""
    row = 0
    for table in rows.with_format("arrow").iter(_ROWS):
        if column not in table.column_names:
            raise RecipeError(f"{where}: no column {column!r}; it has {table.column_names}. Set `column`")
        yield from _column_documents(where, row, column, table.column(column), tolerant)
        row += len(table)
