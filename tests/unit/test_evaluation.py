"""Figures about a model agree with a calculation by hand."""

import math

import pytest
import torch
from conftest import SHAPE, sentences
from recipe import evaluation


@pytest.mark.parametrize(
    ("text", "wanted"), [("", 0.0), ("短い", 0.0), ("あいうえおかきくけこ", 0.0), ("あ" * 100, 1 - 1 / 93)]
)
def test_repetition(text, wanted):
    assert evaluation.repetition(text) == pytest.approx(wanted)


def test_bits_per_byte_by_hand(tmp_path):
    """Every document alone, one token at a time, in float64: the packed evaluation must give the same."""
    from recipe import tokenizer as tokenizers
    from recipe.modeling import build_model
    from recipe.tokenizer_training import train_tokenizer

    fast = train_tokenizer(sentences(2000, 1), {"vocab_size": 400}).tokenizer
    model = build_model({"model_type": "qwen3", **SHAPE}, fast, "sdpa", 0)
    texts = sentences(6, 5)
    figures = evaluation.evaluate_texts(model, fast, texts, 200, 2, tmp_path, "x")
    total, count, crossing = 0.0, 0, 0
    place = 0
    for text in texts:
        ids = [2, *tokenizers.encode_text(fast, text), 3]
        # A document that lies across a block's end sees only its own block: cut it by hand as well.
        pieces, start = [], 0
        while start < len(ids):
            room = 200 - place % 200
            pieces.append((start, min(len(ids), start + room)))
            place += pieces[-1][1] - start
            start = pieces[-1][1]
        crossing += len(pieces) > 1
        for begin, end in pieces:
            logits = (
                model(input_ids=torch.tensor([ids[begin:end]]), use_cache=False)
                .logits[0]
                .double()
                .log_softmax(-1)
            )
            for i, target in enumerate(ids[begin + 1 : end + 1]):
                total -= logits[i, target].item()
                count += 1
    assert figures["tokens"] == count == sum(len(tokenizers.encode_text(fast, text)) + 1 for text in texts)
    assert figures["loss_sum"] == pytest.approx(total, rel=1e-5)
    size = sum(len(text.encode()) for text in texts)
    assert figures["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)
    assert not list(tmp_path.iterdir())
