"""What a stage's result depends on beside its inputs and its files of the recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipe.download import file_facts, source_facts
from recipe.initial import initial_facts
from recipe.instructions import no_pairs, pair_facts
from recipe.outputs import ROOT, Refused
from recipe.preferences import preference_facts


def weights(config: dict[str, Any]) -> dict[str, Any]:
    """The weights of sources other than 1: they decide what the tokenizer's sample and an epoch of training
    hold.
    """
    sources = config["dataset"]["sources"].items()
    return {"weights": {name: spec["weight"] for name, spec in sources if spec.get("weight", 1) != 1}}


def tokenizer_facts(config: dict[str, Any]) -> dict[str, Any]:
    """Of stage 03: the weights, and the files of a published tokenizer that lies in a folder."""
    path = ROOT / Path(config["tokenizer"].get("published", "no path")).expanduser()
    files = sorted(path.glob("*token*")) + sorted(path.glob("*.model")) if path.is_dir() else [path]
    own = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
    return weights(config) | {"published": own}


def pretraining_facts(config: dict[str, Any]) -> dict[str, Any]:
    """Of stage 05: the weights of sources, and the files of the checkpoint it starts from."""
    return weights(config) | initial_facts(config["pretrain"])


def task_facts(config: dict[str, Any]) -> dict[str, Any]:
    """Of stages 06 and 14: sizes and times of the files of tasks that have a `path`."""
    tasks = config["evaluation"].get("tasks", {}).items()
    folders = {name: ROOT / Path(task["path"]).expanduser() for name, task in tasks if "path" in task}
    return {name: file_facts(sorted(folder.glob("*.json"))) for name, folder in folders.items()}


def hub(config: dict) -> dict:
    """Where the model is pushed to: ``repository`` (None: nowhere) and ``private``."""
    file = "pretrain" if no_pairs(config) else "finetune"
    values = config[file]
    if not values.get("push_to_hub"):
        return {"repository": None, "private": True}
    if not values.get("hub_model_id"):
        raise Refused(f"{file}.json: push_to_hub: wanted hub_model_id beside it, as OWNER/NAME")
    return {"repository": values["hub_model_id"], "private": values.get("hub_private_repo") is not False}


FACTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "01_download": source_facts,
    "03_tokenizer": tokenizer_facts,
    "05_pretrain": pretraining_facts,
    "06_evaluate": task_facts,
    "11_dataset": pair_facts,
    "13_preference": preference_facts,
    "14_evaluate": task_facts,
    "16_export": hub,
}
