"""The loss in chunks is that of the whole logits, with the same gradients, and holds no logits."""

import copy
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from recipe.model import chunked_loss
from recipe.model.build import build_model
from recipe.model.chunked_loss import return_loss_in_chunks
from recipe.model.losses import return_loss_only
from recipe.tokenization.packing import IGNORED
from recipe.training import training
from tiny_training import GPT2
from torch._dynamo.utils import counters
from transformers import AutoTokenizer

pytest_plugins = ["tiny_training"]
MODELS = {
    "gpt2": GPT2 | {name: 0.0 for name in GPT2 if "pdrop" in name},  # its output matrix is the embeddings'
    "mistral": {"model_type": "mistral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 1},
}  # fmt: skip


def results(tokenizer, kind, patch, z_loss=0.0, dtype=None, compiled=False, count=None):
    """Outputs in training and in evaluation, and the gradients."""
    model = build_model(MODELS[kind], tokenizer, "sdpa", 0).train()
    patch(model, z_loss)
    call = torch.compile(model, backend="aot_eager") if compiled else model
    ids = torch.arange(5, 69).view(2, 32)
    labels = ids.clone()
    labels[0, 3:7] = IGNORED
    batch = {"input_ids": ids, "labels": labels, "num_items_in_batch": count}
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        output = call(**batch)
        output["loss"].backward()
        figures = {key: value.item() for key, value in output.items()}
        with torch.no_grad():
            figures["eval"] = model.eval()(**batch)["loss"].item()
        assert model(input_ids=ids).logits.shape == (2, 32, len(tokenizer))
    return figures, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mistral", {}),
        ("mistral", {"z_loss": 0.1}),
        ("mistral", {"compiled": True}),
        ("mistral", {"dtype": torch.bfloat16, "count": torch.tensor(50)}),
        ("gpt2", {"z_loss": 0.1, "compiled": True}),
    ],
)
def test_loss_and_gradients_are_those_of_whole_logits(corpus, monkeypatch, kind, options):
    """11 of 64 positions in a chunk: the last chunk is short."""
    tokenizer = AutoTokenizer.from_pretrained(corpus)
    monkeypatch.setattr(chunked_loss, "CHUNK", 11 * len(tokenizer))
    whole, expected = results(tokenizer, kind, return_loss_only, **options)
    figures, gradients = results(tokenizer, kind, return_loss_in_chunks, **options)
    tolerance = 3e-2 if "dtype" in options else 1e-5
    assert figures == pytest.approx(whole, rel=1e-3 if "dtype" in options else 1e-5)
    assert expected.keys() == gradients.keys()
    for name, gradient in gradients.items():
        difference = (gradient - expected[name]).norm() / expected[name].norm()
        assert difference < tolerance, name
    torch._dynamo.reset()
    counters.clear()


def test_no_tensor_of_all_logits_is_made(corpus, monkeypatch):
    """Outside the operation there are no logits, and inside only those of 11 positions."""
    tokenizer = AutoTokenizer.from_pretrained(corpus)
    monkeypatch.setattr(chunked_loss, "CHUNK", 11 * len(tokenizer))
    model = build_model(MODELS["mistral"], tokenizer, "sdpa", 0).train()
    return_loss_in_chunks(model)
    inside, ids, log_softmax = [], torch.arange(5, 69).view(2, 32), torch.Tensor.log_softmax

    def noted(logits, *rest, **more):
        inside.append(len(logits))
        return log_softmax(logits, *rest, **more)

    monkeypatch.setattr(torch.Tensor, "log_softmax", noted)
    with Results() as outside:
        model(input_ids=ids, labels=ids)["loss"].backward()
    assert inside == [11] * 5 + [9]
    assert (64, 32) in outside.shapes and not [shape for shape in outside.shapes if shape[-1:] == (400,)]


class Results(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the shapes of all results; it does not see what a custom operation does inside."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor):
            self.shapes.append(tuple(result.shape))
        return result


def test_only_needed_gradients_are_made():
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(20, 8)
    targets = torch.randint(20, (6,))
    _, of_hidden, of_weight = chunked_loss.chunked_loss(hidden, weight, targets, 0.0, True, False)
    assert of_hidden.shape == hidden.shape and len(of_weight) == 0
    _, of_hidden, of_weight = chunked_loss.chunked_loss(hidden, weight, targets, 0.0, False, True)
    assert len(of_hidden) == len(of_weight) == 0


def test_an_adapter_trains_through_a_frozen_output_matrix(corpus, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(corpus)
    monkeypatch.setattr(chunked_loss, "CHUNK", 11 * len(tokenizer))
    losses, gradients = [], []
    for patch in (return_loss_only, return_loss_in_chunks):
        torch.manual_seed(0)
        model = build_model(MODELS["mistral"], tokenizer, "sdpa", 0)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
        patch(model)
        ids = torch.arange(5, 37).unsqueeze(0)
        output = model(input_ids=ids, labels=ids)
        output["loss"].backward()
        losses.append(output["loss"].item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
        assert chunked_loss.active_loss(model) == ("whole logits", "chunks")[len(losses) - 1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(*gradients)


def test_an_adapter_over_the_output_matrix_is_trained_over_whole_logits(corpus):
    model = build_model(MODELS["mistral"], AutoTokenizer.from_pretrained(corpus), "sdpa", 0)
    run = types.SimpleNamespace(
        arguments=types.SimpleNamespace(use_liger_kernel=False, per_device_train_batch_size=2**12),
        settings=types.SimpleNamespace(block_size=2**12),
        hardware=types.SimpleNamespace(device="cuda"),
        choice=types.SimpleNamespace(compile=False),
        tensor_parallel=1,
    )
    assert training._loss_of(run, model) == "chunks"
    for targets, expected in ((["q_proj"], "chunks"), (["lm_head"], "whole logits")):
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=targets))
        assert training._loss_of(run, adapted) == expected


def test_ligers_forward_is_recognised(corpus):
    model = build_model(MODELS["mistral"], AutoTokenizer.from_pretrained(corpus), "sdpa", 0)

    def lce_forward(self):
        """As Liger puts it into an instance."""

    lce_forward.__module__ = "liger_kernel.transformers.model.mistral"
    model.forward = types.MethodType(lce_forward, model)
    assert chunked_loss.active_loss(model) == "Liger"
