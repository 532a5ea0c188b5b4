"""The loss that a model returns, and the z-loss."""

import math

import pytest
import torch
from recipe.model import losses
from recipe.model.build import build_model
from recipe.tokenization.packing import IGNORED
from tiny_training import GPT2
from torch._dynamo.utils import counters
from transformers import AutoTokenizer

pytest_plugins = ["tiny_training"]


def test_z_loss_by_hand():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 0.0], [5.0, 5.0]]])
    labels = torch.tensor([[0, 1, IGNORED]])
    z = math.log(math.exp(2) + 1), math.log(2)
    expected = [(z[0] - 2 + z[1]) / 4, (z[0] ** 2 + z[1] ** 2) / 4]
    got = losses.cross_entropy_and_z(logits, labels, 2, torch.tensor(4), shift_labels=labels)
    assert got.tolist() == pytest.approx(expected, rel=1e-6)
    mean = losses.cross_entropy_and_z(logits, labels, 2, shift_labels=labels)
    assert mean.tolist() == pytest.approx([2 * value for value in expected], rel=1e-6)
    # Without shift_labels, the labels are those of the tokens themselves.
    shifted = losses.cross_entropy_and_z(logits, torch.tensor([[0, 0, 1]]), 2, torch.tensor(4))
    assert shifted.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_z_loss_pulls_on_the_gradient_and_not_on_evaluation(corpus, compiled):
    tokenizer = AutoTokenizer.from_pretrained(corpus)
    ids = torch.arange(5, 37).unsqueeze(0)
    gradients, figures = [], []
    for coefficient in (0.0, 0.5):
        model = build_model(GPT2 | {name: 0.0 for name in GPT2 if "pdrop" in name}, tokenizer, "sdpa", 0)
        plain = model(input_ids=ids, labels=ids, shift_labels=ids).logits
        losses.return_loss_only(model, coefficient)
        called = torch.compile(model, backend="eager") if compiled else model
        output = called(input_ids=ids, labels=ids, shift_labels=ids)
        output["loss"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        figures.append({key: value.item() for key, value in output.items()})
        model.eval()
        assert set(called(input_ids=ids, labels=ids, shift_labels=ids)) == {"loss"}
        figures[-1]["eval"] = called(input_ids=ids, labels=ids, shift_labels=ids)["loss"].item()
        assert called(input_ids=ids).logits.shape == plain.shape
    share = 0.5 * plain.logsumexp(-1).square().mean().item()
    assert figures[1]["z_loss"] == pytest.approx(share, rel=1e-5)
    assert figures[1]["loss"] - figures[1]["z_loss"] == pytest.approx(figures[0]["loss"], rel=1e-5)
    assert figures[1]["eval"] == pytest.approx(figures[0]["eval"], rel=1e-5)
    assert not torch.allclose(gradients[0], gradients[1], rtol=0.1)
    torch._dynamo.reset()
    counters.clear()  # the check after the first step of a later test reads them
