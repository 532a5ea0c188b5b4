"""Tests that need an NVIDIA GPU. Without one every test says that it could not run."""

import importlib.util
import json
import signal
import subprocess
import sys

import pytest
import torch
from conftest import SHAPE, wait_for
from packed_batches import loss_and_gradients, packed
from recipe.config.optimizers import OPTIMIZERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="could not run: no NVIDIA GPU here"),
]
ampere = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="could not run: needs a GPU of compute capability 8.0 or more",
)
ada = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="could not run: needs a GPU of compute capability 8.9 or more",
)
flash = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None, reason="could not run: flash-attn is not installed"
)
bits = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="could not run: bitsandbytes is not installed"
)
SHARED = ("--set", "pretrain.muon_learning_rate=null", "--set", "pretrain.block_size=128")
COMPILED = ("--set", "pretrain.torch_compile=true")
LONG = ("--set", "pretrain.max_steps=200", "--set", "pretrain.save_steps=100")


@pytest.fixture(scope="module")
def prepared(make_project):
    project = make_project()
    del project.environment["CUDA_VISIBLE_DEVICES"]
    project.run("run_all.sh", "--recipe", "mini", "--to", "04")
    return project


def train(project, *options):
    """The figures of a pretraining of mini with these options."""
    stage = ("pretrain/05_pretrain.sh", "--recipe", "mini", "--force", "--nproc", "1")
    project.run(*stage, *SHARED, *options, timeout=1200)
    return project.figures("mini", "05_pretrain")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--set", "pretrain.bf16=false"), {"precision": "fp32", "attention": "sdpa"}),
        (("--set", "pretrain.fp16=true"), {"precision": "fp16"}),
        (COMPILED, {"compiled": True}),
        pytest.param(("--set", "pretrain.bf16=true"), {"precision": "bf16"}, marks=ampere),
        pytest.param(
            ("--set", "pretrain.bf16=true", "--set", "pretrain.muon_learning_rate=0.02"),
            {"precision": "bf16", "optimizer": "MuonAdamW"},
            marks=ampere,
        ),
        pytest.param(
            ("--set", "pretrain.bf16=true", "--set", "pretrain.attn_implementation=flash_attention_2"),
            {"attention": "flash_attention_2"},
            marks=[ampere, flash],
        ),
        (("--deepspeed", "zero2", *COMPILED), {"parallel": "ZeRO-2", "compiled": True}),
        (("--deepspeed", "zero3", *COMPILED), {"parallel": "ZeRO-3", "compiled": True}),
        (("--deepspeed", "zero2_offload"), {"parallel": "ZeRO-2, optimizer on cpu", "offloaded": True}),
        (("--deepspeed", "zero3"), {"parallel": "ZeRO-3"}),
        (("--deepspeed", "zero3_offload"), {"parallel": "ZeRO-3, optimizer on cpu, parameters on cpu"}),
    ],
)
def test_setting_is_active_and_learns(prepared, options, expected):
    figures = train(prepared, *options)
    assert {key: figures["active"][key] for key in expected} == expected
    assert figures["eval_loss"] < 4  # ln(400) = 6.0 before training


@ada
@pytest.mark.extra("torchao")
def test_fp8_is_active_and_its_loss_is_that_of_bf16(prepared):
    """The bound is the one of tests/unit/model/test_fp8.py, where fp8 is emulated."""
    compiled = ("--set", "pretrain.bf16=true", *COMPILED)
    bf16 = train(prepared, *compiled)
    fp8 = train(prepared, *compiled, "--set", "pretrain.fp8=true")
    assert bf16["active"]["fp8"] is None and fp8["active"]["fp8"] == 14
    assert fp8["eval_loss"] - bf16["eval_loss"] < 0.01


@bits
@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "lion_8bit"])
def test_an_8_bit_optimizer_is_active_and_learns(prepared, optim):
    slow = ("--set", "pretrain.learning_rate=3e-3") if "lion" in optim else ()
    # Smaller matrices than of 4,096 numbers keep states of 32 bits.
    large = ("--set", "model.intermediate_size=256")
    figures = train(prepared, "--set", f"pretrain.optim={optim}", *slow, *large)
    assert figures["active"]["optimizer"] == OPTIMIZERS[optim].reported
    assert figures["eval_loss"] < 5


@pytest.fixture(scope="module")
def talking(prepared):
    """A recipe whose model is pretrained and tuned."""
    prepared.copy("talking")
    prepared.run("run_all.sh", "--recipe", "talking", "--to", "12", timeout=1200)
    return prepared


@bits
def test_qlora_tunes_over_4_bit_weights(talking):
    lora = '--set=finetune.lora={"r": 4, "lora_alpha": 8, "quantization": "nf4"}'
    line = ("fine-tuning/12_finetune.sh", "--recipe", "talking", "--nproc", "1", "--force", lora)
    talking.run(*line, timeout=600)
    rows = talking.log("talking", "12_finetune")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    # The adapter is merged into unquantised weights.
    assert talking.output("talking", "12_finetune", "model.safetensors").exists()


def test_talking_and_generation_answer(talking):
    talking.run("fine-tuning/15_generate.py", "--recipe", "talking", timeout=600)
    assert len(talking.figures("talking", "15_generate")) > 0
    talking.run("pretrain/07_generate.py", "--recipe", "talking", timeout=600)
    command = [sys.executable, str(talking.folder / "fine-tuning/chat.py"), "--recipe", "talking"]
    result = subprocess.run(
        command, input="山は高いですか?\n", env=talking.environment, capture_output=True, text=True
    )
    assert result.returncode == 0 and result.stdout.count("Assistant: ") == 1, result.stderr


def test_a_signal_saves_and_the_same_command_continues(prepared):
    """Stopped and continued, the losses are those of a training that was never stopped."""
    whole = train(prepared, *LONG)
    work = prepared.copy("signal")
    prepared.run("run_all.sh", "--recipe", "signal", "--to", "04", *SHARED)
    line = ("pretrain/05_pretrain.sh", "--recipe", "signal", "--nproc", "1", *SHARED, *LONG)
    child = prepared.start(*line)
    log = work / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count('"loss"') >= 20, child)
    child.send_signal(signal.SIGTERM)
    said, _ = child.communicate(timeout=120)
    assert child.returncode == 143 and "stopped at step" in said, said
    continued = prepared.run(*line, timeout=600)
    assert "continues from checkpoint-" in continued.stdout
    figures = prepared.figures("signal", "05_pretrain")
    assert figures["steps"] == whole["steps"]
    assert figures["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-2)


def test_probe_measures_this_gpu(prepared):
    """In bf16, where varlen is the kernel that others are compared with."""
    small = ("--set", "pretrain.global_batch_size=1", "--set", "pretrain.per_device_train_batch_size=1")
    small += ("--set", f"pretrain.bf16={json.dumps(torch.cuda.is_bf16_supported(False))}")
    result = prepared.run(
        "pretrain/05_pretrain.sh", "--recipe", "mini", "--probe", "--nproc", "1", *small, timeout=1200
    )
    assert "fastest: --set" in result.stdout
    figures = json.loads((prepared.folder / "outputs/mini/probe.json").read_text())["figures"]
    assert figures["outcome"] == "ok" and figures["peak_memory_bytes"] > 0


@ampere
@pytest.mark.parametrize("window", [None, 8, 40])
def test_varlen_attention_is_that_of_a_mask(window):
    """Loss and every gradient, in bf16, with documents of 1 to 123 tokens and padded bounds."""
    batch = {
        key: value.cuda() if isinstance(value, torch.Tensor) else value
        for key, value in packed([20, 1, 107], [128], [5, 123]).items()
    }
    shape = {"model_type": "mistral", "sliding_window": window} | SHAPE
    found = []
    for name in ("varlen", "sdpa"):
        with torch.autocast("cuda", torch.bfloat16):
            loss, gradients = loss_and_gradients(name, batch, **shape)
        found.append([loss, *gradients])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() < 3e-2 * theirs.norm()


def test_the_loss_in_chunks_is_that_of_whole_logits():
    """bf16 and fp16, whose scaled gradients must not vanish, on a vocabulary of more than one chunk."""
    from recipe.model.chunked_loss import _loss_or_logits

    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        head = torch.nn.Linear(64, 40_000, bias=False, device="cuda")
        hidden = torch.randn(2000, 64, device="cuda")
        targets = torch.randint(40_000, (2000,), device="cuda")
        forward, found = _loss_or_logits(head), []
        for chunks in (False, True):
            own = hidden.clone().requires_grad_()
            head.weight.grad = None
            with torch.autocast("cuda", dtype):
                if chunks:
                    loss = forward(own, targets)[0] / len(targets)
                else:
                    loss = torch.nn.functional.cross_entropy(head(own).float(), targets)
            (loss * 2**14).backward()
            found.append((loss.detach(), own.grad, head.weight.grad))
        for whole, parts in zip(*found, strict=True):
            assert (whole - parts).norm() < 2e-2 * whole.norm()
