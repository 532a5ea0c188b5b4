"""A training with --max-restarts goes on by itself after a crash and after a hang, to the same result."""

import json
import os
import signal
import time

import pytest
from conftest import wait_for
from recipe.run.restarts import FIRST_PAUSE

pytestmark = pytest.mark.faults
ADAMW = ("--set", "pretrain.muon_learning_rate=null")
STEPS = ("--set", "pretrain.max_steps=120", "--set", "pretrain.save_steps=10")
STEPS += ("--set", "pretrain.eval_steps=120", *ADAMW)
LAUNCHERS = {"python": (), "torchrun": ("--nproc", "2"), "zero2": ("--nproc", "2", "--deepspeed", "zero2")}


@pytest.fixture(scope="module")
def project(prepared):
    return prepared


def copy(project, name):
    project.copy(name)
    project.run("run_all.sh", "--recipe", name, "--to", "04")
    return project.folder / f"outputs/{name}/.05_pretrain.work"


def steps(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row["step"] for row in rows if "loss" in row]


def ranks(work):
    """The ranks' processes once they have done a step, and a checkpoint is complete."""
    signs = [json.loads(path.read_text()) for path in sorted(work.glob("ranks/rank[0-9]"))]
    done = signs and list(work.glob("checkpoints/*/manifest.json"))
    return [sign["process"] for sign in signs if sign["limit"] == 90.0] if done else []


@pytest.mark.parametrize("name", LAUNCHERS)
def test_killed_rank_is_started_again(project, fault_row, name):
    """Bit-identical to a training without a fault, on one rank and under torchrun and DeepSpeed."""
    models, lost, options = [], 0, LAUNCHERS[name]
    for fault in (False, True):
        work = copy(project, f"{name}-{fault}")
        line = ("pretrain/05_pretrain.sh", "--recipe", f"{name}-{fault}", *STEPS, *options, "--force")
        run = project.start(*line, "--max-restarts", "2")
        if fault:
            lost = kill_a_rank(work, run, 2 if options else 1, name)
        output = run.communicate(timeout=400)[0]
        assert run.returncode == 0, output
        assert ("Restart 1 of 2 from the newest good checkpoint" in output) == fault
        assert steps(project.output(f"{name}-{fault}", "05_pretrain", "metrics.jsonl")) == list(range(1, 121))
        models.append(project.digest(f"{name}-{fault}", "05_pretrain"))
    fault_row(f"rank killed with --max-restarts ({name})", 1, 1, int(models[0] != models[1]), lost)
    assert models[0] == models[1]


def kill_a_rank(work, run, count, name):
    """Kill a rank, print the seconds until the next step is trained; returns the steps that were lost."""
    metrics = work / "metrics.jsonl"
    wait_for(lambda: len(ranks(work)) == count, run)
    os.kill(ranks(work)[-1], signal.SIGKILL)
    killed, reached, first = time.monotonic(), max(steps(metrics)), metrics.stat().st_ino
    # A training that continues rewrites the file with the rows up to its checkpoint.
    wait_for(lambda: metrics.stat().st_ino != first, run)
    kept = max(steps(metrics), default=0)
    wait_for(lambda: max(steps(metrics), default=0) > kept, run)
    seconds = time.monotonic() - killed
    print(f"{name}: {seconds:.1f} s to the next trained step, of these {FIRST_PAUSE:.0f} s of pause")
    return reached - kept


POISON = """
from recipe.training.skip_bad_steps import Guard

stock = Guard.on_step_end

def poison(guard, args, state, control, **objects):
    if state.global_step == 47:
        raise RuntimeError("broken at step 47")
    stock(guard, args, state, control, **objects)

Guard.on_step_end = poison
"""


def test_a_step_that_fails_twice_ends_the_training(project, tmp_path, monkeypatch, fault_row):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'run_clm.py' in ' '.join(sys.orig_argv):\n    import poison\n"
    )
    (tmp_path / "poison.py").write_text(POISON)
    monkeypatch.setitem(project.environment, "PYTHONPATH", f"{tmp_path}:{project.environment['PYTHONPATH']}")
    copy(project, "poisoned")
    line = ("pretrain/05_pretrain.sh", "--recipe", "poisoned", *STEPS, "--force", "--max-restarts", "5")
    result = project.run(*line, check=False)
    fault_row("a step that always fails, with --max-restarts", 1, int(result.returncode == 1))
    assert result.returncode == 1
    assert result.stdout.count("Restart ") == 1 and "continues from checkpoint-40" in result.stdout
    assert "failed twice right after step 47" in result.stderr


def test_frozen_rank_is_started_again(project, fault_row):
    work = copy(project, "frozen")
    line = ("pretrain/05_pretrain.sh", "--recipe", "frozen", *STEPS, "--force", "--nproc", "2")
    run = project.start(*line, "--max-restarts", "1")
    wait_for(lambda: len(ranks(work)) == 2, run)
    os.kill(ranks(work)[1], signal.SIGSTOP)
    output = run.communicate(timeout=400)[0]
    fault_row("rank frozen with --max-restarts", 1, int(run.returncode == 0))
    assert run.returncode == 0, output
    assert "is frozen (SIGSTOP)" in output and "Restart 1 of 1" in output
    assert steps(project.output("frozen", "05_pretrain", "metrics.jsonl")) == list(range(1, 121))
