"""What a stage's result depends on, and whether that has changed since the result was made."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from recipe.config.initial_model import initial_facts
from recipe.config.staleness import TRAINING_FILES, deciding_config
from recipe.conversations.instructions import no_pairs, pair_facts
from recipe.conversations.preferences import preference_facts
from recipe.corpus.download import data_identity, former_identity, source_facts
from recipe.corpus.source_files import file_facts, is_file_facts, is_same_file, path_below_root
from recipe.project import RECORD, Refused, is_finished, read_record, stage_folder, user_path


def weights(config: dict[str, Any]) -> dict[str, float]:
    """The weights of sources that differ from 1, by source.

    They decide what the tokenizer's sample and an epoch of training contain.
    """
    sources = config["dataset"]["sources"].items()
    return {name: spec["weight"] for name, spec in sources if spec.get("weight", 1) != 1}


def tokenizer_facts(config: dict[str, Any]) -> dict[str, Any]:
    """Facts of stage 03: the weights, and the files that a local published tokenizer is read from."""
    published = config["tokenizer"].get("published")
    if not published:
        return {"weights": weights(config), "published": {}}
    path = user_path(published)
    files = [path, *(path.parent / name for name in ("special_tokens_map.json", "tokenizer_config.json"))]
    if path.is_dir():
        # With tokenizer.json, nothing reads the other forms of a vocabulary.
        others = () if (path / "tokenizer.json").exists() else ("vocab.*", "merges.txt")
        files = [file for pattern in ("*token*", "*.model", *others) for file in sorted(path.glob(pattern))]
    own = [file for file in files if file.is_file()] if path.exists() else []
    return {"weights": weights(config), "published": file_facts(own)}


def pretraining_facts(config: dict[str, Any]) -> dict[str, Any]:
    """Facts of stage 05: the weights of sources, and the files of the checkpoint it starts from."""
    return {"weights": weights(config)} | initial_facts(config["pretrain"])


def task_facts(config: dict[str, Any]) -> dict[str, Any]:
    """Facts of stages 06 and 14: sizes and times of the files of tasks that have a `path`."""
    tasks = config["evaluation"].get("tasks", {}).items()
    folders = {name: user_path(task["path"]) for name, task in tasks if "path" in task}
    patterns = ("*.json", "*.jsonl", "*.tar.gz")
    return {
        name: file_facts(sorted(path for pattern in patterns for path in folder.glob(pattern)))
        for name, folder in folders.items()
    }


def hub(config: dict[str, Any]) -> dict[str, Any]:
    """Where the model is pushed to, ``repository`` (None: nowhere) and ``private``.

    Raises Refused for a missing or an impossible ``hub_model_id``, and for ``push_to_hub`` in a file that
    stage 16 does not read.
    """
    file = "pretrain" if no_pairs(config) else "finetune"
    for other in TRAINING_FILES:
        if other != file and config.get(other, {}).get("push_to_hub"):
            raise Refused(
                f"{other}.json: push_to_hub: stage 16 reads it from {file}.json. Move it there, with "
                "hub_model_id"
            )
    values = config[file]
    if not values.get("push_to_hub"):
        return {"repository": None, "private": True}
    repository = values.get("hub_model_id")
    if not repository:
        raise Refused(f"{file}.json: push_to_hub: it needs hub_model_id, too. Write it as OWNER/NAME")
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", repository, re.ASCII):
        raise Refused(
            f"{file}.json: hub_model_id: {repository!r}, expected OWNER/NAME, or NAME for your own account, "
            "of letters, digits, - _ and ."
        )
    return {"repository": repository, "private": values.get("hub_private_repo") is not False}


def export_facts(config: dict[str, Any]) -> dict[str, Any]:
    """Facts of stage 16: `hub`, and the licences that dataset.json gives, which the card shows."""
    sources = config["dataset"]["sources"].items()
    licences = {name: spec["licence"] for name, spec in sources if "licence" in spec}
    return hub(config) | ({"licences": licences} if licences else {})


# What a stage depends on besides its inputs and its files of the recipe.
FACTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "01_download": source_facts,
    "03_tokenizer": tokenizer_facts,
    "05_pretrain": pretraining_facts,
    "06_evaluate": task_facts,
    "11_dataset": pair_facts,
    "13_preference": preference_facts,
    "14_evaluate": task_facts,
    "16_export": export_facts,
}


def input_identity(folder: Path) -> str:
    """A digest of a finished stage, for the stages that read it.

    Of stage 01 only the data count, so that downloading the same files again makes nothing stale. Of every
    other stage it is the digest of ``stage.json``.
    """
    if folder.name == "01_download":
        return _digest_of_json(data_identity(read_record(folder, "figures")["figures"]))
    return _digest((folder / RECORD).read_bytes())


def input_changes(recorded: Mapping[str, str], folders: Mapping[str, Path]) -> list[str]:
    """The inputs that differ from what an earlier run has recorded, each as ``inputs.STAGE: how``.

    folders: of the inputs as they are now. Earlier releases recorded other digests of stage 01: that of its
    ``stage.json``, or of another form of the same data. They also count as unchanged.
    """
    now = {}
    for stage, folder in folders.items():
        now[stage] = input_identity(folder)
        if stage == "01_download" and recorded.get(stage) != now[stage]:
            former = _digest_of_json(former_identity(read_record(folder, "figures")["figures"]))
            if recorded.get(stage) in (former, _digest((folder / RECORD).read_bytes())):
                now[stage] = recorded[stage]
    both = ((stage, recorded.get(stage), now.get(stage)) for stage in sorted(recorded.keys() | now.keys()))
    return [
        f"inputs.{stage}: " + ("made again" if old and new else "new" if new else "no longer read")
        for stage, old, new in both
        if old != new
    ]


def _digest_of_json(value: Any) -> str:
    return _digest(json.dumps(value, sort_keys=True).encode())


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def stale_inputs(
    recipe: str, inputs: Iterable[str], config: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, list[str]]]:
    """Earlier stages, also indirect ones, that were made from other settings or inputs than there are now.

    Yields each with its changed keys. An input that is no longer there is no change.
    """
    for stage in inputs:
        folder = stage_folder(recipe, stage)
        if is_finished(folder):
            recorded = read_record(folder, "wanted")["wanted"]
            yield from stale_inputs(recipe, sorted(recorded["inputs"]), config)
            now = {section: config.get(section, {}) for section in recorded["config"]}
            changes = differences(deciding_config(stage, recorded["config"]), deciding_config(stage, now))
            folders = {name: stage_folder(recipe, name) for name in recorded["inputs"]}
            there = {name: path for name, path in folders.items() if is_finished(path)}
            changes += input_changes({name: recorded["inputs"][name] for name in there}, there)
            if stage in FACTS and "facts" in recorded:
                changes += fact_changes(recorded["facts"], FACTS[stage](config))
            if changes:
                yield stage, changes


def fact_changes(recorded: Any, now: Any) -> list[str]:
    """How facts (`FACTS`) differ from the recorded ones. A copy of a file is the same file."""
    return differences(_settled(recorded, now), now, "facts")


def _settled(recorded: Any, now: Any) -> Any:
    """Recorded facts in the form of `now`: paths from the project's folder; equal files as they are now."""
    if not isinstance(recorded, dict) or not isinstance(now, dict):
        return recorded
    settled = {}
    for key, value in recorded.items():
        key = path_below_root(key)
        current = now.get(key)
        if _is_former(value, current):
            settled[key] = current
        elif is_file_facts(value) and is_file_facts(current):
            same = is_same_file(key, value, current)
            settled[key] = current if same else {name: value[name] for name in current}
        else:
            settled[key] = _settled(value, current)
    return settled


def _is_former(recorded: Any, now: Any) -> bool:
    """Whether `recorded` has the files of `now` as an earlier release recorded them: in a list.

    Some are in it twice.
    """
    if not isinstance(recorded, list) or not isinstance(now, dict):
        return False
    rows = [[Path(path).name, file["bytes"], file["mtime_ns"]] for path, file in now.items()]
    return all(row in rows for row in recorded) and all(row in recorded for row in rows)


SHOWN = 60  # characters of a value
ABSENT = object()  # in place of a key's value: null is another value, such as "no near duplicates" in minhash


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The keys in which two JSON values differ, each as ``path: old -> new``."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: list[str] = []
        for key in sorted(old.keys() | new.keys()):
            both = old.get(key, ABSENT), new.get(key, ABSENT)
            found += differences(*both, f"{path}.{key}" if path else key)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for n, both in pairs for line in differences(*both, f"{path}[{n}]")]
    if old == new:
        return []
    shown = ["absent" if value is ABSENT else json.dumps(value, ensure_ascii=False) for value in (old, new)]
    # Of long values, what is around the first difference.
    same = len(os.path.commonprefix(shown))
    begin = max(0, same - 20) if max(map(len, shown)) > SHOWN else 0
    cut = [("…" if begin else "") + text[begin : begin + SHOWN] for text in shown]
    return [f"{path}: {cut[0]} -> {cut[1]}"]
