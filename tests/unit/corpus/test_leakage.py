"""Leakage: validation documents and lines that occur in the training side."""

import random

import pyarrow as pa
import pyarrow.parquet as pq
from recipe.corpus import leakage
from recipe.corpus.splitting import text_hash

LETTERS = "".join(map(chr, range(0x4E00, 0x4E00 + 2000)))


def random_texts(count, length=300):
    draw = random.Random(1)
    return ["".join(draw.choices(LETTERS, k=length)) for _ in range(count)]


def write_shards(folder, shards):
    folder.mkdir()
    for number, texts in enumerate(shards):
        columns = {"id": [text_hash(text).hex() for text in texts], "text": texts}
        schema = pa.schema([("id", pa.string()), ("text", pa.string())])
        pq.write_table(pa.table(columns, schema), folder / f"{number:05d}.parquet")
    return sorted(folder.iterdir())


def test_leaks_are_named_and_counted(tmp_path):
    a, b, c, d, e = random_texts(5, length=60)
    train = write_shards(tmp_path / "train", [[f"{a}\n{b}", "…"], [], [f"{c[:29]}\n短い", d]])
    valid_texts = [
        f"{a[:30]}、 {a[30:]}。{b}!",  # the same letters, otherwise broken into lines
        f"{e}\n「{d}」\n短い",  # one of its two long lines
        f"{c[:29]}\n{e}",  # a short line only
        "！",  # no letters at all
        "",
    ]
    valid = write_shards(tmp_path / "valid", [valid_texts[:1], valid_texts[1:]])
    ids = [text_hash(text).hex() for text in valid_texts]
    found = leakage.leakage(train, valid)
    assert found.same_text == [ids[0]]
    assert found.figures == {
        "valid_documents": 5,
        "with_same_text": 1,
        "with_shared_lines": 1,
        "long_lines": 4,
        "shared_lines": 1,
    }


def test_leaks_are_found_with_any_buffer_size(tmp_path, monkeypatch):
    lines = random_texts(200, length=30)
    train = write_shards(tmp_path / "train", [lines[:50], lines[50:100]])
    valid = write_shards(tmp_path / "valid", [["\n".join(lines[i : i + 4])] for i in range(0, 200, 4)])
    monkeypatch.setattr(leakage, "_HASHES_AT_ONCE", 3)
    found = leakage.leakage(train, valid)
    assert found.figures["with_shared_lines"] == 25 and found.figures["shared_lines"] == 100
    assert found.same_text == []


def test_empty_sides(tmp_path):
    shards = write_shards(tmp_path / "a", [[]])
    some = write_shards(tmp_path / "b", [random_texts(2)])
    assert leakage.leakage(some, shards) == (
        [],
        dict.fromkeys(leakage.leakage(shards, shards).figures, 0),
    )
    assert leakage.leakage(shards, some).figures["with_same_text"] == 0
