"""A stalled training is noticed in time; one that compiles, evaluates or saves is not disturbed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from recipe.training import watchdog
from recipe.training.watchdog import SHORTEST, TIMES, UNPACED, SignsOfLife, Watchdog, limit


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def sign(folder, **values):
    facts = {"host": watchdog.platform.node(), "process": os.getpid(), "step": 7, "limit": SHORTEST}
    (folder / "rank0").write_text(json.dumps(facts | values))


def watch(dog, clock, seconds):
    """Seconds until the watchdog reports a stalled rank, up to `seconds`; None if it does not."""
    for passed in range(1, seconds + 1):
        clock.now += 1
        if dog.stalled():
            return passed
    return None


def test_silence_is_noticed_after_the_limit_and_not_before(tmp_path, clock):
    dog = Watchdog(tmp_path, clock)
    sign(tmp_path)
    assert watch(dog, clock, 200) == SHORTEST + 2  # one look finds the sign, and more than the limit passes
    assert f"rank0 (process {os.getpid()}" in dog.found and "nothing after step 7 for 91 s" in dog.found
    sign(tmp_path, step=8)
    assert not dog.stalled() and not dog.found
    sign(tmp_path, limit=UNPACED)
    assert watch(dog, clock, 3500) is None


def test_time_in_which_the_launcher_was_frozen_does_not_count(tmp_path, clock):
    dog = Watchdog(tmp_path, clock)
    sign(tmp_path)
    watch(dog, clock, 10)
    clock.now += 10_000
    assert not dog.stalled()
    assert watch(dog, clock, 200) == pytest.approx(SHORTEST - 13, abs=1)


def test_signs_of_an_earlier_run_do_not_count(tmp_path, clock):
    """Another node may start minutes before node 0 removes them: no report, no signal to old processes."""
    sign(tmp_path)
    dog = Watchdog(tmp_path, clock)
    assert watch(dog, clock, 500) is None and dog.processes() == []
    sign(tmp_path, step=1)
    assert dog.processes() == [os.getpid()] and watch(dog, clock, 500) == SHORTEST + 2


def test_limit_follows_the_slowest_recent_step():
    assert limit([1.0, 2.0]) == SHORTEST
    assert limit([1.0, 40.0]) == TIMES * 40


def test_signs_of_life(tmp_path, monkeypatch):
    now = Clock()
    monkeypatch.setattr(watchdog.time, "monotonic", now)
    life = SignsOfLife(tmp_path / "ranks", 1)

    def written():
        return json.loads((tmp_path / "ranks/rank1").read_text())

    assert written()["limit"] == UNPACED and written()["process"] == os.getpid()
    life.step(10)  # the clock starts
    assert written()["limit"] == UNPACED
    now.now += 30
    life.step(11)
    assert written() | {"step": 11, "limit": 180.0} == written()
    now.now += 0.1
    life.step(12)
    assert written()["step"] == 11  # at most once a second
    life.unpaced(12)  # an evaluation
    now.now += 500
    life.alive(12)
    assert written()["limit"] == UNPACED and written()["written"] == now.now
    life.step(12)
    now.now += 2
    life.step(13)
    assert written()["limit"] == 180.0  # the time of the evaluation is not a step


def test_a_frozen_process_is_called_frozen_and_writes_its_stacks_when_it_runs(tmp_path, clock):
    code = "import faulthandler, time; from recipe.training.watchdog import STACKS\n"
    code += "faulthandler.register(STACKS)\n"
    code += "def waits():\n    print('ready', flush=True)\n    time.sleep(60)\nwaits()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    dog = Watchdog(tmp_path, clock)
    sign(tmp_path, process=process.pid)
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    assert watch(dog, clock, 100) and "its process is frozen (SIGSTOP)" in dog.found
    process.send_signal(signal.SIGCONT)
    watchdog.dump_stacks(dog)
    process.kill()
    assert "in waits" in process.communicate()[1]
    dog.stalled()
    clock.now += 1
    assert dog.stalled().endswith("its process is gone")
