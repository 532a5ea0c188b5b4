"""``extended.jsonl``: where a finished training went on after its length was raised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipe.project import read_json_lines

EXTENDED = "extended.jsonl"


def read_extended(folder: Path) -> list[dict[str, Any]]:
    """A row for each time that a training was extended, the first one first.

    from: the step of the checkpoint from which it went on. steps: its length before. rewarm: whether the
    schedule of learning rates began anew there.
    """
    path = folder / EXTENDED
    return read_json_lines(path) if path.exists() else []


def schedule_begin(folder: Path) -> int:
    """The step at which the schedule of learning rates begins: 0, or where it was last re-warmed."""
    return max((row["from"] for row in read_extended(folder) if row["rewarm"]), default=0)
