"""The optimizers that a training can use, one entry each. All other modules read these entries.

To add an optimizer of transformers, write one entry in `OPTIMIZERS` under its name for the key ``optim``.
To add one of our own, write its class and a function that builds it in `recipe.model.optimizers`, and one
entry that names this function; ``optim`` then accepts the entry's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from recipe.hardware import Hardware
from recipe.project import Refused


class StateBytes(NamedTuple):
    """Bytes of optimizer state for each parameter, by the groups of `recipe.run.memory.Shape`.

    matrices: of the layers. embeddings: tokens and learned positions, also where the output matrix is tied to
    them. output: the output matrix. vectors: norms and biases.
    """

    matrices: float
    embeddings: float
    output: float
    vectors: float


def everywhere(state: float) -> StateBytes:
    """The same number of bytes for every parameter."""
    return StateBytes(state, state, state, state)


# Of bitsandbytes. The Trainer keeps the states of embeddings in 32 bits, bitsandbytes those of small tensors.
ADAM_8_BIT = StateBytes(2, 8, 2, 8)
LION_8_BIT = StateBytes(1, 4, 1, 4)

BETAS = ("adam_beta1", "adam_beta2")
ADAM_KEYS = (*BETAS, "adam_epsilon")

DEFAULT, MUON = "adamw_torch_fused", "muon"
# What shards a training. Plain data parallelism (--nproc alone) works with every optimizer.
ZERO, OFFLOAD, FSDP, TENSOR = "--deepspeed", "ZeRO-Offload", "--fsdp", "--tensor-parallel"


@dataclass(frozen=True)
class Optimizer:
    """What has to be known of an optimizer.

    reported: the name under which the check after the first step sees it (`recipe.training.active_check`).
    state: bytes of its state for each parameter. sharding: the ways of sharding that it works under.
    keys: the ``adam_*`` keys that it reads. bitsandbytes: whether it needs that library and an NVIDIA GPU.
    fused: whether it must run as one kernel. builder: the function of `recipe.model.optimizers` that builds
    it; empty for an optimizer that the Trainer builds.
    """

    reported: str
    state: StateBytes
    sharding: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    bitsandbytes: bool = False
    fused: bool = False
    builder: str = ""


# By the value of ``optim``. With ZeRO-Offload accelerate replaces every optimizer by DeepSpeed's own, so
# that only AdamW stays what it is. Under FSDP2 and tensor parallelism parameters are DTensors, which
# bitsandbytes and Adafactor cannot update. Under ZeRO they are flat parts, in which Adafactor finds no rows
# and columns.
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw_torch": Optimizer("AdamW", everywhere(8), (ZERO, OFFLOAD, FSDP, TENSOR), ADAM_KEYS),
    "adamw_torch_fused": Optimizer(
        "AdamW", everywhere(8), (ZERO, OFFLOAD, FSDP, TENSOR), ADAM_KEYS, fused=True
    ),
    "adamw_8bit": Optimizer("AdamW 8-bit", ADAM_8_BIT, (ZERO,), ADAM_KEYS, bitsandbytes=True),
    "adamw_bnb_8bit": Optimizer("AdamW 8-bit", ADAM_8_BIT, (ZERO,), ADAM_KEYS, bitsandbytes=True),
    "paged_adamw_8bit": Optimizer("AdamW 8-bit", ADAM_8_BIT, (ZERO,), ADAM_KEYS, bitsandbytes=True),
    "paged_adamw_32bit": Optimizer("AdamW 32-bit", everywhere(8), (ZERO,), ADAM_KEYS, bitsandbytes=True),
    "lion_8bit": Optimizer("Lion 8-bit", LION_8_BIT, (ZERO,), BETAS, bitsandbytes=True),
    "lion_32bit": Optimizer("Lion 32-bit", everywhere(4), (ZERO,), BETAS, bitsandbytes=True),
    "paged_lion_8bit": Optimizer("Lion 8-bit", LION_8_BIT, (ZERO,), BETAS, bitsandbytes=True),
    "paged_lion_32bit": Optimizer("Lion 32-bit", everywhere(4), (ZERO,), BETAS, bitsandbytes=True),
    # One float32 for each row and each column of a matrix.
    "adafactor": Optimizer("Adafactor", StateBytes(0.02, 0.02, 0.02, 4)),
    "adagrad": Optimizer("Adagrad", everywhere(4), (ZERO, FSDP, TENSOR)),
    "rmsprop": Optimizer("RMSprop", everywhere(4), (ZERO, FSDP, TENSOR)),
    "sgd": Optimizer("SGD", everywhere(0), (ZERO, FSDP, TENSOR)),
    # Chosen by muon_learning_rate: a momentum for the layers' matrices, AdamW for the rest. It needs
    # matrices, and under ZeRO a rank has flat parts of them.
    MUON: Optimizer("MuonAdamW", StateBytes(4, 8, 8, 8), (FSDP, TENSOR), ADAM_KEYS, builder="build_muon"),
}


def optimizer_name(values: Mapping[str, Any]) -> str:
    """The name in `OPTIMIZERS` of what a training file chooses; the name itself is not checked."""
    return MUON if values.get("muon_learning_rate") else values.get("optim", DEFAULT)


def check_optimizer_hardware(hardware: Hardware, values: Mapping[str, Any], where: str) -> None:
    """Refuse an optimizer of bitsandbytes where the library or an NVIDIA GPU is missing. where: the file."""
    name = optimizer_name(values)
    if not OPTIMIZERS[name].bitsandbytes:
        return
    way_out = f"Write {DEFAULT}, or leave the key out"
    if hardware.device != "cuda":
        raise Refused(
            f"{where}: optim: {name} runs in CUDA kernels of bitsandbytes and needs an NVIDIA GPU; "
            f"this is {hardware.name}. {way_out}"
        )
    if not hardware.bitsandbytes:
        raise Refused(
            f"{where}: optim: {name} needs bitsandbytes, which is not installed "
            f"(bash setup.sh --extra bitsandbytes). {way_out}"
        )


def without_muon(values: Mapping[str, Any], file: str = "pretrain") -> list[str]:
    """The options that leave Muon, and what only Muon reads, out of a training. values: of its file."""
    keys = ("muon_learning_rate", "embedding_learning_rate")
    return [f"--set {file}.{key}=null" for key in keys if values.get(key)]


def check_optimizer_sharding(
    values: Mapping[str, Any], file: str, sharding: str, option: str | None = None
) -> None:
    """Refuse an optimizer that does not work under a way of sharding.

    file: ``pretrain``, ``finetune`` or ``preference``. sharding: one of ``ZERO``, ``OFFLOAD``, ``FSDP``,
    ``TENSOR``. option: what the user wrote on the command line, where it differs from `sharding`.
    """
    name, option = optimizer_name(values), option or sharding
    if sharding in OPTIMIZERS[name].sharding:
        return
    if name == MUON:
        raise Refused(
            f"{file}.json: muon_learning_rate: Muon needs matrices, and under {option} a rank has flat parts "
            "of them, for which DeepSpeed would silently use AdamW. "
            f"Add {' '.join(without_muon(values, file))}, or shard by --fsdp"
        )
    fits = [other for other, entry in OPTIMIZERS.items() if sharding in entry.sharding]
    raise Refused(
        f"{file}.json: optim: {name} does not work under {option}. Works: {', '.join(fits)}. "
        f"Add --set {file}.optim={DEFAULT}, or drop {option}"
    )
