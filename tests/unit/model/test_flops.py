"""Floating point operations of a training token."""

from recipe.model.build import flops_per_token
from tiny_training import tiny_qwen3


def test_flops_count_matrices_and_output():
    model = tiny_qwen3()
    matrices = 4 * 16 * 16 + 3 * 16 * 32
    assert flops_per_token(model, 10) == 6 * (matrices + 40 * 16) + 6 * 1 * 2 * 8 * 10
