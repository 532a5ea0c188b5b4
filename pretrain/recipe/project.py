"""Paths of the project, errors with their exit codes, files on disk, and text in Markdown."""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"
OUTPUTS = ROOT / "outputs"
CONFIGS = ROOT / "configs"

LONGEST_NAME = 100  # bytes, of a recipe or a source; a file name may have 255, and stages add to it
RECORD = "stage.json"  # written last into the folder of a finished stage
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota, or limit of the file size reached
# How safetensors, torch and numpy report a failed write: without an errno.
_FAILED_WRITE = re.compile(
    r"os error (28|122|27)\b|unexpected pos \d+ vs|PytorchStreamWriter|iostream error"
    r"|requested and \d+ written"
)
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


def nearest(key: str, known: Iterable[str]) -> str:
    """The text `` Did you mean X?`` for the nearest known key; empty when no key is near.

    All keys are named that differ in one letter only.
    """
    close = [name for name in known if differ_in_one_letter(key, name)]
    close = close or difflib.get_close_matches(key, list(known), 1, 0.6)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def differ_in_one_letter(a: str, b: str) -> bool:
    """Whether one letter is replaced, missing, added, or swapped with the next."""
    head = len(os.path.commonprefix([a, b]))
    a, b = a[head:], b[head:]
    tail = len(os.path.commonprefix([a[::-1], b[::-1]]))
    a, b = a[: len(a) - tail], b[: len(b) - tail]
    return max(len(a), len(b)) == 1 or (len(a) == 2 and a == b[::-1])


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


# ---------------------------------------------------------------------------------------------- files on disk


def digest_of(path: Path, algorithm: str = "sha256") -> str:
    """The hexadecimal hash of a file, which is read in blocks."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, algorithm).hexdigest()


def folder_bytes(folder: Path) -> int:
    """The bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that holds `folder`, or will hold it."""
    return shutil.disk_usage(_existing(folder)).free


def disk_of(folder: Path) -> Path:
    """Where the disk that holds `folder`, or will hold it, is mounted."""
    found = _existing(folder).resolve()
    return next(path for path in (found, *found.parents) if path.is_mount())


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise Refused unless the disk of `folder` (which need not exist yet) has `needed` bytes free."""
    free = free_bytes(folder)
    if needed > free:
        raise Refused(
            f"{folder}: {what} needs {needed:,} bytes, and {free:,} bytes are free on the disk mounted at "
            f"{disk_of(folder)}. Free some space, or replace the folder by a link to a larger disk, and run "
            "again"
        )


@contextlib.contextmanager
def naming_full_disk(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn a full disk, quota or limit of the file size into a RecipeError.

    Its message names the file (`path`, if the system's error names none), its disk, and the bytes that are
    needed and free. needed: None where the size of the file is not known before.
    """
    try:
        yield
    except RecipeError:  # it has a name already
        raise
    except Exception as error:
        if getattr(error, "errno", None) not in NO_SPACE and not _FAILED_WRITE.search(str(error)):
            raise
        raise full_disk(path, error, needed) from error


def full_disk(path: Path, error: Exception, needed: int | None = None) -> RecipeError:
    """The error for a file that could not be written; see `naming_full_disk`."""
    known = getattr(error, "errno", None)
    reason = os.strerror(known) if known else str(error).splitlines()[0]
    file = Path(getattr(error, "filename", None) or path)
    need = f"{needed:,} bytes are needed" if needed is not None else "its size is not known before"
    return RecipeError(
        f"{file}: {reason}: {need}, {free_bytes(file):,} bytes are free on the disk mounted at "
        f"{disk_of(file)}. Free some space and run the same command again: finished work is kept"
    )


@contextlib.contextmanager
def written_whole(path: Path, size: int | None = None, flush: bool = True) -> Iterator[BinaryIO]:
    """A file to write, whole or not at all: as ``<name>.part``, which is flushed to disk and renamed.

    size: its bytes, where they are known before. flush: False for a file that need not survive a power
    failure. Raises RecipeError when the disk is full. After any error there is no .part.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with naming_full_disk(path, size), part.open("wb") as handle:
            yield handle
            handle.flush()
            if flush:
                os.fsync(handle.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str, flush: bool = True) -> None:
    """Write a file of UTF-8 by `written_whole`."""
    content = text.encode("utf-8")
    with written_whole(path, len(content), flush) as handle:
        handle.write(content)


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people, whole or not at all (`write_text`): indented, with a final newline."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a file of JSON Lines, whole or not at all (`write_text`)."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_json_line(path: Path, row: dict[str, Any]) -> None:
    """Append one object to a file of JSON Lines. Raises RecipeError when the disk is full."""
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")
    if path.exists() and _last_line_is_cut(path):
        line = b"\n" + line
    with naming_full_disk(path, len(line)), path.open("ab") as handle:
        handle.write(line)


def _last_line_is_cut(path: Path) -> bool:
    """Whether the last line of a file was cut short, as by a full disk."""
    with path.open("rb") as handle:
        if not handle.seek(0, os.SEEK_END):
            return False
        handle.seek(-1, os.SEEK_END)
        return handle.read(1) != b"\n"


def read_json(path: Path) -> Any:
    """Read JSON that a stage wrote. Raises RecipeError, with the path, when it cannot be read."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"not valid JSON: {error}"
        raise RecipeError(f"{path}: cannot be read ({reason}). Redo its stage with --force") from error


def read_state(path: Path, *keys: str) -> Any:
    """Read bookkeeping; None where there is none.

    keys: what an object must have. A file that cannot be read counts as absent, and one line says so.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        value = None
    if value is None or (keys and not (isinstance(value, dict) and value.keys() >= set(keys))):
        warn(f"{path}: cannot be read, so it counts as absent")
        return None
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a file of JSON Lines. An incomplete last line (an interrupted run) is left out.

    So is any other line that cannot be read, which a line on stderr says.
    """
    # Not splitlines: a string in JSON may hold other line separators, such as U+2028, as they are.
    lines = path.read_text("utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            warn(f"{path}: line {number} cannot be read, so it is left out")
    return rows


@functools.cache
def warn(message: str) -> None:
    """Print a warning on stderr; the same one only once."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to disk.

    A rename after it then publishes complete files. A mounted drive may not be able to flush a folder; its
    files are flushed. A file that another process, such as another rank, has removed meanwhile is left out.
    """
    for path in [folder, *folder.rglob("*")]:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            with naming_full_disk(path):
                os.fsync(descriptor)
        except OSError as error:
            unsupported = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
            if error.errno not in unsupported or not path.is_dir():
                raise
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


def user_path(name: str) -> Path:
    """A path that a user has written: ``~`` works, and a relative one is below the project's folder."""
    return ROOT / os.path.expanduser(name)  # unlike Path.expanduser, for a user who does not exist, too


def listed(counts: Mapping[str, int]) -> str:
    """Counts by name in words, without those of 0; `none` for no count."""
    return ", ".join(f"{name} {count:,}" for name, count in counts.items() if count) or "none"


def glob_files(pattern: str) -> list[Path]:
    """Paths that a shell-like pattern matches; ``~`` and ``**`` work.

    A relative pattern is searched from the project's folder.
    """
    # The project's own path may hold characters that are special in a pattern.
    matches = glob.glob(os.path.expanduser(pattern), root_dir=ROOT, recursive=True)
    return [ROOT / match for match in matches]


def stage_folder(recipe: str, stage: str) -> Path:
    """The folder of a finished stage."""
    return OUTPUTS / recipe / stage


def work_folder(final: Path) -> Path:
    """The hidden folder in which a stage works until it is finished, next to its folder `final`."""
    return final.with_name(f".{final.name}.work")


def is_finished(folder: Path) -> bool:
    """Whether a stage has finished this folder: ``stage.json`` is written last."""
    return (folder / RECORD).exists()


def read_record(folder: Path, *keys: str) -> dict[str, Any]:
    """``stage.json`` of a finished stage. Raises Refused when it cannot be read, or lacks one of `keys`."""
    path = folder / RECORD
    try:
        record = read_json(path)
        parts = [record[key] for key in keys if record[key] is not None]
        whole = isinstance(record, dict) and len(parts) == len(keys)
        if not whole or ("wanted" in keys and not {"config", "inputs"} <= record["wanted"].keys()):
            raise KeyError
    except (RecipeError, LookupError, TypeError, AttributeError) as error:
        raise Refused(f"{path}: cannot be read. {redo(folder)}") from error
    return record


def known_record(folder: Path, *keys: str) -> dict[str, Any] | None:
    """As `read_record`; None for an unfinished stage, and with a warning where that raises."""
    if not is_finished(folder):
        return None
    try:
        return read_record(folder, *keys)
    except Refused:
        warn(f"{folder / RECORD}: cannot be read, so this stage is passed over")
        return None


def redo(folder: Path) -> str:
    """What to do about a stage's folder that is damaged, for an error message."""
    return f"Run it again: bash run_all.sh --recipe {folder.parent.name} --from {folder.name[:2]} --force"


# What Markdown would not show as it is written. An underscore within a word, a lone < or & and a backslash
# before a letter are shown as they are.
_MARKS = re.compile(
    r"[`*\[|~]|(?<![^\W_])_|_(?![^\W_])|<(?=[A-Za-z/!?])|&(?=[A-Za-z0-9#])|\\(?=[!-/:-@\[-`{-~])"
)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], align: str = "lr") -> list[str]:
    """The lines of a Markdown table.

    align: ``l`` or ``r`` for each column, the last one also for all that follow.
    """
    rules = ["---:" if align[min(i, len(align) - 1)] == "r" else "---" for i in range(len(heads))]
    table = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return [table[0], f"|{'|'.join(rules)}|", *table[1:]]


def markdown_text(text: str) -> str:
    """A text on one line for a table cell of Markdown, so that it is shown as it is written.

    Only what would change the display is escaped: ``日本で一番高い山は?`` stays as it is.
    """
    return _MARKS.sub(r"\\\g<0>", " ".join(text.split()))
