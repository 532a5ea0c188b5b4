"""Progress bars: a bar on a terminal, a line every 20 s elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
# No bar for work that is shorter than this.
DELAY_SECONDS = 2.0
LOOK: dict[str, Any] = {"dynamic_ncols": True, "leave": False, "delay": DELAY_SECONDS, "mininterval": 0.5}


def progress(items: Iterable[T], name: str, unit: str, total: int | None = None) -> Iterator[T]:
    """Pass `items` on, showing count, speed and, where the total is known, the time left.

    Work that is done within two seconds shows nothing.
    """
    yield from tqdm(items, desc=name, unit=f" {unit}", total=total, **LOOK)


def byte_progress(chunks: Iterable[bytes], name: str, total: int | None, done: int = 0) -> Iterator[bytes]:
    """Pass chunks of a file on, showing bytes, speed and, where the total is known, the time left.

    done: the bytes that an earlier run has downloaded; they count as done, but not for the speed.
    """
    with tqdm(desc=name, unit="B", unit_scale=True, total=total, initial=done, **LOOK) as line:
        for chunk in chunks:
            yield chunk
            line.update(len(chunk))


def write_lines_without_a_terminal(seconds: float = 20.0) -> None:
    """Without a terminal, let every tqdm bar of this process write whole lines, one every `seconds`.

    A bar redraws itself with carriage returns, which fill a log file with thousands of copies of one line.
    This changes tqdm's own class, because other libraries (lm-evaluation-harness, datasets, transformers)
    make bars, too. The last line of a bar is written where the bar would stay (``leave``), unless it took
    less than two seconds. Call this before the first bar; on a terminal it changes nothing.
    """
    if sys.stderr.isatty():
        return
    close = tqdm.close

    def write_line(bar: tqdm) -> None:
        bar.fp.write(str(bar).strip() + "\n")
        bar.fp.flush()

    def display(bar: tqdm, msg: str | None = None, pos: int | None = None) -> bool:
        now = time.time()
        if now - getattr(bar, "line_time", getattr(bar, "start_t", now)) >= seconds:
            bar.line_time = now
            write_line(bar)
        return True

    def close_with_a_line(bar: tqdm) -> None:
        if not getattr(bar, "disable", True):
            if bar.leave and time.time() - bar.start_t >= DELAY_SECONDS:
                write_line(bar)
            # tqdm then finds nothing of the bar to clear, and writes nothing.
            bar.last_print_t = float("-inf")
        close(bar)

    tqdm.display, tqdm.close, tqdm.clear = display, close_with_a_line, lambda bar, nolock=False: None
