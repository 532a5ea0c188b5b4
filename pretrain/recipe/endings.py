"""How a command ends: what a user can fix in one line on stderr, signals, and the right exit code."""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from recipe.project import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    NO_SPACE,
    OUTPUTS,
    Interrupted,
    RecipeError,
    full_disk,
)
from recipe.signals import STOPPING, exit_code_of


@contextlib.contextmanager
def errors_in_one_line(name: str) -> Iterator[None]:
    """Turn errors that a user can fix, and Ctrl-C, into one line on stderr and the right exit code.

    name: of the stage, to begin the line with.
    """
    try:
        yield
    except RecipeError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(
            f"\n{name}: interrupted. Run the same command again, without --force, to continue.",
            file=sys.stderr,
        )
        sys.exit(EXIT_INTERRUPTED)
    except OSError as error:
        path = error.filename or OUTPUTS
        if error.errno in NO_SPACE:
            message = str(full_disk(Path(path), error))
        elif error.errno in (errno.EROFS, errno.EACCES):
            message = f"cannot use {path}: {error.strerror}. Fix the permissions, then run again"
        elif error.errno in (errno.ENOTCONN, errno.ESTALE, errno.EIO, errno.ENODEV):
            message = (
                f"cannot use {path}: {error.strerror}. The drive does not answer: mount it again, and run "
                "the same command again. Finished work is kept"
            )
        else:
            raise
        print(f"{name}: error: {message}", file=sys.stderr)
        sys.exit(EXIT_FAILED)


def raise_stopped(signum: int, frame: object) -> None:
    """The handler of the signals that end a stage. Raises KeyboardInterrupt for Ctrl-C, else Interrupted."""
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    for other in set(STOPPING) - {signal.SIGINT}:
        # A second signal must not interrupt the way out.
        signal.signal(other, signal.SIG_IGN)
    name = signal.Signals(signum).name
    again = "Run the same command again, without --force, to continue."
    raise Interrupted(f"terminated ({name}). {again}", exit_code_of(signum))
