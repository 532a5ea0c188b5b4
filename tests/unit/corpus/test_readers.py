"""Readers: every fault is an error with file and line (strict) or a counted document (tolerant)."""

import bz2
import gzip
import json
import lzma
import os
import struct
import tracemalloc

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from recipe import project
from recipe.corpus import readers
from recipe.corpus.data_sets import DataFile
from recipe.corpus.readers import Document, cap_bad, read_file, read_folder, read_hub
from recipe.corpus.source_files import expand_paths, own_files
from recipe.project import RecipeError

PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
ARCHIVES = [compression for compression in PACK if compression]
LINES = [f"{number}行目の文です。" * 3 for number in range(20_000)]  # several blocks of every compressor
BODIES = {
    ".txt": "\n\n".join(LINES).encode(),
    ".jsonl": "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in LINES).encode(),
}


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def texts(documents):
    return [document.text for document in documents if not document.dropped]


def faults(documents):
    """The names (without the folder) and reasons of dropped documents; `cap_bad` must know each reason."""
    documents = [d for d in documents if d.dropped]
    assert {d.dropped for d in documents} <= readers.FAULTS
    return [(d.name.rpartition("/")[2], d.dropped) for d in documents if d.dropped]


def write_parquet(path, values, column="text", kind=None):
    pq.write_table(pa.table({column: pa.array(values, kind), "other": [0] * len(values)}), path)
    return path


# ------------------------------------------------------------------------------------------- good files


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("kind", BODIES)
def test_every_form_gives_its_documents_in_order(tmp_path, kind, compression):
    path = write(tmp_path, f"ja{kind}{compression}", PACK[compression](BODIES[kind]))
    documents = list(read_file(path))
    assert texts(documents) == LINES
    step = 2 if kind == ".txt" else 1
    assert documents[-1].name == f"{path}:{19_999 * step + 1}"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbfa\nb\n\n\nc", [("1", "a\nb"), ("5", "c")]),  # byte order mark, no final newline
        (b"\xef\xbb\xbf\n\na\n", [("3", "a")]),
        (b"a\r\nb\r\n\r\nc\r\n", [("1", "a\nb"), ("4", "c")]),
        (b"a \n \t\n\xe3\x80\x80\nb", [("1", "a "), ("4", "b")]),  # lines of white space are empty
        (b"\n \n a\n\n\n", [("3", " a")]),
        (b"a\x00b\n", [("1", "a\x00b")]),  # NUL is left to cleaning
        (b"a\rb", [("1", "a\rb")]),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 3, 2**20])
def test_text_documents_and_their_lines(tmp_path, monkeypatch, content, expected, chunk):
    monkeypatch.setattr(readers, "_CHUNK", chunk)  # separators and marks fall across chunks
    path = write(tmp_path, "a.txt", content)
    assert [(d.name.rpartition(":")[2], d.text) for d in read_file(path)] == expected


def test_json_lines_with_marks_blanks_and_nul(tmp_path):
    content = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n \n{"text": ""}\n{"text": "b\\u0000\\ud842\\udfb7", "x": 1}'
    documents = list(read_file(write(tmp_path, "a.json", content)))
    assert [(d.name[-2:], d.text, d.dropped) for d in documents] == [
        (":1", "a", ""),
        (":4", "", "empty"),
        (":5", "b\x00𠮷", ""),
    ]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),  # what polars writes
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int32(), pa.large_string()),
    ],
)
def test_parquet_rows(tmp_path, kind):
    values = [*LINES[:1000], "", "a\x00b"]
    path = write_parquet(tmp_path / "a.parquet", values, kind=kind)
    documents = list(read_file(path))
    assert [d.text for d in documents] == values
    assert [d.dropped for d in documents] == [""] * 1000 + ["empty", ""]
    assert documents[-1].name == f"{path}:1001"


@pytest.mark.parametrize("compression", ARCHIVES)
def test_archive_of_several_streams_is_read_to_its_end(tmp_path, compression):
    content = PACK[compression](b"a\n\nb") + PACK[compression](b"c\n")
    if compression in (".gz", ".xz"):
        content += b"\0" * 8  # padding
    if compression == ".zst":
        content += struct.pack("<II", 0x184D2A50, 5) + b"index"  # a frame to be skipped
    assert texts(read_file(write(tmp_path, f"a.txt{compression}", content))) == ["a", "bc"]


# --------------------------------------------------------------------------------------------- one fault

# name, content, place and reason of the fault, its readable form, words of the strict error
FAULTS_IN_TEXT = [
    ("a.txt", b"\xff\n", "a.txt:1", "bad UTF-8", "\ufffd", "0xff"),
    ("a.txt", b"b\n\xe3\x81\n", "a.txt:2", "bad UTF-8", "b\n\ufffd", "unexpected end"),
    ("a.txt", "一".encode("utf-16"), "a.txt:1", "bad UTF-8", "\ufffd\ufffd\x00N", "iconv"),
    ("a.txt", b"", "a.txt", "empty file", "", "no document in it"),
    ("a.txt", b"\n \n\xe3\x80\x80\n", "a.txt", "empty file", "", "no document in it"),
    ("a.txt.gz", gzip.compress(b"", mtime=0), "a.txt.gz", "empty file", "", "no document in it"),
    ("a.jsonl", b"", "a.jsonl", "empty file", "", "no document in it"),
    ("a.jsonl", b'{"text": \n', "a.jsonl:1", "bad JSON", '{"text": ', "line 1 column"),
    ("a.jsonl", b"[" * 100_000, "a.jsonl:1", "bad JSON", "[" * 100_000, "recursion"),
    ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl:1", "bad UTF-8", '{"text": "\ufffd"}', "0xff"),
    ("a.jsonl", b'{"text": "\\ud842"}\n', "a.jsonl:1", "bad UTF-8", "\ufffd", "surrogate"),
    ("a.jsonl", b'{"text": "a\x00"}\n', "a.jsonl:1", "bad JSON", '{"text": "a\x00"}', "control character"),
    ("a.jsonl", b'{"body": "a"}\n', "a.jsonl:1", "no text", '{"body": "a"}', r"it has \['body'\]"),
    (
        "a.jsonl",
        b'{"text": 5}\n',
        "a.jsonl:1",
        "no text",
        '{"text": 5}',
        "'text' is int, expected a string",
    ),
    ("a.jsonl", b'{"text": null}\n', "a.jsonl:1", "no text", '{"text": null}', "'text' is NoneType"),
    ("a.json", b'[{"text": "a"}]', "a.json:1", "no text", '[{"text": "a"}]', "found a list"),
]


@pytest.mark.parametrize(("name", "content", "place", "reason", "readable", "words"), FAULTS_IN_TEXT)
def test_fault_in_a_text_file(tmp_path, name, content, place, reason, readable, words):
    path = write(tmp_path, name, content)
    with pytest.raises(RecipeError, match=f"{place}: {reason}: .*{words}"):
        list(read_file(path))
    (document,) = read_file(path, tolerant=True)
    assert document == Document(str(tmp_path / place), readable, reason)


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize(
    ("kind", "bad", "place", "reason"),
    [
        (".txt", b"\n\nx\nbad \xff\n\n", "3", "bad UTF-8"),
        (".jsonl", b'\n{"text": \n', "2", "bad JSON"),
        (".jsonl", b'\n{"body": "x"}\n', "2", "no text"),
        (".jsonl", b'\n{"text": ["x"]}\n', "2", "no text"),
        (".jsonl", b'\n{"text": "\xe3\x81"}\n', "2", "bad UTF-8"),
    ],
)
def test_fault_does_not_affect_the_next_documents(tmp_path, kind, bad, place, reason, compression):
    body = BODIES[kind].rstrip()
    name = f"a{kind}{compression}"
    path = write(tmp_path, name, PACK[compression](body + bad + body))
    line = int(place) + body.count(b"\n") + (1 if kind == ".txt" else 0)
    documents = list(read_file(path, tolerant=True))
    assert faults(documents) == [(f"{name}:{line}", reason)]
    assert texts(documents) == LINES * 2
    with pytest.raises(RecipeError, match=f"{name}:{line}: {reason}"):
        list(read_file(path))


def read_until_error(path):
    """The documents before the error that ends tolerant and strict reading, and its message."""
    documents = []
    with pytest.raises(RecipeError):
        list(read_file(path))
    with pytest.raises(RecipeError) as caught:
        for document in read_file(path, tolerant=True):
            documents.append(document)
    return documents, str(caught.value)


@pytest.mark.parametrize("compression", ARCHIVES)
@pytest.mark.parametrize("kind", BODIES)
def test_truncated_archive_gives_its_complete_documents(tmp_path, kind, compression):
    packed = PACK[compression](BODIES[kind])
    if compression == ".bz2":  # its blocks are the least that can be had
        packed = b"".join(bz2.compress(part) for part in (BODIES[kind][:100_000], BODIES[kind][100_000:]))
    path = write(tmp_path, f"a{kind}{compression}", packed[: len(packed) * 7 // 8])
    whole, error = read_until_error(path)
    assert texts(whole) == LINES[: len(whole)] and len(whole) > 1000
    line = len(whole) * (2 if kind == ".txt" else 1) + 1
    assert f"a{kind}{compression}:{line}: truncated archive" in error


@pytest.mark.parametrize("compression", ARCHIVES)
@pytest.mark.parametrize("length", [0, 1, 5])
def test_archive_cut_within_its_first_bytes(tmp_path, compression, length):
    path = write(tmp_path, f"a.txt{compression}", PACK[compression](b"a")[:length])
    documents, error = read_until_error(path)
    assert not documents and f"a.txt{compression}:1: truncated archive" in error


@pytest.mark.parametrize("compression", ARCHIVES)
def test_missing_last_byte_of_an_archive_is_a_fault(tmp_path, compression):
    path = write(tmp_path, f"a.txt{compression}", PACK[compression](b"a\n\nb")[:-1])
    assert "truncated archive" in read_until_error(path)[1]


@pytest.mark.parametrize("compression", ARCHIVES)
def test_bytes_after_an_archive_are_a_fault(tmp_path, compression):
    path = write(tmp_path, f"a.txt{compression}", PACK[compression](b"a\n\nb\n\n") + b"something else" * 9)
    documents, error = read_until_error(path)
    assert texts(documents) == ["a", "b"]
    assert (
        f"a.txt{compression}:5: damaged archive" in error
        and "run stage 01 with --force; if the file is your own" in error
    )


@pytest.mark.parametrize("compression", ARCHIVES)
def test_flipped_bit_in_an_archive_is_found(tmp_path, compression):
    packed = bytearray(
        zstandard.ZstdCompressor(write_checksum=True).compress(BODIES[".txt"])
        if compression == ".zst"
        else PACK[compression](BODIES[".txt"])
    )
    packed[len(packed) * 3 // 4] ^= 1
    path = write(tmp_path, f"a.txt{compression}", packed)
    assert "damaged archive" in read_until_error(path)[1]


# ---------------------------------------------------------------------------------------------- too long


@pytest.mark.parametrize("compression", ["", ".xz"])
@pytest.mark.parametrize("chunk", [7, 2**20])
@pytest.mark.parametrize(
    ("kind", "good", "end"), [(".txt", b"good", b"\n\n"), (".jsonl", b'{"text": "good"}', b"\n")]
)
def test_too_long_document(tmp_path, monkeypatch, kind, good, end, chunk, compression):
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    monkeypatch.setattr(readers, "MAXIMUM_BYTES", 1000)
    body = good + end + b"x" * 4321 + end + good + end
    path = write(tmp_path, f"a{kind}{compression}", PACK[compression](body))
    documents = list(read_file(path, tolerant=True))
    assert texts(documents) == ["good", "good"]
    long = [document for document in documents if document.dropped]
    line = 1 + end.count(b"\n")
    assert {(d.name, d.dropped) for d in long} == {(f"{path}:{line}", "too long")}
    assert "".join(d.text for d in long) == "x" * 4321
    assert documents[-1].name == f"{path}:{2 * line - 1}"
    with pytest.raises(RecipeError, match=rf":{line}: too long: more than 1,000 bytes"):
        list(read_file(path))


def test_too_long_document_at_the_end_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAXIMUM_BYTES", 1000)
    (document,) = read_file(write(tmp_path, "a.txt", b"x" * 1001), tolerant=True)
    assert (document.text, document.dropped) == ("x" * 1001, "too long")
    assert texts(read_file(write(tmp_path, "a.txt", b"x" * 1000))) == ["x" * 1000]


def test_line_of_ten_megabytes_is_read(tmp_path):
    text = "長" * 3_500_000
    path = write(tmp_path, "a.jsonl.zst", zstandard.compress(json.dumps({"text": text}).encode()))
    assert texts(read_file(path)) == [text]


@pytest.mark.parametrize("compression", PACK)
def test_memory_is_bounded(tmp_path, monkeypatch, compression):
    """A line of 200 MB, which compresses to next to nothing, with a limit of 4 MB."""
    monkeypatch.setattr(readers, "MAXIMUM_BYTES", 2**22)
    path = write(tmp_path, f"a.txt{compression}", PACK[compression](b"x" * 200_000_000))
    tracemalloc.start()
    size = sum(len(document.text) for document in read_file(path, tolerant=True))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size == 200_000_000
    assert peak < 110_000_000


# ----------------------------------------------------------------------------------------------- Parquet


@pytest.mark.parametrize(
    ("values", "kind", "place", "reason", "readable", "words"),
    [
        (["a", None, "b"], pa.string(), 1, "no text", "", "null"),
        ([1, 2], pa.int64(), 0, "no text", "1", "'text' is of type int64, expected a string"),
        ([["a"]], pa.list_(pa.string()), 0, "no text", "['a']", "'text' is of type list"),
        ([b"a"], pa.binary(), 0, "no text", "b'a'", "'text' is of type binary"),
        ([b"a"], pa.binary_view(), 0, "no text", "b'a'", "'text' is of type binary_view"),
    ],
)
def test_fault_in_a_parquet_row(tmp_path, values, kind, place, reason, readable, words):
    path = write_parquet(tmp_path / "a.parquet", values, kind=kind)
    with pytest.raises(RecipeError, match=rf"a\.parquet:{place}: {reason}: .*{words}"):
        list(read_file(path))
    documents = list(read_file(path, tolerant=True))
    assert len(documents) == len(values)
    assert documents[place] == Document(f"{path}:{place}", readable, reason)


@pytest.mark.parametrize("kind", [pa.string(), pa.string_view()])
def test_parquet_string_that_is_not_utf8(tmp_path, kind):
    # Arrow writes it unseen.
    broken = pa.array([b"a", b"\xff"], pa.binary()).view(pa.string()).cast(kind)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": broken}), path)
    assert faults(read_file(path, tolerant=True)) == [("a.parquet:1", "bad UTF-8")]
    with pytest.raises(RecipeError, match=r"a\.parquet:1: bad UTF-8"):
        list(read_file(path))


def test_parquet_text_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAXIMUM_BYTES", 10)
    path = write_parquet(tmp_path / "a.parquet", ["x" * 10, "x" * 11])
    assert faults(read_file(path, tolerant=True)) == [("a.parquet:1", "too long")]
    with pytest.raises(RecipeError, match=r"a\.parquet:1: too long: 11 bytes"):
        list(read_file(path))


def test_parquet_without_the_column_is_a_fault_per_row(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["a"] * 3, column="body")
    assert faults(read_file(path, tolerant=True)) == [(f"a.parquet:{row}", "no text") for row in range(3)]
    with pytest.raises(RecipeError, match=r"a\.parquet:0: .*no column 'text'; it has \['body', 'other'\]"):
        list(read_file(path))


@pytest.mark.parametrize("length", [0, 3, 100, -4, -100])
def test_truncated_parquet(tmp_path, length):
    path = write_parquet(tmp_path / "a.parquet", LINES)
    path.write_bytes(path.read_bytes()[:length])
    assert list(read_file(path, tolerant=True)) == [Document(f"{path}:0", "", "damaged Parquet")]
    with pytest.raises(RecipeError, match=r"a\.parquet:0: damaged Parquet"):
        list(read_file(path))


def test_damaged_page_of_a_parquet_file(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": LINES}), path, row_group_size=5000, use_dictionary=False)
    content = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    content[start : start + 50] = bytes(50)
    path.write_bytes(content)
    documents = list(read_file(path, tolerant=True))
    assert texts(documents) == LINES[:10_000] + LINES[15_000:]
    assert faults(documents) == [(f"a.parquet:{row}", "damaged Parquet") for row in range(10_000, 15_000)]
    with pytest.raises(RecipeError, match=r"a\.parquet:10000: damaged Parquet"):
        list(read_file(path))


def test_parquet_without_rows(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [], kind=pa.string())
    assert faults(read_file(path, tolerant=True)) == [("a.parquet", "empty file")]
    with pytest.raises(RecipeError, match="empty file"):
        list(read_file(path))


@pytest.mark.parametrize("name", ["a.doc", "a", "a.gz", "a.parquet.gz", "a.txt.zip"])
@pytest.mark.parametrize("tolerant", [False, True])
def test_unknown_kind_is_always_refused(tmp_path, name, tolerant):
    with pytest.raises(RecipeError, match=r"unknown kind of file .*expected \.txt"):
        list(read_file(write(tmp_path, name, b"x"), tolerant=tolerant))


# ----------------------------------------------------------------------------------------------- the cap


def documents(total, bad, reason="bad JSON"):
    """`total` documents, those with the numbers in `bad` dropped."""
    return [Document(str(number), "x", reason if number in bad else "") for number in range(total)]


def test_allowed_share_of_faults_passes():
    within = documents(3000, {0, 1999, 2999})
    assert list(cap_bad(within, "mine", 0.001)) == within
    assert list(cap_bad(documents(0, set()), "mine", 0.0)) == []
    # What a source leaves out on purpose is no fault.
    redirects = documents(2000, range(500), "redirect") + documents(9, range(9), "empty")
    assert list(cap_bad(redirects, "mine", 0.0)) == redirects


@pytest.mark.parametrize(
    ("total", "bad", "seen"),
    [
        (100, {99}, 100),  # at the end, however few there are
        (5000, set(range(8)), 999),  # as soon as 1,000 were read
        (5000, {0, 2000, 2001}, 2001),  # at the fault that is one too many
    ],
)
def test_too_many_faults_stop(total, bad, seen):
    passed = []
    with pytest.raises(RecipeError, match=r"^mine: \d of [\d,]+ documents cannot be read"):
        passed.extend(cap_bad(documents(total, bad), "mine", 0.001))
    counted = []
    with pytest.raises(RecipeError):
        for document in cap_bad(documents(total, bad), "mine", 0.001):
            counted.append(document)
    assert len(counted) == seen


def test_too_many_faults_are_listed():
    bad = [Document(f"a.txt:{number}", "x", "bad UTF-8") for number in range(7)]
    with pytest.raises(RecipeError) as error:
        list(cap_bad([*bad, Document("b.jsonl:1", "{", "bad JSON"), Document("c", "c")], "mine", 0.5))
    assert "8 of 9 documents cannot be read (88.89%, maximum_bad_share allows 50.00%)" in str(error.value)
    assert "bad UTF-8 7, bad JSON 1" in str(error.value)
    assert "a.txt:0 (bad UTF-8)" in str(error.value) and "a.txt:5" not in str(error.value)


# --------------------------------------------------------------------------------------------- data sets


def test_folder_of_datasets_with_and_without_splits(tmp_path):
    def rows(*values):
        return datasets.Dataset.from_dict({"body": list(values), "other": [0] * len(values)})

    rows("一", "", "三").save_to_disk(tmp_path / "plain")
    plain = list(read_folder(tmp_path / "plain", "body"))
    assert [(d.name[-7:], d.text, d.dropped) for d in plain] == [
        ("plain:0", "一", ""),
        ("plain:1", "", "empty"),
        ("plain:2", "三", ""),
    ]
    splits = datasets.DatasetDict(train=rows(*LINES[:600]), test=rows("終"))
    splits.save_to_disk(tmp_path / "splits", num_shards={"train": 2, "test": 1})
    documents = list(read_folder(tmp_path / "splits", "body"))
    assert texts(documents) == [*LINES[:600], "終"]
    assert documents[599].name.endswith("splits/train:599")
    assert documents[600].name.endswith("splits/test:0")


def test_folder_with_a_fault(tmp_path):
    datasets.Dataset.from_dict({"text": ["a", None]}).save_to_disk(tmp_path / "set")
    with pytest.raises(RecipeError, match=r"set:1: no text: 'text' is null"):
        list(read_folder(tmp_path / "set"))
    assert faults(read_folder(tmp_path / "set", tolerant=True)) == [("set:1", "no text")]
    with pytest.raises(RecipeError, match=r"set: no column 'body'; it has \['text'\]"):
        list(read_folder(tmp_path / "set", "body"))


@pytest.mark.parametrize("damage", ["missing", "no data", "not JSON", "cut"])
def test_folder_that_cannot_be_loaded(tmp_path, damage):
    folder = tmp_path / "set"
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(folder)
    (data,) = folder.glob("*.arrow")
    if damage == "missing":
        folder = tmp_path / "nothing"
    elif damage == "no data":
        data.unlink()
    elif damage == "cut":
        data.write_bytes(data.read_bytes()[:20])
    else:
        (folder / "state.json").write_text("{")
    with pytest.raises(RecipeError, match=f"{folder}: not a folder that `datasets` can load"):
        list(read_folder(folder))


def make_wikipedia(folder, card):
    """The layout of wikimedia/wikipedia: a folder of Parquet shards for each configuration."""
    for language in ("en", "ja"):
        part = folder / f"20231101.{language}"
        part.mkdir(parents=True)
        for shard in range(2):
            rows = [
                {"id": f"{row}", "url": "u", "title": f"t{row}", "text": f"{language} {shard} {row}"}
                for row in range(300)
            ]
            pq.write_table(pa.Table.from_pylist(rows), part / f"train-0000{shard}-of-00002.parquet")
    if card:
        entries = "".join(
            f"- config_name: 20231101.{language}\n  data_files:\n  - split: train\n"
            f"    path: 20231101.{language}/train-*\n"
            for language in ("en", "ja")
        )
        (folder / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    return str(folder)


@pytest.mark.parametrize("card", [False, True])
def test_hub_configuration_in_a_local_folder(tmp_path, card):
    source = make_wikipedia(tmp_path / "wikipedia", card)
    spec = {"dataset": source, "configuration": "20231101.ja"}
    read = list(read_hub("wiki", spec))
    assert texts(read) == [f"ja {shard} {row}" for shard in range(2) for row in range(300)]
    files = [f"{source}/20231101.ja/train-0000{shard}-of-00002.parquet" for shard in range(2)]
    assert [d.name for d in read] == [f"{file}:{row}" for file in files for row in range(300)]
    with pytest.raises(RecipeError, match=r"no column 'body'; it has \['id', 'url', 'title', 'text'\]"):
        list(read_hub("wiki", spec | {"column": "body"}))
    with pytest.raises(RecipeError, match=r"sources\.wiki: cannot read the data set .*wikipedia"):
        list(read_hub("wiki", spec | {"configuration": "20231101.xx"}))


def test_hub_fault_is_strict_unless_a_share_is_allowed(tmp_path):
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set/train.parquet", ["a", None])
    spec = {"dataset": str(tmp_path / "set")}
    with pytest.raises(RecipeError, match=r"set/train\.parquet:1: no text: 'text' is null"):
        list(read_hub("h", spec))
    assert list(read_hub("h", spec | {"maximum_bad_share": 0.5})) == [
        Document(f"{tmp_path}/set/train.parquet:0", "a"),
        Document(f"{tmp_path}/set/train.parquet:1", "", "no text"),
    ]


def test_hub_data_set_of_string_views_is_read(tmp_path):
    (tmp_path / "set").mkdir()
    write_parquet(tmp_path / "set/train.parquet", LINES[:3], kind=pa.string_view())
    assert texts(read_hub("h", {"dataset": str(tmp_path / "set")})) == LINES[:3]


def write_list(path, rows):
    path.write_text(json.dumps(rows), "utf-8")


def write_lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")


def write_gzip(path, rows):
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))


def write_csv(path, rows):
    path.write_text("\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]))


def write_rows(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("card", [False, True])
@pytest.mark.parametrize(
    ("ending", "write"),
    [
        ("json", write_list),
        ("jsonl", write_lines),
        ("json.gz", write_gzip),
        ("parquet", write_rows),
        ("csv", write_csv),
    ],
)
def test_files_of_a_data_set_with_other_columns_and_types(tmp_path, ending, write, card):
    """datasets refuses them: null and then text, a number and then text, another column, another order."""
    none = "" if ending == "csv" else None
    write(tmp_path / f"a.{ending}", [{"text": "一", "title": none, "n": 1}])
    write(tmp_path / f"b.{ending}", [{"title": "題", "n": "x", "text": "二", "more": 3}])
    write(tmp_path / f"c.{ending}", [{"text": "三"}])
    if card:
        features = "".join(f"  - name: {name}\n    dtype: string\n" for name in ("text", "title", "n"))
        (tmp_path / "README.md").write_text(f"---\ndataset_info:\n  features:\n{features}---\n")
    assert texts(read_hub("h", {"dataset": str(tmp_path)})) == ["一", "二", "三"]


@pytest.mark.parametrize(("ending", "library"), [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
def test_a_compressed_list_of_a_data_set_is_read_as_a_list(tmp_path, ending, library):
    rows = [{"text": f"{n}番目の文書"} for n in range(2000)]
    path = tmp_path / f"train.json.{ending}"
    path.write_bytes(library.compress(json.dumps(rows, indent=1).encode()))
    assert texts(read_hub("h", {"dataset": str(tmp_path)})) == [row["text"] for row in rows]
    path.write_bytes(b"")
    with pytest.raises(RecipeError, match=rf"sources\.h: .*train\.json\.{ending}:1: truncated archive"):
        list(read_hub("h", {"dataset": str(tmp_path)}))


def test_types_of_a_card_turn_digits_of_a_table_into_text(tmp_path):
    write_csv(tmp_path / "a.csv", [{"text": "42"}])
    with pytest.raises(RecipeError, match=r"a\.csv:0: no text: 'text' is of type int64, expected a string"):
        list(read_hub("h", {"dataset": str(tmp_path)}))
    (tmp_path / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - {name: text, dtype: string}\n---\n"
    )
    assert texts(read_hub("h", {"dataset": str(tmp_path)})) == ["42"]


@pytest.mark.parametrize(("ending", "write", "row"), [("jsonl", write_lines, 1), ("parquet", write_rows, 0)])
def test_a_text_of_another_type_is_named_by_file(tmp_path, ending, write, row):
    write(tmp_path / f"a.{ending}", [{"text": "一"}])
    write(tmp_path / f"b.{ending}", [{"text": 2}])
    with pytest.raises(
        RecipeError, match=rf"b\.{ending}:{row}: no text: .*'text' is (int|of type int64), expected a string"
    ):
        list(read_hub("h", {"dataset": str(tmp_path)}))
    tolerant = {"dataset": str(tmp_path), "maximum_bad_share": 0.5}
    assert [d.dropped for d in read_hub("h", tolerant)] == ["", "no text"]


@pytest.mark.parametrize(("other", "named"), [("c.parquet", "c.parquet"), ("more/train.csv", "a.jsonl")])
def test_a_file_that_no_split_has_is_refused(tmp_path, other, named):
    """datasets leaves files of another form out, and says nothing."""
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", [{"text": name}])
    (tmp_path / other).parent.mkdir(exist_ok=True)
    (tmp_path / other).write_text("text\nx")
    with pytest.raises(RecipeError, match=rf"sources\.h: .*{named} would not be read"):
        list(read_hub("h", {"dataset": str(tmp_path)}))
    (tmp_path / other).unlink()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/c.parquet").touch()
    assert texts(read_hub("h", {"dataset": str(tmp_path)})) == ["a", "b"]


def test_a_data_set_by_url_is_read_as_a_stream(tmp_path, monkeypatch):
    """fsspec opens what `datasets` lists, as the hub's files are."""
    fsspec.filesystem("memory").pipe("/set/a.jsonl.gz", gzip.compress(b'{"text": "x"}\n{"text": "y"}'))
    write_rows(tmp_path / "b.parquet", [{"text": "z"}])
    fsspec.filesystem("memory").put(str(tmp_path / "b.parquet"), "/set/b.parquet")
    files = [
        DataFile("memory://set/a.jsonl.gz", "json", None),
        DataFile("memory://set/b.parquet", "parquet", None),
    ]
    monkeypatch.setattr("recipe.corpus.readers.data_set_files", lambda where, spec: files)
    read = list(read_hub("h", {"dataset": "owner/name"}))
    assert [d[:2] for d in read] == [
        ("memory://set/a.jsonl.gz:1", "x"),
        ("memory://set/a.jsonl.gz:2", "y"),
        ("memory://set/b.parquet:0", "z"),
    ]
    whole = (tmp_path / "b.parquet").read_bytes()
    for broken in (whole[:-9], whole[:4] + bytes(40) + whole[44:]):  # its end, its first page
        fsspec.filesystem("memory").pipe("/set/b.parquet", broken)
        with pytest.raises(RecipeError, match=r"sources\.h: memory://set/b\.parquet:0: damaged Parquet"):
            list(read_hub("h", {"dataset": "owner/name", "maximum_bad_share": 0.9}))


def test_only_files_are_read(tmp_path):
    """What a pattern matches that is no file is named, not left out."""
    write(tmp_path, "a.txt", "一つ目。\n".encode())
    (tmp_path / "folder").mkdir()
    os.symlink(tmp_path / "gone", tmp_path / "link.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    for pattern, words in (("*", "folder is a folder"), ("l*", "a link to nothing"), ("p*", "no file")):
        with pytest.raises(RecipeError, match=words):
            expand_paths("mine", [f"{tmp_path}/{pattern}"])
    assert expand_paths("mine", [f"{tmp_path}/**/a*"]) == [tmp_path / "a.txt"]


def test_brackets_in_the_path_of_the_project_or_of_a_folder_are_no_pattern(tmp_path, monkeypatch):
    root = tmp_path / "project[v2]"
    (root / "saved[1]").mkdir(parents=True)
    (root / "a.txt").touch()
    (root / "saved[1]/data.arrow").touch()
    monkeypatch.setattr(project, "ROOT", root)
    assert expand_paths("mine", ["*.txt"]) == [root / "a.txt"]
    assert own_files("mine", {"path": "saved[1]"}) == [root / "saved[1]/data.arrow"]
    with pytest.raises(RecipeError, match=r"sources\.mine\.path: .*saved is no folder with files"):
        own_files("mine", {"path": "saved"})


# ------------------------------------------------------------------------------------------- web pages

LOGIN = "<!DOCTYPE html>\n<html><head><title>Log in</title></head><body>利用には認証が必要です</body></html>"


@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize(
    "name", ["a.txt", "a.jsonl", "a.json", "a.parquet", *(f"a.txt{c}" for c in ARCHIVES)]
)
@pytest.mark.parametrize("before", ["", "\ufeff", "\n  ", "<!-- saved -->\n"])
def test_a_login_page_in_place_of_data_is_named(tmp_path, name, before, tolerant):
    path = write(tmp_path, name, (before + LOGIN).encode())
    with pytest.raises(RecipeError, match=rf"{name}: an HTML page and no data: probably a login"):
        list(read_file(path, tolerant=tolerant))


def test_text_about_html_is_text(tmp_path):
    path = write(tmp_path, "a.txt", "HTML は <html> で始まる。\n\n<htmlは要素ではない".encode())
    assert len(texts(read_file(path))) == 2


def test_a_flipped_bit_in_parquet_with_checksums_is_found(tmp_path):
    """Without checksums, which few writers write, only the sha256 of the source can tell."""
    lines = [f"{number}行目の文です。" for number in range(3000)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": lines}), path, compression="none", write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[content.index("1500行目".encode())] ^= 1
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"a\.parquet:\d+: damaged Parquet: .*CRC"):
        list(read_file(path))
