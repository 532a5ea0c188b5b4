"""The rewards: what each gives for an answer, how they are configured, and their tables."""

import json
import math
import re

import pytest
from recipe.config.preference import with_valid_share
from recipe.config.recipe import check_recipe
from recipe.config.rewards import REWARDS, Attempt, score, weights
from recipe.project import CONFIGS
from refusal import preference, refusal, tiny

GRPO = {
    "method": "grpo",
    "rewards": {"japanese": {}},
    "num_generations": 4,
    "max_completion_length": 32,
    "global_batch_size": 8,
}


@pytest.mark.parametrize(
    ("name", "options", "text", "value"),
    [
        ("answer", {}, "  10 本。\n", 1.0),
        ("answer", {}, "１０本。", 1.0),
        ("answer", {}, "10本", 0.0),
        ("format", {"pattern": r"答え: \d+"}, " 答え: 12\n", 1.0),
        ("format", {"pattern": r"答え: \d+"}, "答え: 12です", 0.0),
        ("format", {"pattern": "あ.*ん"}, "あ\nん", 1.0),
        ("length", {}, "はい", 1.0),
        ("length", {}, " \n", 0.0),
        ("length", {"maximum": 2}, "はい。", 0.0),
        ("length", {"minimum": 3, "maximum": 3}, "はい。", 1.0),
        ("japanese", {}, "山です", 1.0),
        ("japanese", {}, "山yama", 0.4),
        ("japanese", {"minimum": 0.2}, "山yama", 1.0),
        ("japanese", {}, "", 0.0),
    ],
)
def test_the_value_of_an_answer(name, options, text, value):
    assert score({name: options | {"weight": 3.0}}, Attempt(text, True, "10本。")) == [pytest.approx(value)]


def test_an_answer_that_did_not_end_or_that_nothing_is_known_of():
    assert score({"length": {}}, Attempt("はい", ended=False)) == [0.0]
    assert score({"answer": {}}, Attempt("", True, "")) == [0.0]  # no expected answer is never the right one


@pytest.mark.parametrize("text", ["", " ", "\0", "あ" * 10_000, "\U000fffff", "\r\n", "�"])
def test_every_reward_of_every_text_is_finite_and_from_0_to_1(text):
    rewards = {"answer": {}, "format": {"pattern": ".*"}, "length": {}, "japanese": {"minimum": 1e-9}}
    assert rewards.keys() == REWARDS.keys()
    values = score(rewards, Attempt(text, True, "はい"))
    assert len(values) == 4 and all(math.isfinite(value) and 0 <= value <= 1 for value in values)


def test_weights_are_1_by_default():
    assert weights({"answer": {}, "length": {"weight": 0.5}}) == [1.0, 0.5]


def grpo(config, **values):
    preference(config, **GRPO | values)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "ppo"}, ['method: "ppo"', "dpo, grpo"]),
        ({"rewards": {}}, ["rewards: empty", "answer, format, length, japanese"]),
        ({"rewards": {"lenght": {}}}, ["rewards.lenght", "Did you mean 'length'"]),
        ({"rewards": {"length": 20}}, ["rewards.length: 20", "expected an object"]),
        ({"rewards": {"length": {"max": 20}}}, ["rewards.length: max", "unknown key"]),
        ({"rewards": {"format": {}}}, ["rewards.format.pattern: missing"]),
        ({"rewards": {"format": {"pattern": "("}}}, ["rewards.format: pattern", "regular expression"]),
        ({"rewards": {"format": {"pattern": ""}}}, ["rewards.format: pattern", "not empty"]),
        ({"rewards": {"length": {"weight": 0}}}, ["rewards.length: weight: 0", "above 0"]),
        ({"rewards": {"length": {"minimum": 9, "maximum": 3}}}, ["minimum 9 is above maximum 3"]),
        ({"num_generations": 1}, ["num_generations: 1", "2 or more", "no other to compare"]),
        ({"num_generations": 3}, ["global_batch_size: 8", "groups of num_generations 3", "multiple of 3"]),
        ({"max_completion_length": 256}, ["max_completion_length: 256", "block_size"]),
        ({"beta": -0.1}, ["beta: -0.1"]),
        ({"loss_type": "sigmoid"}, ['loss_type: "sigmoid"', "dapo"]),
        ({"temperature": 0}, ["temperature: 0"]),
        ({"label_smoothing": 0.1}, ["label_smoothing: 0.1", "only the method dpo"]),
        ({"method": "dpo"}, ["rewards", "only the method grpo", "method is dpo"]),
        ({"spikes": {}}, ["spikes: {}", "Remove the key"]),
        ({"lora": {"r": 4}}, ["lora", "dpo only"]),
        ({"neftune_noise_alpha": 5.0}, ["neftune_noise_alpha: 5.0", "writes the answers"]),
        ({"valid_share": 0.04}, ["valid_share: 0.04", "at least the 0.05 of instruction.json"]),
        ({"pairs": {"translation": {"source": "wiki"}}}, ["preference.json: pairs.translation", "wiki"]),
        ({"pairs": {"x": {"source": "tatoeba"}}}, ["preference.json: pairs.x", "no packaged pairs"]),
    ],
)
def test_a_fault_is_named_with_the_way_out(changes, words):
    message = refusal(lambda config: grpo(config, **changes))
    assert all(word in message for word in words), message


def test_the_share_for_validation_is_that_of_the_tuning_unless_given():
    config = tiny()
    grpo(config)
    assert with_valid_share(config)["valid_share"] == 0.05
    config["instruction"]["valid_share"] = 0.1
    assert with_valid_share(config)["valid_share"] == 0.1
    config["preference"]["valid_share"] = 0.2
    assert with_valid_share(config)["valid_share"] == 0.2


@pytest.mark.parametrize("key", ["rewards", "max_completion_length"])
def test_a_key_that_grpo_needs(key):
    def change(config):
        grpo(config)
        del config["preference"][key]

    assert f"{key}: missing" in refusal(change)


def test_the_example_is_accepted():
    text = (CONFIGS.parent / "fine-tuning/README.md").read_text("utf-8").partition("## 13: rewards")[2]
    config = tiny()
    config["preference"] = json.loads(re.search(r"```json\n(.*?)```", text, re.S)[1])
    check_recipe(config, "configs/x")
