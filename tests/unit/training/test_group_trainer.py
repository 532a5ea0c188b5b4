"""Training by rewards: what is logged of the groups, and rewards that teach nothing."""

import itertools
from types import SimpleNamespace

import pytest
from recipe.config import rewards
from recipe.model.build import build_model
from recipe.project import RecipeError
from recipe.training import training
from recipe.training.callbacks import Meter
from recipe.training.group_trainer import EQUAL_GROUPS, GroupTrainer
from recipe.training.preference_trainer import in_order
from recipe.training.prepare import prepare
from tiny_training import GPT2, plan_of, rows_of
from transformers import AutoTokenizer
from trl import GRPOConfig

pytest_plugins = ["tiny_training"]

VALUES = {
    "block_size": 32,
    "global_batch_size": 8,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 8,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": False,
    "torch_compile": False,
    "shuffle_dataset": False,
    "activation_checkpointing": False,
    "spikes": None,
}


@pytest.fixture
def learn(corpus, tmp_path, monkeypatch, train):
    """Train a tiny model by rewards; returns (figures, rows of metrics.jsonl)."""

    def run(chosen, folder="plain", **changes):
        path = tmp_path / folder
        path.mkdir(exist_ok=True)  # the same folder again continues
        tokenizer = AutoTokenizer.from_pretrained(corpus)
        config = {"preference": VALUES | changes, "model": GPT2, "pretrain": {}}
        run = prepare(plan_of(path, config), "preference", GRPOConfig)
        rows = [{"prompt": [5 + i, 6, 7], "answer": "はい"} for i in range(8)]
        figures = training.train_model(
            run,
            build_model(GPT2, tokenizer, run.choice.attention, 0),
            tokenizer,
            in_order(rows, 0, 1),
            in_order(rows[:3], 0, 1),
            trainer_class=GroupTrainer,
            tokens_per_step=1000,  # more than a step has, so that what is measured differs from it
            processing_class=tokenizer,
            rewards=chosen,
        )
        return figures, rows_of(path / "metrics.jsonl")

    return run


def reward(monkeypatch, values):
    """Replace the reward `length` by one that gives these values, one after the other, again and again."""
    given = []

    def function(attempt):
        given.append(attempt)
        return values[(len(given) - 1) % len(values)]

    monkeypatch.setitem(rewards.REWARDS, "length", rewards.Reward(function, {}, {}))
    return given


def test_what_is_logged_of_the_groups(learn, monkeypatch):
    # Two groups a step: one whose four answers differ, one whose four answers are equal.
    given = reward(monkeypatch, [0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    figures, rows = learn({"length": {"weight": 2.0}})
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3] and figures["steps"] == 3
    for row in steps:
        assert row["reward"] == 1.5 and row["rewards/length/mean"] == 0.75
        assert row["frac_reward_zero_std"] == 0.5 and row["reward_std"] > 0
        assert row["entropy"] > 0 and 1 <= row["completions/mean_length"] <= 8
        assert not [key for key in row if key.startswith("clip_ratio")]
    assert len(given) == 3 * 8 + 3  # each answer once, and one for each of three validation questions
    assert figures["active"]["global_batch"] == 8 and figures["active"]["accumulation"] == 2
    # The tokens are those that were read and written: 24 questions of 3 tokens, and the answers.
    written = sum(8 * row["completions/mean_length"] for row in steps)
    assert steps[-1]["tokens"] == 24 * 3 + round(written)
    last = rows[-1]
    assert figures["eval_loss"] == last["eval_loss"] == -last["eval_reward"]
    assert last["eval_reward"] == pytest.approx(2 / 3 * (given_value(0) + given_value(1) + given_value(2)))


def given_value(position):
    """The values of the three validation questions follow the 24 of the training."""
    return [0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0][(24 + position) % 8]


def test_the_speed_counts_the_tokens_that_were_read_and_written(learn, monkeypatch):
    counted = []
    complete = Meter.complete

    def noted(self, logs, *rest):
        if "loss" in logs:
            counted.append(self.tokens_per_step)
        complete(self, logs, *rest)

    monkeypatch.setattr(Meter, "complete", noted)
    tokens = [row["tokens"] for row in learn({"japanese": {}})[1] if "loss" in row]
    assert counted == [after - before for before, after in itertools.pairwise([0, *tokens])]
    counted.clear()
    with monkeypatch.context() as patch:
        patch.setattr(GroupTrainer, "training_step", killed_after_two_steps)
        with pytest.raises(KeyboardInterrupt):
            learn({"japanese": {}}, "continued", save_strategy="steps", save_steps=2)
    counted.clear()
    tokens = [r["tokens"] for r in learn({"japanese": {}}, "continued", save_strategy="no")[1] if "loss" in r]
    assert counted == [tokens[2] - tokens[1]]


TRAINING_STEP = GroupTrainer.training_step


def killed_after_two_steps(trainer, *inputs):
    if trainer.state.global_step == 2:
        raise KeyboardInterrupt
    trainer.state.num_input_tokens_seen += 100  # the later steps have fewer
    return TRAINING_STEP(trainer, *inputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_stops_before_it_is_trained(learn, monkeypatch, value):
    reward(monkeypatch, [0.0, 1.0, 0.0, 1.0, 1.0, 0.0, value, 1.0])
    with pytest.raises(RecipeError, match=rf"step 1: the reward length is {value}, expected a finite number"):
        learn({"length": {}})


def watcher(history=()):
    said = SimpleNamespace(
        equal_groups=0,
        ever_different=False,
        rewards={"format": {}},
        num_generations=4,
        state=SimpleNamespace(global_step=9, log_history=list(history)),
        is_world_process_zero=lambda: True,
    )
    return lambda different, mean=0.0: GroupTrainer._watch_groups(said, different, mean)


def test_rewards_that_are_equal_from_the_beginning_stop_the_training():
    watch = watcher()
    watch([False] * (EQUAL_GROUPS - 1))
    with pytest.raises(RecipeError) as caught:
        watch([False, False])
    for words in (f"last {EQUAL_GROUPS + 1} groups", "4 answers", "(format; mean 0.000)", "num_generations"):
        assert words in str(caught.value)


@pytest.mark.parametrize("history", [[], [{"frac_reward_zero_std": 0.9}]], ids=["this run", "an earlier run"])
def test_rewards_that_have_become_equal_are_a_warning_said_once(history, capsys):
    watch = watcher(history)
    watch([False] * 50 + [not history])
    for _ in range(2):
        watch([False] * EQUAL_GROUPS, 1.5)
    said = capsys.readouterr().out
    assert said.count("warning: ") == 1 and "mean 1.500" in said and "reached its end" in said


def test_a_group_that_differs_begins_the_count_again(capsys):
    watch = watcher()
    for _ in range(4):
        watch([False] * (EQUAL_GROUPS - 1) + [True])
    assert not capsys.readouterr().out


def test_questions_are_never_encoded_by_trl():
    """Their ids are made by the chat template, where special-token strings in a text are text."""
    assert GroupTrainer._tokenize_prompts(None, [[1, 2]]) == ([[1, 2]], None, {})


def test_the_evaluation_uses_no_random_numbers_of_the_training(learn):
    plain = [row["loss"] for row in learn({"japanese": {}})[1] if "loss" in row]
    rows = learn({"japanese": {}}, folder="measured", eval_strategy="steps", eval_steps=1)[1]
    assert [row["loss"] for row in rows if "loss" in row] == plain and any(plain)
    assert len([row for row in rows if "eval_reward" in row]) == 3


def test_only_the_tokens_of_answers_are_scored(learn, scored):
    """On a CPU, trl would also compute the output for questions and padding."""
    steps = [row for row in learn({"japanese": {}})[1] if "loss" in row]
    assert sum(scored) == round(sum(8 * row["completions/mean_length"] for row in steps))


def test_answers_are_written_with_a_cache(learn, monkeypatch):
    """After its first, each forward pass of generate() reads one token only; without a cache, all of them."""
    widths = []
    generate = GroupTrainer._generate_single_turn

    def noted(self, *given):
        def note(model, arguments, keywords):
            widths.append(keywords["input_ids"].shape[1])

        hook = self.model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            return generate(self, *given)
        finally:
            hook.remove()

    monkeypatch.setattr(GroupTrainer, "_generate_single_turn", noted)
    learn({"japanese": {}}, max_steps=1)
    assert widths[0] == 3 and set(widths) == {1, 3} and widths.count(1) > widths.count(3)
