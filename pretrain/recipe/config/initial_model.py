"""The published checkpoint that pretraining may start from: found and checked before torch is imported.

``initial_model`` in pretrain.json names it: a folder, or a repository on the hub (``initial_revision`` pins
its commit). Only config.json and safetensors weights are read or fetched: pickled weights could run code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from recipe.corpus.source_files import file_facts
from recipe.project import RecipeError, Refused, read_json, user_path

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_FETCHED = ("config.json", *WEIGHTS, "model-*.safetensors")
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
NEW_PIECES = "new_pieces.json"
# What model.json may change of a checkpoint with rotary embeddings, to train it at another context length.
CONTEXT = ("max_position_embeddings", "rope_parameters")


class NewPieces(NamedTuple):
    """The tokens that stage 03 added to a published vocabulary.

    first: the id of the first one, which is the size of the published vocabulary. old_ids: for the token with
    the id ``first + i``, the old ids that spell the same text.
    """

    first: int
    old_ids: list[list[int]]

    def spelled(self, ids: list[int]) -> list[int]:
        """The same text in old ids: every new token is replaced by the old ids that spell it."""
        return [old for i in ids for old in ([i] if i < self.first else self.old_ids[i - self.first])]


def read_new_pieces(tokenizer: Path, size: int) -> NewPieces:
    """The tokens that stage 03 added to the tokenizer in this folder; none when the folder has no record.

    size: of the tokenizer's vocabulary. Raises RecipeError when the record belongs to another tokenizer.
    """
    path = tokenizer / NEW_PIECES
    found = NewPieces(**read_json(path)) if path.exists() else NewPieces(size, [])
    if found.first + len(found.old_ids) != size:
        raise RecipeError(
            f"{path}: {found.first} old and {len(found.old_ids)} new tokens, but the tokenizer has {size}. "
            "Run stage 03 again with --force"
        )
    return found


def find_initial(pretrain: dict[str, Any]) -> Path | None:
    """The folder of the checkpoint that pretrain.json names; fetched from the hub if it is not a path.

    None without ``initial_model``. Raises Refused when there is no such checkpoint, or when it has no
    safetensors weights.
    """
    name = pretrain.get("initial_model")
    if name is None:
        return None
    folder = user_path(name)
    if not folder.exists():
        folder = _fetch(name, pretrain.get("initial_revision"))
    _check_weights(folder, name)
    return folder


def _check_weights(folder: Path, name: str) -> None:
    if any((folder / weights).is_file() for weights in WEIGHTS):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    seen = f"only {', '.join(pickles)}" if pickles else "none"
    raise Refused(
        f"pretrain.json: initial_model: {name}: expected weights in model.safetensors, found {seen}. Pickled "
        "weights (.bin, .pt) can run code when they are loaded, so they are never read. Convert them once on "
        "a machine without secrets, with transformers' from_pretrained and save_pretrained, and give that "
        "folder; or give a revision of the hub that has safetensors (initial_revision)"
    )


def _fetch(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_FETCHED)))
    except (OSError, ValueError) as error:
        raise Refused(
            f"pretrain.json: initial_model: {name!r}: no such folder, and not available from the hub "
            f"({str(error).strip().splitlines()[0]}). Give the path of a folder with config.json and "
            "model.safetensors"
        ) from error


def published_config(pretrain: dict[str, Any]) -> dict[str, Any]:
    """config.json of the checkpoint that pretrain.json names, without using the network.

    Empty without ``initial_model``, and for a name on the hub that was not fetched yet. Raises Refused for
    pickled weights and for a bad config.json.
    """
    name = pretrain.get("initial_model")
    if name is None:
        return {}
    folder = user_path(name)
    if folder.exists():
        _check_weights(folder, name)
        return read_config_of(folder)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=pretrain.get("initial_revision"))
    except HFValidationError as error:
        raise Refused(
            f"pretrain.json: initial_model: {name!r}: no such folder, and not a name on the hub "
            "(OWNER/NAME). Give one of the two"
        ) from error
    return read_config_of(Path(found).parent) if isinstance(found, str) else {}


def changed_context(model: dict[str, Any], published: dict[str, Any]) -> dict[str, list[Any]]:
    """What model.json changes of a checkpoint's `CONTEXT`: by key, the published value and the new one.

    model: model.json. published: the checkpoint's config.json. Empty without a checkpoint.
    """
    if not published or "n_positions" in published:  # GPT-2 learns a vector for each position
        return {}
    old = {"rope_parameters": _rope_of(published)} | published
    return {key: [old.get(key), model[key]] for key in CONTEXT if key in model and model[key] != old.get(key)}


def _rope_of(published: dict[str, Any]) -> dict[str, Any] | None:
    """The rotary embeddings of a config.json of transformers 4, which has them in two other keys."""
    if "rope_theta" not in published:
        return None
    scaling = dict(published.get("rope_scaling") or {})
    kind = scaling.pop("type", None) or scaling.pop("rope_type", "default")
    rope = {"rope_type": kind, "rope_theta": published["rope_theta"]} | scaling
    if "rope_local_base_freq" not in published:
        return rope
    # Gemma 3: layers with a window have a theta of their own, and no scaling.
    local = {"rope_type": "default", "rope_theta": published["rope_local_base_freq"]}
    return {"full_attention": rope, "sliding_attention": local}


def read_config_of(folder: Path) -> dict[str, Any]:
    """config.json in a checkpoint's folder.

    Raises Refused when it is missing, is not valid JSON, or names quantised weights.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise Refused(
            f"pretrain.json: initial_model: {path}: {error.strerror}. Give the folder of a model as "
            "save_pretrained writes it"
        ) from error
    except ValueError as error:
        raise Refused(f"pretrain.json: initial_model: {path}: not valid JSON ({error})") from error
    if values.get("quantization_config"):
        raise Refused(
            f"pretrain.json: initial_model: {path}: quantization_config: quantised weights cannot be "
            "trained further. Give the checkpoint from which they were made"
        )
    return values


def describe_initial(
    config: dict[str, dict[str, Any]], folder: Path, pieces: NewPieces, before: int, rows: int
) -> dict[str, Any]:
    """For stage.json: where the weights came from, what was added to them, and a changed context.

    before, rows: the rows of the embeddings as published, and now. ``commit`` is None for a folder.
    """
    pretrain, context = config["pretrain"], changed_context(config["model"], read_config_of(folder))
    return {
        "name": pretrain["initial_model"],
        "revision": pretrain.get("initial_revision"),
        "commit": folder.name if folder.parent.name == "snapshots" else None,
        "new_pieces": len(pieces.old_ids),
        "rows_added": rows - before,
        "rows": rows,
    } | ({"context": context} if context else {})


def initial_facts(pretrain: dict[str, Any]) -> dict[str, Any]:
    """What else a training depends on: the files (`file_facts`) of an initial model in a folder.

    Empty without ``initial_model``, so that the records of trainings from scratch do not change.
    """
    name = pretrain.get("initial_model")
    if name is None:
        return {}
    folder = user_path(name)
    files = sorted({path for pattern in _FETCHED for path in folder.glob(pattern)})
    return {"initial_model": file_facts(files)}


def check_rows(pretrain: dict[str, Any], pieces: NewPieces) -> None:
    """Refuse a tokenizer with ids that are neither rows of the initial model nor added tokens.

    Does nothing without ``initial_model``, or before its config.json was fetched.
    """
    rows = published_config(pretrain).get("vocab_size")
    if rows is not None and pieces.first > rows:
        raise Refused(
            f"{pretrain['initial_model']}/config.json: vocab_size: {rows}, but the tokenizer has "
            f"{pieces.first} tokens of its own: they were not published together. Set tokenizer.published "
            "to the tokenizer of pretrain.initial_model"
        )
