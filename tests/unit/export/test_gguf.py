"""GGUF: llama.cpp itself loads the file, and encodes and continues 200 Japanese prompts as we do."""

import pytest
from conftest import EXPERTS, SHAPE, sentences
from recipe.config.chat_templates import chat_template
from recipe.export.gguf import LIMITS, compare_with_llama_cpp, write_gguf
from recipe.model.build import build_model
from recipe.model.save import complete_configs
from recipe.project import Refused
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


def converted(kind, tmp_path, values=QWEN3):
    """A trained tokenizer, a model, and the GGUF file of both. values: model.json."""
    trained = train_tokenizer(sentences(2000, 1), {"vocab_size": 400, "kind": kind})
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
