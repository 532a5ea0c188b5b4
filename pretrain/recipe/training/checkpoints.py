"""Checkpoints with a manifest of sha256 sums, and the newest checkpoint that matches its manifest."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from recipe.project import write_json

MANIFEST = "manifest.json"


def write_manifest(checkpoint: Path) -> None:
    """Record every file of a checkpoint with its size and sha256; the manifest comes last, by rename."""
    files = {}
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST):
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
            os.fsync(handle.fileno())
        files[str(path.relative_to(checkpoint))] = {"bytes": path.stat().st_size, "sha256": digest}
    part = checkpoint / f"{MANIFEST}.part"
    write_json(part, files)
    part.rename(checkpoint / MANIFEST)


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; empty when every file matches the manifest."""
    manifest = checkpoint / MANIFEST
    if not manifest.exists():
        return "it was not completely written"
    try:
        files = json.loads(manifest.read_text("utf-8"))
    except ValueError:
        return f"{MANIFEST} is damaged"
    for name, facts in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        with path.open("rb") as handle:
            if hashlib.file_digest(handle, "sha256").hexdigest() != facts["sha256"]:
                return f"{name} is damaged"
    return ""


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, the newest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)


def newest_good_checkpoint(folder: Path) -> Path | None:
    """The newest undamaged checkpoint. Damaged ones are named in a warning and not used."""
    for checkpoint in list_checkpoints(folder):
        reason = damage(checkpoint)
        if not reason:
            return checkpoint
        print(f"warning: {checkpoint.name} is not used: {reason}", flush=True)
    return None
