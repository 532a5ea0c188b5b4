"""Training by preferences: which positions are scored."""

import pytest
from recipe.model.build import build_model
from recipe.training import training
from recipe.training.preference_trainer import PreferenceTrainer, in_order
from recipe.training.prepare import prepare
from tiny_training import GPT2, plan_of
from transformers import AutoTokenizer
from trl import DPOConfig

pytest_plugins = ["tiny_training"]

VALUES = {
    "block_size": 32,
    "global_batch_size": 4,
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": False,
    "activation_checkpointing": False,
    "spikes": None,
}
# Ids of questions, and of answers of different lengths, so that there is padding.
ROWS = [
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9 + i] * (1 + i % 3), "rejected_ids": [20] * (1 + i % 4)}
    for i in range(8)
]


def learn(corpus, folder):
    """Train a tiny model for an epoch of `ROWS`, and evaluate it on the first two."""
    plan = plan_of(folder, {"preference": VALUES, "model": GPT2, "pretrain": {}})
    run = prepare(plan, "preference", DPOConfig, {"max_length": None, "torch_compile": False})
    tokenizer = AutoTokenizer.from_pretrained(corpus)
    return training.train_model(
        run,
        build_model(GPT2, tokenizer, run.choice.attention, 0),
        tokenizer,
        in_order(ROWS, 0, 1),
        in_order(ROWS[:2], 0, 1),
        trainer_class=PreferenceTrainer,
        ref_model=build_model(GPT2, tokenizer, run.choice.attention, 0),
        processing_class=tokenizer,
    )


def answer_tokens(rows):
    return sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)


@pytest.mark.usefixtures("train")  # what it cleans up before and after a training
def test_only_the_tokens_of_answers_are_scored(corpus, tmp_path, scored):
    """On a CPU, trl would also compute the output for questions and padding."""
    assert learn(corpus, tmp_path)["steps"] == 2
    # By the model that trains and by the reference: each preference once, and those of the validation side.
    assert sum(scored) == 2 * (answer_tokens(ROWS) + answer_tokens(ROWS[:2]))
