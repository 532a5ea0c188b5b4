"""Checkpoints with a manifest of sha256 sums, and the newest checkpoint that matches its manifest."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from recipe.project import Refused, digest_of, write_json

MANIFEST = "manifest.json"
# What a checkpoint must hold, with the names of its files under the kinds of parallelism (`fnmatch`).
PARTS = {
    "weights": ("*.safetensors", "global_step*/*"),
    "optimizer": ("optimizer.pt", "optimizer/*", "global_step*/*"),
    "learning rate schedule": ("scheduler.pt",),
    "random numbers": ("rng_state*.pth",),
    "state of the training": ("trainer_state.json",),
}


def write_manifest(checkpoint: Path) -> None:
    """Record every file of a checkpoint with its size and sha256; the manifest comes last, by rename."""
    files = {}
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST):
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
            os.fsync(handle.fileno())
        files[str(path.relative_to(checkpoint))] = {"bytes": path.stat().st_size, "sha256": digest}
    write_json(checkpoint / MANIFEST, files)


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint that has a manifest; empty when every file matches it.

    Files that the manifest does not name are ignored.
    """
    try:
        files = json.loads((checkpoint / MANIFEST).read_text("utf-8"))
        sums = {name: facts["sha256"] for name, facts in files.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return f"{MANIFEST} is damaged"
    for part, patterns in PARTS.items():
        if not any(fnmatchcase(name, pattern) for name in sums for pattern in patterns):
            return f"{MANIFEST} is damaged: it names no file with the {part} ({patterns[0]})"
    for name, expected in sums.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        try:
            found = digest_of(path)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != expected:
            return f"{name} is damaged"
    return ""


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, the newest first; other names are left out."""
    found = {path: re.fullmatch("checkpoint-([0-9]+)", path.name) for path in folder.glob("checkpoint-*")}
    steps = {path: int(match[1]) for path, match in found.items() if match and path.is_dir()}
    return sorted(steps, key=steps.__getitem__, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved, by its name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def newest_good_checkpoint(folder: Path) -> Path | None:
    """The newest undamaged checkpoint of a training, None when it has saved none yet.

    This also tidies the folder, with a warning for each change: a checkpoint without a manifest, which a
    killed run has left, is deleted. A damaged one that is newer than the result is renamed to
    ``damaged-checkpoint-N``: its number would otherwise make `delete_old` keep it and delete better ones.

    Raises Refused when all checkpoints are damaged, and changes nothing then.
    """
    for checkpoint in list_checkpoints(folder):
        if not (checkpoint / MANIFEST).exists():
            print(
                f"warning: {checkpoint.name} is not used: it was not completely written. It is deleted",
                flush=True,
            )
            shutil.rmtree(checkpoint)
    damaged: dict[Path, str] = {}
    good = None
    for checkpoint in list_checkpoints(folder):
        if not (reason := damage(checkpoint)):
            good = checkpoint
            break
        damaged[checkpoint] = reason
    if damaged and not good:
        reasons = "; ".join(f"{checkpoint.name}: {reason}" for checkpoint, reason in damaged.items())
        raise Refused(
            f"{folder}: no checkpoint is good, so the training cannot continue: {reasons}. Restore the files "
            "from a copy, or start over at step 0 with --force"
        )
    for checkpoint, reason in damaged.items():
        aside = folder / f"damaged-{checkpoint.name}"
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        print(f"warning: {checkpoint.name} is not used: {reason}. It is now {aside.name}", flush=True)
    return good


def delete_old(folder: Path, limit: int | None, up_to: int | None = None) -> None:
    """Delete all checkpoints but the newest `limit`; None keeps all.

    up_to: the newest one up to this step is kept in addition; an extended training goes on from it.
    """
    found = list_checkpoints(folder)
    early = [path for path in found if step_of(path) <= (up_to or 0)]
    for old in found[limit:] if limit else []:
        if old not in early[:1]:
            shutil.rmtree(old)
