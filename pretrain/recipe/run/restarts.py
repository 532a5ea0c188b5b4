"""When a training that has failed is started again by itself (``--max-restarts``), and when it is not."""

from __future__ import annotations

# Seconds before the first restart; each later one waits twice as long, up to the longest. Meanwhile the other
# nodes notice the same fault, and the memory of killed ranks is free again.
FIRST_PAUSE, LONGEST_PAUSE = 10.0, 600.0


def pause_before(restart: int) -> float:
    """Seconds to wait before a restart, counted from 1."""
    return min(FIRST_PAUSE * 2 ** (restart - 1), LONGEST_PAUSE)


def why_no_restart(failed: list[int], most: int) -> str:
    """Why a training is not started again; empty when it is.

    failed: the last step that was done, for each time that the training failed; 0 before the first step.
    most: restarts that are allowed.
    """
    if not most:
        return "It would start again by itself with --max-restarts N"
    if failed[-1:] == failed[-2:-1]:
        where = f"right after step {failed[-1]}" if failed[-1] else "before its first step"
        return f"It failed twice {where}, so that another restart would fail, too: correct the cause first"
    if len(failed) > most:
        return f"All restarts (--max-restarts {most}) are used up"
    return ""
