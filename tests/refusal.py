"""What the checks of a recipe say about a change of tiny."""

import pytest
from recipe.config.recipe import check_recipe, load_recipe
from recipe.project import Refused


def tiny() -> dict:
    return load_recipe("tiny")


def refusal(change) -> str:
    values = tiny()
    change(values)
    with pytest.raises(Refused) as caught:
        check_recipe(values, "configs/x")
    return str(caught.value)


def pair(config, **values):
    """Change the packaged pairs `translation`."""
    config["instruction"]["pairs"]["translation"].update(values)


def preference(config, **values):
    """Add a preference.json."""
    batches = {"global_batch_size": 4, "per_device_train_batch_size": 4, "block_size": 256}
    config["preference"] = {"pairs": {"mine": {"path": "p.jsonl"}}, "learning_rate": 1e-6} | batches | values
