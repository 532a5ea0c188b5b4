"""A full disk stops a stage with the name of the file and its disk; with space, the same command works."""

import os
import shutil
import subprocess
import time

import pytest

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def small_disk(make_project):
    """A project with its outputs on a disk of 64 MiB, and a function that leaves so many bytes free there."""
    project = make_project()
    outputs = project.folder / "outputs"
    outputs.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(outputs)]
    if os.geteuid() or subprocess.run(line, capture_output=True).returncode:
        pytest.skip("could not run: only root can mount a small disk, outside a container without that right")

    def leave(free):
        ballast = outputs / "ballast"
        ballast.unlink(missing_ok=True)
        if free is not None:
            with ballast.open("wb") as handle:
                os.posix_fallocate(handle.fileno(), 0, shutil.disk_usage(outputs).free - free)

    yield project, leave
    subprocess.run(["umount", str(outputs)], check=True)


def is_named(project, said):
    """Whether a message names a file, its disk, and free bytes; not a traceback."""
    outputs = project.folder / "outputs"
    words = (f"{outputs}/", "bytes are free on the disk mounted at", f" {outputs}. Free some space")
    return "Traceback" not in said and all(word in said for word in words)


@pytest.mark.parametrize("stage", ["01_download", "02_dataset", "03_tokenizer", "04_tokenize"])
def test_stage_says_which_disk_is_full_and_works_when_it_has_space(small_disk, stage, fault_row):
    project, leave = small_disk
    tries = 0
    line = (f"pretrain/{stage}.py", "--recipe", "mini")
    for free in (0, 4096, 16384, 65536, 131072):
        leave(free)
        result = project.run(*line, check=False)
        leave(None)
        assert result.returncode in (0, 1), result.stderr
        if not result.returncode:
            assert free
            break
        tries += 1
        assert is_named(project, result.stderr), result.stderr
    project.run(*line)
    assert project.output("mini", stage).exists()
    fault_row("the disk is full in a stage of the data", tries, tries)


@pytest.mark.parametrize("free", [0, 30_000, 300_000])
def test_training_continues_after_a_full_disk(small_disk, free, fault_row):
    """A checkpoint has 360 KB: the disk is full at a sign of life, in the weights, or in the optimizer."""
    project, leave = small_disk
    project.run("run_all.sh", "--recipe", "mini", "--to", "04")
    shutil.rmtree(project.output("mini", "05_pretrain", ""), ignore_errors=True)
    line = ("pretrain/05_pretrain.sh", "--recipe", "mini", "--set", "pretrain.max_steps=60")
    line += ("--set", f"pretrain.seed={free}")
    run = project.start(*line)
    metrics = project.output("mini", ".05_pretrain.work", "metrics.jsonl")
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 12):
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.02)
    leave(free)
    said = run.communicate(timeout=200)[0]
    leave(None)
    assert run.returncode == 1, said
    assert "Traceback" not in said and "bytes are needed, " in said and "on the disk mounted at" in said
    result = project.run(*line)
    assert "continues from checkpoint-" in result.stdout
    assert project.figures("mini", "05_pretrain")["steps"] == 60
    fault_row("the disk is full while a training saves", 1, 1)
