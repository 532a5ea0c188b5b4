"""Paths of the project, errors with their exit codes, and JSON on disk."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
OUTPUTS = ROOT / "outputs"
CONFIGS = ROOT / "configs"

EXIT_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143


class RecipeError(Exception):
    """Something the user can mend; the message says what and how. The command ends with `exit_code`."""

    exit_code = EXIT_FAILED


class Refused(RecipeError):
    """Nothing was started: wrong configuration, missing input, stale output, or a folder in use."""

    exit_code = EXIT_REFUSED


class Interrupted(RecipeError):
    """The work was stopped from outside and can be continued."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people: UTF-8, indented, a final newline."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON that a stage wrote."""
    return json.loads(path.read_text("utf-8"))


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to disk, so that the rename that follows publishes whole
    files.
    """
    for path in [folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def glob_files(pattern: str) -> list[Path]:
    """Paths that a shell-like pattern matches, relative ones from the project's folder; ``~`` and ``**``
    work.
    """
    return [Path(match) for match in glob.glob(str(ROOT / os.path.expanduser(pattern)), recursive=True)]


def stage_folder(recipe: str, stage: str) -> Path:
    """Where a finished stage lies."""
    return OUTPUTS / recipe / stage
