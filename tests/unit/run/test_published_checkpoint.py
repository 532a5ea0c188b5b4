"""A published checkpoint at the start of a stage: checked again once fetched, and part of freshness."""

import shutil
from pathlib import Path

import pytest
from published_checkpoint import default_options, recipe_of, write_checkpoint
from recipe.config import initial_model
from recipe.config.recipe import check_recipe, load_recipe
from recipe.project import Refused
from recipe.run import decision, freshness, launch, probe
from recipe.run.stage import Stage


def test_a_fetched_checkpoint_is_checked_again_before_it_is_loaded(monkeypatch, tmp_path):
    """Of a checkpoint on the hub nothing is known until stage 05 has fetched it."""
    folder = write_checkpoint(tmp_path / "checkpoint")
    values = recipe_of("nobody/model", pretrain_block_size=512)
    check_recipe(values, "configs/x")
    monkeypatch.setattr(initial_model, "_fetch", lambda name, revision: folder)
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda name, file, revision: str(folder / file)
    )
    continued = Stage("05_pretrain", "x", values, {}, tmp_path, default_options(), -1)
    with pytest.raises(Refused, match="block_size: 512, more than the 256 positions of nobody/model/config"):
        launch.run_training(continued, Path("run_clm.py"))


def test_a_dry_run_before_the_checkpoint_is_fetched_says_what_is_not_known(monkeypatch, capsys):
    monkeypatch.setattr(decision, "load_recipe", lambda *_: recipe_of("nobody/model"))
    monkeypatch.setattr("sys.argv", ["launch", "run_clm.py", "--recipe", "no-such-output", "--dry-run"])
    launch.main()
    assert "parameters   known once the checkpoint is fetched: nobody/model" in capsys.readouterr().out


def test_a_probe_fetches_the_checkpoint_and_checks_again(monkeypatch, tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint")
    values = recipe_of("nobody/model", pretrain_block_size=512)
    monkeypatch.setattr(initial_model, "_fetch", lambda name, revision: folder)
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda name, file, revision: str(folder / file)
    )
    monkeypatch.setattr(probe, "load_recipe", lambda recipe, overrides: values)
    monkeypatch.setattr(probe, "stage_folder", lambda recipe, stage: tmp_path / stage)
    monkeypatch.setattr("sys.argv", ["05_pretrain.sh", "--recipe", "x", "--probe"])
    for name in ("03_tokenizer", "04_tokenize"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stage.json").write_text("{}")
    with pytest.raises(Refused, match="block_size: 512, more than the 256 positions of nobody/model/config"):
        probe.main(Path("run_clm.py"))


def test_changed_weights_are_a_changed_fact(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint")
    values = recipe_of(folder)
    before = freshness.pretraining_facts(values)
    assert before == freshness.pretraining_facts(values)
    shutil.copy(folder / "model.safetensors", tmp_path / "copy")
    shutil.move(tmp_path / "copy", folder / "model.safetensors")
    assert freshness.pretraining_facts(values) != before
    assert freshness.pretraining_facts(load_recipe("tiny")) == {"weights": {}}
