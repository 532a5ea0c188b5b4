"""A whole recipe: it is checked in a moment, its files agree, and overrides are applied."""

import re
import shutil
import subprocess
import sys

import pytest
from recipe.config import recipe as recipe_module
from recipe.config.recipe import check_recipe, load_recipe, recipes
from recipe.project import CONFIGS, Refused
from refusal import pair, preference, refusal, tiny


@pytest.mark.parametrize("recipe", recipes())
def test_shipped_recipe_is_valid(recipe):
    load_recipe(recipe)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["pretrain"].update(block_size=4096), ["block_size: 4096", "1024 positions"]),
        (
            lambda c: c["model"].update(vocab_size=50257),
            ["model.json: vocab_size: 50257", "tokenizer.json has 4000"],
        ),
        (lambda c: c["model"].update(bos_token_id=0), ["bos_token_id: 0", "tokenizer has 2"]),
        (lambda c: pair(c, source="manpages"), ["expected a source of kind tatoeba"]),
        (lambda c: c["dataset"]["sources"].pop("tatoeba"), ["not a source of dataset.json", '"pairs": {}']),
        (lambda c: c["generation"].update(max_new_tokens=2000), ["max_new_tokens: 2000", "1024 positions"]),
        (
            lambda c: (c["finetune"].update(sample_steps=5), c["generation"].update(questions=[])),
            ["finetune.json: sample_steps: 5", "no questions"],
        ),
        (lambda c: preference(c, block_size=4096), ["preference.json: block_size: 4096", "1024 positions"]),
        (
            lambda c: (preference(c), c["instruction"].update(pairs={})),
            ["instruction.json names no pairs", "delete preference.json"],
        ),
    ],
)
def test_a_contradiction_names_both_files(change, words):
    message = refusal(change)
    assert all(word in message for word in words), message


def test_agreeing_repetition_is_accepted():
    values = tiny()
    values["model"]["vocab_size"] = values["tokenizer"]["vocab_size"]
    values["model"]["eos_token_id"] = 3
    check_recipe(values, "configs/x")


def test_override_reaches_nested_keys_and_is_checked():
    values = load_recipe("tiny", ["pretrain.learning_rate=1e-4", "dataset.minhash.bands=20"])
    assert values["pretrain"]["learning_rate"] == 1e-4
    assert values["dataset"]["minhash"]["bands"] == 20
    with pytest.raises(Refused, match="'max_steps'"):
        load_recipe("tiny", ["pretrain.max_stepz=3"])
    with pytest.raises(Refused, match="'pretrain'"):
        load_recipe("tiny", ["pretran.max_steps=3"])


def test_check_is_quick_and_does_not_import_torch():
    code = (
        "import sys; from recipe.config.recipe import load_recipe; load_recipe('tiny'); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_bad_recipe_exits_with_2_before_anything_slow_is_imported():
    command = [sys.executable, "-X", "importtime", "-m", "recipe.run.check", "--recipe", "tinny"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "'tiny'" in result.stderr
    imported = set(re.findall(r"^import time:.*\|\s+(\S+)$", result.stderr, re.M))
    assert "recipe.config.recipe" in imported and not imported & {"torch", "transformers", "datasets"}


def test_the_variant_of_a_recipe_differs_in_its_tuning_only():
    one, other = load_recipe("mistral-300m"), load_recipe("mistral-300m-qlora")
    assert {name for name in one if one[name] != other[name]} == {"instruction", "finetune"}
    assert (one["finetune"]["learning_rate"], one["instruction"]["valid_share"]) == (5e-6, 0.1)
    assert other["finetune"]["learning_rate"] == 3e-4
    assert other["finetune"]["lora"]["r"] == other["finetune"]["lora"]["lora_alpha"] == 128


def test_a_misspelt_file_name_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_module, "CONFIGS", tmp_path)
    shutil.copytree(CONFIGS / "tiny", tmp_path / "x")
    (tmp_path / "x/dataset.json").rename(tmp_path / "x/datase.json")
    with pytest.raises(Refused, match=r"configs/x/datase\.json: no stage reads this file\. .*'dataset'"):
        load_recipe("x")
    (tmp_path / "x/datase.json").unlink()
    with pytest.raises(Refused, match=r"configs/x/dataset\.json is missing"):
        load_recipe("x")
