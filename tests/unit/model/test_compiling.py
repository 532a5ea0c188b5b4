"""Compiling a model in parts."""

import functools

import pytest
import torch
from recipe.model.build import build_model
from recipe.model.compiling import compile_parts
from recipe.model.losses import return_loss_only
from tiny_training import GPT2
from torch._dynamo.utils import counters
from transformers import AutoTokenizer

pytest_plugins = ["tiny_training"]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
MODELS = {
    "gpt2": {key: 0.0 if "pdrop" in key else value for key, value in GPT2.items()},
    "qwen3": SMALL | {"model_type": "qwen3", "head_dim": 16, "num_hidden_layers": 3},
    # Its layers are of two kinds: with and without a window.
    "gemma3_text": SMALL
    | {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 8}
    | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
}


@pytest.fixture(autouse=True)
def fresh_counters(monkeypatch):
    """Without C++, which takes long; the check after the first step of a later test reads the counters."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def loss_and_gradients(tokenizer, values, compiled):
    model = build_model(values, tokenizer, "sdpa", 0).train()
    return_loss_only(model, 0.01)
    if compiled:
        compile_parts(model)
    ids = torch.arange(5, 69).view(2, 32)
    batch = {"input_ids": ids, "labels": ids, "shift_labels": ids, "use_cache": False}
    loss = model(**batch)["loss"]
    loss.backward()
    with torch.no_grad():
        evaluated = model.eval()(**batch)["loss"]
    return loss.item(), evaluated.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", MODELS)
def test_parts_compute_what_the_model_does(corpus, kind):
    tokenizer = AutoTokenizer.from_pretrained(corpus)
    plain, found = (loss_and_gradients(tokenizer, MODELS[kind], compiled) for compiled in (False, True))
    assert found[:2] == pytest.approx(plain[:2], rel=1e-6)
    torch.testing.assert_close(found[2], plain[2], rtol=1e-5, atol=1e-7)


def test_equal_layers_are_compiled_once(corpus):
    tokenizer = AutoTokenizer.from_pretrained(corpus)
    graphs = []
    for layers in (2, 5):
        counters.clear()
        loss_and_gradients(tokenizer, MODELS["qwen3"] | {"num_hidden_layers": layers}, compiled=True)
        graphs.append(counters["stats"]["unique_graphs"])
        torch._dynamo.reset()
    assert graphs[0] == graphs[1] > 0
