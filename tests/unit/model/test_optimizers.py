"""Muon with AdamW, and what weight decay applies to."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import EXPERTS, SHAPE
from recipe.config.settings import Settings
from recipe.model.build import build_model
from recipe.model.muon import orthogonalise, precision
from recipe.model.optimizers import MuonAdamW, build_muon, decayed
from recipe.project import Refused
from tiny_training import tiny_qwen3
from torch.optim._muon import _zeropower_via_newtonschulz as newton_schulz
from transformers import AutoTokenizer

pytest_plugins = ["tiny_training"]


def optimizer_of(model):
    return MuonAdamW(model, 0.02, 0.003, (0.9, 0.95), 1e-8, 0.1)


def test_a_scaler_of_fp16_changes_no_step_and_skips_one_that_overflows():
    """As on a T4, where `small` trains in fp16: the gradients are scaled, and come back before the step."""
    alone, scaled = tiny_qwen3(), tiny_qwen3()
    optimizers = [optimizer_of(model) for model in (alone, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    ids = torch.arange(20)[None]
    for overflow in (False, True, False):
        before = [parameter.clone() for parameter in scaled.parameters()]
        scaler.scale(scaled(ids, labels=ids).loss).backward()
        if overflow:
            next(scaled.parameters()).grad.fill_(torch.inf)
        else:
            alone(ids, labels=ids).loss.backward()
            optimizers[0].step()
            alone.zero_grad()
        scaler.unscale_(optimizers[1])
        scaler.step(optimizers[1])
        scaler.update()
        scaled.zero_grad()
        changed = [not torch.equal(*pair) for pair in zip(before, scaled.parameters(), strict=True)]
        assert any(changed) != overflow
    for one, other in zip(alone.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_every_parameter_has_one_optimizer_and_matrices_have_muon():
    model = tiny_qwen3()
    optimizer = optimizer_of(model)
    muon, adamw = (
        [id(p) for group in groups for p in group["params"]]
        for groups in (optimizer.param_groups[:1], optimizer.adamw.param_groups)
    )
    assert sorted(muon + adamw) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[i].split(".")[-2] for i in muon} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert all(group["weight_decay"] == 0 for group in optimizer.adamw.param_groups)


@pytest.mark.parametrize("loaded", [False, True])
def test_scheduler_moves_both_optimizers(loaded):
    optimizer = optimizer_of(tiny_qwen3())
    if loaded:
        optimizer.load_state_dict(optimizer_of(tiny_qwen3()).state_dict())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.0015]
    assert [group["lr"] for group in optimizer.adamw.param_groups] == [0.0015]


def steps(model, optimizer, numbers):
    for number in numbers:
        torch.manual_seed(number)
        model(input_ids=torch.randint(40, (2, 8)), labels=torch.randint(40, (2, 8))).loss.backward()
        optimizer.step()
        model.zero_grad()


class Apart:
    """Muon and AdamW of PyTorch, as an earlier release used and saved them."""

    def __init__(self, model):
        matrices, others = ([p for p in group["params"]] for group in optimizer_of(model).param_groups)
        muon = torch.optim.Muon(matrices, 0.02, 0.1, 0.95, adjust_lr_fn="match_rms_adamw")
        self.parts = [muon, torch.optim.AdamW(others, 0.003, (0.9, 0.95), 1e-8, 0.0, fused=True)]

    def step(self):
        for part in self.parts:
            part.step()

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts]}


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_adamws_steps_are_those_of_pytorch():
    model = tiny_qwen3()
    optimizer = optimizer_of(model)
    updated = [p for group in optimizer.param_groups[1:] for p in group["params"]]
    others = [p.detach().clone().requires_grad_() for p in updated]
    torchs = torch.optim.AdamW(others, 0.003, (0.9, 0.95), 1e-8, 0.0, fused=True)
    for number in range(3):
        torch.manual_seed(number)
        model(input_ids=torch.randint(40, (2, 8)), labels=torch.randint(40, (2, 8))).loss.backward()
        for mine, theirs in zip(updated, others, strict=True):
            theirs.grad = mine.grad.clone()
        optimizer.step()
        torchs.step()
        model.zero_grad()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(updated, others, strict=True))


def test_muons_steps_are_those_of_pytorch_around_the_orthogonalisation(monkeypatch):
    """Momentum, the size of a step and weight decay, with PyTorch's iteration in place of ours."""

    def by_pytorch(batch):
        return torch.stack([newton_schulz(m, (3.4445, -4.775, 2.0315), 5, 1e-7) for m in batch])

    monkeypatch.setattr("recipe.model.muon.orthogonalise", by_pytorch)
    start = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
    moved = []
    for build in (
        optimizer_of,
        lambda model: torch.optim.Muon([model.inner], 0.02, 0.1, 0.85, adjust_lr_fn="match_rms_adamw"),
    ):
        model = torch.nn.LayerNorm(2)  # AdamW must have something, too
        model.inner = torch.nn.Parameter(start.clone())
        optimizer = build(model)
        gradients = torch.Generator().manual_seed(1)
        momentum = 0.85
        for _ in range(3):
            assert optimizer.param_groups[0]["momentum"] == momentum
            model.inner.grad = torch.randn(start.shape, generator=gradients)
            optimizer.step()
            momentum += (0.95 - 0.85) / 300
            if isinstance(optimizer, torch.optim.Muon):
                optimizer.param_groups[0]["momentum"] = momentum
        moved.append(model.inner.detach())
    assert torch.equal(*moved)


def test_muons_momentum_rises_over_300_steps_and_stays():
    optimizer = optimizer_of(tiny_qwen3())
    seen = []
    for _ in range(310):
        seen.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
    assert seen[0] == 0.85 and seen[150] == pytest.approx(0.9) and seen[299] < 0.95
    assert seen[301:] == [0.95] * 9


def matrix(shape, least):
    """A random matrix with singular values from 1 to `least`, evenly spread over the orders of magnitude."""
    side = min(shape)
    left, right = (torch.linalg.qr(torch.randn(n, side))[0] for n in shape)
    return left * torch.logspace(0, math.log10(least), side) @ right.T


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32), (96, 64)])
def test_muon_makes_singular_values_about_equal(shape, precision, monkeypatch):
    """In both precisions and both forms of the iteration; and the directions stay."""
    monkeypatch.setattr("recipe.model.muon.precision", lambda: precision)
    torch.manual_seed(0)
    update = 1e-4 * matrix(shape, least=0.01)
    rows = orthogonalise(update).float()
    assert rows.norm(dim=1).tolist() == pytest.approx(
        [min(1, shape[1] / shape[0]) ** 0.5] * len(rows), rel=4e-3
    )
    # What PyTorch's match_rms_adamw relies on: a step is 0.2 x the rate in the root of the mean of squares.
    size = max(shape) ** 0.5 * rows.square().mean().sqrt().item()
    assert size == pytest.approx(1, rel=2e-3)
    monkeypatch.setattr("recipe.model.muon.even_rows", lambda matrices: matrices)
    found = orthogonalise(update).float()
    values = torch.linalg.svdvals(found)
    assert 0.55 < values.min() < values.max() < 1.28
    wide = update if shape[0] <= shape[1] else update.T
    left, _, right = torch.linalg.svd(
        wide / (wide @ wide.T).abs().sum(1, keepdim=True).sqrt(), full_matrices=False
    )
    exact = left @ right if shape[0] <= shape[1] else (left @ right).T
    assert torch.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.97


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(16, 48), (32, 32)])
def test_muon_stays_finite_where_a_singular_value_is_at_its_bound(shape, precision, monkeypatch):
    """Of a matrix of rank one the scaling leaves exactly 1. A little more, and the iteration explodes."""
    monkeypatch.setattr("recipe.model.muon.precision", lambda: precision)
    monkeypatch.setattr("recipe.model.muon.even_rows", lambda matrices: matrices)
    torch.manual_seed(0)
    for update in (torch.ones(shape), torch.outer(torch.randn(shape[0]), torch.randn(shape[1]))):
        assert torch.linalg.svdvals(orthogonalise(1e-4 * update).float()).max() < 1.28
    assert torch.equal(orthogonalise(torch.zeros(shape)), torch.zeros(shape, dtype=precision))


def test_embeddings_have_a_rate_of_their_own():
    model = tiny_qwen3()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # not shared
    embeddings, output = model.model.embed_tokens.weight, model.lm_head.weight
    optimizer = MuonAdamW(model, 0.02, 0.003, (0.9, 0.95), 1e-8, 0.1, 0.1)
    rates = {id(p): group["lr"] for group in optimizer.adamw.param_groups for p in group["params"]}
    assert rates.pop(id(embeddings)) == 0.1 and set(rates.values()) == {0.003}
    before = [p.detach().clone() for p in (embeddings, output)]
    steps(model, optimizer, range(1))
    # The first step of AdamW is as long as the rate, wherever there is a gradient.
    moved = [(p - old).abs().max().item() for p, old in zip((embeddings, output), before, strict=True)]
    assert moved == pytest.approx([0.1, 0.003], rel=0.1)


def test_shared_embeddings_have_no_rate_of_their_own():
    settings = Settings(1, 1, muon_learning_rate=0.02, embedding_learning_rate=0.1)
    model = tiny_qwen3()
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(Refused, match="this model's output shares the embeddings' matrix"):
        build_muon(model, settings, None)


def test_a_checkpoint_of_an_earlier_release_is_loaded():
    model = tiny_qwen3()
    before, after = Apart(model), optimizer_of(model)
    steps(model, before, range(3))
    after.load_state_dict(before.state_dict())
    saved = {p: state for part in before.parts for p, state in part.state.items()}
    assert saved.keys() == after.state.keys() == set(model.parameters())
    for parameter, state in saved.items():
        assert state.keys() == after.state[parameter].keys()
        assert all(torch.equal(state[key], after.state[parameter][key]) for key in state)
    assert after.param_groups[0]["momentum"] == 0.95
    steps(model, after, range(3, 4))
    assert all(after.state[p]["step"] == 4 for group in after.param_groups[1:] for p in group["params"])


def test_every_matrix_of_the_experts_is_orthogonalised_on_its_own(corpus):
    """The step is that of the same matrices as parameters of their own."""
    values = {"model_type": "qwen3_moe"} | SHAPE | EXPERTS
    model = build_model(values, AutoTokenizer.from_pretrained(corpus), "eager", 0)
    optimizer = optimizer_of(model)
    experts = model.model.layers[0].mlp.experts.down_proj
    alone = torch.nn.LayerNorm(2)  # AdamW must have something, too
    alone.matrices = torch.nn.ParameterList([expert.detach().clone() for expert in experts])
    other = optimizer_of(alone)
    experts.grad = torch.randn(experts.shape, generator=torch.Generator().manual_seed(0))
    for matrix, gradient in zip(alone.matrices, experts.grad.clone(), strict=True):
        matrix.grad = gradient
    optimizer.step()
    other.step()
    for mine, theirs in zip(experts, alone.matrices, strict=True):
        # bfloat16, and products of batches are summed in another order.
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("precision", "rounding"), [(torch.bfloat16, 0.02), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32)])
def test_a_batch_of_matrices_is_orthogonalised_as_each_alone(shape, precision, rounding, monkeypatch):
    """Products of batches are summed in another order."""
    monkeypatch.setattr("recipe.model.muon.precision", lambda: precision)
    torch.manual_seed(0)
    batch = torch.randn(3, *shape)
    alone = torch.stack([orthogonalise(matrix) for matrix in batch])
    torch.testing.assert_close(orthogonalise(batch), alone, rtol=0, atol=rounding)
    # Rows of equal length move the singular values a little; here are those of the iteration.
    monkeypatch.setattr("recipe.model.muon.even_rows", lambda matrices: matrices)
    assert torch.linalg.svdvals(orthogonalise(batch).float()).max() < 1.28


@pytest.mark.parametrize("units, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_muon_computes_in_bf16_only_with_units_for_it(units, dtype, monkeypatch):
    """A CPU with AVX2 alone needs a hundred times as long in bf16."""
    monkeypatch.setattr("recipe.model.muon.detect", lambda: SimpleNamespace(fast_bf16=units))
    precision.cache_clear()
    try:
        assert orthogonalise(torch.eye(4, 8)).dtype == dtype
    finally:
        precision.cache_clear()


def test_resumed_optimizer_steps_identically():
    straight = tiny_qwen3()
    steps(straight, optimizer_of(straight), range(6))
    first = tiny_qwen3()
    optimizer = optimizer_of(first)
    steps(first, optimizer, range(3))
    resumed = tiny_qwen3()
    resumed.load_state_dict(first.state_dict())
    again = optimizer_of(resumed)
    again.load_state_dict(optimizer.state_dict())
    steps(resumed, again, range(3, 6))
    assert same_weights(straight, resumed)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape", "matrices"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 2}, ["attn.c_attn", "attn.c_proj", "mlp.c_fc"]),
        ("qwen3", {}, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("mistral", {}, ["q_proj", "o_proj", "down_proj"]),
        ("qwen2", {}, ["q_proj", "o_proj", "down_proj"]),
        ("olmo2", {}, ["q_proj", "o_proj", "down_proj"]),
        ("gemma3_text", {}, ["q_proj", "o_proj", "down_proj"]),
        (
            "qwen3_moe",
            EXPERTS,
            ["q_proj", "experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"],
        ),
        ("gpt_neox", {}, ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h"]),
    ],
)
def test_decay_leaves_norms_biases_and_embeddings_alone(corpus, kind, shape, matrices, tied):
    llama = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    if kind in ("qwen3", "mistral", "gemma3_text", "qwen3_moe"):
        llama |= {"num_key_value_heads": 2, "head_dim": 16}
    values = {"model_type": kind, "tie_word_embeddings": tied} | (llama if kind != "gpt2" else {}) | shape
    model = build_model(values, AutoTokenizer.from_pretrained(corpus), "eager", 0)
    names = set(decayed(model))
    everything = dict(model.named_parameters())
    for name in everything:
        alone = name.endswith("bias") or any(
            part in name for part in ("norm", "ln_", "wte", "wpe", "embed_tokens", "embed_in")
        )
        assert (name in names) == (not alone), name
    assert all(any(matrix in name for name in names) for matrix in matrices)
    output = {"lm_head.weight", "embed_out.weight"} & set(everything)
    assert (output <= names) and bool(output) == (not tied)
