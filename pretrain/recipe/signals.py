"""Signals that end a run in order, and processes that must not outlive their parent.

Nothing here imports torch.
"""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from recipe.project import EXIT_INTERRUPTED, EXIT_TERMINATED

# Ctrl-C, the usual one, a closed terminal, and what clusters send before the time limit.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Options of Linux's prctl.
_DEATH_SIGNAL, _CHILD_SUBREAPER = 1, 36


def on_stop(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Let `handler` receive the signals in `STOPPING`; returns the handlers that it replaces, by signal.

    A SIGHUP that is ignored stays ignored: `nohup` asks for that.
    """
    return {
        signum: signal.signal(signum, handler)
        for signum in STOPPING
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN
    }


def exit_code_of(signum: int) -> int:
    """The exit code of a run that a signal of `STOPPING` has stopped."""
    return EXIT_INTERRUPTED if signum == signal.SIGINT else EXIT_TERMINATED


def end_with_parent(signum: int) -> None:
    """Let this process get a signal when its parent ends, however that happens (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signum)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that they can be found (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_CHILD_SUBREAPER, 1)
