"""The progress line that every long step shows."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def _look() -> dict[str, Any]:
    """How every line looks: none for work of under two seconds, few where stderr is a file."""
    interval = 0.5 if sys.stderr.isatty() else 20.0
    return {"dynamic_ncols": True, "leave": False, "delay": 2.0, "mininterval": interval}


def progress(items: Iterable[T], name: str, unit: str, total: int | None = None) -> Iterator[T]:
    """Pass `items` on, showing count, speed and, where the total is known, the time left. Silent for short
    work.
    """
    yield from tqdm(items, desc=name, unit=f" {unit}", total=total, **_look())


def byte_progress(pieces: Iterable[bytes], name: str, total: int | None, done: int = 0) -> Iterator[bytes]:
    """Pass pieces of a file on, showing bytes, speed and, where the total is known, the time left.

    done: the bytes that an earlier try has brought; they count as there, not as speed.
    """
    with tqdm(desc=name, unit="B", unit_scale=True, total=total, initial=done, **_look()) as line:
        for piece in pieces:
            yield piece
            line.update(len(piece))
