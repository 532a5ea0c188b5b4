"""The steps of a training."""

import pytest
from recipe.training import training
from transformers import TrainingArguments


@pytest.mark.parametrize(
    ("steps", "epochs", "expected"),
    [(-1, 1.0, (13, 2)), (-1, 3.0, (38, 4)), (5, 1.0, (5, 1)), (30, 1.0, (30, 3))],
)
def test_total_steps(tmp_path, steps, epochs, expected):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, num_train_epochs=epochs, use_cpu=True
    )
    assert training.total_steps(arguments, 100, 8) == expected
    assert expected[1] * 100 >= expected[0] * 8
