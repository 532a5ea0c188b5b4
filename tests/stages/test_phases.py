"""A pretraining with phases, from the recipe to the evaluation; stopped and continued on another layout."""

import json
import shutil
import signal
import time

import pytest

pytestmark = pytest.mark.slow

PHASES = [
    {"until_step": 8},
    {"until_tokens": 14 * 512, "block_size": 128, "rate": 0.5},
    {"block_size": 128, "rope_theta": 500000.0, "sources": {"text": 2}},
]
CHANGES = {"phases": PHASES, "lr_scheduler_type": "constant", "muon_learning_rate": None, "save_steps": 3}


@pytest.fixture(scope="module")
def project(make_project):
    project = make_project()
    project.edit("mini", "pretrain", **CHANGES)
    project.run("run_all.sh", "--recipe", "mini", "--to", "06")
    return project


def rows(project):
    return [row for row in project.log("mini") if "loss" in row]


def test_rates_blocks_and_rotary_embeddings_change_and_every_block_size_is_evaluated(project):
    assert [row["learning_rate"] for row in rows(project)] == [0.01] * 8 + [0.005] * 6 + [0.01] * 6
    figures = project.figures("mini", "05_pretrain")
    assert [phase["end"] for phase in figures["phases"]] == [8, 14, 20]
    assert figures["tokens"] == 20 * 512 and figures["active"]["global_batch"] == 8
    config = json.loads(project.output("mini", "05_pretrain", "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 500000.0
    assert list(project.figures("mini", "06_evaluate")["lengths"]) == ["64", "128"]


@pytest.mark.parametrize("options", [(), ("--nproc", "2"), ("--nproc", "2", "--deepspeed", "zero2")])
def test_a_stop_in_a_later_phase_and_other_ranks_change_no_loss(project, options):
    before = rows(project)
    shutil.rmtree(project.output("mini", "05_pretrain", ""))
    work = project.folder / "outputs/mini/.05_pretrain.work"
    line = ("pretrain/05_pretrain.sh", "--recipe", "mini", *options)
    run = project.start(*line)
    ends = time.monotonic() + 300
    while not (work / "checkpoints/checkpoint-9/manifest.json").exists() and time.monotonic() < ends:
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    output = run.communicate(timeout=120)[0]
    assert run.returncode == 143, output
    assert "continues from checkpoint-" in project.run(*line).stdout
    after = [row["loss"] for row in rows(project)]
    exact = 0 if not options else 1e-4
    assert after == pytest.approx([row["loss"] for row in before], abs=exact)
