"""Every signal in every stage and in run_all.sh, and processes whose parent is killed: nothing is left."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import wait_for

pytestmark = pytest.mark.faults
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 143, signal.SIGUSR1: 143}
STAGES = {
    "02_dataset": "pretrain/02_dataset.py",
    "03_tokenizer": "pretrain/03_tokenizer.py",
    "04_tokenize": "pretrain/04_tokenize.py",
    "05_pretrain": "pretrain/05_pretrain.sh",
    "06_evaluate": "pretrain/06_evaluate.py",
    "07_generate": "pretrain/07_generate.py",
    "11_dataset": "fine-tuning/11_dataset.py",
    "12_finetune": "fine-tuning/12_finetune.sh",
    "14_evaluate": "fine-tuning/14_evaluate.py",
    "15_generate": "fine-tuning/15_generate.py",
}
LONG = ("--set", "pretrain.max_steps=2000", "--set", "pretrain.save_steps=20")
LONG += ("--set", "pretrain.eval_steps=2000", "--set", "pretrain.muon_learning_rate=null")


def processes_of(folder):
    """The running processes whose command line or working folder is in a project."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                line = Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace")
                state = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if str(folder) in line and state != "Z":
                found.append((int(entry), line.replace("\0", " ")[:120]))
    return found


@pytest.fixture(scope="module")
def finished(make_project):
    project = make_project()
    project.run("run_all.sh", "--recipe", "mini", timeout=900)
    return project


def test_every_signal_in_every_stage(finished, fault_row):
    """The exit code names the signal, the old output stays, and the same command then finishes the stage."""
    survived = 0
    for name, script in STAGES.items():
        for signum, code in CODES.items():
            record = finished.output("mini", name)
            before = record.read_bytes()
            work = record.parents[1] / f".{name}.work"
            shutil.rmtree(work, ignore_errors=True)  # what the signal before has left
            run = finished.start(script, "--recipe", "mini", "--force")
            wait_for(lambda work=work, run=run: work.exists() or run.poll() is not None)
            time.sleep(0.3)
            run.send_signal(signum)
            output = run.communicate(timeout=180)[0]
            # A stage that was faster than the signal has ended in order.
            assert run.returncode in (code, 0), (name, signum, run.returncode, output)
            assert "Traceback" not in output, output
            assert run.returncode == 0 or record.read_bytes() == before
            assert not processes_of(finished.folder)
            survived += 1
        finished.run(script, "--recipe", "mini", "--force", timeout=600)
    fault_row("INT, TERM, HUP, USR1 to each of 10 stages", len(STAGES) * len(CODES), survived)


def test_every_signal_to_run_all(finished, fault_row):
    for signum, code in CODES.items():
        name = f"run{int(signum)}"
        finished.copy(name)
        run = finished.start("run_all.sh", "--recipe", name, *LONG)
        metrics = finished.folder / f"outputs/{name}/.05_pretrain.work/metrics.jsonl"
        wait_for(lambda path=metrics: path.exists() and path.stat().st_size)
        run.send_signal(signum)
        output = run.communicate(timeout=180)[0]
        assert run.returncode == code, output
        assert output.count("stopping: the training saves a checkpoint") == 1
        assert list(metrics.parent.glob("checkpoints/*/manifest.json"))
        assert not processes_of(finished.folder)
    fault_row("INT, TERM, HUP, USR1 to run_all.sh", len(CODES), len(CODES))


TORCHRUN, DEEPSPEED = ("--nproc", "2"), ("--nproc", "2", "--deepspeed", "zero2")


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("victim", ["launcher", "stage"])
@pytest.mark.parametrize("launcher", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
def test_no_rank_outlives_its_launcher(finished, fault_row, launcher, victim, frozen):
    """torchrun or deepspeed, or the stage above it, is killed; with `frozen`, a rank was stopped before."""
    which = "torchrun" if launcher == TORCHRUN else "deepspeed"
    name = f"orphan-{which}-{victim}-{frozen}"
    finished.copy(name)
    finished.run("run_all.sh", "--recipe", name, "--to", "04", *LONG)
    work = finished.folder / f"outputs/{name}/.05_pretrain.work"
    stage = ("pretrain/05_pretrain.sh", "--recipe", name, *LONG, *launcher)
    run = finished.start(*stage)
    wait_for(lambda: list(work.glob("checkpoints/*/manifest.json")))
    ranks = [json.loads(path.read_text())["process"] for path in sorted(work.glob("ranks/rank[0-9]"))]
    assert len(ranks) == 2
    if frozen:
        os.kill(ranks[1], signal.SIGSTOP)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(run.pid if victim == "stage" else int(children[0]), signal.SIGKILL)
    if victim == "stage" and frozen and which == "deepspeed":
        # Nobody is left who could end them; but nothing else trains in the folder.
        again = finished.run(*stage, check=False)
        assert again.returncode == 2 and f"kill -9 {ranks[0]} {ranks[1]}" in again.stderr
        for process, _ in processes_of(finished.folder):
            os.kill(process, signal.SIGKILL)
    wait_for(lambda: not processes_of(finished.folder), 120)
    if victim == "launcher":
        assert run.wait(60) == 1
    run.stdout.close()
    killed = which if victim == "launcher" else f"stage above {which}"
    fault_row(f"{killed} killed{', a rank frozen' if frozen else ''}", 1, 1)
