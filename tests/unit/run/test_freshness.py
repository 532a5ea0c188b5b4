"""What stages depend on besides their inputs and their files of the recipe."""

from recipe.run.freshness import weights


def test_only_weights_other_than_one_are_facts():
    sources = {"a": {"weight": 2}, "b": {"weight": 1.0}, "c": {}}
    assert weights({"dataset": {"sources": sources}}) == {"a": 2}
