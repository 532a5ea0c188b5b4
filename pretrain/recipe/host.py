"""What this process may use of its machine, also in a container: cores, threads, memory and ports."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
MEMORY = Path("/proc/meminfo")
# Limits of containers and of jobs of a scheduler: control groups of Linux, version 2.
OWN_GROUP, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def cores() -> int:
    """The logical cores that this process may use: for processes and threads that wait or compute little."""
    count = len(_allowed())
    for group in _groups():
        quota, period = ((group / "cpu.max").read_text() if (group / "cpu.max").exists() else "max 1").split()
        if quota != "max":
            # Rounded down: threads that share a core are slower than fewer threads.
            count = min(count, max(1, int(quota) // int(period)))
    return count


def threads() -> int:
    """The threads that compute fastest: one for each physical core of `cores`.

    Two threads of one physical core share its arithmetic units.
    """
    physical = set()
    for number in _allowed():
        siblings = CPUS / f"cpu{number}/topology/thread_siblings_list"
        physical.add(siblings.read_text() if siblings.exists() else str(number))
    return min(cores(), len(physical))


def free_port() -> int:
    """A TCP port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def memory() -> tuple[int, int]:
    """Bytes of memory that this process may use: (total, available). Without /proc both are the total."""
    if MEMORY.exists():
        facts = dict(line.split(":") for line in MEMORY.read_text().splitlines())
        total, available = (int(facts[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    else:
        total = available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for group in _groups():
        limit = (group / "memory.max").read_text().strip() if (group / "memory.max").exists() else "max"
        if limit != "max":
            facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            # Pages of files that nobody has used lately are given back when memory is needed.
            used = int((group / "memory.current").read_text()) - int(facts["inactive_file"])
            total, available = min(total, int(limit)), min(available, max(0, int(limit) - used))
    return total, available


def _allowed() -> set[int]:
    """The numbers of the logical cores; elsewhere than on Linux all that there are."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _groups() -> Iterator[Path]:
    """The control group of this process and the ones above it. In a container the highest is its own."""
    if not OWN_GROUP.exists():
        return
    for line in OWN_GROUP.read_text().splitlines():
        if line.startswith("0::"):
            own = GROUPS / line[3:].lstrip("/")
            yield from (group for group in (own, *own.parents) if group.is_relative_to(GROUPS))
