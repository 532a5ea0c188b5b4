"""`extends`: a file of a recipe takes the rest from another recipe's file of the same name."""

import json
import shutil

import pytest
from recipe.config import recipe as recipes
from recipe.config.launch import check_deepspeed
from recipe.config.recipe import load_recipe
from recipe.config.staleness import deciding_keys
from recipe.project import CONFIGS, Refused


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """A configs folder with the recipe `base`, a copy of tiny, and `mine`, whose files all extend it."""
    shutil.copytree(CONFIGS / "tiny", tmp_path / "base")
    (tmp_path / "mine").mkdir()
    for file in (tmp_path / "base").glob("*.json"):
        (tmp_path / "mine" / file.name).write_text('{"extends": "base"}')
    monkeypatch.setattr(recipes, "CONFIGS", tmp_path)
    return tmp_path


def write(configs, name, **values):
    """Write a file of a recipe."""
    (configs / f"{name}.json").write_text(json.dumps(values))


def refusal(recipe, *overrides):
    with pytest.raises(Refused) as caught:
        load_recipe(recipe, overrides)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_may_extend_a_whole_file(configs):
    assert load_recipe("mine") == load_recipe("base")
    assert list(load_recipe("mine")["dataset"]["sources"]) == list(load_recipe("base")["dataset"]["sources"])


def test_its_own_keys_replace_those_of_the_base_whole(configs):
    write(configs, "mine/pretrain", extends="base", learning_rate=1e-4, muon_learning_rate=None)
    write(configs, "mine/evaluation", extends="base", tasks={"reading": {"source": "tatoeba"}})
    mine, base = load_recipe("mine"), load_recipe("base")
    assert mine["pretrain"] == base["pretrain"] | {"learning_rate": 1e-4, "muon_learning_rate": None}
    assert list(mine["evaluation"]["tasks"]) == ["reading"]  # the other tasks of the base are gone
    assert mine["evaluation"]["batch_size"] == base["evaluation"]["batch_size"]


def test_a_chain_of_recipes_is_followed(configs):
    shutil.copytree(configs / "mine", configs / "third")
    write(configs, "mine/pretrain", extends="base", learning_rate=1e-4, seed=7)
    write(configs, "third/pretrain", extends="mine", seed=8)
    values = load_recipe("third")["pretrain"]
    assert (values["learning_rate"], values["seed"]) == (1e-4, 8)
    assert values["block_size"] == load_recipe("base")["pretrain"]["block_size"]


def test_an_override_comes_last(configs):
    write(configs, "mine/pretrain", extends="base", learning_rate=1e-4)
    values = load_recipe("mine", ["pretrain.learning_rate=2e-4", "model.rope_parameters.rope_theta=5000.0"])
    assert values["pretrain"]["learning_rate"] == 2e-4
    rotation = load_recipe("base")["model"]["rope_parameters"]
    assert values["model"]["rope_parameters"] == rotation | {"rope_theta": 5000.0} != rotation


def test_an_override_cannot_extend(configs):
    assert "Write it into pretrain.json" in refusal("mine", "pretrain.extends=base")


def test_no_stage_sees_the_key_and_none_becomes_stale(configs):
    """What decides whether a stage is stale is the same before and after a recipe is rewritten."""
    before, after = load_recipe("base"), load_recipe("mine")
    for section in before:
        assert "extends" not in after[section]
        assert deciding_keys(section, after[section]) == deciding_keys(section, before[section])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mine", "would extend itself (mine -> mine)"),
        ("bass", "no such recipe. Did you mean 'base'? Known: base, mine"),
        ("../configs/base", "no such recipe."),
        ("", "no such recipe."),
        (["base", "mine"], "expected the name of one recipe"),
        (None, "expected the name of one recipe"),
    ],
)
def test_a_bad_name_is_refused_with_the_way_out(configs, name, words):
    write(configs, "mine/model", extends=name)
    message = refusal("mine")
    assert message.startswith(f"configs/mine/model.json: extends: {json.dumps(name)}") and words in message


def test_a_circle_of_recipes_is_refused_with_its_files(configs):
    shutil.copytree(configs / "mine", configs / "third")
    write(configs, "mine/model", extends="third")
    write(configs, "third/model", extends="mine")
    message = refusal("mine")
    assert "configs/third/model.json: extends" in message
    assert "(mine -> third -> mine)" in message and "Remove `extends`" in message


def test_a_file_that_the_base_does_not_have_is_refused(configs):
    write(configs, "mine/preference", extends="base")
    assert 'configs/mine/preference.json: extends: "base": configs/base/preference.json does not' in refusal(
        "mine"
    )


@pytest.mark.parametrize("name", ["evaluation", "model"])
def test_a_missing_file_says_how_to_take_it_from_another_recipe(configs, name):
    (configs / f"mine/{name}.json").unlink()
    message = refusal("mine")
    assert f"configs/mine/{name}.json is missing" in message and '{"extends": "tiny"}' in message


def test_a_fault_names_the_file_in_which_the_key_is(configs):
    values = json.loads((configs / "base/pretrain.json").read_text())
    write(configs, "base/pretrain", **values, learning_rat=1)
    message = refusal("mine")
    assert message.startswith(
        "configs/base/pretrain.json (configs/mine/pretrain.json extends it): learning_rat: unknown key"
    )
    write(configs, "base/pretrain", **values)
    write(configs, "mine/pretrain", extends="base", learning_rat=1)
    assert refusal("mine").startswith("configs/mine/pretrain.json: learning_rat: unknown key")
    assert refusal("base", "pretrain.block_sise=1").startswith("configs/base/pretrain.json: block_sise")


def test_a_contradiction_names_both_files_and_an_override_is_no_file_of_the_base(configs):
    write(configs, "mine/model", extends="base", max_position_embeddings=128)
    message = refusal("mine")
    assert "configs/base/pretrain.json (configs/mine/pretrain.json extends it): block_size: 256" in message
    assert "128 positions of configs/mine/model.json" in message
    assert refusal("mine", "pretrain.block_size=200").startswith(
        "configs/mine/pretrain.json: block_size: 200"
    )


def test_bad_json_of_the_base_is_named(configs):
    (configs / "base/model.json").write_text('{"model_type": }')
    assert refusal("mine").startswith("configs/base/model.json:1: not valid JSON")


def test_deepspeed_files_extend_nothing(tmp_path, monkeypatch):
    from recipe.config import launch

    monkeypatch.setattr(launch, "CONFIGS", tmp_path)
    (tmp_path / "deepspeed").mkdir()
    write(tmp_path, "deepspeed/mine", extends="zero2", zero_optimization={"stage": 2})
    with pytest.raises(Refused, match=r"configs/deepspeed/mine\.json: extends: unknown key"):
        check_deepspeed("mine")


def test_tiny_is_complete_in_itself():
    """`cp -r configs/tiny configs/mine` gives a recipe in which every key can be seen and changed."""
    for file in (CONFIGS / "tiny").glob("*.json"):
        assert "extends" not in json.loads(file.read_text("utf-8")), file
