"""What this machine has: GPUs or a CPU, what they can compute in, their memory and their speed.

`recipe.config.choice` decides what a training uses of it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from recipe.project import Refused, warn

# CUDA numbers GPUs as nvidia-smi does, in every stage, and not the fastest first.
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")

# Package and least compute capability of each version of FlashAttention.
FLASH_ATTENTION = {
    2: ("flash_attn", (8, 0)),
    3: ("flash_attn_interface", (9, 0)),
    4: ("flash_attn.cute", (9, 0)),
}
MEASUREMENTS = 6  # of the peak
# The least compute capability that Triton, and so torch.compile, generates code for.
COMPILER_CAPABILITY = (7, 0)
# The least compute capability with bf16 units: Ampere.
BF16_CAPABILITY = (8, 0)
GPU_COLUMNS = "uuid,name,compute_cap,memory.total,memory.free"


@dataclass(frozen=True)
class Hardware:
    """What a device and its software can do.

    device: ``cuda`` or ``cpu``. name: for people. capability: CUDA compute capability, (0, 0) on a CPU.
    torch: PyTorch's version. fast_bf16: whether it has bf16 units that are faster than those for float32.
    flash_attention: the versions of FlashAttention that are installed and run on this device. compiler:
    whether torch.compile works: there are g++ and Python.h, and a GPU is of `COMPILER_CAPABILITY` or more.
    bitsandbytes, liger, torchao: whether that library is installed, for 8-bit optimizers, for Liger's
    kernels, and for fp8.
    """

    device: str
    name: str
    capability: tuple[int, int]
    torch: tuple[int, int]
    fast_bf16: bool
    flash_attention: tuple[int, ...]
    compiler: bool
    bitsandbytes: bool = False
    liger: bool = False
    torchao: bool = False


def detect() -> Hardware:
    """The hardware that PyTorch finds in this process.

    Raises Refused where there is a GPU that PyTorch cannot use: the training would be on the CPU.
    """
    import torch

    if torch.cuda.is_available():
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        check_build(name, capability, torch.cuda.get_arch_list())
        return _gpu(name, capability)
    if seen := gpus():
        try:
            torch.cuda.init()
            reason = "torch.cuda.is_available() is false"
        except (AssertionError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
        raise Refused(
            f"nvidia-smi lists {seen[0].name}, but PyTorch {torch.__version__} cannot use it: {reason}. "
            "Install a build of torch for the CUDA version of the driver (nvidia-smi shows it), or train on "
            "the CPU: export CUDA_VISIBLE_DEVICES="
        )
    return _cpu()


def check_build(name: str, capability: tuple[int, int], built: list[str]) -> None:
    """Raise Refused for a GPU that this build of PyTorch has no kernels for.

    built: of `torch.cuda.get_arch_list`. The kernels of ``sm_86`` run on 8.6 and 8.9, the newer ones of the
    same generation. Those of ``compute_90`` are compiled for any GPU from 9.0 on.
    """
    found = re.findall(r"\b(sm|compute)_(\d+)", " ".join(built))
    kernels = [(kind, divmod(int(number), 10)) for kind, number in found]
    if kernels and not any(
        version <= capability and (kind == "compute" or version[0] == capability[0])
        for kind, version in kernels
    ):
        raise Refused(
            f"{name} has compute capability {capability[0]}.{capability[1]}, but this build of PyTorch has "
            f"kernels for {' '.join(built)}. Install another build of torch (pytorch.org; for an old GPU, "
            "previous versions), or train on the CPU: export CUDA_VISIBLE_DEVICES="
        )


class Gpu(NamedTuple):
    """A GPU as nvidia-smi lists it. total, free: bytes, or None where it shares the machine's memory.

    part: whether it is a part of a GPU (MIG), whose memory is not known.
    """

    name: str
    capability: tuple[int, int]
    total: int | None
    free: int | None
    part: bool = False


def glance() -> Hardware:
    """What `detect` would find, without importing torch: the first visible GPU, or the CPU."""
    seen = gpus()
    return _gpu(seen[0].name, seen[0].capability) if seen else _cpu()


def count_gpus() -> int:
    """The number of GPUs that a training started now would see."""
    return len(gpus())


def gpus() -> list[Gpu]:
    """The GPUs that a training started now would see."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", f"--query-gpu={GPU_COLUMNS}", "--format=csv,noheader,nounits"]
    listing = subprocess.run(query, capture_output=True, text=True)
    found = visible_gpus(os.environ, listing.stdout)
    if listing.returncode and not found:  # such as a driver that was updated without a restart
        said = (listing.stdout + listing.stderr).strip().splitlines() or ["no output"]
        warn(f"nvidia-smi ends with exit code {listing.returncode}: {said[0]}. So no GPU is used")
    return found


def visible_gpus(environment: Mapping[str, str], listing: str) -> list[Gpu]:
    """The GPUs of a listing by nvidia-smi (with `GPU_COLUMNS`) that CUDA_VISIBLE_DEVICES leaves visible.

    The variable is read as CUDA does: numbers or beginnings of UUIDs, in the order given, up to the first one
    that does not exist. A process gets only the first part of a GPU (``MIG-…``) that is named. The listing
    does not show parts: one is named after the first GPU, and without the variable the whole GPU is listed.
    """
    present = []
    for line in listing.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 5 and parts[2].replace(".", "").isdigit():
            major, _, minor = parts[2].partition(".")
            # In MiB; "[N/A]" where GPU and CPU have one memory.
            total, free = (int(size) * 2**20 if size.isdigit() else None for size in parts[3:])
            present.append((parts[0], Gpu(parts[1], (int(major), int(minor or 0)), total, free)))
    asked = environment.get("CUDA_VISIBLE_DEVICES")
    if asked is None:
        return [facts for _, facts in present]
    visible = []
    for name in (part.strip() for part in asked.split(",")):
        if name.startswith("MIG-"):
            whole = [facts for _, facts in present[:1]]
            return visible or [Gpu(f"{gpu.name} MIG", gpu.capability, None, None, True) for gpu in whole]
        found = [
            facts
            for index, (uuid, facts) in enumerate(present)
            if name == str(index) or (name.startswith("GPU-") and uuid.startswith(name))
        ]
        if not found:
            break
        visible.append(found[0])
    return visible


def _gpu(name: str, capability: tuple[int, int]) -> Hardware:
    flash = tuple(
        version
        for version, (package, least) in FLASH_ATTENTION.items()
        if capability >= least and is_installed(package)
    )
    bf16 = capability >= BF16_CAPABILITY
    libraries = [is_installed(name) for name in ("bitsandbytes", "liger_kernel", "torchao")]
    compiler = capability >= COMPILER_CAPABILITY and _compiler()
    return Hardware("cuda", name, capability, _torch_version(), bf16, flash, compiler, *libraries)


def _cpu() -> Hardware:
    facts = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return Hardware("cpu", "CPU", (0, 0), _torch_version(), cpu_has_fast_bf16(facts), (), _compiler())


def cpu_has_fast_bf16(facts: str) -> bool:
    """Whether a CPU multiplies faster in bf16 than in float32. facts: the content of /proc/cpuinfo.

    AMX does (Intel, from Sapphire Rapids on), and AMD's AVX-512 (from Zen 4 on: twice as fast). Intel's
    AVX-512 without AMX, which a virtual machine may hide, has the instructions, but takes longer with them
    (tests/bench/README.md: the machine).
    """
    return "amx_bf16" in facts or ("avx512_bf16" in facts and "AuthenticAMD" in facts)


def is_installed(package: str) -> bool:
    """Whether a package, or a part of one (``flash_attn.cute``), is found. Nothing is imported."""
    whole, _, part = package.partition(".")
    found = importlib.util.find_spec(whole)
    if found is None or not part:
        return found is not None
    # For a part, find_spec would import the whole: FlashAttention imports torch.
    return any(Path(folder, part).is_dir() for folder in found.submodule_search_locations or ())


def _torch_version() -> tuple[int, int]:
    major, minor = importlib.metadata.version("torch").split(".")[:2]
    return int(major), int(minor)


def _compiler() -> bool:
    # What torch.compile generates for a CPU includes Python.h.
    return shutil.which("g++") is not None and Path(sysconfig.get_path("include"), "Python.h").exists()


def initialise_vector_math() -> None:
    """Let one thread make the process's first call of MKL's vector functions (cos, sin, exp, log).

    When two threads make it at once, one of them sometimes computes its half of the tensor on another code
    path, with relative errors of 1.5e-4: in 1 of about 2,000 processes that do nothing else, and in 1 of 40
    trainings, which then differed from all others after their first step (torch 2.13, 2 cores).
    """
    import torch

    torch.zeros(1).cos()


def peak_memory(device: str) -> int:
    """The peak memory of this process in bytes: reserved by PyTorch on a GPU, resident on a CPU."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gemm_peak(device: str, precision: str, seconds: float = 0.3) -> float:
    """Measured FLOP/s of a large matrix product in the training's precision, the base of MFU.

    It is the best of several short measurements: one in which the machine is busy with something else does
    not count. On a GPU products of 4096 x 4096 x 4096 are timed by its own clock, without waiting for each
    (on an H200 that gives 797 TFLOP/s, where 2048 with a wait after each gave 348); on a CPU 2048.

    seconds: how long to measure.
    """
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    size = 4096 if device == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    measure = _seconds_on_gpu if device == "cuda" else _seconds_on_cpu
    measure(lambda: left @ right, 3)  # the first products choose and load kernels
    once = max(measure(lambda: left @ right, 1), 1e-6)
    count = max(1, int(seconds / MEASUREMENTS / once))
    best = min(measure(lambda: left @ right, count) for _ in range(MEASUREMENTS))
    return 2 * size**3 * count / best


def _seconds_on_cpu(work: Callable[[], object], count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        work()
    return time.perf_counter() - started


def _seconds_on_gpu(work: Callable[[], object], count: int) -> float:
    """Seconds between two events on the GPU, around `count` calls that are queued one after the other."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000  # milliseconds
