"""Mixtures of experts: the precision of their products, and the balance of their load."""

import pytest
import torch
from conftest import EXPERTS, SHAPE
from recipe.model import experts as module
from recipe.model.build import build_model
from recipe.model.experts import MULTIPLE, balance, even_groups
from recipe.model.losses import return_loss_only
from recipe.tokenization.packing import IGNORED
from torch._dynamo.utils import counters
from transformers import AutoTokenizer

pytest_plugins = ["tiny_training"]

MOE = {"model_type": "qwen3_moe", "router_aux_loss_coef": 0.01} | SHAPE | EXPERTS


@pytest.fixture
def model(corpus):
    return build_model(MOE, AutoTokenizer.from_pretrained(corpus), "sdpa", 0).train()


def batch(trained=32):
    """A row of 32 tokens; the last ones have no label."""
    ids = torch.arange(5, 37).unsqueeze(0)
    labels = torch.where(torch.arange(32) < trained, ids, IGNORED)
    return {"input_ids": ids, "labels": labels, "shift_labels": labels}


def test_experts_compute_in_the_type_of_autocast(model):
    """As transformers' loop over the experts does, whose products autocast knows."""
    experts = model.model.layers[0].mlp.experts
    torch.manual_seed(0)
    hidden, index = torch.randn(20, 32), torch.randint(4, (20, 2))
    index[:, 1] = (index[:, 0] + 1) % 4
    weights = torch.full((20, 2), 0.5)
    results = {}
    for name in ("grouped_mm", "eager"):
        model.set_experts_implementation(name)
        exact = experts(hidden, index, weights)
        with torch.autocast("cpu", torch.bfloat16):
            half = experts(hidden, index, weights)
        results[name] = exact, (half.float() - exact).abs().max() / exact.abs().max()
    torch.testing.assert_close(results["grouped_mm"][0], results["eager"][0])
    assert 1e-4 < results["grouped_mm"][1] < 2 * results["eager"][1]


def chosen_experts(tokens, used):
    """Two different experts for each token, of the first `used`."""
    first = torch.randint(used, (tokens, 1))
    return torch.cat([first, (first + 1 + torch.randint(used - 1, (tokens, 1))) % used], dim=1)


def test_in_a_large_batch_every_expert_gets_a_multiple_of_tokens():
    torch.manual_seed(0)
    hidden, index, weights = torch.randn(1100, 32), chosen_experts(1100, 3), torch.rand(1100, 2)
    more, added, shares = even_groups(hidden, index, weights, 4)
    before, after = (torch.bincount(i.flatten(), minlength=4)[:4] for i in (index, added))
    assert (before % MULTIPLE).any() and not (after % MULTIPLE).any()
    assert (after - before < MULTIPLE).all() and after[3] == 0
    assert torch.equal(more[:1100], hidden) and not more[1100:].any() and not shares[1100:].any()
    assert even_groups(hidden[:900], index[:900], weights[:900], 4)[0].shape == (900, 32)


def test_what_is_added_changes_neither_outputs_nor_gradients(model, monkeypatch):
    experts = model.model.layers[0].mlp.experts
    torch.manual_seed(0)
    index = chosen_experts(1100, 4)
    given = [torch.randn(1100, 32, requires_grad=True), torch.rand(1100, 2, requires_grad=True)]
    results = []
    for function in (even_groups, lambda hidden, index, weights, count: (hidden, index, weights)):
        monkeypatch.setattr(module, "even_groups", function)
        with torch.autocast("cpu", torch.bfloat16):
            output = experts(given[0], index, given[1])
        loss = (output.float() * torch.linspace(-1, 1, 32)).sum()
        results.append([output, *torch.autograd.grad(loss, [*given, *experts.parameters()])])
    for one, other in zip(*results, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.01 * other.abs().max().item())


def test_balance_by_hand():
    even = torch.eye(4)[[0, 1, 2, 3]] * 20
    loss, shares = balance((even, even), 1)
    assert loss.item() == pytest.approx(1, rel=1e-4) and shares.tolist() == [[0.25] * 4] * 2
    one = torch.tensor([[20.0, 0, 0, 0]] * 4)
    loss, shares = balance((one,), 1)
    assert loss.item() == pytest.approx(4, rel=1e-4) and shares.tolist() == [[1, 0, 0, 0]]
    # One layer does not hide what the other does: together the two use all experts alike.
    other = torch.tensor([[0, 20.0, 20, 20]] * 4)
    assert balance((one, other), 1)[0].item() > 2
    assert balance((torch.zeros(8, 4),), 2)[0].item() == pytest.approx(2)


def test_micro_batches_add_up_to_one_auxiliary_loss(model):
    """transformers would add a whole one for each micro-batch."""
    return_loss_only(model)
    parts = [model(**batch(trained), num_items_in_batch=torch.tensor(40)) for trained in (32, 8)]
    alone = model(**batch())["router_aux_loss"].item()  # the same tokens, and so the same load
    assert [part["router_aux_loss"].item() for part in parts] == pytest.approx([0.8 * alone, 0.2 * alone])
    assert alone == pytest.approx(0.01 * 2, rel=0.2)  # near balance at the start


@pytest.mark.parametrize("z_loss", [0.0, 0.5])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_auxiliary_loss_pulls_on_the_routers_and_not_on_evaluation(corpus, compiled, z_loss):
    gradients, figures = [], []
    for coefficient in (0.0, 0.9):
        values = MOE | {"router_aux_loss_coef": coefficient}
        model = build_model(values, AutoTokenizer.from_pretrained(corpus), "sdpa", 0).train()
        return_loss_only(model, z_loss)
        called = torch.compile(model, backend="aot_eager") if compiled else model
        output = called(**batch())
        output["loss"].backward()
        gradients.append(model.model.layers[1].mlp.gate.weight.grad)
        figures.append({key: value.sum().item() for key, value in output.items()})
        assert set(model.eval()(**batch())) == {"loss"}
        figures[-1]["eval"] = called(**batch())["loss"].item()
        assert model.config.router_aux_loss_coef == coefficient
    without, with_loss = figures
    assert "router_aux_loss" not in without
    added = with_loss["router_aux_loss"]
    assert added > 0.9 and with_loss["loss"] - added == pytest.approx(without["loss"], rel=1e-5)
    assert with_loss["eval"] == pytest.approx(without["eval"], rel=1e-6)
    assert with_loss["expert_shares"] == pytest.approx(2)  # one for each layer
    assert not torch.allclose(*gradients, rtol=0.1)
    torch._dynamo.reset()
    counters.clear()  # the check after the first step of a later test reads them
