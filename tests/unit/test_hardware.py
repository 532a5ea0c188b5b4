"""The choice of precision, attention and compilation for given hardware."""

from dataclasses import replace

import pytest
from recipe import hardware
from recipe.config.training import documents_suffice
from recipe.hardware import (
    Choice,
    Gpu,
    Hardware,
    check_quantization,
    choose,
    detect,
    gemm_peak,
    glance,
    host_memory,
    visible_gpus,
)
from recipe.project import Refused

A100 = Hardware("cuda", "A100", (8, 0), True, True, True)
A100_WITHOUT_FLASH = Hardware("cuda", "A100", (8, 0), True, False, True)
A100_WITH_BITSANDBYTES = Hardware("cuda", "A100", (8, 0), True, True, True, True)
T4 = Hardware("cuda", "T4", (7, 5), False, False, True)
ZEN4 = Hardware("cpu", "CPU", (0, 0), True, False, True)
OLD_CPU = Hardware("cpu", "CPU", (0, 0), False, False, False)


@pytest.mark.parametrize(
    ("hardware", "values", "expected"),
    [
        (A100, {}, Choice("bf16", "flash_attention_2", True)),
        (A100_WITHOUT_FLASH, {}, Choice("bf16", "sdpa", True)),
        (T4, {}, Choice("fp16", "sdpa", True)),
        (ZEN4, {}, Choice("bf16", "documents", True)),
        (OLD_CPU, {}, Choice("fp32", "documents", False)),
        (A100, {"bf16": False}, Choice("fp32", "sdpa", True)),
        (A100, {"fp16": True, "torch_compile": False}, Choice("fp16", "flash_attention_2", False)),
        (ZEN4, {"attn_implementation": "eager", "torch_compile": False}, Choice("bf16", "eager", False)),
    ],
)
def test_choice(hardware, values, expected):
    assert choose(hardware, values) == expected


def test_attention_by_documents_is_chosen_only_where_it_can_compute():
    """For dropout in attention, a sliding window and padded preferences PyTorch's attention is used."""
    assert choose(ZEN4, {}, documents=False).attention == "sdpa"
    with pytest.raises(Refused, match="attn_implementation: documents computes neither"):
        choose(ZEN4, {"attn_implementation": "documents"}, documents=False)
    assert choose(A100, {}, documents=False).attention == "flash_attention_2"


@pytest.mark.parametrize(
    ("model", "file", "expected"),
    [
        ({"model_type": "qwen3"}, "pretrain", True),
        ({"model_type": "mistral", "sliding_window": 64}, "pretrain", True),
        ({"model_type": "mistral", "sliding_window": 32}, "pretrain", False),
        ({"model_type": "mistral"}, "pretrain", True),
        ({"model_type": "llama", "attention_dropout": 0.1}, "pretrain", False),
        ({"model_type": "gpt2"}, "finetune", False),
        ({"model_type": "gpt2", "attn_pdrop": 0.0}, "finetune", True),
        ({"model_type": "qwen3"}, "preference", False),
    ],
)
def test_what_attention_by_documents_can_compute(model, file, expected):
    config = dict.fromkeys(("pretrain", "finetune", "preference"), {"block_size": 64}) | {"model": model}
    assert documents_suffice(config, file) is expected


def test_nf4_needs_a_gpu_and_bitsandbytes():
    values = {"lora": {"quantization": "nf4"}}
    check_quantization(A100_WITH_BITSANDBYTES, values, "finetune.json")
    check_quantization(ZEN4, {"lora": None}, "finetune.json")
    for seen, missing in ((ZEN4, "no NVIDIA GPU"), (A100, "setup.sh --extra bitsandbytes")):
        with pytest.raises(Refused, match=rf"{missing}.*--set finetune.lora.quantization=null"):
            check_quantization(seen, values, "finetune.json")


def test_flash_attention_3_does_not_ask_for_version_2(monkeypatch):
    hopper = replace(A100_WITHOUT_FLASH, capability=(9, 0))
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: name)
    values = {"attn_implementation": "flash_attention_3"}
    assert choose(hopper, values) == Choice("bf16", "flash_attention_3", True)


@pytest.mark.parametrize(
    ("hardware", "values", "words"),
    [
        (T4, {"bf16": True}, "T4 has no bf16.*fp16 is chosen"),
        (OLD_CPU, {"bf16": True}, "CPU has no bf16.*fp32 is chosen"),
        (ZEN4, {"fp16": True}, "needs a GPU"),
        (ZEN4, {"attn_implementation": "flash_attention_2"}, "needs an NVIDIA GPU"),
        (T4, {"attn_implementation": "flash_attention_2"}, "capability 8.0"),
        (A100, {"attn_implementation": "flash_attention_2", "bf16": False}, "fp32 is asked for"),
        (T4, {"attn_implementation": "documents"}, "documents is for CPUs; this is T4"),
        (OLD_CPU, {"torch_compile": True}, r"no g\+\+"),
        (T4, {"tf32": True}, "capability 8.0 or more; this is T4"),
        (A100, {"attn_implementation": "flash_attention_3"}, "capability 9.0"),
    ],
)
def test_impossible_value_is_refused(hardware, values, words):
    with pytest.raises(Refused, match=words) as caught:
        choose(hardware, values, "finetune.json")
    assert str(caught.value).startswith(f"finetune.json: {next(iter(values))}: ")


def test_gemm_peak_is_a_plausible_rate():
    assert 1e9 < gemm_peak("cpu", "fp32", 0.05) < 1e14


LISTING = "GPU-aa11, NVIDIA A100-SXM4-40GB, 8.0, 40960, 40000\nGPU-aa22, NVIDIA GB10, 12.1, [N/A], [N/A]\n"
BIG = Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 40 * 2**30, 40_000 * 2**20)
SHARED = Gpu("NVIDIA GB10", (12, 1), None, None)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, [BIG, SHARED]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, [SHARED]),
        ({"CUDA_VISIBLE_DEVICES": "1,0"}, [SHARED, BIG]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-aa2"}, [SHARED]),
        ({"CUDA_VISIBLE_DEVICES": "0,7,1"}, [BIG]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, []),
    ],
)
def test_visible_gpus(environment, expected):
    assert visible_gpus(environment, LISTING) == expected
    assert visible_gpus(environment, "") == []
    assert visible_gpus(environment, "NVIDIA-SMI has failed because of the driver\n") == []


def test_a_glance_finds_what_torch_finds():
    assert glance() == detect()


def test_host_memory_is_what_the_machine_has(monkeypatch, tmp_path):
    total, available = host_memory()
    assert 0 < available <= total
    monkeypatch.setattr(hardware, "Path", lambda name: tmp_path / name.lstrip("/"))  # without /proc
    without, free = host_memory()
    assert without == free == pytest.approx(total, rel=0.02)
