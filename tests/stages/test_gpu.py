"""Tests that need an NVIDIA GPU. Without one every test says that it could not run."""

import importlib.util
import re
import shutil

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="could not run: no NVIDIA GPU here"),
]
ampere = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="could not run: needs a GPU of compute capability 8.0 or more",
)
flash = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None, reason="could not run: flash-attn is not installed"
)


@pytest.fixture(scope="module")
def prepared(make_project):
    project = make_project()
    del project.environment["CUDA_VISIBLE_DEVICES"]
    project.run("run_all.sh", "--recipe", "mini", "--to", "04")
    return project


def train(project, name, *options):
    shutil.copytree(project.folder / "configs/mini", project.folder / "configs" / name)
    settings = ("--set", "pretrain.muon_learning_rate=null", "--set", "pretrain.block_size=128")
    project.run("run_all.sh", "--recipe", name, "--to", "04", *settings)
    # --force: a launcher's options are not settings, so that an earlier case's model would be reused.
    stage = ("pretrain/05_pretrain.sh", "--recipe", name, "--force", "--nproc", "1")
    project.run(*stage, *settings, *options, timeout=1200)
    return project.figures(name, "05_pretrain")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--set", "pretrain.bf16=false"), {"precision": "fp32", "attention": "sdpa"}),
        (("--set", "pretrain.fp16=true"), {"precision": "fp16"}),
        (("--set", "pretrain.torch_compile=true"), {"compiled": True}),
        pytest.param(("--set", "pretrain.bf16=true"), {"precision": "bf16"}, marks=ampere),
        pytest.param(
            ("--set", "pretrain.bf16=true", "--set", "pretrain.attn_implementation=flash_attention_2"),
            {"attention": "flash_attention_2"},
            marks=[ampere, flash],
        ),
        (("--deepspeed", "zero2_offload"), {"parallel": "ZeRO-2, optimizer on cpu", "offloaded": True}),
        (("--deepspeed", "zero3"), {"parallel": "ZeRO-3"}),
    ],
)
def test_setting_is_active_and_learns(prepared, options, expected):
    name = re.sub(r"\W+", "-", "".join(options)).strip("-")
    figures = train(prepared, name, *options)
    assert {key: figures["active"][key] for key in expected} == expected
    assert figures["eval_loss"] < 4  # ln(400) = 6.0 before training
