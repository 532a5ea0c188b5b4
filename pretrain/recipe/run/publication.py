"""A stage's output folder on the disk: one run at a time, whole or not at all, copied for another recipe."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recipe.project import (
    RECORD,
    Refused,
    fsync_tree,
    known_record,
    naming_full_disk,
    require_space,
    share_blocks,
    warn,
    write_json,
)
from recipe.training.files import STOP

# Bookkeeping in a work folder: what the run is made from, and its working time in seconds so far.
WANTED, SECONDS = ".wanted.json", ".seconds"
# The figures of a training that has come to its end, in its folder.
RESULT = "result.json"
# What the phases of stages 02 and 04 leave for one another, with the markers of the tasks that are done. It
# stays until the record is written: a kill before that must not cost the work of all phases.
SCAFFOLD = ("logs", "raw", "clean", "parts")


@contextlib.contextmanager
def hold(folder: Path, name: str) -> Iterator[int]:
    """Hold a folder for one run, and yield the descriptor of its lock.

    The kernel releases the lock when its last holder ends, so a killed process never blocks a later run.
    name: what the holder does, for the message of a second run. Raises Refused when another run holds it, and
    when `folder` cannot be made because it is a link to a folder that does not exist. Where the file system
    has no locks, a warning says so, and the run goes on.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise Refused(
            f"{error.filename}: neither a folder nor a link to an existing one. Make the folder it points "
            "to (is the disk mounted?), or delete it"
        ) from error
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(descriptor, folder)
        os.ftruncate(descriptor, 0)
        with naming_full_disk(folder / ".lock"):
            os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()} ({name})".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    """Lock a file; a warning where the file system has no locks, like some mounted drives."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            holder = os.read(descriptor, 200).decode(errors="replace") or "another run"
            raise Refused(f"{folder} is in use by {holder}. Wait until it has ended, or stop it") from None
        warn(
            f"{folder}: this file system has no locks ({error.strerror}), so a second run there would not be "
            "noticed. Start only one at a time"
        )


def write_last(path: Path, value: Any) -> None:
    """Write a JSON file that says that its folder is complete: everything in it is on the disk before."""
    fsync_tree(path.parent)
    write_json(path, value)


def publish(work: Path, final: Path) -> None:
    """Make a finished work folder the stage's output: without its scaffold, flushed to the disk, renamed."""
    for name in SCAFFOLD:
        shutil.rmtree(work / name, ignore_errors=True)
    fsync_tree(work)
    old = former(final)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    work.rename(final)
    _remove_rest(work, final)


def former(final: Path) -> Path:
    """The output that is replaced, until the new one is complete."""
    return final.with_name(f".{final.name}.old")


def _remove_rest(work: Path, final: Path) -> None:
    """Remove what a published stage no longer needs."""
    for folder in (former(final), set_aside(work)):
        shutil.rmtree(folder, ignore_errors=True)
    for name in (WANTED, SECONDS, STOP):
        (final / name).unlink(missing_ok=True)


def has_checkpoints(work: Path) -> bool:
    """Whether an unfinished training has saved a checkpoint in its work folder."""
    return any(work.glob("checkpoints/checkpoint-*"))


def set_aside(work: Path) -> Path:
    """The folder of the last attempt that was given up, until the stage is finished."""
    return work.with_suffix(".aside")


def clear(work: Path) -> None:
    """Remove a work folder. That of an unfinished training is set aside instead, which one line says.

    An interrupted `copy_stage` leaves checkpoints without `WANTED`; they are copies.
    """
    if has_checkpoints(work) and (work / WANTED).exists():
        aside = set_aside(work)
        earlier = ", in place of those of an earlier one" if aside.exists() else ""
        shutil.rmtree(aside, ignore_errors=True)
        work.rename(aside)
        print(
            f"starts over: the checkpoints of the unfinished run are set aside in {aside}{earlier}. They are "
            "deleted when the stage is finished",
            flush=True,
        )
    shutil.rmtree(work, ignore_errors=True)


def finish_publication(
    work: Path,
    final: Path,
    is_current: Callable[[dict[str, Any]], bool],
    damage_of: Callable[[dict[str, Any]], str],
) -> None:
    """Complete a `publish` that was killed.

    is_current: whether a finished work folder was made from today's settings and inputs (from the
    ``wanted`` of its ``stage.json``); only then is it published. damage_of: how its files differ from its
    ``stage.json``, empty if they agree. A damaged one counts as unfinished: a power cut has cost its files.
    """
    old = former(final)
    finished = known_record(work, "wanted")
    if finished and (reason := damage_of(finished)):
        warn(f"{reason}, so this result is not used")
        for name in (RECORD, RESULT):
            (work / name).unlink(missing_ok=True)
        finished = None
    if finished and is_current(finished["wanted"]):
        publish(work, final)
    elif old.exists() and not final.exists():
        old.rename(final)
    elif not work.exists() and (old.exists() or (final / WANTED).exists()):
        _remove_rest(work, final)


def copy_stage(source: Path, target: Path) -> None:
    """Copy a finished stage. Where the file system can, the copies share their blocks with the originals.

    ``stage.json`` is copied last, so that an interrupted copy does not look like a finished stage. Raises
    Refused when the disk has no room for the copy.
    """
    record = source / RECORD
    paths = sorted(source.rglob("*"), key=lambda path: path == record)
    target.mkdir(parents=True)
    share = True
    for path in paths:
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir(parents=True, exist_ok=True)
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if share and not share_blocks(path, copy):
            share = False
            size = sum(path.stat().st_size for path in paths if path.is_file())
            require_space(target, size, f"copying {source}")
        if not share:
            with naming_full_disk(copy, path.stat().st_size):
                shutil.copyfile(path, copy)
        shutil.copystat(path, copy)
