"""Samples during a training."""

from types import SimpleNamespace

import pytest
from recipe.training.sample_prompts import SamplePrompts
from tiny_training import GENERATION, losses_of, rows_of

pytest_plugins = ["tiny_training"]


@pytest.mark.parametrize("steps", [2, [2, 4]])
def test_samples_at_chosen_steps_change_nothing(train, steps):
    plain, sampled = train("plain")[1], train("sampled", sample_steps=steps)
    assert losses_of(sampled[1]) == losses_of(plain)
    rows = rows_of(sampled[2] / "samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (step, prompt) for step in (0, 2, 4, 6) for prompt in GENERATION["prompts"]
    ]
    evaluated = {row["step"]: row["eval_loss"] for row in sampled[1] if "eval_loss" in row}
    assert {row["step"]: row["eval_loss"] for row in rows if row["step"]} == evaluated
    page = (sampled[2] / "samples.md").read_text()
    head, _, *body = page.splitlines()
    assert head.startswith("| prompt | step 0 | step 2, valid loss") and "step 6, valid loss" in head
    assert [line.split(" | ")[0] for line in body] == [f"| {prompt}" for prompt in GENERATION["prompts"]]
    assert not (sampled[2].parent / "plain/samples.jsonl").exists()


def test_an_evaluation_before_the_first_step_samples_nothing_twice(train):
    _, _, folder = train(sample_steps=3, eval_on_start=True, eval_strategy="steps", eval_steps=3)
    rows = rows_of(folder / "samples.jsonl")
    assert [row["step"] for row in rows[:: len(GENERATION["prompts"])]] == [0, 3, 6]


def test_no_rank_stops_by_its_clock(tmp_path):
    """Ranks that share the model by tensor parallelism would wait for the one that has stopped."""
    tokenizer = SimpleNamespace(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    sampling = SamplePrompts(2, {}, GENERATION | {"max_time": 1.0}, tokenizer, tmp_path)
    assert sampling.config.max_time is None and sampling.config.max_new_tokens == 5
