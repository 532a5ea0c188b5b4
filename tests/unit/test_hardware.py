"""What the machine has: GPUs that are visible, builds that fit, and the measured peak."""

import os
from types import SimpleNamespace

import pytest
from recipe import hardware
from recipe.hardware import (
    Gpu,
    check_build,
    cpu_has_fast_bf16,
    detect,
    gemm_peak,
    glance,
    gpus,
    is_installed,
    visible_gpus,
)
from recipe.project import Refused


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
