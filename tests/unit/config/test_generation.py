"""The keys of generation.json."""

import pytest
from refusal import refusal


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["generation"].pop("prompts"), ["generation.json: prompts: missing"]),
        (lambda c: c["generation"].update(prompts=[]), ["generation.json: prompts: empty"]),
        (lambda c: c["generation"].update(prompts=[1]), ["prompts: 1", "expected strings"]),
        (lambda c: c["generation"].update(num_return_sequences=None), ["num_return_sequences: null"]),
    ],
)
def test_a_fault_is_named_with_the_way_out(change, words):
    message = refusal(change)
    assert all(word in message for word in words), message
