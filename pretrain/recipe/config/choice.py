"""What a training uses on given hardware: precision, attention, compiling, loss; and why not something else.

Pure functions of the hardware (`recipe.hardware.glance`) and of the values that a user edits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipe.hardware import BF16_CAPABILITY, COMPILER_CAPABILITY, FLASH_ATTENTION, Hardware
from recipe.project import Refused

# Bytes per logit at the peak of a loss over whole logits, compiled and not (`recipe.run.memory.LOGIT_BYTES`),
# and how many bytes are too many for a GPU. Fewer are kept: compiled, a loss over them takes less time.
BYTES_PER_LOGIT = {True: 4, False: 16}
TOO_MANY_BYTES = 2**32
# Logits of a chunk: 1,024 positions of a vocabulary of 32,768. Their float32 values take 128 MiB, and the
# matrix products are still large enough for a GPU.
CHUNK = 2**25
# How the loss is computed, in the words of the check after the first step.
WHOLE, CHUNKS, LIGER = "whole logits", "chunks", "Liger"
# The least compute capability with fp8 units: Ada and Hopper.
FP8_CAPABILITY = (8, 9)
# The architectures whose loss Liger's kernels can replace; it does nothing with others.
LIGER_MODELS = ("llama", "mistral", "qwen3")


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
