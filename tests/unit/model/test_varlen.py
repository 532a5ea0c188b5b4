"""Attention by bounds of documents: the kernel needs a GPU, so that a loop over the documents replaces it."""

import pytest
import torch
from conftest import GEMMA3, SHAPE
from packed_batches import loss_and_gradients, packed
from recipe.model import varlen
from torch._dynamo.testing import CompileCounter
from transformers import AutoConfig, AutoModelForCausalLM

QWEN3 = {"model_type": "qwen3"} | SHAPE
GROUPED = QWEN3 | {"num_key_value_heads": 1}
GEMMA = {"model_type": "gemma3_text"} | SHAPE | GEMMA3
WINDOW = {"model_type": "mistral", "sliding_window": 8} | SHAPE


def kernel(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """What torch.nn.attention.varlen.varlen_attn computes, by its documentation, with its checks."""
    assert cu_q.dtype == torch.int32 and query.dtype == key.dtype == value.dtype
    assert enable_gqa or query.shape[1] == key.shape[1]
    out = torch.zeros_like(query)
    for begin, end in zip(cu_q.tolist(), cu_q.tolist()[1:], strict=False):
        assert end - begin <= max_q
        if begin == end:
            continue
        distance = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        parts = (part[begin:end].transpose(0, 1) for part in (query, key, value))
        one = torch.nn.functional.scaled_dot_product_attention(
            *parts, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
        out[begin:end] = one.transpose(0, 1)
    return out


@pytest.mark.parametrize("grouped", [True, False], ids=["2.12 and later", "2.11"])
@pytest.mark.parametrize(
    "values",
    [QWEN3, GROUPED, WINDOW, GEMMA],
    ids=["whole", "grouped heads", "sliding window", "windows in some layers"],
)
def test_same_loss_and_gradients_as_with_a_mask(monkeypatch, values, grouped):
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(varlen, "GROUPS", grouped)
    batch = packed([20, 1, 11], [32], [5, 27])
    ours, theirs = (loss_and_gradients(name, batch, **values) for name in ("varlen", "sdpa"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    alone = loss_and_gradients("varlen", packed([32], [32], [32]) | {"labels": batch["labels"]}, **values)
    assert abs(ours[0] - alone[0]) > 1e-4


def test_a_training_batch_without_bounds_is_refused():
    batch = {key: value for key, value in packed([20, 12]).items() if not key.startswith(("cu_", "max_"))}
    with pytest.raises(RuntimeError, match="does not say where its documents begin"):
        loss_and_gradients("varlen", batch, **QWEN3)


def test_generation_uses_the_other_attention():
    torch.manual_seed(1)
    config = AutoConfig.for_model(vocab_size=97, **QWEN3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="varlen").eval()
    prompts = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    options = {"attention_mask": (prompts > 0).long(), "max_new_tokens": 5, "do_sample": False}
    written = model.generate(prompts, **options)
    model.set_attn_implementation("sdpa")
    assert written.tolist() == model.generate(prompts, **options).tolist()


def test_bounds_end_with_the_total_and_have_few_shapes():
    assert packed([64])["cu_seq_lens_q"].tolist() == [0, 64]
    assert packed([60, 4])["cu_seq_lens_q"].tolist() == [0, 60, 64]
    assert packed([16, 16, 32])["cu_seq_lens_q"].tolist() == [0, 16, 32, 64, 64]
    batch = packed([16, 16, 16, 16], [1, 63])
    assert batch["cu_seq_lens_k"].tolist() == [0, 16, 32, 48, 64, 65, 128, 128, 128]
    assert batch["max_length_q"] == 64


@torch.library.custom_op("test::by_bounds", mutates_args=())
def by_bounds(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int
) -> torch.Tensor:
    """`kernel` as an operator, which torch.compile does not look into."""
    return kernel(query, key, value, bounds, bounds, longest, longest, scale=None, window_size=(-1, 0))


by_bounds.register_fake(lambda query, *_: torch.empty_like(query))


@pytest.mark.parametrize("automatic", [True, False])
def test_one_compiled_model_serves_any_number_of_documents(monkeypatch, automatic):
    """Also in a run with phases, which switches automatic dynamic shapes off."""

    def attention(query, key, value, bounds, _, longest, *__, **___):
        return by_bounds(query, key, value, bounds, longest)

    monkeypatch.setattr(varlen, "varlen_attn", attention)
    torch._dynamo.reset()
    torch.manual_seed(1)
    config = AutoConfig.for_model(vocab_size=97, use_cache=False, **QWEN3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="varlen").train()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    for rows in ([64], [20, 1, 43], [8] * 8, [4] * 16):
        batch = packed(rows, [64])
        varlen.for_any_number_of_documents(batch)
        with torch.no_grad(), torch._dynamo.config.patch(automatic_dynamic_shapes=automatic):
            torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)
    assert counter.frame_count == 1


@pytest.mark.parametrize("window", [None, 8])
def test_the_real_kernel_takes_these_arguments(window):
    """On tensors without values: shapes, types and arguments are checked as on a GPU."""
    query, key, value = (
        torch.empty(2, heads, 32, 16, dtype=kind, device="meta", requires_grad=True)
        for heads, kind in ((4, torch.float32), (2, torch.float32), (2, torch.bfloat16))
    )
    bounds = torch.empty(5, dtype=torch.int32, device="meta")
    out, _ = varlen.attend(
        torch.nn.Module(),
        query,
        key,
        value,
        None,
        0.25,
        sliding_window=window,
        cu_seq_lens_q=bounds,
        max_length_q=32,
    )
    assert (out.shape, out.dtype) == ((2, 32, 4, 16), torch.bfloat16)
    out.sum().backward()
    assert key.grad.shape == key.shape
