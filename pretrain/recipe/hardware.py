"""What this machine has, and what a training should use on it."""

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
from typing import Any, NamedTuple

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
# Bytes per logit at the peak of a loss over whole logits, compiled and not (`recipe.run.memory.LOGIT_BYTES`),
# and how many bytes are too many for a GPU. Fewer are kept: compiled, a loss over them takes less time.
BYTES_PER_LOGIT = {True: 4, False: 16}
TOO_MANY_BYTES = 2**32
# Logits of a chunk: 1,024 positions of a vocabulary of 32,768. Their float32 values take 128 MiB, and the
# matrix products are still large enough for a GPU.
CHUNK = 2**25
# How the loss is computed, in the words of the check after the first step.
WHOLE, CHUNKS, LIGER = "whole logits", "chunks", "Liger"
# The least compute capability that Triton, and so torch.compile, generates code for.
COMPILER_CAPABILITY = (7, 0)
# The least compute capability with bf16 units: Ampere.
BF16_CAPABILITY = (8, 0)
# The least compute capability with fp8 units: Ada and Hopper.
FP8_CAPABILITY = (8, 9)
# The architectures whose loss Liger's kernels can replace; it does nothing with others.
LIGER_MODELS = ("llama", "mistral", "qwen3")
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


@dataclass(frozen=True)
class AttentionNeeds:
    """What the attention of a training has to compute, beyond causal attention inside packed documents.

    dropout: of the attention weights. window: a sliding window below the block. padded: the batches are
    padded pairs, not packed blocks. head_size: numbers in a head; None if it is not known.
    """

    dropout: bool = False
    window: bool = False
    padded: bool = False
    head_size: int | None = None


@dataclass(frozen=True)
class Choice:
    """What a training uses: precision ``bf16``, ``fp16`` or ``fp32``, attention kernel, torch.compile.

    fp8: whether the layers multiply in fp8; the precision is bf16 then, of everything else.
    """

    precision: str
    attention: str
    compile: bool
    fp8: bool = False


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


def choose(
    hardware: Hardware,
    values: dict[str, Any],
    where: str = "pretrain.json",
    needs: AttentionNeeds = AttentionNeeds(),
) -> Choice:
    """What to use: the values of a training file, or else the best that the hardware has.

    where: the file's name, for messages. needs: what the attention has to compute
    (`recipe.config.training.attention_needs`). Raises Refused for a value that the hardware cannot meet.
    """
    precision = _precision(hardware, values, where)
    attention = _attention(hardware, values, where, needs, precision)
    if values.get("torch_compile") and not hardware.compiler:
        raise Refused(f"{where}: torch_compile: true, but {_why_not_compile(hardware)}, or leave the key out")
    if values.get("tf32") and hardware.capability < BF16_CAPABILITY:
        raise Refused(
            f"{where}: tf32: true, but it needs an NVIDIA GPU of capability 8.0 or more; this is "
            f"{hardware.name}. Leave the key out"
        )
    choice = Choice(
        precision, attention, values.get("torch_compile", hardware.compiler), bool(values.get("fp8"))
    )
    _check_fp8(hardware, choice, where)
    return choice


def _why_not_compile(hardware: Hardware) -> str:
    """Why torch.compile does not work on hardware without a `compiler`, and what to do."""
    if hardware.device == "cuda" and hardware.capability < COMPILER_CAPABILITY:
        return f"it needs a GPU of capability 7.0 or more; this is {hardware.name}. Take another GPU"
    return "there is no g++, or no Python.h, on this machine. Install them (apt-get install g++ python3-dev)"


def choose_loss(device: str, logits: int, compiled: bool, tensor_parallel: int) -> str:
    """How the loss is computed unless Liger is asked for: `WHOLE`, or `CHUNKS` where that saves memory.

    logits: of a micro-batch, positions x vocabulary. tensor_parallel: ranks that share each matrix; several
    split the output matrix over the vocabulary.
    """
    large = BYTES_PER_LOGIT[compiled] * logits >= TOO_MANY_BYTES
    return CHUNKS if device == "cuda" and large and tensor_parallel == 1 else WHOLE


def _precision(hardware: Hardware, values: dict[str, Any], where: str) -> str:
    if values.get("bf16"):
        if not hardware.fast_bf16:
            instead = "fp16" if hardware.device == "cuda" else "fp32"
            lack = f"{hardware.name} has no bf16 units (capability {hardware.capability})"
            if hardware.device == "cpu":
                lack = "this CPU has no bf16 units that are faster than float32 (AMX, or AVX-512 of AMD)"
            raise Refused(f"{where}: bf16: true, but {lack}. Leave the key out, and {instead} is chosen")
        return "bf16"
    if values.get("fp16"):
        if hardware.device == "cpu":
            raise Refused(
                f"{where}: fp16: true, but fp16 training needs a GPU. Leave the key out, and the best for "
                "this CPU is chosen"
            )
        return "fp16"
    return precision_of(values, hardware.device, hardware.fast_bf16)


def precision_of(values: Mapping[str, Any], device: str, fast_bf16: bool) -> str:
    """The precision that a training file leads to: ``bf16``, ``fp16`` or ``fp32``.

    It is what the file sets to true, or else the fastest that the device has. Where the file sets that to
    false, it is fp32: ``"bf16": false`` changes nothing on a GPU without bf16 units, which computes in fp16.
    """
    best = "bf16" if fast_bf16 else "fp16" if device == "cuda" else "fp32"
    chosen = next((name for name in ("bf16", "fp16") if values.get(name)), best)
    return "fp32" if values.get(chosen) is False else chosen


def _attention(
    hardware: Hardware, values: dict[str, Any], where: str, needs: AttentionNeeds, precision: str
) -> str:
    """The kernel of the attention: the one asked for, or else the fastest that computes what is needed."""
    asked = values.get("attn_implementation", "auto")
    reasons = _why_not(hardware, needs, precision)
    if asked == "auto":
        return next((name for name in ("documents", "varlen") if not reasons[name]), "sdpa")
    if reasons.get(asked):
        raise Refused(f"{where}: attn_implementation: {asked} {reasons[asked]}. Write auto or sdpa")
    return asked


def usable_attention(hardware: Hardware, needs: AttentionNeeds, choice: Choice) -> list[str]:
    """The kernels that could be used in place of the chosen one, without `eager`, which no one needs."""
    reasons = _why_not(hardware, needs, choice.precision) | {"sdpa": ""}
    return [name for name, reason in reasons.items() if not reason and name != choice.attention]


def _why_not(hardware: Hardware, needs: AttentionNeeds, precision: str) -> dict[str, str]:
    """By kernel, why it cannot be used here; empty if it can."""
    return {
        "documents": _why_not_documents(hardware, needs),
        "varlen": _why_not_varlen(hardware, needs, precision),
        "flex_attention": _why_not_flex(hardware, needs),
    } | {
        f"flash_attention_{version}": _why_not_flash(hardware, version, needs, precision)
        for version in FLASH_ATTENTION
    }


def _why_not_documents(hardware: Hardware, needs: AttentionNeeds) -> str:
    """Why `recipe.model.attention` cannot be used here; empty if it can."""
    if hardware.device != "cpu":
        return f"is for CPUs; this is {hardware.name}"
    if needs.dropout or needs.window or needs.padded:
        return (
            "computes neither dropout of attention (model.json: attention_dropout, attn_pdrop) nor a "
            "sliding_window below block_size nor padded preferences"
        )
    return ""


def _why_not_varlen(hardware: Hardware, needs: AttentionNeeds, precision: str) -> str:
    """Why PyTorch's own FlashAttention over packed documents cannot be used here; empty if it can.

    PyTorch has it from 2.10 on, with the arguments that `recipe.model.varlen` uses from 2.11 on.
    """
    if hardware.device != "cuda" or hardware.capability < BF16_CAPABILITY:
        return f"needs an NVIDIA GPU of capability 8.0 or more; this is {hardware.name}"
    if hardware.torch < (2, 11):
        return f"needs PyTorch 2.11 or newer; this is {hardware.torch[0]}.{hardware.torch[1]}"
    if precision == "fp32":
        return "computes in bf16 or fp16 only, but fp32 is asked for"
    if needs.dropout or needs.padded:
        return (
            "computes neither dropout of attention (model.json: attention_dropout, attn_pdrop) nor padded "
            "preferences"
        )
    return _why_not_heads(needs)


def _why_not_heads(needs: AttentionNeeds) -> str:
    """Why FlashAttention cannot be used for heads of this size; empty if it can."""
    if needs.head_size and (needs.head_size > 256 or needs.head_size % 8):
        return f"needs heads of a multiple of 8 numbers, at most 256; model.json makes it {needs.head_size}"
    return ""


def _why_not_flex(hardware: Hardware, needs: AttentionNeeds) -> str:
    """Why PyTorch's flex_attention cannot be used here; empty if it can."""
    if hardware.device != "cuda":
        return f"has no gradient on a CPU, and needs an NVIDIA GPU; this is {hardware.name}"
    if not hardware.compiler:
        return f"must be compiled, but {_why_not_compile(hardware)}"
    if needs.dropout:
        return "computes no dropout of attention (model.json: attention_dropout, attn_pdrop)"
    return ""


def _why_not_flash(hardware: Hardware, version: int, needs: AttentionNeeds, precision: str) -> str:
    """Why a version of FlashAttention cannot be used here; empty if it can."""
    package, (major, minor) = FLASH_ATTENTION[version]
    if version not in hardware.flash_attention:
        return (
            f"needs an NVIDIA GPU of capability {major}.{minor} or more with {package} installed; this is "
            f"{hardware.name}"
        )
    if precision == "fp32":
        return "computes in bf16 or fp16 only, but fp32 is asked for"
    if needs.dropout and version > 2:
        return "computes no dropout of attention (model.json: attention_dropout, attn_pdrop)"
    if version == 2 and (needs.head_size or 0) <= 256:
        return ""  # it pads its heads to a multiple of 8
    return _why_not_heads(needs)


def _check_fp8(hardware: Hardware, choice: Choice, where: str) -> None:
    """Raise Refused for ``fp8`` where the hardware or the other choices rule it out."""
    reason = ""
    if hardware.device != "cuda" or hardware.capability < FP8_CAPABILITY:
        reason = f"it needs an NVIDIA GPU of capability 8.9 or more; this is {hardware.name}"
    elif not hardware.torchao:
        reason = "torchao is not installed (bash setup.sh --extra torchao)"
    elif choice.precision != "bf16":
        reason = f"everything but its products is computed in bf16, and {choice.precision} is asked for"
    elif not choice.compile:
        reason = "uncompiled it is slower than bf16, and there is no torch.compile (torch_compile, g++)"
    if choice.fp8 and reason:
        raise Refused(f"{where}: fp8: true, but {reason}. Leave the key out, and bf16 is used")


def check_quantization(hardware: Hardware, values: dict[str, Any], where: str) -> None:
    """Raise Refused for an adapter over 4-bit weights without a GPU or without bitsandbytes.

    where: the name of the training file.
    """
    if not (values.get("lora") or {}).get("quantization"):
        return
    missing = "no NVIDIA GPU is visible" if hardware.device != "cuda" else ""
    if not missing and not hardware.bitsandbytes:
        missing = "it is not installed (bash setup.sh --extra bitsandbytes)"
    if missing:
        raise Refused(
            f"{where}: lora.quantization: nf4 weights need the CUDA kernels of bitsandbytes, but "
            f"{missing}. To tune LoRA over unquantised weights: --set "
            f"{where.removesuffix('.json')}.lora.quantization=null"
        )


def initialise_vector_math() -> None:
    """Let one thread make the process's first call of MKL's vector functions (cos, sin, exp, log).

    When two threads make it at once, one of them sometimes computes its half of the tensor on another code
    path, with relative errors of 1.5e-4: in 1 of about 2,000 processes that do nothing else, and in 1 of 40
    trainings, which then differed from all others after their first step (torch 2.13, 2 cores).
    """
    import torch

    torch.zeros(1).cos()


def check_liger(
    hardware: Hardware, values: dict[str, Any], model_type: str | None, sharded: bool, where: str
) -> None:
    """Raise Refused for ``use_liger_kernel`` where Liger's kernels cannot work.

    model_type: of model.json; None if it is not known yet. sharded: by FSDP2 or tensor parallelism. where:
    the name of the training file.
    """
    if not values.get("use_liger_kernel"):
        return
    reason = ""
    if hardware.device != "cuda":
        reason = f"its kernels are for GPUs; this is {hardware.name}"
    elif not hardware.liger:
        reason = "liger-kernel is not installed (bash setup.sh --extra liger)"
    elif model_type is not None and model_type not in LIGER_MODELS:
        reason = f"it has no kernels for {model_type}, only for {', '.join(LIGER_MODELS)}"
    elif sharded:
        reason = "it reads the whole output matrix, which --fsdp and --tensor-parallel split"
    elif where == "preference.json":
        reason = "its loss is that of the next token, not of preferences"
    if reason:
        raise Refused(
            f"{where}: use_liger_kernel: true, but {reason}. Leave the key out: a GPU computes the loss of a "
            "large batch in chunks anyway"
        )


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
