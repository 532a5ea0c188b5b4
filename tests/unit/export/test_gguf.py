"""GGUF: llama.cpp itself loads the file, and encodes and continues 200 Japanese prompts as we do."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import EXPERTS, ROOT, SHAPE, sentences
from recipe import project
from recipe.config.chat_templates import chat_template
from recipe.export import gguf
from recipe.export.gguf import LIMITS, compare_with_llama_cpp, write_gguf
from recipe.model.build import build_model
from recipe.model.save import complete_configs
from recipe.project import Refused
from recipe.signals import STOPPING
from recipe.tokenization.save import save_tokenizer
from recipe.tokenization.train import train_tokenizer

QWEN3 = {"model_type": "qwen3", **SHAPE}
TEXTS = [*sentences(190, 9), *(f"{i}匹の🐈と𠮷野家 ▁ へ  行く。" for i in range(10))]
CHATS = [
    [{"role": "user", "content": "山は?"}],
    [
        {"role": "user", "content": "山は?"},
        {"role": "assistant", "content": "高いです。\nはい。"},
        {"role": "user", "content": "湖は?"},
    ],
]


def converted(kind, tmp_path, values=QWEN3, **keys):
    """A trained tokenizer, a model, and the GGUF file of both.

    values: model.json. keys: of tokenizer.json.
    """
    trained = train_tokenizer(sentences(2000, 1), {"vocab_size": 400, "kind": kind} | keys)
    trained.tokenizer.chat_template = chat_template("chat", "あなたは親切です。")
    model = build_model(values, trained.tokenizer, "sdpa", 0).eval()
    folder, work = tmp_path / "model", tmp_path / "work"
    work.mkdir()
    model.save_pretrained(folder)
    save_tokenizer(trained.tokenizer, folder)
    complete_configs(folder)
    spm = tmp_path / "spm.model"
    spm.write_bytes(trained.sentencepiece)
    return trained.tokenizer, model, write_gguf(folder, spm, kind, work)


FLAT = {key: value for key, value in SHAPE.items() if key != "head_dim"}
# llama.cpp knows one pattern of windows, that of the published Gemma 3.
GEMMA = {"model_type": "gemma3_text", **SHAPE, "query_pre_attn_scalar": 16, "sliding_window": 6}
MODELS = {"qwen3": QWEN3, "gemma3_text": GEMMA}
REFUSED = {
    "olmo2": {"model_type": "olmo2", **FLAT},
    "qwen3_moe": {"model_type": "qwen3_moe", **SHAPE, **EXPERTS},
}


@pytest.mark.extra("gguf")
@pytest.mark.parametrize("values", MODELS.values(), ids=MODELS)
def test_bpe_is_identical(tmp_path, values):
    tokenizer, model, file = converted("bpe", tmp_path, values)
    figures = compare_with_llama_cpp(file, tokenizer, model, TEXTS, CHATS)
    assert figures["texts"] == 200
    assert {key: figures[key] for key in LIMITS} == dict.fromkeys(LIMITS, 1.0), figures


@pytest.mark.extra("gguf")
def test_no_token_is_added_before_a_document_that_has_none(tmp_path):
    tokenizer, model, file = converted("bpe", tmp_path, bos_token=None)
    figures = compare_with_llama_cpp(file, tokenizer, model, TEXTS[:20], CHATS)
    assert {key: figures[key] for key in LIMITS} == dict.fromkeys(LIMITS, 1.0), figures


@pytest.mark.extra("gguf")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_type_that_the_converter_cannot_read_is_refused(tmp_path, kind):
    with pytest.raises(Refused, match=f"model_type: {kind}: .* no SentencePiece tokenizer. Train a qwen3"):
        converted("bpe", tmp_path, REFUSED[kind])


@pytest.mark.extra("gguf")
def test_unigram_lacks_byte_fallback_and_that_is_measured(tmp_path):
    tokenizer, model, file = converted("unigram", tmp_path)
    figures = compare_with_llama_cpp(file, tokenizer, model, TEXTS, CHATS)
    assert figures["identical_ids"] == 0.95 and figures["first_difference"] in TEXTS[190:]
    assert figures["identical_chat"] == 0.0  # the line end is a byte token
    assert figures["same_next_token"] == 1.0


def test_kinds_without_a_counterpart_are_refused(tmp_path):
    with pytest.raises(Refused, match="'word-bpe' has no exact counterpart in llama.cpp"):
        write_gguf(tmp_path, tmp_path, "word-bpe", tmp_path)


SERVER = "import time; print('started', flush=True); time.sleep(30); print('outlived', flush=True)"


def test_the_server_ends_with_the_command_that_is_killed():
    code = f"from recipe.export import gguf\ngguf._SERVER = {SERVER!r}\ngguf._serve('model.gguf')"
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert command.stdout.readline() == "started\n"
    command.kill()
    assert command.communicate()[0] == ""


@pytest.fixture
def to_gguf(tmp_path, monkeypatch):
    """The command, on the recipe `tiny` with a validation side of one line; other parts are left out."""
    monkeypatch.syspath_prepend(ROOT / "fine-tuning")
    import to_gguf

    monkeypatch.setattr(project, "OUTPUTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["to_gguf.py", "--recipe", "tiny"])
    for name in ("require_extra", "is_finished", "require_whole"):
        monkeypatch.setattr(to_gguf, name, lambda *_: True)
    tokenizer = SimpleNamespace(chat_template=None)
    monkeypatch.setattr("recipe.tokenization.save.load_tokenizer", lambda _: tokenizer)
    (tmp_path / "tiny/02_dataset").mkdir(parents=True)
    table = pa.table({"text": ["短い\nこれは十文字以上の行です。"]})
    pq.write_table(table, tmp_path / "tiny/02_dataset/valid-web-0.parquet")
    return to_gguf


def test_a_command_that_is_terminated_leaves_nothing(to_gguf, tmp_path, monkeypatch):
    def convert(model, sentencepiece, kind, work):
        assert work.is_dir() and not list(work.iterdir())
        os.kill(os.getpid(), signal.SIGTERM)

    def die(*_):
        raise AssertionError("terminated")

    (tmp_path / "tiny/.tiny.gguf.work/of_a_run_that_was_killed").mkdir(parents=True)
    monkeypatch.setattr(gguf, "write_gguf", convert)
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    signal.signal(signal.SIGTERM, die)
    try:
        with pytest.raises(SystemExit) as end:
            to_gguf.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert end.value.code == 143
    assert {path.name for path in (tmp_path / "tiny").iterdir()} == {"02_dataset", ".lock"}


def test_a_validation_side_without_lines_is_refused(to_gguf, tmp_path):
    assert to_gguf.lines("tiny") == ["これは十文字以上の行です。"]
    pq.write_table(pa.table({"text": ["短い"]}), tmp_path / "tiny/02_dataset/valid-web-0.parquet")
    with pytest.raises(Refused, match="02_dataset: no line of the validation side has 10 or more"):
        to_gguf.lines("tiny")
