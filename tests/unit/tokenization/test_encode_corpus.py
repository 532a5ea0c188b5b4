"""Bulk tokenisation: the exact ids, counts by source, and the stage killed, resumed, and given bad input."""

import json
import os
import random
import re
import signal
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import MINI, Project, sentences
from recipe.corpus.shards import list_shards
from recipe.project import RecipeError
from recipe.tokenization.encode_corpus import document_frame, make_encoder, vocab_size
from recipe.tokenization.token_files import TokenFile
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

# transformers is imported inside functions, because workers of the last tests import this file.
LITERALS = ["<|end|>という文字列", "</s><s><pad>", "<0xE5>"]


def load(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory):
    """A folder as stage 03 writes it for the SentencePiece kind."""
    from recipe.tokenization.train import train_tokenizer

    folder = tmp_path_factory.mktemp("sentencepiece")
    tokenizer, model = train_tokenizer(sentences(2000, 1), {"kind": "unigram", "vocab_size": 400})
    tokenizer.save_pretrained(folder)
    (folder / "spm.model").write_bytes(model)
    return folder


def byte_level(folder, bos):
    """A byte-level BPE as stage 03 saves one; `bos`: the post-processor puts <|start|> before a text."""
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.BPE())
    fast.decoder = decoders.ByteLevel()
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(sentences(500, 2), trainer)
    if bos:
        fast.post_processor = processors.TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", 1)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|end|>"
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bos", [True, False])
def test_byte_level_ids_are_those_of_the_class_and_literals_are_text(tmp_path, bos):
    folder = byte_level(tmp_path, bos)
    fast, encode = load(folder), make_encoder(folder)
    texts = sentences(50, 3)
    before, _ = document_frame(folder)
    assert before == ([1] if bos else [])
    assert [before + ids.tolist() for ids in encode(texts)] == [fast(text)["input_ids"] for text in texts]
    for text, ids in zip(LITERALS, encode(LITERALS), strict=True):
        assert not {0, 1} & set(ids.tolist())
        assert fast.decode(ids) == text


def test_sentencepiece_ids_are_those_of_the_class_and_literals_are_text(sentencepiece_folder):
    fast, encode = load(sentencepiece_folder), make_encoder(sentencepiece_folder)
    texts = sentences(50, 3)
    before, after = document_frame(sentencepiece_folder)
    assert (before, after, vocab_size(sentencepiece_folder)) == ([2], [3], len(fast))
    assert [before + ids.tolist() for ids in encode(texts)] == [fast(text)["input_ids"] for text in texts]
    for ids in encode(LITERALS):
        assert not {0, 1, 2, 3} & set(ids.tolist())


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    folder = byte_level(tmp_path, False)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["eos_token"] = "<eos>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="eos_token: '<eos>' is not a token"):
        document_frame(folder)


# ------------------------------------------------------------------------------------------- the stage


class Dataset:
    """A project whose stages 02 and 03 are done; `write` makes a shard of stage 02."""

    def __init__(self, folder, tokenizer):
        self.project = Project(folder)
        self.project.add_recipe("mini", MINI)
        self.folder = folder / "outputs/mini/02_dataset"
        self.folder.mkdir(parents=True)
        (folder / "outputs/mini/03_tokenizer").symlink_to(tokenizer)
        for stage in (self.folder, tokenizer):
            (stage / "stage.json").write_text(json.dumps({"wanted": {"config": {}, "inputs": {}}}))
        self.work = folder / "outputs/mini/.04_tokenize.work"
        self.final = folder / "outputs/mini/04_tokenize"

    def write(self, name, texts):
        rows = [{"id": f"{name}/{i}", "source": name.split("-")[1], "text": t} for i, t in enumerate(texts)]
        schema = pa.schema([("id", pa.string()), ("source", pa.string()), ("text", pa.string())])
        pq.write_table(pa.Table.from_pylist(rows, schema), self.folder / f"{name}.parquet")

    def run(self, check=True):
        return self.project.run("pretrain/04_tokenize.py", "--recipe", "mini", check=check)

    def result(self):
        return {path.name: path.read_bytes() for path in self.final.glob("*.???")}


def documents(count, seed):
    draw = random.Random(seed)
    lines = sentences(count * 3, seed)
    return ["\n".join(lines[3 * i : 3 * i + draw.randrange(1, 4)]) for i in range(count)]


@pytest.fixture
def dataset(tmp_path, sentencepiece_folder):
    dataset = Dataset(tmp_path / "project", sentencepiece_folder)
    dataset.write("valid-text-00000", documents(5, 1))
    dataset.write("valid-other-00000", documents(5, 2))  # held out
    return dataset


def test_every_document_once_in_the_order_of_the_shards(dataset, sentencepiece_folder):
    texts = {}
    for number in (0, 1, 9, 10):
        texts[number] = documents(300, number)
        dataset.write(f"train-text-{number:05d}", texts[number])
    dataset.write("train-text-00002", [])
    dataset.run()
    fast, file = load(sentencepiece_folder), TokenFile(dataset.final / "train")
    expected = [fast(text)["input_ids"] + [3] for part in texts.values() for text in part]
    assert np.split(file.tokens, np.cumsum(file.lengths)[:-1])[700].tolist() == expected[700]
    assert file.tokens.tolist() == [i for ids in expected for i in ids]
    assert sorted(path.name for path in dataset.final.iterdir()) == [
        *("stage.json", "train.bin", "train.idx", "valid.bin", "valid.idx")
    ]
    figures = json.loads((dataset.final / "stage.json").read_text())["figures"]
    assert figures["sources"]["train"] == {
        "text": {
            "first_document": 0,
            "first_token": 0,
            "documents": 1200,
            "bytes": sum(len(text.encode()) for part in texts.values() for text in part),
            "tokens": len(file.tokens),
        }
    }
    assert figures["totals"]["train"]["largest_id"] == max(map(max, expected))
    assert list(figures["sources"]["valid"]) == ["text"]


def test_a_source_begins_where_the_one_before_ends(dataset):
    dataset.project.edit(
        "mini", "dataset", sources={n: {"source": "descriptions"} for n in ("a", "a-b", "b")}
    )
    for name in ("valid-a-00000", "train-a-00000", "train-a-00001", "train-a-b-00000", "train-b-00000"):
        dataset.write(name, documents(20, 1))
    (dataset.folder / "valid-text-00000.parquet").unlink()
    (dataset.folder / "valid-other-00000.parquet").unlink()
    assert [shard.source for shard in list_shards(dataset.folder, "train")] == ["a", "a", "a-b", "b"]
    dataset.run()
    figures = json.loads((dataset.final / "stage.json").read_text())["figures"]
    counts, file = figures["sources"]["train"], TokenFile(dataset.final / "train")
    assert [count["first_document"] for count in counts.values()] == [0, 40, 60]
    for count in counts.values():
        assert file.first_token(count["first_document"]) == count["first_token"]
    assert counts["b"]["first_token"] + counts["b"]["tokens"] == len(file.tokens)


def test_killed_in_the_middle_it_continues_to_the_same_bytes(dataset):
    for number in range(40):
        dataset.write(f"train-text-{number:05d}", documents(3000, number))
    running = dataset.project.start("pretrain/04_tokenize.py", "--recipe", "mini")
    ends = time.monotonic() + 60
    while len(done := list(dataset.work.glob("logs/tokenize/completions/*"))) < 5:
        assert time.monotonic() < ends and running.poll() is None
        time.sleep(0.002)
    os.kill(running.pid, signal.SIGKILL)  # only this process: its workers must end by themselves
    running.communicate(timeout=20)  # ends when the last worker has closed the pipe
    assert len(done) < 41 and not dataset.final.exists()
    done = [path.name for path in dataset.work.glob("logs/tokenize/completions/*")]
    parts = {p.name: p.stat().st_mtime_ns for p in dataset.work.glob("parts/*.bin")}
    for side in ("train", "valid"):
        with pytest.raises(RecipeError, match="missing"):
            TokenFile(dataset.work / side)
    result = dataset.run()
    assert f"{len(done)} of 41 tasks are done" in result.stdout
    assert 5 <= len(done) < 41 and len(parts) >= len(done)
    first = dataset.result()
    dataset.project.run("pretrain/04_tokenize.py", "--recipe", "mini", "--force")
    assert len(first) == 4 and dataset.result() == first


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            ["よい天気です。", ""],
            r"train-text-00001\.parquet: document train-text-00001/1 \(''\) has no tokens",
        ),
        (
            ["よい天気です。", None],
            r"train-text-00001\.parquet: document train-text-00001/1: its text is null",
        ),
        (None, r"train-text-00001\.parquet: cannot be read"),
    ],
)
def test_a_bad_shard_stops_the_stage_with_its_name_and_keeps_what_is_there(dataset, texts, message):
    dataset.write("train-text-00000", documents(50, 1))
    dataset.run()
    before = dataset.result()
    if texts is None:
        dataset.write("train-text-00001", documents(50, 1))
        path = dataset.folder / "train-text-00001.parquet"
        path.write_bytes(path.read_bytes()[:-50])
    else:
        dataset.write("train-text-00001", texts)
    result = dataset.project.run("pretrain/04_tokenize.py", "--recipe", "mini", "--force", check=False)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert re.search(message, last), result.stderr
    assert dataset.result() == before


def test_an_empty_side_is_refused(dataset):
    dataset.write("train-text-00000", [])
    result = dataset.run(check=False)
    assert result.returncode == 1 and "train: no document on this side of the split" in result.stderr
    assert not dataset.final.exists()
