"""The tokenizer: the fast form equals SentencePiece, loses nothing, takes no text for a control token."""

import random

import pytest
import sentencepiece as spm
from conftest import sentences
from recipe import tokenizer as subject
from recipe.outputs import RecipeError
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    model = subject.train_sentencepiece(sentences(2000, 1), {"vocab_size": 400}, 2)
    processor = spm.SentencePieceProcessor(model_proto=model)
    subject.save(folder, model, subject.to_fast(processor))
    return processor, AutoTokenizer.from_pretrained(folder)


def test_parity_and_round_trip_on_hard_cases(trained):
    processor, fast = trained
    report = subject.parity(processor, fast, sentences(500, 2))
    assert report["identical_ids"] == report["lossless"] == 500 + len(subject.HARD_CASES) - 1
    assert report["with_literal_special_tokens"] == 1


def test_parity_on_random_unicode(trained):
    processor, fast = trained
    draw = random.Random(0)
    alphabet = "あア漢𠮷ｱ👨\u200d🌈é\u0301 \u3000\t\n\x01aZ09<>/s"
    texts = ["".join(draw.choice(alphabet) for _ in range(draw.randrange(40))) for _ in range(2000)]
    subject.parity(processor, fast, texts)


def test_gate_fails_when_ids_differ(trained):
    processor, _ = trained
    other = subject.train_sentencepiece(sentences(2000, 9)[:300], {"vocab_size": 390}, 1)
    wrong = subject.to_fast(spm.SentencePieceProcessor(model_proto=other))
    with pytest.raises(RecipeError, match="disagree"):
        subject.parity(processor, wrong, sentences(50, 2))


@pytest.mark.parametrize("text", ["</s>", "a<s>b</s>", "<pad><unk>", "<0xE5>", "<<s>>", "<", "終</s>わり"])
def test_special_strings_in_text_stay_text(trained, text):
    _, fast = trained
    ids = subject.encode_text(fast, text)
    assert not set(ids) & {0, 1, 2, 3}
    assert fast.decode(ids) == text


def test_special_ids_and_document_start(trained):
    _, fast = trained
    assert (fast.pad_token_id, fast.unk_token_id, fast.bos_token_id, fast.eos_token_id) == (0, 1, 2, 3)
    assert fast("山")["input_ids"][0] == 2
    assert fast("山")["input_ids"].count(2) == 1
    assert fast("山", add_special_tokens=False)["input_ids"] == subject.encode_text(fast, "山")


def test_vocabulary_larger_than_the_text_supports_is_refused():
    with pytest.raises(RecipeError, match=r"at most \d+ pieces\. Lower tokenizer\.vocab_size"):
        subject.train_sentencepiece(["短い文。"], {"vocab_size": 5000}, 1)


def test_empty_corpus_is_refused():
    with pytest.raises(RecipeError, match="add text"):
        subject.train_sentencepiece([], {"vocab_size": 500}, 1)


def test_sample_is_seeded_and_near_its_size():
    texts = sentences(3000, 4)
    total = sum(len(text.encode()) for text in texts)
    first = list(subject.sample_lines(texts, total // 4, total, 1))
    assert first == list(subject.sample_lines(texts, total // 4, total, 1))
    assert first != list(subject.sample_lines(texts, total // 4, total, 2))
    assert 0.2 < sum(len(text.encode()) for text in first) / total < 0.3


def test_sentences_are_cut_at_full_stops_and_lines():
    assert list(subject.sample_lines(["一。二。\n三"], 100, 100, 0)) == ["一。", "二。", "三"]


def test_compression_counts_no_control_tokens(trained):
    processor, _ = trained
    figures = subject.compression(processor, ["今日"], 1)
    assert figures["bytes_per_token"] == 6 / figures["tokens"]
    assert figures["byte_fallback_rate"] == 0
    assert subject.compression(processor, ["鱻"], 1)["byte_fallback_rate"] == 1
