"""What this process may use of its machine, also in a container."""

import os

import pytest
from recipe import host


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with 8 logical cores, two on each physical core, 16 GB, and control groups in a folder."""
    for number in range(8):
        folder = tmp_path / f"cpu/cpu{number}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{number % 4},{number % 4 + 4}\n")
    (tmp_path / "meminfo").write_text("MemTotal: 16000000 kB\nMemFree: 1 kB\nMemAvailable: 12000000 kB\n")
    (tmp_path / "own").write_text("9:memory:/elsewhere\n0::/job/step\n")
    (tmp_path / "groups/job/step").mkdir(parents=True)
    monkeypatch.setattr(host, "CPUS", tmp_path / "cpu")
    monkeypatch.setattr(host, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(host, "OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(host, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return tmp_path


def test_one_thread_for_each_physical_core(machine):
    assert (host.cores(), host.threads()) == (8, 4)


def test_only_the_cores_that_a_process_is_bound_to_count(machine, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5, 6})
    assert (host.cores(), host.threads()) == (3, 2)


@pytest.mark.parametrize(("limit", "cores"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1)])
@pytest.mark.parametrize("place", ["", "job", "job/step"])
def test_the_share_of_a_container_counts_at_every_level(machine, limit, cores, place):
    (machine / "groups" / place / "cpu.max").write_text(limit)
    assert host.cores() == cores and host.threads() == min(4, cores)


def test_cores_where_the_system_says_nothing_of_them(machine, monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    for name in ("CPUS", "OWN_GROUP", "MEMORY"):
        monkeypatch.setattr(host, name, tmp_path / "nothing")
    assert (host.cores(), host.threads()) == (6, 6)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert host.memory() == (total, total)


def test_memory_is_that_of_the_machine_or_of_the_container(machine):
    assert host.memory() == (16_000_000 * 1024, 12_000_000 * 1024)
    group = machine / "groups/job"
    (group / "memory.max").write_text("8000000000\n")
    (group / "memory.current").write_text("3000000000\n")
    (group / "memory.stat").write_text("anon 1000000000\ninactive_file 1500000000\n")
    assert host.memory() == (8_000_000_000, 6_500_000_000)
    (group / "memory.max").write_text("max\n")
    assert host.memory() == (16_000_000 * 1024, 12_000_000 * 1024)


def test_this_machine_has_cores_and_memory():
    assert 1 <= host.threads() <= host.cores() <= os.cpu_count()
    total, available = host.memory()
    assert 2**28 < available <= total
