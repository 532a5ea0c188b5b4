"""Paths of the project, errors with their exit codes, JSON on disk, and text in Markdown."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
OUTPUTS = ROOT / "outputs"
CONFIGS = ROOT / "configs"

# Linux's request to let two files share their blocks until one of them is changed (man 2 ioctl_ficlone).
FICLONE = 0x40049409

EXIT_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143


class RecipeError(Exception):
    """Something the user can fix; the message says what and how. The command ends with `exit_code`."""

    exit_code = EXIT_FAILED


class Refused(RecipeError):
    """Nothing was started: wrong configuration, missing input, stale output, or a folder in use."""

    exit_code = EXIT_REFUSED


class Interrupted(RecipeError):
    """The work was stopped from outside and can be continued."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def missing_packages(extra: str) -> list[str]:
    """The packages of an extra of pyproject.toml (`ray`, `sudachi` ...) that are not installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    missing = []
    for pin in project["optional-dependencies"][extra]:
        name = pin.split("==")[0]
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    return missing


def require_extra(extra: str, where: str) -> None:
    """Raise Refused if a package of an extra is missing. where: the file, key and value that need it."""
    if missing := missing_packages(extra):
        raise Refused(f"{where}: not installed: {', '.join(missing)}. Run `bash setup.sh --extra {extra}`")


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people: UTF-8, indented, a final newline."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON that a stage wrote."""
    return json.loads(path.read_text("utf-8"))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a file of JSON Lines. An incomplete last line (an interrupted run) is left out."""
    # Not splitlines: a string in JSON may hold other line separators, such as U+2028, as they are.
    lines = path.read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines if line.endswith("}")]


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to disk.

    A rename after it then publishes complete files.
    """
    for path in [folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def share_blocks(source: Path, target: Path) -> bool:
    """Make `target` a reflink, a copy that costs no space; False where the file system has none."""
    with source.open("rb") as old, target.open("wb") as new:
        try:
            fcntl.ioctl(new.fileno(), FICLONE, old.fileno())
        except OSError:
            return False
    return True


def glob_files(pattern: str) -> list[Path]:
    """Paths that a shell-like pattern matches; ``~`` and ``**`` work.

    A relative pattern is searched from the project's folder.
    """
    return [Path(match) for match in glob.glob(str(ROOT / os.path.expanduser(pattern)), recursive=True)]


def stage_folder(recipe: str, stage: str) -> Path:
    """The folder of a finished stage."""
    return OUTPUTS / recipe / stage


# What Markdown would not show as it is written. An underscore within a word, a lone < or & and a backslash
# before a letter are shown as they are.
_MARKS = re.compile(
    r"[`*\[|~]|(?<![^\W_])_|_(?![^\W_])|<(?=[A-Za-z/!?])|&(?=[A-Za-z0-9#])|\\(?=[!-/:-@\[-`{-~])"
)


def markdown_text(text: str) -> str:
    """A text on one line for a table cell of Markdown, so that it is shown as it is written.

    Only what would change the display is escaped: ``日本で一番高い山は?`` stays as it is.
    """
    return _MARKS.sub(r"\\\g<0>", " ".join(text.split()))
