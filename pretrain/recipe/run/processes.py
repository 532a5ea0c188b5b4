"""The command, environment and plan of a training child, and how to kill it."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipe import host
from recipe.hardware import count_gpus
from recipe.project import DATA, Refused, read_state, write_text
from recipe.run.launch_options import Launch
from recipe.training.files import RANKS


def command(
    script: str, arguments: list[str], launch: Launch, deepspeed: Path | None, visible: str | None = None
) -> list[str]:
    """The command that starts this machine's ranks, or with a hostfile the ranks of all machines.

    deepspeed: path of a DeepSpeed file, or None. Without it a single process runs as plain python.
    visible: CUDA_VISIBLE_DEVICES. DeepSpeed's launcher ignores it when it is given a number of ranks, so the
    GPUs are named instead.
    """
    count = str(launch.processes)
    if launch.nodes > 1:
        where = ["--nnodes", str(launch.nodes), "--node-rank", str(launch.node_rank)]
        where += ["--master-addr", launch.master_addr, "--master-port", str(launch.master_port)]
        launcher = [sys.executable, "-m", "torch.distributed.run", *where]
        return [*launcher, "--nproc-per-node", count, script, *arguments]
    if deepspeed:
        if launch.hostfile:
            ranks = ["--hostfile", str(launch.hostfile), "--master_port", str(launch.master_port)]
            ranks += ["--master_addr", launch.master_addr] if launch.master_addr else []
        else:
            ranks = ["--num_gpus", count]
            if visible:
                chosen = [number.strip() for number in visible.split(",")[: launch.processes]]
                if not all(number.isdigit() for number in chosen):
                    raise Refused(
                        f"CUDA_VISIBLE_DEVICES: {visible}: the launcher of DeepSpeed reads numbers only. "
                        "Give those that nvidia-smi shows, or leave --deepspeed out"
                    )
                ranks = ["--include", "localhost:" + ",".join(chosen)]
            ranks += ["--master_port", str(host.free_port())]
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", *ranks, "--no_local_rank"]
        return [*launcher, script, *arguments]
    if launch.processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*launcher, "--nproc-per-node", count, script, *arguments]
    return [sys.executable, script, *arguments]


def visible_devices() -> str | None:
    """CUDA_VISIBLE_DEVICES on a machine with visible GPUs, else None."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") if count_gpus() else None


def kept_memory(glibc: tuple[int, int]) -> dict[str, str]:
    """Variables of glibc for a training in one process on a CPU: freed tensors stay in it.

    By default large ones go back to the system after each use, and every step of `tiny` has 35,000 page
    faults, which take 5 to 10 % of its time. Under FSDP2 it would take 15 % more memory.

    glibc: its version. Before 2.35 a threshold above 32 MiB is ignored, and that of the trimming alone keeps
    the default one, 128 KiB, from growing: still more page faults.
    """
    largest = 2**32 if glibc >= (2, 35) else 2**25
    return {"MALLOC_MMAP_THRESHOLD_": str(largest), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def _glibc() -> tuple[int, int]:
    name, number = platform.libc_ver()
    found = re.match(r"(\d+)\.(\d+)", number)
    return (int(found[1]), int(found[2])) if name == "glibc" and found else (0, 0)


def _defaults(processes: int) -> dict[str, str]:
    threads = max(1, host.threads() // processes)
    gpus = count_gpus()
    return (kept_memory(_glibc()) if processes == 1 and not gpus else {}) | {
        "OMP_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": str(DATA / ".torchinductor"),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DS_ACCELERATOR": "cuda" if gpus else "cpu",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as `recipe.hardware`, for the machines of a hostfile
        "PYTHONUNBUFFERED": "1",
    }


def child_environment(
    environment: Mapping[str, str], processes: int, for_hosts: Path | None = None
) -> dict[str, str]:
    """The environment of the training child.

    The ranks share the CPU's threads, one alone keeps its memory, compiled kernels are kept between runs, and
    telemetry is off. Variables that the user has set are kept.

    for_hosts: a file to write for DeepSpeed, which sets its variables on the machines of a hostfile.
    """
    defaults = _defaults(processes)
    chosen = defaults | dict(environment)
    if for_hosts:
        write_text(for_hosts, "".join(f"{name}={chosen[name]}\n" for name in defaults))
        chosen["DS_ENV_FILE"] = str(for_hosts)
    return chosen


def training_plan(
    recipe: str,
    config: dict[str, dict[str, Any]],
    inputs: Mapping[str, Path],
    launch: Launch,
    deepspeed: Path | None,
    folder: Path,
) -> dict[str, Any]:
    """What the training child reads: settings, launch, and the paths of its inputs and its work folder."""
    return {
        "recipe": recipe,
        "config": config,
        "deepspeed": str(deepspeed) if deepspeed else None,
        "fsdp": launch.fsdp,
        "tensor_parallel": launch.tensor_parallel,
        "new_optimizer": launch.new_optimizer,
        "ranks": launch.ranks,
        "parent": os.getpid(),
        "host": platform.node(),
        "folder": str(folder),
        "inputs": {name: str(path) for name, path in inputs.items()},
    }


def kill(child: subprocess.Popen[bytes]) -> None:
    """Kill a child and all its descendants.

    torchrun's ranks have sessions of their own and would otherwise go on.
    """
    _kill_all(descendants(child.pid))


def kill_orphans() -> list[int]:
    """Kill all descendants of this process that are still running, and return their ids."""
    found = [process for process in descendants(os.getpid())[1:] if _is_running(process)]
    _kill_all(found)
    return found


def _kill_all(processes: list[int]) -> None:
    for process in reversed(processes):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _is_running(process: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for yet has (Linux)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def living_ranks(folder: Path) -> list[int]:
    """The processes on this machine that still train in a work folder, by their signs of life in it."""
    signs = (read_state(path, "host", "process") for path in sorted((folder / RANKS).glob("rank*[0-9]")))
    mine = [sign["process"] for sign in signs if sign and sign["host"] == platform.node()]
    return [process for process in mine if _is_running(process) and str(folder) in _command_line(process)]


def _command_line(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def descendants(process: int) -> list[int]:
    """The ids of a process and all its descendants, parents first (Linux)."""
    found = [process]
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            found += descendants(int(child))
    return found
