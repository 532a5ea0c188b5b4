"""Floating point operations of a training token."""

from types import SimpleNamespace

import torch
from recipe.model.build import flops_per_token, parameter_count, trained_parameter_count
from tiny_training import tiny_qwen3


def test_flops_count_matrices_and_output():
    model = tiny_qwen3()
    matrices = 4 * 16 * 16 + 3 * 16 * 32
    assert flops_per_token(model, 10) == 6 * (matrices + 40 * 16) + 6 * 1 * 2 * 8 * 10


def test_4_bit_weights_count_as_the_weights_that_they_encode():
    """bitsandbytes packs two of them into a byte of one column."""
    model, packed = tiny_qwen3(), tiny_qwen3()
    layer = packed.model.layers[0].mlp.up_proj
    state = SimpleNamespace(shape=layer.weight.shape)
    layer.weight = torch.nn.Parameter(torch.zeros(256, 1, dtype=torch.uint8), requires_grad=False)
    layer.weight.quant_state = state
    model.model.layers[0].mlp.up_proj.weight.requires_grad = False
    assert parameter_count(packed) == parameter_count(model)
    assert flops_per_token(packed, 10) == flops_per_token(model, 10)


def test_trained_weights_are_counted_also_where_zero_3_keeps_them_elsewhere():
    """DeepSpeed leaves an empty tensor here, and its true size in ds_numel."""
    model = tiny_qwen3()
    model.requires_grad_(False)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.zeros(0))
    layer.weight.ds_numel = 16 * 32
    assert trained_parameter_count(model) == 16 * 32
