"""The process of a training script: it reads its plan, works, and ends in one line when that fails."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from recipe.progress import write_lines_without_a_terminal
from recipe.project import EXIT_FAILED, NO_SPACE, RecipeError, Refused, naming_full_disk, read_json
from recipe.signals import end_with_parent
from recipe.training.files import RANKS
from recipe.training.watchdog import REFUSED, STACKS


def _name_full_disk(failed: threading.ExceptHookArgs) -> None:
    """One line instead of a traceback when a thread, such as TensorBoard's writer, finds the disk full.

    The training goes on; a full disk ends it where it saves something itself.
    """
    if isinstance(failed.exc_value, OSError) and failed.exc_value.errno in NO_SPACE:
        print(f"warning: the disk is full, so a log is incomplete: {failed.exc_value}", flush=True)
    else:
        threading.__excepthook__(failed)


def leave(code: int) -> NoReturn:
    """End this process with its exit code, a rank among others only once all of them are here."""
    if dist.is_initialized():
        dist.barrier()  # a rank that leaves while another still talks to it would abort it
        dist.destroy_process_group()
        # Everything is written. At a regular exit gloo's threads, still joinable, sometimes abort the process
        # ("terminate called without an active exception"), and a finished training would count as failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run_script(work: Callable[[dict[str, Any]], None]) -> None:
    """Call a training script's main function with its plan; an error that a user can fix ends in one line."""
    write_lines_without_a_terminal()
    plan = read_json(Path(sys.argv[1]))
    faulthandler.register(STACKS)
    threading.excepthook = _name_full_disk
    if "LOCAL_RANK" in os.environ:
        # The launcher between this rank and the stage was killed, so that nobody ends the other ranks.
        end_with_parent(signal.SIGKILL)
    code = 0
    try:
        with naming_full_disk(Path(plan["folder"])):
            work(plan)
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if isinstance(error, Refused):
            refused = Path(plan["folder"]) / RANKS / REFUSED
            refused.parent.mkdir(exist_ok=True)
            refused.touch()
        sys.exit(error.exit_code)
    except torch.OutOfMemoryError as error:
        print(
            f"error: the memory of a GPU is full: {str(error).splitlines()[0]} Run the same command again "
            "with a smaller per_device_train_batch_size: it continues, and the result stays the same. "
            "--dry-run says what else saves memory",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(EXIT_FAILED)
    leave(code)
