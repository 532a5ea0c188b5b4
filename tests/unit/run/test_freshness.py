"""What stages depend on besides their inputs and their files of the recipe."""

import os

import pytest
from recipe import project
from recipe.config.initial_model import initial_facts
from recipe.corpus.source_files import local_data_set, with_hashes
from recipe.project import RECORD, Refused, write_json
from recipe.run.freshness import (
    export_facts,
    fact_changes,
    hub,
    input_identity,
    stale_inputs,
    tokenizer_facts,
    weights,
)


def test_only_weights_other_than_one_are_facts():
    sources = {"a": {"weight": 2}, "b": {"weight": 1.0}, "c": {}}
    assert weights({"dataset": {"sources": sources}}) == {"a": 2}


def test_an_input_that_is_older_than_its_own_input_is_stale(tmp_path, monkeypatch):
    """Stage 02 was redone from equal settings, 04 was not: what reads 04 must not train on it."""
    monkeypatch.setattr(project, "OUTPUTS", tmp_path)
    dataset, tokens = tmp_path / "mine/02_dataset", tmp_path / "mine/04_tokenize"
    for folder in (dataset, tokens):
        folder.mkdir(parents=True)
    write_json(dataset / RECORD, {"wanted": {"config": {}, "inputs": {}}, "seconds": 1})
    inputs = {"02_dataset": input_identity(dataset), "03_tokenizer": "no longer there"}
    write_json(tokens / RECORD, {"wanted": {"config": {}, "inputs": inputs}})
    assert list(stale_inputs("mine", ["04_tokenize"], {})) == []
    write_json(dataset / RECORD, {"wanted": {"config": {}, "inputs": {}}, "seconds": 2})
    ((stage, changes),) = stale_inputs("mine", ["04_tokenize"], {})
    assert stage == "04_tokenize" and changes == ["inputs.02_dataset: made again"]


def test_a_stage_whose_file_of_the_recipe_was_deleted_is_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(project, "OUTPUTS", tmp_path)
    (tmp_path / "mine/13_preference").mkdir(parents=True)
    wanted = {"config": {"preference": {"beta": 0.1}}, "inputs": {}}
    write_json(tmp_path / "mine/13_preference" / RECORD, {"wanted": wanted})
    ((stage, changes),) = stale_inputs("mine", ["13_preference"], {})
    assert (stage, changes) == ("13_preference", ["preference.beta: 0.1 -> absent"])


def test_a_copied_checkpoint_or_tokenizer_is_the_same_one(tmp_path):
    """Also by the records of an earlier release, which have lists, where nothing was copied."""
    path = tmp_path / "tokenizer.model"
    path.write_text("a")
    (tmp_path / "model.safetensors").write_text("b")
    config = {"tokenizer": {"published": str(tmp_path)}, "dataset": {"sources": {}}}
    for key, facts_now, name in (
        ("published", lambda: tokenizer_facts(config), "tokenizer.model"),
        ("initial_model", lambda: initial_facts({"initial_model": str(tmp_path)}), "model.safetensors"),
    ):
        recorded, file = with_hashes(facts_now()), tmp_path / name
        older = recorded | {key: [[name, 1, file.stat().st_mtime_ns]] * 2}
        assert fact_changes(older, facts_now()) == []
        os.utime(file, (1, 1))
        assert fact_changes(recorded, facts_now()) == []
        assert fact_changes(older, facts_now())
        file.write_text("c")
        assert fact_changes(recorded, facts_now())


@pytest.mark.parametrize(
    ("published", "files", "read"),
    [
        (
            "x",
            ["vocab.json", "merges.txt", "tokenizer_config.json"],
            {"vocab.json", "merges.txt", "tokenizer_config.json"},
        ),
        ("x", ["tokenizer.json", "vocab.json", "merges.txt"], {"tokenizer.json"}),
        ("x/a.model", ["a.model", "tokenizer_config.json", "b.txt"], {"a.model", "tokenizer_config.json"}),
    ],
)
def test_the_files_that_a_published_tokenizer_is_read_from_are_its_facts(tmp_path, published, files, read):
    (tmp_path / "x").mkdir()
    for name in files:
        (tmp_path / "x" / name).write_text("a")
    config = {"tokenizer": {"published": str(tmp_path / published)}, "dataset": {"sources": {}}}
    assert set(tokenizer_facts(config)["published"]) == {str(tmp_path / "x" / name) for name in read}


def test_the_home_of_a_user_who_does_not_exist_is_no_folder():
    name = "~nosuch/x"
    facts = tokenizer_facts({"tokenizer": {"published": name}, "dataset": {"sources": {}}})
    assert facts == {"weights": {}, "published": {}}
    assert local_data_set({"dataset": name}) is None


@pytest.mark.parametrize("repository", [None, "a/b/c", "my model"])
def test_a_push_needs_a_name_that_the_hub_can_have(repository):
    pushed = {"push_to_hub": True, "hub_model_id": repository}
    with pytest.raises(Refused, match=r"finetune\.json: .*hub_model_id.* OWNER/NAME"):
        hub({"instruction": {"pairs": {"mine": {}}}, "finetune": pushed})


def test_the_card_depends_on_the_licences_of_dataset_json():
    recipe = {"instruction": {"pairs": {}}, "pretrain": {}}
    given, plain = ({"a": {"licence": "CC0"}, "b": {}}, {"a": {}, "b": {}})
    with_licence, without = (export_facts(recipe | {"dataset": {"sources": s}}) for s in (given, plain))
    assert with_licence == without | {"licences": {"a": "CC0"}}
