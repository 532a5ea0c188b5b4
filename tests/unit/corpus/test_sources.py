"""Sources: read by their kind, faults with file and line, and the table that all of stages 01 and 02 read."""

import io
import json
import re

import pytest
from recipe.config.dataset import check_dataset
from recipe.corpus import download, pipeline, sources
from recipe.corpus.readers import Document
from recipe.project import CONFIGS, RecipeError, Refused


def read(tmp_path, name, content, **spec):
    path = tmp_path / name
    path.write_bytes(content)
    return list(sources.read("mine", {"source": "files", "paths": [str(path)], **spec}, tmp_path))


def test_text_file_is_split_at_empty_lines(tmp_path):
    documents = read(tmp_path, "a.txt", "\ufeff一\n二\r\n\n\n三".encode())
    assert [document.text for document in documents] == ["一\n二", "三"]
    assert documents[1].name.endswith("a.txt:5")


def test_jsonl_and_parquet_give_their_column(tmp_path):
    rows = [{"body": "一"}, {"body": ""}, {"body": "三"}]
    content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    documents = read(tmp_path, "a.jsonl", content, column="body")
    assert [(document.text, document.dropped) for document in documents] == [
        ("一", ""),
        ("", "empty"),
        ("三", ""),
    ]

    import pyarrow as pa
    import pyarrow.parquet as pq

    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), table)
    assert [d.text for d in read(tmp_path, "a.parquet", table.getvalue(), column="body")] == ["一", "", "三"]
    with pytest.raises(RecipeError, match=r"no column 'text'.*body"):
        read(tmp_path, "a.parquet", table.getvalue())
    with pytest.raises(RecipeError, match=r"a\.parquet:0: damaged Parquet"):
        read(tmp_path, "a.parquet", table.getvalue()[:-20], column="body")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"\xe4\xb8\x80\nbad \xff\n", r"a\.txt:2: bad UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl:2"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl:1.*'text'"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1.*int, expected a string"),
        ("a.doc", b"x", r"unknown kind of file '\.doc'"),
    ],
)
def test_fault_names_file_and_line(tmp_path, name, content, words):
    with pytest.raises(RecipeError, match=words):
        read(tmp_path, name, content)


def test_pattern_without_files_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="matches no file"):
        list(sources.read("mine", {"source": "files", "paths": [str(tmp_path / "*.txt")]}, tmp_path))


def test_hub_dataset_is_streamed_from_a_local_folder(tmp_path):
    rows = [{"body": "一"}, {"body": "二"}]
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    spec = {"source": "hub", "dataset": str(tmp_path / "set"), "column": "body"}
    assert [d.text for d in sources.read("h", spec, tmp_path)] == ["一", "二"]
    with pytest.raises(RecipeError, match=r"train\.jsonl:1: no text: it has \['body'\]"):
        list(sources.read("h", {"source": "hub", "dataset": str(tmp_path / "set")}, tmp_path))


def test_new_kind_is_one_entry_of_the_table(tmp_path, monkeypatch):
    def read_haiku(name, spec, data):
        for number in range(spec["poems"]):
            yield Document(f"haiku {number}", f"<古池や蛙飛びこむ水の音{number}>")

    def strip_brackets(name, text):
        return text.strip("<>"), "" if "1" in text else "zeroth", {"brackets": 2}

    kind = sources.Kind(
        reads="haiku",
        needs="nothing",
        licence="public domain",
        download="",
        read=read_haiku,
        required={"poems": "int"},
        optional={"season": "str"},
        extract=lambda spec, learned, templates: strip_brackets,
    )
    monkeypatch.setitem(sources.KINDS, "haiku", kind)
    config = {"sources": {"poems": {"source": "haiku", "poems": 2}}, "minhash": None}
    check_dataset(config, "dataset.json")
    with pytest.raises(Refused, match=r"sources\.poems: poems: missing"):
        check_dataset({"sources": {"poems": {"source": "haiku"}}}, "dataset.json")
    with pytest.raises(Refused, match=r"sources\.poems: saeson: unknown key"):
        check_dataset({"sources": {"poems": {"source": "haiku", "poems": 1, "saeson": "秋"}}}, "dataset.json")
    record = download.download("poems", config["sources"]["poems"], tmp_path)
    assert record == {"kind": "haiku", "licence": "public domain", "files": {}}
    assert "| `haiku` | `poems`, [`season`] | haiku | nothing | public domain |" in sources.key_table()
    # The workers of the stage are other processes, where the table is not patched: the tasks are called here.
    raw, clean = tmp_path / "raw", tmp_path / "clean"
    clean.mkdir()
    pipeline.Read(config, tmp_path, raw)(None, 0, 1)
    pipeline.Clean(config, [("poems", raw / "poems/00000.parquet")], clean)(None, 0, 1)
    (row,) = pipeline.shard_rows(clean / "00000.parquet")
    assert row["text"] == "古池や蛙飛びこむ水の音1"
    counts = json.loads((clean / "00000.json").read_text("utf-8"))
    assert (counts["documents_dropped"], counts["extraction"]) == ({"zeroth": 1}, {"brackets": 4})


def test_unknown_kind_is_refused_by_name_everywhere(tmp_path):
    spec = {"source": "wikipedai", "paths": ["a.txt"]}
    words = r"sources\.w: source: unknown kind 'wikipedai'\. Did you mean 'wikipedia'\? Known: files, "
    for use in (
        lambda: check_dataset({"sources": {"w": spec}}, "dataset.json"),
        lambda: download.download("w", spec, tmp_path),
        lambda: sources.read("w", spec, tmp_path),
    ):
        with pytest.raises(Refused, match=words):
            use()


def test_key_table_is_in_the_readme_of_configs():
    assert sources.key_table() in (CONFIGS / "README.md").read_text("utf-8")


def test_every_shipped_kind_has_its_row_and_its_licence():
    for name, kind in sources.KINDS.items():
        assert re.search(rf"^\| `{name}` \|.*\| {re.escape(kind.licence)} \|$", sources.key_table(), re.M)
        assert sources.licence({"source": name}) == kind.licence
        assert sources.licence({"source": name, "licence": "CC0"}) == "CC0"
