"""The keys of model.json."""

import pytest
from refusal import refusal


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["model"].update(num_key_value_heads=3), ["does not divide by num_key_value_heads 3"]),
        (lambda c: c["model"].update(model_type="mistrall"), ["model_type", "'mistral'"]),
        (
            lambda c: (c["model"].pop("head_dim"), c["model"].update(hidden_size=258)),
            ["model.json: hidden size 258 does not divide by 4"],
        ),
        (lambda c: c["model"].update(hidden_size=10**11), ["hidden_size: 100000000000", "1,000,000"]),
        (lambda c: c["model"].update(num_hidden_layers=0), ["num_hidden_layers: 0", "from 1 to 1,000,000"]),
        (lambda c: c["model"].update(dtype="bfloat16"), ['model.json: dtype: "bfloat16"', "float32"]),
    ],
)
def test_a_fault_is_named_with_the_way_out(change, words):
    message = refusal(change)
    assert all(word in message for word in words), message
