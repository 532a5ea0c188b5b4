"""Figures of a model agree with a calculation by hand."""

import math

import pytest
import torch
from conftest import SHAPE, sentences
from recipe.evaluation import metrics
from recipe.project import RecipeError


@pytest.mark.parametrize(
    ("text", "expected"), [("", 0.0), ("短い", 0.0), ("あいうえおかきくけこ", 0.0), ("あ" * 100, 1 - 1 / 93)]
)
def test_repetition(text, expected):
    assert metrics.repetition(text) == pytest.approx(expected)


def test_distinct_by_hand():
    assert metrics.distinct(["ああい", "ああ"], 2) == pytest.approx(2 / 3)  # ああ, あい, ああ
    assert metrics.distinct(["あ"], 2) == 0


def test_bits_per_byte_by_hand(tmp_path):
    """The packed evaluation gives the same as every document alone, token by token, in float64."""
    from recipe.model.build import build_model
    from recipe.tokenization import encode_text as tokenizers
    from recipe.tokenization.train import train_tokenizer

    fast = train_tokenizer(sentences(2000, 1), {"vocab_size": 400}).tokenizer
    model = build_model({"model_type": "qwen3", **SHAPE}, fast, "sdpa", 0)
    texts = sentences(6, 5)
    figures = metrics.evaluate_texts(model, fast, texts, 200, 2, tmp_path, "x")
    total, count, crossing = 0.0, 0, 0
    place = 0
    for text in texts:
        ids = [2, *tokenizers.encode_text(fast, text), 3]
        # A document across the end of a block sees only the part in its own block: cut it by hand as well.
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
    next(model.parameters()).data.fill_(math.nan)
    with pytest.raises(RecipeError, match=r"x: the loss of .* is nan, so nothing is written"):
        metrics.evaluate_texts(model, fast, texts, 200, 2, tmp_path, "x")


@pytest.fixture(scope="module")
def trained():
    from recipe.model.build import build_model
    from recipe.tokenization.train import train_tokenizer

    fast = train_tokenizer(sentences(2000, 1), {"vocab_size": 400}).tokenizer
    return build_model({"model_type": "qwen3", **SHAPE}, fast, "sdpa", 0), fast


def test_what_a_block_cuts_off_starts_without_context(trained, tmp_path):
    """A change before the cut of a long document changes no loss after it.

    The first token after the cut is the exception: it is predicted from before the cut.
    """
    from recipe.tokenization.packing import IGNORED, PackedBlocks
    from recipe.tokenization.token_files import TokenFile, write_token_file

    model, fast = trained
    ids = [2, *range(10, 140), 3]
    other = [2, *([9] * 60), *ids[61:]]
    losses = []
    for name, document in (("one", ids), ("other", other)):
        write_token_file(tmp_path / name, [document], len(fast))
        block = PackedBlocks(TokenFile(tmp_path / name), 64, fast.pad_token_id)[1]
        logits = model(
            input_ids=block["input_ids"][None], position_ids=block["position_ids"][None], use_cache=False
        ).logits[0]
        assert block["position_ids"][0] == 0 and (block["shift_labels"] != IGNORED).all()
        losses.append(torch.nn.functional.cross_entropy(logits, block["shift_labels"], reduction="none"))
    assert torch.equal(*losses)
    first = PackedBlocks(TokenFile(tmp_path / "one"), 64, fast.pad_token_id)[0]
    assert first["shift_labels"][-1] == ids[64]  # so that every token is predicted


def test_losses_are_summed_over_parts(trained, monkeypatch):
    logits, labels = torch.randn(70, 400), torch.randint(0, 400, (70,))
    labels[::7] = -100
    monkeypatch.setattr(metrics, "ROWS", 16)
    expected = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum")
    assert metrics.sum_of_losses(logits, labels).item() == pytest.approx(expected.item(), rel=1e-6)


def test_bf16_is_near_and_is_really_used(trained, tmp_path):
    model, fast = trained
    texts = sentences(20, 5)
    exact, near = (
        metrics.evaluate_texts(model, fast, texts, 200, 2, tmp_path, "x", bf16)["loss"]
        for bf16 in (False, True)
    )
    assert exact != near and near == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize(
    ("training", "units", "expected"),
    [
        ({}, True, True),
        ({"bf16": True}, False, False),
        ({"bf16": False}, True, False),
        ({"fp16": True}, True, False),
        ({"fp16": False}, True, True),
    ],
)
def test_bf16_where_training_computes_in_it(monkeypatch, training, units, expected):
    from types import SimpleNamespace

    monkeypatch.setattr(metrics, "detect", lambda: SimpleNamespace(device="cpu", fast_bf16=units))
    assert metrics.computes_in_bf16(training) is expected


def test_comparison_has_a_row_per_figure():
    figures = {"tokens": 1234, "response_loss": 1.5, "tasks": {}}
    table = metrics.comparison(figures, figures | {"response_loss": 1.25}).splitlines()
    assert table[2:] == ["| tokens | 1,234 | 1,234 |", "| response loss | 1.5 | 1.25 |"]


def test_evaluation_weighs_tokens_not_batches():
    from recipe.evaluation.metrics import combine

    parts = [
        {"documents": 1, "bytes": 30, "characters": 10, "tokens": 10, "loss_sum": 20.0},
        {"documents": 2, "bytes": 60, "characters": 20, "tokens": 40, "loss_sum": 40.0},
    ]
    total = combine(parts)
    assert total["loss"] == 60 / 50
    assert total["bits_per_byte"] == pytest.approx(60 / math.log(2) / 90)
    assert total["perplexity"] == pytest.approx(math.exp(1.2))


def test_a_loss_whose_perplexity_is_no_number_is_named():
    sums = {"documents": 1, "bytes": 30, "characters": 10, "tokens": 10, "loss_sum": 9000.0}
    with pytest.raises(RecipeError, match="a mean loss of 900 nats per token"):
        metrics.combine([sums])
