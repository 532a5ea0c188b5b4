"""The choice of precision, attention and compilation for given hardware."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
from recipe import hardware
from recipe.config.training import attention_needs
from recipe.hardware import (
    AttentionNeeds,
    Choice,
    Gpu,
    Hardware,
    check_build,
    check_liger,
    check_quantization,
    choose,
    choose_loss,
    cpu_has_fast_bf16,
    detect,
    gemm_peak,
    glance,
    gpus,
    is_installed,
    usable_attention,
    visible_gpus,
)
from recipe.project import Refused

TORCH = (2, 13)
A100 = Hardware("cuda", "A100", (8, 0), TORCH, True, (2,), True)
A100_WITHOUT_FLASH = replace(A100, flash_attention=())
A100_WITH_BITSANDBYTES = replace(A100, bitsandbytes=True)
A100_WITH_LIGER = replace(A100, liger=True)
ADA = replace(A100, name="RTX 4090", capability=(8, 9), torchao=True)
T4 = Hardware("cuda", "T4", (7, 5), TORCH, False, (), True)
P100 = Hardware("cuda", "P100", (6, 0), TORCH, False, (), False)
HOPPER = replace(A100, name="H100", capability=(9, 0), flash_attention=(2, 3))
ZEN4 = Hardware("cpu", "CPU", (0, 0), TORCH, True, (), True)
OLD_CPU = Hardware("cpu", "CPU", (0, 0), TORCH, False, (), False)


@pytest.mark.parametrize(
    ("hardware", "values", "expected"),
    [
        (A100, {}, Choice("bf16", "varlen", True)),
        (A100_WITHOUT_FLASH, {}, Choice("bf16", "varlen", True)),
        (T4, {}, Choice("fp16", "sdpa", True)),
        (ZEN4, {}, Choice("bf16", "documents", True)),
        (OLD_CPU, {}, Choice("fp32", "documents", False)),
        (A100, {"bf16": False}, Choice("fp32", "sdpa", True)),
        (A100, {"fp16": False}, Choice("bf16", "varlen", True)),
        (A100, {"bf16": False, "fp16": False}, Choice("fp32", "sdpa", True)),
        (T4, {"bf16": False}, Choice("fp16", "sdpa", True)),
        (T4, {"fp16": False}, Choice("fp32", "sdpa", True)),
        (ZEN4, {"fp16": False}, Choice("bf16", "documents", True)),
        (P100, {}, Choice("fp16", "sdpa", False)),
        (A100, {"fp16": True, "torch_compile": False}, Choice("fp16", "varlen", False)),
        (ZEN4, {"attn_implementation": "eager", "torch_compile": False}, Choice("bf16", "eager", False)),
        (ADA, {}, Choice("bf16", "varlen", True)),
        (ADA, {"fp8": True}, Choice("bf16", "varlen", True, fp8=True)),
    ],
)
def test_choice(hardware, values, expected):
    assert choose(hardware, values) == expected


@pytest.mark.parametrize(
    ("seen", "needs", "expected"),
    [
        (ZEN4, AttentionNeeds(), "documents"),
        (ZEN4, AttentionNeeds(dropout=True), "sdpa"),
        (ZEN4, AttentionNeeds(window=True), "sdpa"),
        (ZEN4, AttentionNeeds(padded=True), "sdpa"),
        (A100, AttentionNeeds(head_size=128), "varlen"),
        (A100, AttentionNeeds(window=True), "varlen"),
        (A100, AttentionNeeds(dropout=True), "sdpa"),
        (A100, AttentionNeeds(padded=True), "sdpa"),
        (A100, AttentionNeeds(head_size=36), "sdpa"),
        (A100, AttentionNeeds(head_size=288), "sdpa"),
        (replace(A100, torch=(2, 11)), AttentionNeeds(), "varlen"),
        (replace(A100, torch=(2, 10)), AttentionNeeds(), "sdpa"),
        (replace(A100, capability=(12, 0)), AttentionNeeds(), "varlen"),
        (T4, AttentionNeeds(), "sdpa"),
    ],
)
def test_the_kernel_that_is_chosen_computes_what_is_needed(seen, needs, expected):
    assert choose(seen, {}, needs=needs).attention == expected


@pytest.mark.parametrize(
    ("model", "file", "expected"),
    [
        ({"model_type": "qwen3"}, "pretrain", AttentionNeeds(head_size=128)),
        ({"model_type": "mistral", "sliding_window": 64}, "pretrain", AttentionNeeds(head_size=128)),
        (
            {"model_type": "mistral", "sliding_window": 32},
            "pretrain",
            AttentionNeeds(window=True, head_size=128),
        ),
        # As Qwen publishes it: a window that is not used.
        ({"model_type": "qwen2", "sliding_window": 32}, "pretrain", AttentionNeeds(head_size=128)),
        (
            {"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": True},
            "pretrain",
            AttentionNeeds(window=True, head_size=128),
        ),
        ({"model_type": "llama", "attention_dropout": 0.1}, "pretrain", AttentionNeeds(True, head_size=128)),
        ({"model_type": "gpt2"}, "finetune", AttentionNeeds(True, head_size=64)),
        ({"model_type": "gpt2", "attn_pdrop": 0.0, "n_embd": 96}, "finetune", AttentionNeeds(head_size=8)),
        ({"model_type": "qwen3", "head_dim": 48}, "preference", AttentionNeeds(padded=True, head_size=48)),
    ],
)
def test_what_the_attention_of_a_training_needs(model, file, expected):
    config = dict.fromkeys(("pretrain", "finetune", "preference"), {"block_size": 64}) | {"model": model}
    assert attention_needs(config, file) == expected


def test_nf4_needs_a_gpu_and_bitsandbytes():
    values = {"lora": {"quantization": "nf4"}}
    check_quantization(A100_WITH_BITSANDBYTES, values, "finetune.json")
    check_quantization(ZEN4, {"lora": None}, "finetune.json")
    for seen, missing in ((ZEN4, "no NVIDIA GPU"), (A100, "setup.sh --extra bitsandbytes")):
        with pytest.raises(Refused, match=rf"{missing}.*--set finetune.lora.quantization=null"):
            check_quantization(seen, values, "finetune.json")


@pytest.mark.parametrize(
    "name", ["sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"]
)
def test_other_kernels_are_a_choice_by_name(name):
    assert choose(HOPPER, {"attn_implementation": name}) == Choice("bf16", name, True)


@pytest.mark.parametrize(
    ("version", "needs", "reason"),
    [
        (2, AttentionNeeds(dropout=True), ""),
        (3, AttentionNeeds(dropout=True), "computes no dropout"),
        (3, AttentionNeeds(padded=True, window=True, head_size=256), ""),
        (2, AttentionNeeds(head_size=36), ""),
        (2, AttentionNeeds(head_size=288), "at most 256; model.json makes it 288"),
        (3, AttentionNeeds(head_size=36), "a multiple of 8"),
    ],
)
def test_flash_attention_is_refused_where_it_does_not_compute_what_is_needed(version, needs, reason):
    name = f"flash_attention_{version}"
    assert (name in usable_attention(HOPPER, needs, choose(HOPPER, {}, needs=needs))) == (not reason)
    if reason:
        with pytest.raises(Refused, match=f"{name} .*{reason}"):
            choose(HOPPER, {"attn_implementation": name}, needs=needs)


def test_installed_versions_of_flash_attention_count_where_they_run(monkeypatch, tmp_path):
    package = SimpleNamespace(submodule_search_locations=[tmp_path])
    installed = {"flash_attn": package, "flash_attn_interface": package}
    monkeypatch.setattr(hardware.importlib.util, "find_spec", installed.get)
    assert hardware._gpu("T4", (7, 5)).flash_attention == ()
    assert hardware._gpu("A100", (8, 0)).flash_attention == (2,)
    assert hardware._gpu("H100", (9, 0)).flash_attention == (2, 3)
    (tmp_path / "cute").mkdir()
    assert hardware._gpu("H100", (9, 0)).flash_attention == (2, 3, 4)


def test_torch_compile_is_not_for_gpus_that_triton_refuses(monkeypatch):
    monkeypatch.setattr(hardware, "_compiler", lambda: True)
    assert [hardware._gpu("", version).compiler for version in ((6, 1), (7, 0))] == [False, True]


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
        (P100, {"torch_compile": True}, "capability 7.0 or more; this is P100"),
        (P100, {"attn_implementation": "flex_attention"}, "capability 7.0 or more; this is P100"),
        (T4, {"tf32": True}, "capability 8.0 or more; this is T4"),
        (A100, {"attn_implementation": "flash_attention_3"}, "capability 9.0"),
        (A100, {"attn_implementation": "flash_attention_4"}, r"flash_attn\.cute installed"),
        (ZEN4, {"attn_implementation": "varlen"}, "needs an NVIDIA GPU"),
        (T4, {"attn_implementation": "varlen"}, "capability 8.0"),
        (A100, {"attn_implementation": "varlen", "bf16": False}, "fp32 is asked for"),
        (replace(A100, torch=(2, 10)), {"attn_implementation": "varlen"}, "this is 2.10"),
        (ZEN4, {"attn_implementation": "flex_attention"}, "no gradient on a CPU"),
        (replace(A100, compiler=False), {"attn_implementation": "flex_attention"}, r"no g\+\+"),
        (ZEN4, {"fp8": True}, "capability 8.9 or more; this is CPU"),
        (replace(A100, torchao=True), {"fp8": True}, "capability 8.9 or more; this is A100"),
        (replace(ADA, torchao=False), {"fp8": True}, "setup.sh --extra torchao"),
        (ADA, {"fp8": True, "fp16": True}, "fp16 is asked for"),
        (ADA, {"fp8": True, "torch_compile": False}, "no torch.compile"),
        (replace(ADA, compiler=False), {"fp8": True}, "no torch.compile"),
    ],
)
def test_impossible_value_is_refused(hardware, values, words):
    with pytest.raises(Refused, match=words) as caught:
        choose(hardware, values, "finetune.json")
    assert str(caught.value).startswith(f"finetune.json: {next(iter(values))}: ")


def test_a_busy_moment_does_not_lower_the_peak(monkeypatch):
    """Of six measurements, each of 10 products a second, five are disturbed."""
    taken = iter([1.0, 0.1, 9.0, 4.0, 1.0, 2.0, 3.0, 5.0])
    monkeypatch.setattr(hardware, "_seconds_on_cpu", lambda work, count: next(taken))
    assert gemm_peak("cpu", "fp32", 6.0) == 2 * 2048**3 * 10 / 1.0


def test_gemm_peak_is_a_plausible_rate():
    assert 1e9 < gemm_peak("cpu", "fp32", 0.05) < 1e14


LISTING = "GPU-aa11, NVIDIA A100-SXM4-40GB, 8.0, 40960, 40000\nGPU-aa22, NVIDIA GB10, 12.1, [N/A], [N/A]\n"
BIG = Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 40 * 2**30, 40_000 * 2**20)
SHARED = Gpu("NVIDIA GB10", (12, 1), None, None)
PART = Gpu("NVIDIA A100-SXM4-40GB MIG", (8, 0), None, None, part=True)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, [BIG, SHARED]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, [SHARED]),
        ({"CUDA_VISIBLE_DEVICES": "1,0"}, [SHARED, BIG]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-aa2"}, [SHARED]),
        ({"CUDA_VISIBLE_DEVICES": "0,7,1"}, [BIG]),
        ({"CUDA_VISIBLE_DEVICES": "MIG-3c1f-aaaa,MIG-3c1f-bbbb"}, [PART]),
        ({"CUDA_VISIBLE_DEVICES": "1,MIG-3c1f-aaaa"}, [SHARED]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, []),
    ],
)
def test_visible_gpus(environment, expected):
    assert visible_gpus(environment, LISTING) == expected
    assert visible_gpus(environment, "") == []
    assert visible_gpus(environment, "NVIDIA-SMI has failed because of the driver\n") == []


def test_an_nvidia_smi_that_fails_is_said(tmp_path, monkeypatch, capsys):
    """As after an update of the driver without a restart; the training would silently be on the CPU."""
    said = "Failed to initialize NVML: Driver/library version mismatch"
    listing = tmp_path / "nvidia-smi"
    listing.write_text(f"#!/bin/sh\necho '{said}'\nexit 18\n")
    listing.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpus() == []
    assert f"nvidia-smi ends with exit code 18: {said}. So no GPU is used" in capsys.readouterr().err


def test_a_part_of_a_package_is_found_without_an_import(tmp_path, monkeypatch):
    """FlashAttention imports torch, which takes seconds."""
    (tmp_path / "flash_that_imports/cute").mkdir(parents=True)
    (tmp_path / "flash_that_imports/__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert is_installed("flash_that_imports.cute")
    assert not is_installed("flash_that_imports.hopper") and not is_installed("no_such_package.cute")


@pytest.mark.parametrize(
    ("vendor", "flags", "fast"),
    [
        ("GenuineIntel", "avx2", False),
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16 amx_tile", True),
        ("GenuineIntel", "avx512f avx512_bf16", False),  # AMX hidden by a virtual machine
        ("AuthenticAMD", "avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx512f", False),
    ],
)
def test_bf16_on_a_cpu_is_for_units_that_are_faster_than_float32(vendor, flags, fast):
    assert cpu_has_fast_bf16(f"vendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n") == fast


def test_a_glance_finds_what_torch_finds():
    assert glance() == detect()


def test_a_gpu_that_torch_cannot_use_is_one_line(tmp_path, monkeypatch):
    """Such as a CPU build of torch, or one for a newer driver."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    listing = tmp_path / "nvidia-smi"
    listing.write_text(f"#!/bin/sh\ncat <<END\n{LISTING}END\n")
    listing.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for error in (RuntimeError("The driver is too old\nmore"), AssertionError("no CUDA")):
        monkeypatch.setattr("torch.cuda.init", lambda error=error: (_ for _ in ()).throw(error))
        first = str(error).splitlines()[0]
        with pytest.raises(Refused, match=f"lists NVIDIA A100.*cannot use it: {first}. Install") as caught:
            detect()
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert detect().device == "cpu"


@pytest.mark.parametrize(
    ("capability", "built", "works"),
    [
        ((6, 1), ["sm_75", "sm_80", "sm_90a", "compute_120"], False),
        ((7, 5), ["sm_75", "sm_80"], True),
        ((8, 9), ["sm_80", "sm_90"], True),
        ((8, 0), ["sm_75", "sm_86"], False),
        ((12, 0), ["sm_75", "sm_90"], False),
        ((12, 0), ["sm_75", "sm_90", "compute_90"], True),  # by PTX
        ((12, 1), ["sm_90", "sm_120"], True),
        ((6, 1), [], True),  # unknown
    ],
)
def test_a_gpu_that_the_build_of_torch_has_no_kernels_for_is_refused(capability, built, works):
    if works:
        return check_build("GTX", capability, built)
    has = rf"capability {'.'.join(map(str, capability))}, .* kernels for {' '.join(built)}. Install"
    with pytest.raises(Refused, match=f"GTX has compute {has}"):
        check_build("GTX", capability, built)


def test_torch_compile_needs_the_headers_of_python(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name: name)
    assert hardware._compiler()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert not hardware._compiler()


@pytest.mark.parametrize(
    ("device", "positions", "vocabulary", "compiled", "tensor_parallel", "expected"),
    [
        ("cuda", 16 * 1024, 32_000, False, 1, "chunks"),
        ("cuda", 16 * 1024, 32_000, True, 1, "whole logits"),
        ("cuda", 4 * 1024, 32_000, False, 1, "whole logits"),
        ("cuda", 8 * 1024, 32_768, False, 1, "chunks"),
        ("cuda", 32 * 1024, 50_000, True, 1, "chunks"),
        ("cuda", 16 * 1024, 32_000, False, 2, "whole logits"),
        ("cpu", 16 * 1024, 32_000, False, 1, "whole logits"),
    ],
)
def test_many_logits_are_never_held_on_a_gpu(
    device, positions, vocabulary, compiled, tensor_parallel, expected
):
    assert choose_loss(device, positions * vocabulary, compiled, tensor_parallel) == expected


@pytest.mark.parametrize(
    ("hardware", "model_type", "sharded", "where", "reason"),
    [
        (ZEN4, "mistral", False, "pretrain.json", "for GPUs; this is CPU"),
        (A100, "mistral", False, "pretrain.json", "liger-kernel is not installed"),
        (A100_WITH_LIGER, "gpt2", False, "pretrain.json", "no kernels for gpt2, only for llama, mistral"),
        (A100_WITH_LIGER, "mistral", True, "pretrain.json", "--fsdp and --tensor-parallel split"),
        (A100_WITH_LIGER, "mistral", False, "preference.json", "not of preferences"),
    ],
)
def test_liger_is_refused_where_it_cannot_work(hardware, model_type, sharded, where, reason):
    with pytest.raises(Refused, match=f"{where}: use_liger_kernel: true, but .*{reason}.*Leave the key out"):
        check_liger(hardware, {"use_liger_kernel": True}, model_type, sharded, where)
    check_liger(hardware, {}, model_type, sharded, where)
    check_liger(A100_WITH_LIGER, {"use_liger_kernel": True}, "mistral", False, "pretrain.json")


@pytest.mark.parametrize(
    ("hardware", "needs", "expected"),
    [
        (ZEN4, AttentionNeeds(), ["sdpa"]),
        (A100, AttentionNeeds(), ["flex_attention", "flash_attention_2", "sdpa"]),
        (T4, AttentionNeeds(), ["flex_attention"]),
        (A100_WITHOUT_FLASH, AttentionNeeds(dropout=True), []),
    ],
)
def test_the_kernels_that_a_probe_compares_with_the_chosen_one(hardware, needs, expected):
    assert usable_attention(hardware, needs, choose(hardware, {}, needs=needs)) == expected
