"""The phases of stage 02 on small files: the documents, their order, and the counts."""

from __future__ import annotations

import bz2
import json
import lzma
import random
import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from recipe.corpus import pipeline, shards
from recipe.corpus.funnel import Funnel, funnel_table
from recipe.project import RecipeError
from recipe.run.publication import SCAFFOLD

SYLLABLES = [chr(code) for code in range(0x3042, 0x3094)] + list("山川空海人木本日月火水金土学校町村")


def prose(seed: object, characters: int = 60) -> str:
    """A text of random syllables, so that no two are near duplicates."""
    draw = random.Random(str(seed))
    return "".join(draw.choices(SYLLABLES, k=characters)) + "。"


def write_lines(path: Path, texts: list[str]) -> dict:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return {"source": "files", "paths": [str(path)]}


def build(folder: Path, sources: dict, **config: object):
    """The funnels, the rows by side and the figures of leakage of a corpus."""
    out = folder / "out"
    out.mkdir(exist_ok=True)
    settings = {"engine": {"workers": 1}, "valid_share": 0.1} | config
    funnels, leaks = pipeline.build(settings | {"sources": sources}, folder, out)
    for name in SCAFFOLD:
        shutil.rmtree(out / name, ignore_errors=True)
    assert not [path for path in out.iterdir() if path.is_dir()]
    rows: dict[str, list] = {"train": [], "valid": []}
    for path in sorted(out.glob("*.parquet")):
        rows[path.name.split("-")[0]] += pq.read_table(path).to_pylist()
    return funnels, rows, leaks


def test_every_document_and_byte_is_counted_by_reason_with_a_sample(tmp_path):
    kept = [prose(seed) for seed in range(40)]
    near = prose(1)[:-2] + "。"
    odd = ["short", " ", "制御\x00文字を含む日本語です", "Only English words stand in this one."]
    source = write_lines(tmp_path / "a.jsonl", [*kept, kept[0], near, *odd, f"　{kept[2]}\n\n"])
    funnels, rows, _ = build(tmp_path, {"a": source}, minimum_characters=6, minimum_japanese_share=0.3)
    table = funnels["a"].as_json()
    assert table["documents"]["in"] == 47
    assert table["documents"]["dropped"] == {
        "duplicate": 2,
        "near duplicate": 1,
        "short": 1,
        "empty": 1,
        "control characters": 1,
        "not Japanese": 1,
    }
    assert table["documents"]["out"] == len(rows["train"]) + len(rows["valid"]) == 40
    size = table["bytes"]
    assert size["in"] == sum(len(t.encode()) for t in [*kept, kept[0], near, *odd, f"　{kept[2]}\n\n"])
    assert size["in"] == size["out"] + sum(size["dropped"].values()) + size["trimmed"]
    assert [text for *_, text in funnels["a"].samples["not Japanese"]] == [odd[3]]


def test_minhash_can_be_switched_off(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [prose(1), prose(1)[:-2] + "。"])
    funnels, _, _ = build(tmp_path, {"a": source}, minhash=None)
    assert funnels["a"].documents_out == 2


CODE = """{}

次の関数を使います。

```python
def kazoeru(n):
    for i in range(n):
        if i % 2 == 0:

\t    print(i)
    return n
```

- 親の項目
  - 子の項目

以上です。"""


def test_a_kept_layout_comes_back_exactly_and_a_copy_in_another_layout_is_found(tmp_path):
    texts = [CODE.format(prose(seed)) for seed in range(20)]
    flat = "\n".join(line.strip() for line in texts[0].split("\n") if line)
    source = write_lines(tmp_path / "a.jsonl", [*texts, flat]) | {"rules": "books"}
    funnels, rows, _ = build(tmp_path, {"a": source}, layout="keep", minimum_japanese_share=0.3)
    assert sorted(row["text"] for side in rows.values() for row in side) == sorted(texts)
    assert funnels["a"].as_json()["documents"]["dropped"] == {"near duplicate": 1}


def test_an_earlier_source_has_priority(tmp_path):
    first = write_lines(tmp_path / "z.jsonl", [prose(seed) for seed in range(5)])
    second = write_lines(tmp_path / "a.jsonl", [prose(seed) for seed in range(10)])
    funnels, rows, _ = build(tmp_path, {"encyclopaedia": first, "a-web": second})
    assert funnels["encyclopaedia"].documents_out == 5
    assert funnels["a-web"].documents_dropped == {"duplicate": 5}
    assert {row["source"] for row in rows["train"] + rows["valid"]} == {"encyclopaedia", "a-web"}


def test_the_split_is_stable_when_data_is_added(tmp_path):
    (tmp_path / "few").mkdir(), (tmp_path / "many").mkdir()
    few = write_lines(tmp_path / "few.jsonl", [prose(seed) for seed in range(600)])
    many = write_lines(tmp_path / "many.jsonl", [prose(seed) for seed in range(900)])
    _, before, _ = build(tmp_path / "few", {"a": few})
    _, after, _ = build(tmp_path / "many", {"b": many})
    ids = [{side: {row["id"] for row in rows[side]} for side in rows} for rows in (before, after)]
    assert 0.07 < len(ids[0]["valid"]) / 600 < 0.13
    assert ids[0]["valid"] < ids[1]["valid"] and ids[0]["train"] < ids[1]["train"]


def test_a_held_out_source_is_wholly_on_the_validation_side(tmp_path):
    sources = {
        "a": write_lines(tmp_path / "a.jsonl", [prose(seed) for seed in range(20)]),
        "b": write_lines(tmp_path / "b.jsonl", [prose(seed) for seed in range(20, 40)]) | {"held_out": True},
    }
    _, rows, _ = build(tmp_path, sources)
    assert sum(row["source"] == "b" for row in rows["valid"]) == 20
    assert not [row for row in rows["train"] if row["source"] == "b"]


def test_copy_with_other_punctuation_is_removed_from_validation(tmp_path):
    """Too short for MinHash, and not equal by hash: only the check for leaks finds it."""
    texts = [f"{word}、{word}。" for word in (prose(seed, 2)[:-1] for seed in range(200))]
    folded = [text.replace("、", "").replace("。", "！") for text in texts]
    source = write_lines(tmp_path / "a.jsonl", texts + folded)
    funnels, rows, leaks = build(tmp_path, {"a": source}, minhash=None, valid_share=0.3)
    train = {row["text"].replace("、", "").strip("。！") for row in rows["train"]}
    assert not [row for row in rows["valid"] if row["text"].replace("、", "").strip("。！") in train]
    assert funnels["a"].documents_dropped["in the training side"] == leaks["with_same_text"] > 10


@pytest.mark.parametrize(
    ("limit", "count"), [({"maximum_documents": 7}, 7), ({"maximum_megabytes": 0.001}, 5)]
)
def test_limits_of_a_source(tmp_path, limit, count):
    source = write_lines(tmp_path / "a.jsonl", [prose(seed) for seed in range(30)]) | limit  # 183 bytes each
    funnels, _, _ = build(tmp_path, {"a": source})
    assert funnels["a"].documents_in == count and funnels["a"].capped == next(iter(limit))


def test_shards_of_a_large_source_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "SHARD_BYTES", 2000)
    texts = [prose(seed) for seed in range(100)]
    task = pipeline.Read(
        {"sources": {"a": write_lines(tmp_path / "a.jsonl", texts)}}, tmp_path, tmp_path / "raw"
    )
    task(None, 0, 1)
    paths = sorted((tmp_path / "raw/a").glob("*.parquet"))
    assert len(paths) > 5
    assert [row["text"] for path in paths for row in pipeline.shard_rows(path)] == texts


def test_formats_of_the_reference_systems(tmp_path):
    """A dump, CC-100's form, a folder of `datasets` and one of the hub, through the same phases."""
    import datasets

    dump = "".join(
        f"<page><title>記事{n}</title><ns>0</ns><id>{n}</id><revision><id>1</id><model>wikitext</model>"
        f"<text>'''記事{n}'''は[[記事]]である。{prose(n, 150)}</text></revision></page>"
        for n in range(5)
    )
    dump += (
        '<page><title>別名</title><ns>0</ns><id>9</id><redirect title="記事0" />'
        "<revision><id>2</id><model>wikitext</model><text>#REDIRECT [[記事0]]</text></revision></page>"
    )
    export = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xml:lang="ja">{dump}</mediawiki>'
    (tmp_path / "jawiki-pages-articles.xml.bz2").write_bytes(bz2.compress(export.encode()))
    documents = ["\n".join(prose((n, line), 80) for line in range(3)) for n in range(4)]
    (tmp_path / "ja.txt.xz").write_bytes(lzma.compress(("\n\n".join(documents) + "\n").encode()))
    rows = {"text": [prose(("hub", n), 150) for n in range(6)]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"))
    sources = {
        "wikipedia": {
            "source": "wikipedia",
            "paths": [str(tmp_path / "*.xml.bz2")],
            "rules": "encyclopaedia",
        },
        "cc100": {"source": "files", "paths": [str(tmp_path / "ja.txt.xz")]},
        "aozora": {"source": "datasets-folder", "path": str(tmp_path / "saved"), "rules": "books"},
    }
    funnels, out, _ = build(tmp_path, sources)
    assert funnels["wikipedia"].documents_dropped == {"redirect": 1}
    assert [funnels[name].documents_out for name in sources] == [5, 4, 6]
    texts = [row["text"] for row in out["train"] + out["valid"]]
    assert any(text.startswith("記事3は記事である。") for text in texts)
    assert any(text.count("\n") == 2 for text in texts)


def test_templates_of_a_dump(tmp_path):
    """Redirects come after the articles that use them; what is not known is listed in the table."""
    pages = [
        *(
            (0, f"山{n}", f"高さ{{{{換算|{n}|m}}}}、{{{{標高|{n}}}}}の{{{{語|a|峰}}}}。{prose(n)}")
            for n in range(3)
        ),
        (10, "Template:換算", "#転送 [[Template:Convert]]"),
        (10, "Template:標高2", "#転送 [[Template:標高]]"),
    ]
    dump = "".join(
        f"<page><title>{title}</title><ns>{space}</ns><id>{n}</id><revision><id>1</id><text>{text}</text></revision>"
        "</page>"
        for n, (space, title, text) in enumerate(pages)
    )
    (tmp_path / "dump.xml").write_text(f"<mediawiki>{dump}</mediawiki>", "utf-8")
    source = {"source": "wikipedia", "paths": [str(tmp_path / "dump.xml")], "templates": {"語": 2}}
    funnels, out, _ = build(tmp_path, {"w": source}, minhash=None)
    texts = sorted(row["text"] for row in out["train"] + out["valid"])
    assert [text.partition("。")[0] for text in texts] == [f"高さ{n}メートル、の峰" for n in range(3)]
    assert funnels["w"].documents_dropped == {"not an article": 2}
    table = funnel_table(funnels)
    assert "Found in w: unknown templates 3.\n" in table
    assert "| `標高` | 3 | 3 | `高さ{{換算\\|0\\|m}}、{{標高\\|0}}の{{語\\|a\\|峰}}。" in table


def test_the_table_of_templates_is_bounded():
    """The most frequent ones of each shard are kept; all uses are counted."""
    whole = Funnel()
    for shard in range(3):
        part = Funnel()
        part.templates = {f"t{shard}-{n}": [1, 0, "example"] for n in range(1500)} | {
            "often": [9, 8, f"{shard}"]
        }
        part.close_templates()
        assert len(part.templates) == 1000
        whole.add(part)
    assert len(whole.templates) == 1000 and next(iter(whole.templates.items())) == ("often", [27, 24, "0"])
    assert whole.extraction["unknown templates"] == 3 * 1509
    assert funnel_table({"w": whole}).count("`example`") == 29


def test_strict_names_the_line_and_tolerant_counts_it(tmp_path):
    lines = [json.dumps({"text": prose(seed)}) for seed in range(99)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:40], "{broken", *lines[40:]]), "utf-8")
    source = {"source": "files", "paths": [str(tmp_path / "a.jsonl")]}
    with pytest.raises(RecipeError, match=r"a\.jsonl:41"):
        build(tmp_path, {"a": source})
    funnels, _, _ = build(tmp_path, {"a": source | {"maximum_bad_share": 0.02}})
    assert funnels["a"].documents_dropped == {"bad JSON": 1}
    with pytest.raises(RecipeError, match="maximum_bad_share"):
        build(tmp_path, {"a": source | {"maximum_bad_share": 0.005}})


def test_a_source_that_is_too_small_stops(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [prose(1)]) | {"minimum_megabytes": 1}
    with pytest.raises(RecipeError, match=r"sources\.a: only 0\.00 MB .* minimum_megabytes 1"):
        build(tmp_path, {"a": source})


def test_a_killed_run_is_continued_with_the_same_counts(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "a.jsonl", [prose(seed) for seed in range(50)] * 2)
    (tmp_path / "whole").mkdir()
    expected, rows, _ = build(tmp_path / "whole", {"a": source})
    real = pipeline._merge_funnels
    monkeypatch.setattr(pipeline, "_merge_funnels", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, {"a": source})
    monkeypatch.setattr(pipeline, "_merge_funnels", real)
    # Reading again would fail: what is complete is not done again.
    (tmp_path / "a.jsonl").unlink()
    funnels, again, _ = build(tmp_path, {"a": source})
    assert funnels == expected and again == rows


def write_hub(folder: Path, configuration: str, texts: list[str], shards: int) -> dict:
    """A source of the kind ``hub``: a card, and a folder with the shards of a configuration."""
    (folder / configuration).mkdir(parents=True)
    each = len(texts) // shards
    for shard in range(shards):
        part = texts[shard * each : (shard + 1) * each]
        rows = {"text": part, "id": [f"<urn:uuid:{n}>" for n in range(each)], "score": [2.5] * each}
        path = folder / configuration / f"train-{shard:05d}-of-{shards:05d}.parquet"
        pq.write_table(pa.table(rows), path)
    files = f"  data_files:\n  - split: train\n    path: {configuration}/train-*\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {configuration}\n{files}---\n")
    return {"source": "hub", "dataset": str(folder), "configuration": configuration}


def test_a_data_set_of_the_hub_is_read_up_to_its_limit_and_no_further(tmp_path):
    """A shard behind the limit is not opened: here it is no Parquet."""
    texts = [prose(("hub", seed), 100) for seed in range(3000)]
    source = write_hub(tmp_path / "web", "sample_10BT", texts, 3)
    (tmp_path / "web/sample_10BT/train-00002-of-00003.parquet").write_text("not fetched yet")
    most = sum(len(text.encode()) for text in texts[:1500]) / 1e6
    funnels, rows, _ = build(tmp_path, {"web": source | {"maximum_megabytes": most}}, minhash=None)
    assert sorted(row["text"] for row in rows["train"] + rows["valid"]) == sorted(texts[:1500])
    with pytest.raises(RecipeError, match=r"web.*sample_10BT|cannot read the data set"):
        build(tmp_path, {"web": source}, minhash=None)


def test_an_interrupted_stream_is_read_again_and_finished_sources_are_not(tmp_path):
    texts = {name: [prose((name, seed)) for seed in range(600)] for name in ("wikipedia", "web")}
    sources = {name: write_hub(tmp_path / name, "one", texts[name], 2) for name in texts}
    (tmp_path / "whole").mkdir()
    expected, rows, _ = build(tmp_path / "whole", sources, minhash=None)
    # The connection breaks after the first shard of the second source.
    shard = tmp_path / "web/one/train-00001-of-00002.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1000])
    with pytest.raises(RecipeError, match=r"sources\.web: .*train-00001-of-00002\.parquet:0: damaged"):
        build(tmp_path, sources, minhash=None)
    shard.write_bytes(whole)
    shutil.rmtree(tmp_path / "wikipedia")
    funnels, again, _ = build(tmp_path, sources, minhash=None)
    assert funnels == expected and again == rows


def test_a_limit_does_not_hide_bad_lines(tmp_path):
    lines = [json.dumps({"text": prose(seed)}) for seed in range(50)]
    broken = [line for pair in zip(lines, ["{"] * 50, strict=True) for line in pair]
    (tmp_path / "a.jsonl").write_text("\n".join(broken), "utf-8")
    source = {"source": "files", "paths": [str(tmp_path / "a.jsonl")], "maximum_bad_share": 0.01}
    with pytest.raises(RecipeError, match="maximum_bad_share"):
        build(tmp_path, {"a": source | {"maximum_documents": 10}})


def test_empty_sources_are_named(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [prose(1)]) | {"maximum_megabytes": 1e-6}
    with pytest.raises(RecipeError, match=r"sources\.a: nothing is left"):
        build(tmp_path, {"a": source})


def test_a_reason_without_bytes_has_its_column():
    """Empty documents: without the column, the table would not sum up."""
    part, whole = Funnel(), Funnel()
    part.drop("empty", 0, "a", "")
    whole.add(part)
    assert "| dropped: empty |" in funnel_table({"x": whole})


def test_the_table_tells_what_extraction_found():
    found = Funnel(extraction=Counter({"ruby": 3000, "notes": 0}))
    assert "Found in x: ruby 3,000.\n" in funnel_table({"x": found})


def test_a_shard_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """After a power cut there is no shard under its name that is empty or cut short."""
    path, seen = tmp_path / "train-a-0.parquet", []
    monkeypatch.setattr(shards.os, "fsync", lambda descriptor: seen.append(path.exists()))
    writer = shards.ShardWriter(path, pa.schema([("text", pa.string())]))
    writer.write({"text": "山"})
    writer.close()
    assert seen == [False] and path.exists()
