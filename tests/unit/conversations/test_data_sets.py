"""Data sets in a local folder: their files may have other columns and types than the first one."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from recipe.conversations.read_rows import read_rows
from recipe.project import RecipeError

FIRST = [{"instruction": "訳せ", "input": None, "output": "い"}] * 2
SECOND = [{"instruction": "訳せ", "input": "a", "output": "あ", "category": "文", "index": 0}]


def read(folder, **spec):
    return list(read_rows("instruction.json: pairs.mine", {"dataset": str(folder)} | spec))


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_csv(path, rows):
    lines = [
        ",".join(rows[0]),
        *(",".join("" if v is None else str(v) for v in row.values()) for row in rows),
    ]
    path.write_text("\n".join(lines), "utf-8")


def write_list(path, rows):
    path.write_text(json.dumps(rows), "utf-8")


def write_lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")


def write_compressed(path, rows):
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))


@pytest.mark.parametrize(
    ("ending", "write"),
    [
        ("json", write_list),
        ("jsonl", write_lines),
        ("jsonl.gz", write_compressed),
        ("parquet", write_parquet),
        ("csv", write_csv),
    ],
)
def test_null_in_one_file_and_text_or_more_columns_in_the_next(tmp_path, ending, write):
    for name, rows in (("a", FIRST), ("b", SECOND), ("c", FIRST)):
        write(tmp_path / f"{name}.{ending}", rows)
    assert [row for _, row in read(tmp_path)] == FIRST + SECOND + FIRST


def test_null_and_then_text_in_one_file_longer_than_what_datasets_looks_at(tmp_path):
    """datasets parses 10 MB at once."""
    long = FIRST[0] | {"output": "い" * 1_000_000}
    write_lines(tmp_path / "a.jsonl", [long] * 4 + SECOND)
    assert [row["input"] for _, row in read(tmp_path)] == [None] * 4 + ["a"]


def test_the_split_and_the_lines_of_files(tmp_path):
    write_lines(tmp_path / "train.jsonl", FIRST)
    write_lines(tmp_path / "test.jsonl", SECOND)
    ((where, row),) = read(tmp_path, split="test")
    assert where.endswith("test.jsonl: line 1") and row == SECOND[0]
    with pytest.raises(RecipeError, match=r"pairs\.mine: cannot read .* no split 'dev', only train, test"):
        read(tmp_path, split="dev")


def test_a_faulty_file_of_a_data_set_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"instruction": "x"}\n3')
    with pytest.raises(RecipeError, match=r"a\.jsonl: line 2: expected an object, found int"):
        read(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"instruction": "x"}\n{')
    with pytest.raises(RecipeError, match=r"a\.jsonl:2: not valid JSON"):
        read(tmp_path)


@pytest.mark.parametrize("damage", ["cut short", "changed"])
@pytest.mark.parametrize(
    ("ending", "library"), [("gz", gzip), ("bz2", bz2), ("xz", lzma), ("zst", zstandard)]
)
def test_a_compressed_file_that_is_damaged_is_named(tmp_path, ending, library, damage):
    content = library.compress("".join(f'{{"instruction": "{n}"}}\n' for n in range(9000)).encode())
    middle = len(content) // 2
    changed = (
        content[:middle] + bytes(byte ^ 255 for byte in content[middle : middle + 9]) + content[middle + 9 :]
    )
    (tmp_path / f"a.jsonl.{ending}").write_bytes(content[:-500] if damage == "cut short" else changed)
    with pytest.raises(RecipeError, match=rf"pairs\.mine: .*a\.jsonl\.{ending}"):
        read(tmp_path)
