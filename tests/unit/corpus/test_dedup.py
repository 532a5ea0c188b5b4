"""Deduplication on planted exact and near duplicates, in shards of the real format."""

import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster
from datatrove.pipeline.dedup.minhash import MinhashConfig
from recipe.corpus import dedup, minhash
from recipe.corpus.splitting import text_hash
from recipe.project import RecipeError

LETTERS = "".join(map(chr, range(0x4E00, 0x4E00 + 2000)))  # kanji, so that 5-grams are all different


def random_texts(count, length=300, seed=1):
    draw = random.Random(seed)
    return ["".join(draw.choices(LETTERS, k=length)) for _ in range(count)]


def edited(text, characters=9):
    """The text with one passage replaced: 3 % of 300 characters give a Jaccard similarity of .92."""
    return text[:100] + "ん" * characters + text[100 + characters :]


def write_shards(folder, shards):
    """Clean shards and their files of hashes, as `Clean` writes them."""
    folder.mkdir(exist_ok=True)
    paths = []
    for number, texts in enumerate(shards):
        hashes = [text_hash(text) for text in texts]
        columns = {"id": [h.hex() for h in hashes], "source": ["s"] * len(texts), "text": texts}
        schema = pa.schema([(name, pa.string()) for name in columns])
        paths.append(folder / f"{number:05d}.parquet")
        pq.write_table(pa.table(columns, schema), paths[-1], compression="zstd")
        np.save(paths[-1].with_suffix(".npy"), np.frombuffer(b"".join(hashes), "u1").reshape(-1, 16))
    return paths


def hash_files(shards):
    return [path.with_suffix(".npy") for path in shards]


def run(steps, tasks):
    for rank in range(tasks):
        for step in steps:
            step.run(None, rank, tasks)


def deduplicate(shards, folder, config=None, tasks=(2, 14)):
    """Run all phases; the removed rows of each shard, as lists."""
    config = config or {}
    run(dedup.exact(hash_files(shards), folder), 1)
    run(dedup.signatures(shards, folder, config), tasks[0])
    run(dedup.buckets(shards, folder, config), tasks[1])
    run(dedup.clusters(shards, folder, config), 1)
    return [
        {reason: rows.tolist() for reason, rows in dedup.removed_rows(folder, shard).items()}
        for shard in range(len(shards))
    ]


@pytest.fixture
def planted(tmp_path):
    """Four shards, one of them empty and one with a single document, with copies of every kind."""
    a = random_texts(30)
    first = [*a[:10], a[3], edited(a[4])]
    third = [*a[10:20], a[5], edited(a[6]), edited(edited(a[7]), 10)]
    fourth = [edited(a[8])]
    removed = [
        {"duplicate": [10], "near duplicate": [11]},
        {"duplicate": [], "near duplicate": []},
        {"duplicate": [10], "near duplicate": [11, 12]},
        {"duplicate": [], "near duplicate": [0]},
    ]
    return write_shards(tmp_path / "shards", [first, [], third, fourth]), removed


# ------------------------------------------------------------------------------------------------- exact


def test_exact_duplicates_keep_the_first(tmp_path):
    a, b, c, d = random_texts(4)
    shards = write_shards(tmp_path, [[a, b, a], [], [c, b, c, a], [d, c]])
    assert [rows.tolist() for rows in dedup.exact_duplicates(hash_files(shards))] == [[2], [], [1, 2, 3], [1]]


def test_exact_duplicates_in_many_passes(tmp_path, monkeypatch):
    texts = random.Random(2).choices(random_texts(300, length=20), k=900)
    shards = write_shards(tmp_path, [texts[:400], texts[400:]])
    seen, expected = set(), []
    for row, text in enumerate(texts):
        if text in seen:
            expected.append(row)
        seen.add(text)
    monkeypatch.setattr(dedup, "_RECORDS_AT_ONCE", 7)
    first, second = dedup.exact_duplicates(hash_files(shards))
    assert [*first.tolist(), *(second + 400).tolist()] == expected


def test_hashes_with_one_equal_half_are_different(tmp_path):
    one, other, third = bytes(16), bytes(8) + b"\1" * 8, b"\1" * 8 + bytes(8)
    np.save(tmp_path / "h.npy", np.frombuffer(one + other + third + one, "u1").reshape(-1, 16))
    assert [rows.tolist() for rows in dedup.exact_duplicates([tmp_path / "h.npy"])] == [[3]]


def test_hashes_of_another_size_are_refused(tmp_path):
    np.save(tmp_path / "h.npy", np.zeros((3, 8), "u1"))
    with pytest.raises(RecipeError, match=r"h\.npy: 24 bytes in 3 rows, expected 16"):
        dedup.exact_duplicates([tmp_path / "h.npy"])


# ----------------------------------------------------------------------------------------------- MinHash


def test_planted_duplicates_across_shards_with_priority(tmp_path, planted):
    shards, removed = planted
    assert deduplicate(shards, tmp_path / "work") == removed


@pytest.mark.parametrize("tasks", [(1, 1), (4, 5), (9, 40)])
def test_the_number_of_tasks_changes_nothing(tmp_path, planted, tasks):
    shards, removed = planted
    assert deduplicate(shards, tmp_path / "work", tasks=tasks) == removed


def test_ranges_of_keys_change_nothing(tmp_path, planted, monkeypatch):
    shards, removed = planted
    monkeypatch.setattr(dedup, "_RECORDS_AT_ONCE", 5)
    assert deduplicate(shards, tmp_path / "work") == removed
    assert len(list((tmp_path / "work/pairs").glob("*.dups"))) == 14 * 5  # 23 signed documents


def test_the_first_in_the_order_of_shards_is_kept(tmp_path):
    text = random_texts(1)[0]
    shards = write_shards(tmp_path / "shards", [[edited(text)], [text]])
    assert [r["near duplicate"] for r in deduplicate(shards, tmp_path / "a")] == [[], [0]]
    assert [r["near duplicate"] for r in deduplicate(shards[::-1], tmp_path / "b")] == [[], [0]]


def test_datatroves_own_steps_find_the_same_clusters(tmp_path, planted):
    shards, removed = planted
    work = tmp_path / "work"
    deduplicate(shards, work)
    config = MinhashConfig(num_buckets=14, hashes_per_bucket=1)
    for rank in range(14):
        MinhashDedupBuckets(str(work / "signatures"), str(tmp_path / "pairs"), config=config).run(
            None, rank, 14
        )
    pairs = [
        {
            path.name: sorted(np.fromfile(path, "<u4").reshape(-1, 4).tolist())
            for path in folder.glob("*.dups")
        }
        for folder in (work / "pairs", tmp_path / "pairs")
    ]
    assert pairs[0] == pairs[1]
    assert sum(map(len, pairs[0].values())) > 14
    step = MinhashDedupCluster(str(work / "pairs"), str(tmp_path / "removed"), config)
    step.run(None, 0, 1)
    found = sum(path.stat().st_size // 4 for path in (tmp_path / "removed").glob("*.remove"))
    assert found == sum(len(of_shard["near duplicate"]) for of_shard in removed)


@pytest.mark.parametrize("shift", [0, 40, 100, 200, 300, 400])
def test_share_of_equal_minima_is_the_jaccard_similarity(shift):
    """Without bias: 20,000 functions, 3 sigma, over neighbouring code points, the worst for linear hashes."""
    signer = minhash.MinHash(bands=2500, rows=8, ngram=5, seed=3)
    texts = ["".join(map(chr, range(0x4E00 + start, 0x4E00 + start + 400))) for start in (0, shift)]
    common = max(0, 396 - shift)
    jaccard = common / (2 * 396 - common)
    agreed = (signer.signature(texts[0]) == signer.signature(texts[1])).mean()
    assert abs(agreed - jaccard) <= 3 * (jaccard * (1 - jaccard) / 20_000) ** 0.5


def test_different_documents_are_kept(tmp_path):
    texts, others = random_texts(300, length=120), random_texts(300, length=120, seed=2)
    mixed = [text[:40] + other[40:] for text, other in zip(texts, others, strict=True)]
    shards = write_shards(tmp_path / "shards", [texts, mixed])
    assert [r["near duplicate"] for r in deduplicate(shards, tmp_path / "work")] == [[], []]


@pytest.mark.parametrize(("length", "chunk"), [(400_000, 1 << 10), (3_000, 1), (3_000, 7), (3_000, 2_995)])
def test_signature_does_not_depend_on_the_chunk_size(monkeypatch, length, chunk):
    signer = minhash.MinHash(**minhash.MINHASH)
    text = random_texts(1, length)[0]
    monkeypatch.setattr(minhash, "_SHINGLES_AT_ONCE", chunk)
    in_chunks = signer.signature(text)
    monkeypatch.setattr(minhash, "_SHINGLES_AT_ONCE", 1 << 19)
    assert in_chunks.tolist() == signer.signature(text).tolist()


def test_dakuten_stay_different_and_forms_become_equal():
    assert minhash.fold("が") != minhash.fold("か")
    assert minhash.fold("はがき、ＡＢＣ １２!") == "はがきabc12"
    assert minhash.fold("か\u3099ｶﾞ") == "がガ"
    assert minhash.fold("コーヒー々 \n あ_い", " ") == "コーヒー々 あ い"
    signer = minhash.MinHash(**minhash.MINHASH)
    assert (signer.signature("かきくけこ") != signer.signature("がぎぐげご")).all()


def test_documents_shorter_than_an_ngram_are_kept(tmp_path):
    shards = write_shards(
        tmp_path / "shards", [["あいうえ", "あいう、え", "…", "!!", "あいうえお", "あいうえお。"]]
    )
    assert deduplicate(shards, tmp_path / "work") == [{"duplicate": [], "near duplicate": [5]}]


def test_settings_change_the_result(tmp_path):
    text = random_texts(1)[0]
    signed = [
        minhash.MinHash(**(minhash.MINHASH | config)).signature(text)
        for config in ({}, {}, {"seed": 2}, {"ngram": 4})
    ]
    assert (signed[0] == signed[1]).all()
    assert (signed[0] != signed[2]).all() and (signed[0] != signed[3]).all()
    shards = write_shards(tmp_path / "shards", [[text, text[:150] + random_texts(1, seed=9)[0][150:]]])
    strict = deduplicate(shards, tmp_path / "a", {"bands": 2, "rows": 16})
    loose = deduplicate(shards, tmp_path / "b", {"bands": 50, "rows": 1})
    assert (strict[0]["near duplicate"], loose[0]["near duplicate"]) == ([], [1])


def test_clusters_of_long_chains():
    """A chain whose links come in a random order, a ring, and a star around the largest node."""
    draw = np.random.RandomState(5)
    chain = np.stack([np.arange(0, 999), np.arange(1, 1000)])[:, draw.permutation(999)]
    ring = 2000 + np.stack([np.arange(50), np.roll(np.arange(50), 1)])
    star = np.stack([np.arange(3000, 3040), np.full(40, 3999)])
    left, right = np.concatenate([chain, ring, star], axis=1).astype(np.uint64)
    nodes, first = dedup.first_of_cluster(left, right)
    assert len(nodes) == 1000 + 50 + 41
    assert (first == nodes // 1000 * 1000).all()
    assert len(dedup.first_of_cluster(left[:0], right[:0])[0]) == 0


# ---------------------------------------------------------------------------------- phases and their files


def execute(pipeline, tasks, logs):
    LocalPipelineExecutor(pipeline, tasks=tasks, logging_dir=str(logs)).run()


def test_a_second_run_repeats_only_missing_tasks(tmp_path, planted):
    shards, removed = planted
    work, logs = tmp_path / "work", tmp_path / "logs"
    phases = {
        "exact": (dedup.exact(hash_files(shards), work), 1),
        "signatures": (dedup.signatures(shards, work, {}), len(shards)),
        "buckets": (dedup.buckets(shards, work, {}), 14),
        "clusters": (dedup.clusters(shards, work, {}), 1),
    }

    def run_all():
        for name, (pipeline, tasks) in phases.items():
            execute(pipeline, tasks, logs / name)
        return {path: path.stat().st_ino for path in work.rglob("*") if path.is_file()}

    before = run_all()
    assert [
        {reason: rows.tolist() for reason, rows in dedup.removed_rows(work, shard).items()}
        for shard in range(len(shards))
    ] == removed
    assert run_all() == before
    (logs / "signatures/completions/00002").unlink()
    renewed = {path for path, number in run_all().items() if number != before[path]}
    assert renewed == {work / f"signatures/bucket_{band:03d}/00002.minhash.sig" for band in range(14)}
    assert not list(work.rglob("*.part"))


def test_a_missing_file_names_its_phase(tmp_path, planted):
    shards, _ = planted
    work = tmp_path / "work"
    with pytest.raises(RecipeError, match="000000.remove is missing: the search for duplicates"):
        run(dedup.signatures(shards, work, {}), 1)
    deduplicate(shards, work)
    (work / "near-duplicate/000002.remove").unlink()
    with pytest.raises(RecipeError, match="000002.remove is missing: the search for near duplicates"):
        dedup.removed_rows(work, 2)
    (work / "pairs/00013_00.dups").unlink()
    with pytest.raises(RecipeError, match="00013_00.dups is missing: the phase `buckets`"):
        run(dedup.clusters(shards, work, {}), 1)
    (work / "signatures/bucket_007/00003.minhash.sig").unlink()
    with pytest.raises(RecipeError, match=r"00003.minhash.sig is missing: .*00003.parquet"):
        run(dedup.buckets(shards, work, {}), 14)


def test_phases_of_one_task_refuse_more(tmp_path, planted):
    shards, _ = planted
    for steps in (dedup.exact(hash_files(shards), tmp_path), dedup.clusters(shards, tmp_path, {})):
        with pytest.raises(RecipeError, match="2 tasks, expected 1"):
            steps[0].run(None, 0, 2)


def test_without_minhash_only_exact_duplicates_are_removed(tmp_path, planted):
    shards, removed = planted
    run(dedup.exact(hash_files(shards), tmp_path / "work"), 1)
    rows = dedup.removed_rows(tmp_path / "work", 2)
    assert {reason: found.tolist() for reason, found in rows.items()} == {
        "duplicate": removed[2]["duplicate"]
    }


def test_more_shards_are_compared_than_may_be_open(tmp_path, few_open_files):
    texts = random_texts(30)
    shards = [[text] for text in texts] + [[texts[3]], [edited(texts[5])]]
    removed = deduplicate(write_shards(tmp_path / "clean", shards), tmp_path / "dedup")
    assert [number for number, rows in enumerate(removed) if any(rows.values())] == [30, 31]
