"""What a result was made with, for ``stage.json``: versions of packages, the commit, peak memory."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import resource
import subprocess

from recipe.project import ROOT

# The packages whose versions are written into stage.json.
VERSIONED = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "deepspeed",
    "sentencepiece",
    "tokenizers",
    "neologdn",
    "hojichar",
    "mwparserfromhell",
    "aozora",
    "datatrove",
    "trl",
    "peft",
    "lxml",
    "pyarrow",
    "numpy",
)


def versions() -> dict[str, str]:
    """The version of Python and of each package of `VERSIONED` that is installed."""
    found = {"python": platform.python_version()}
    for package in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def commit() -> str:
    """The project's git commit, with ``+`` when the work tree was changed; empty outside git."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def peak_memory() -> int:
    """Peak resident bytes of the largest process of this stage (itself or a finished child)."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) * 1024
