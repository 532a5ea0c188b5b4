"""A recipe's file is read strictly; unknown keys and wrong types are refused with the way out."""

import json

import pytest
from recipe.config import dataset, keys, model, training
from recipe.config.recipe import load_recipe
from recipe.project import Refused, nearest
from refusal import refusal


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["pretrain"].update(learning_rat=1), ["pretrain.json: learning_rat", "'learning_rate'"]),
        (
            lambda c: c["pretrain"].update(learning_rate="fast"),
            ["learning_rate", '"fast" is str', "expected float"],
        ),
        (lambda c: c["pretrain"].update(max_steps=True), ["max_steps", "bool"]),
        (lambda c: c["pretrain"].update(use_cpu=True), ["use_cpu", "CUDA_VISIBLE_DEVICES"]),
        (lambda c: c["generation"].update(temperatur=1.0), ["'temperature'"]),
        (lambda c: c["pretrain"].update(data_seed=1), ["data_seed", "decided by seed"]),
        (lambda c: c["pretrain"].update(fsdp="full_shard"), ["fsdp", "the option --fsdp"]),
        (lambda c: c["pretrain"].update(use_cache=True), ["use_cache", "the one before it"]),
        (
            lambda c: c["pretrain"].update(gradient_checkpointing=True),
            ["gradient_checkpointing: unknown key", "It is decided by activation_checkpointing"],
        ),
        (lambda c: c["pretrain"].update(lora={"r": 4}), ["pretrain.json: lora: unknown key"]),
        (
            lambda c: c["model"].update(rope_parameters={"rope_thete": 1e4}),
            ["model.json: rope_parameters: rope_thete: unknown key", "'rope_theta'"],
        ),
        (lambda c: c["model"].update(rope_parameters=[1]), ["rope_parameters: [1] is list"]),
        (
            lambda c: c["model"].update(rope_parameters={"rope_theta": "big"}),
            ['rope_theta: "big" is str', "expected float"],
        ),
        (
            lambda c: c["dataset"]["sources"].update(mine={"sorce": "files", "paths": ["a.txt"]}),
            ['sources.mine: sorce: unknown key (value "files")', "'source'"],
        ),
        (
            lambda c: c["model"].update(model_typo=c["model"].pop("model_type")),
            ["model.json: model_typo: unknown key", "'model_type'"],
        ),
    ],
)
def test_a_bad_key_or_type_is_refused_with_the_way_out(change, words):
    message = refusal(change)
    assert all(word in message for word in words), message


def test_duplicate_key_and_bad_json_name_file_and_line(tmp_path):
    path = tmp_path / "pretrain.json"
    path.write_text('{"seed": 1, "seed": 2}')
    with pytest.raises(Refused, match="seed: occurs twice"):
        keys.read_config(path)
    path.write_text('{"seed": 1,\n "x" 2}')
    with pytest.raises(Refused, match=r"pretrain\.json:2: not valid JSON"):
        keys.read_config(path)


ABSURD = [
    ("[" * 100_000 + "]" * 100_000, "in more than 50 levels"),
    ('{"a":' * 60 + "1" + "}" * 60, "in more than 50 levels"),
    ('{"seed": %s}' % ("1" * 5000), "a number has more than 4,300 digits"),
    ('{"seed": "\\ud800"}', "half of a surrogate pair"),
    ("[1]", "expected a JSON object"),
    ("", "not valid JSON"),
]


@pytest.mark.parametrize(("text", "words"), ABSURD)
def test_absurd_json_is_refused_in_one_line(tmp_path, text, words):
    path = tmp_path / "pretrain.json"
    path.write_text(text)
    with pytest.raises(Refused) as caught:
        keys.read_config(path)
    message = str(caught.value)
    assert words in message and "pretrain.json" in message and "\n" not in message, message
    if text and text != "[1]":
        with pytest.raises(Refused, match="^--set pretrain.seed: ") as caught:
            load_recipe("tiny", [f"pretrain.seed={text}"])


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "pretrain.json").mkdir()
    with pytest.raises(Refused, match="pretrain.json: cannot be read"):
        keys.read_config(tmp_path / "pretrain.json")


def test_an_absurd_name_of_a_recipe_is_refused():
    with pytest.raises(Refused, match="has 300 bytes, expected at most 100"):
        load_recipe("a" * 300)


def typos():
    """(typo, key, known keys): a letter of a key is wrong, missing, double, or swapped with the next one."""
    table = keys.known_keys()
    groups = [
        table["training_arguments"] | training.TRAINING,
        table["generation"],
        table["model"]["qwen3"],
        model.ROPE,
        dataset.DATASET,
        dataset.SOURCE,
        dataset.MINHASH,
    ]
    for known in groups:
        for key in known:
            for position in range(len(key)):
                before, letter, after = key[:position], key[position], key[position + 1 :]
                wrong = "x" if letter != "x" else "y"
                for middle in (wrong + after, after, letter + letter + after, after[:1] + letter + after[1:]):
                    typo = before + middle
                    if typo not in known:
                        yield typo, key, known


def test_typos_are_answered_with_the_right_key():
    for typo, key, known in typos():
        assert f"'{key}'" in nearest(typo, known), (key, typo)


def test_known_keys_are_those_of_the_installed_libraries():
    from recipe.config.known_keys import table

    assert json.loads(json.dumps(table())) == keys.known_keys(), "run: python -m recipe.config.known_keys"
