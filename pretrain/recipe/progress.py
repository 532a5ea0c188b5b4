"""The progress line that every long step shows."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], name: str, unit: str, total: int | None = None) -> Iterator[T]:
    """Pass `items` on, showing count, speed and, where the total is known, the time left. Silent for short
    work.
    """
    yield from tqdm(
        items,
        desc=name,
        unit=f" {unit}",
        total=total,
        dynamic_ncols=True,
        leave=False,
        delay=2.0,
        mininterval=0.5 if sys.stderr.isatty() else 20.0,
    )
