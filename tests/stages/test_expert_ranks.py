"""A mixture of experts on several ranks: the losses of one process, and the load of all ranks."""

import json

import pytest
from conftest import EXPERTS, SHAPE

pytestmark = pytest.mark.slow

COMMON = ("--set", "pretrain.max_steps=6", "--set", "pretrain.eval_steps=6")
ADAMW = ("--set", "pretrain.muon_learning_rate=null")
WAYS = {
    "ddp": (("--nproc", "2"), "DDP 2"),
    "zero2": (("--nproc", "2", "--deepspeed", "zero2", *ADAMW), "ZeRO-2"),
    "zero3": (("--nproc", "2", "--deepspeed", "zero3", *ADAMW), "ZeRO-3"),
    "fsdp": (("--nproc", "2", "--fsdp"), "FSDP2 2"),
    "tp": (("--nproc", "2", "--tensor-parallel", "2", *ADAMW), "TP 2"),
}


def train(project, name, *options):
    """The rows with a loss, and the figures."""
    project.copy(name)
    project.run("run_all.sh", "--recipe", name, "--to", "04")
    project.run("pretrain/05_pretrain.sh", "--recipe", name, "--force", *COMMON, *options, timeout=900)
    return [row for row in project.log(name) if "loss" in row], project.figures(name, "05_pretrain")


@pytest.fixture(scope="module")
def project(make_project):
    made = make_project()
    model = {"model_type": "qwen3_moe", "router_aux_loss_coef": 0.001} | SHAPE | EXPERTS
    (made.folder / "configs/mini/model.json").write_text(json.dumps(model))
    return made


@pytest.fixture(scope="module")
def alone(project):
    return {True: train(project, "adamw", *ADAMW)[0], False: train(project, "muon")[0]}


@pytest.mark.parametrize("way", WAYS)
def test_ranks_together_reach_the_losses_of_one(project, alone, way):
    options, parallel = WAYS[way]
    expected = alone[options[-2:] == ADAMW]
    rows, figures = train(project, way, *options)
    assert figures["active"]["parallel"] == parallel and figures["active"]["router_aux_loss"] == 0.001
    assert len(rows) == len(expected) == 6
    assert rows[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)
    # The auxiliary loss is that of a micro-batch, and its mean over smaller ones is another.
    for row, one in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(one["loss"], rel=5e-3)
        assert row["router_aux_loss"] == pytest.approx(one["router_aux_loss"], rel=0.1)
        assert row["expert_load_max"] == pytest.approx(one["expert_load_max"], rel=0.1)
