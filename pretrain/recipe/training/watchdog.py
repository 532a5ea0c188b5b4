"""Notice a training that has stopped making progress: its ranks write signs of life, the launcher reads them.

The launcher checks them, because a rank that is frozen or stuck in a C library cannot report it. Nothing here
imports torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recipe.project import read_state, write_text

SHORTEST = 90.0  # seconds without a sign that are never a fault
TIMES = 6  # the limit, as a multiple of the slowest recent step
UNPACED = 3600.0  # seconds that compiling, evaluating, sampling or saving may take without a sign
RECENT = 20
REFUSED = "refused"  # next to the signs of life: a rank has refused to start, and would do so again
STACKS = signal.SIGUSR2  # on this signal a rank writes the stacks of its threads to stderr


class SignsOfLife:
    """Write, at most once a second, the step of a rank and the seconds until its next sign is due."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"rank{rank}"
        folder.mkdir(exist_ok=True)
        self.steps: deque[float] = deque(maxlen=RECENT)
        self.started: float | None = None
        self.written, self.seconds = -math.inf, UNPACED
        self.unpaced(0)

    def unpaced(self, step: int) -> None:
        """The time of what follows is not known: the first step, an evaluation, a checkpoint."""
        self.started = None
        self._write(step, UNPACED)

    def step(self, step: int) -> None:
        """A step has ended, or the first step after something of unknown time begins."""
        now = time.monotonic()
        if self.started is not None:
            self.steps.append(now - self.started)
        self.started = now
        if self.steps and (now - self.written > 1 or self.seconds == UNPACED):
            self._write(step, limit(self.steps))

    def alive(self, step: int) -> None:
        """Something of unknown time is still running."""
        if time.monotonic() - self.written > 1:
            self._write(step, UNPACED)

    def _write(self, step: int, seconds: float) -> None:
        self.written, self.seconds = time.monotonic(), seconds
        sign = {"host": platform.node(), "process": os.getpid(), "step": step, "limit": seconds}
        # Not flushed: after a power failure no rank is alive.
        write_text(self.path, json.dumps(sign | {"written": self.written}), flush=False)


def limit(steps: deque[float]) -> float:
    """Seconds without a step after which a training counts as stalled, by its recent steps."""
    return max(SHORTEST, TIMES * max(steps))


class Watchdog:
    """Check the ranks' signs of life. Time in which the launcher itself was frozen does not count."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self.clock = folder, clock
        # Signs of an earlier run: node 0 removes them, but it may start later than this node.
        self.old = {name: text for name, text, _ in self._signs({})}
        self.last = clock()
        self.found = ""  # the last answer of `stalled`
        # By rank: its sign, and for how many seconds it has not changed.
        self.silence: dict[str, tuple[str, float]] = {}

    def stalled(self) -> str:
        """The stalled ranks, and for how long; empty if there are none. To be called about every second."""
        now = self.clock()
        passed, self.last = min(now - self.last, 5.0), now
        found = []
        for name, text, sign in self._signs(self.old):
            before, silent = self.silence.get(name, ("", 0.0))
            silent = silent + passed if text == before else 0.0
            self.silence[name] = (text, silent)
            if silent > sign["limit"]:
                where = f"{name} (process {sign['process']} on {sign['host']})"
                found.append(f"{where}: nothing after step {sign['step']} for {silent:.0f} s{_state(sign)}")
        self.found = "; ".join(found)
        return self.found

    def _signs(self, old: dict[str, str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """The signs that are not `old`: the rank, the file's text, and what it says."""
        for path in sorted(self.folder.glob("rank*[0-9]")):
            sign = read_state(path, "host", "process", "step", "limit")
            text = json.dumps(sign)
            if sign and text != old.get(path.name):
                yield path.name, text, sign

    def reached(self) -> int:
        """The last step that a rank has reported, 0 before the first one."""
        return max((sign["step"] for _, _, sign in self._signs(self.old)), default=0)

    def processes(self) -> list[int]:
        """The ranks' processes on this machine."""
        signs = [sign for _, _, sign in self._signs(self.old)]
        return [sign["process"] for sign in signs if sign["host"] == platform.node()]


def _state(sign: dict) -> str:
    """The state of a rank's process on this machine, in words; empty if it is running."""
    if sign["host"] != platform.node():
        return ""
    try:
        state = Path(f"/proc/{sign['process']}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ", its process is gone"
    return ", its process is frozen (SIGSTOP)" if state == "T" else ""


def dump_stacks(watchdog: Watchdog) -> None:
    """Let the ranks of this machine write their stacks to stderr, and give them time for it."""
    for process in watchdog.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, STACKS)
    time.sleep(2)
