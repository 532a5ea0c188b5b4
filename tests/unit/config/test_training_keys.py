"""Keys of ours in a training file: their JSON types, and boards."""

import dataclasses
import importlib.util

import pytest
from recipe.config import training
from recipe.config.settings import Settings
from recipe.config.training import check_boards
from recipe.project import Refused


def test_board_without_its_library_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else name)
    with pytest.raises(Refused, match=r"pretrain.json: report_to: wandb is not installed.*pip install wandb"):
        check_boards(["wandb"], "pretrain.json")
    assert check_boards("none", "x") == check_boards(None, "x") == ["tensorboard"]


def test_json_types_are_those_of_the_dataclass():
    types = training.TRAINING
    assert types["block_size"] == "int" and types["sample_steps"] == "int|list|null"
    assert types["muon_learning_rate"] == "float|null" and training.TUNING == {"lora": "dict|null"}
    assert set(training.INITIAL) == {"initial_model", "initial_revision"}
    everywhere = training.TRAINING | training.INITIAL | training.TUNING
    assert list(everywhere.values()).count("any") == 0
    assert set(everywhere) == {field.name for field in dataclasses.fields(Settings)}
