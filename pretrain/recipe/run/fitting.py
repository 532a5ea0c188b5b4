"""Whether a training fits into the memory of a device, and what makes it fit: computed, without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from recipe import host
from recipe.config.choice import precision_of
from recipe.config.launch import batch_layout, offloads_optimizer, offloads_parameters
from recipe.config.optimizers import DEFAULT, OFFLOAD, OPTIMIZERS, ZERO, optimizer_name, without_muon
from recipe.config.phases import longest_block, samples_of, sequences_of_longest
from recipe.hardware import glance, gpus
from recipe.project import (
    CONFIGS,
    read_json,
)
from recipe.run.cards import CARDS
from recipe.run.launch_options import Launch
from recipe.run.memory import Setting, Shape, memory

GIB = 2**30
# The optimizer that is suggested where memory is short on a GPU.
EIGHT_BIT = "adamw_bnb_8bit"


@dataclass(frozen=True)
class Device:
    """A device to train on.

    flops: the maker's peak FLOP/s for dense 16-bit matrix products with float32 sums. compiler: whether
    torch.compile works there, as it does on a GPU of another machine.
    """

    name: str
    gigabytes: float
    flops: float
    bf16: bool
    kind: str = "cuda"
    compiler: bool = True


PROFILES = tuple(
    Device(label, CARDS[key].gigabytes, CARDS[key].flops, CARDS[key].bf16)
    for label, key in (
        ("8 GB RTX 4060", "rtx4060"),
        ("12 GB RTX 3060", "rtx3060"),
        ("16 GB T4 (fp16, no FlashAttention-2)", "t4"),
        ("24 GB RTX 3090", "rtx3090"),
        ("24 GB RTX 4090", "rtx4090"),
        ("40 GB A100", "a100-40gb"),
        ("80 GB A100", "a100-80gb"),
    )
)
# The usable share of a GPU's memory. The driver and fragmentation take the rest.
USABLE = 0.94
# The time of a step with activation checkpointing: its forward pass, a third of its work, is done twice.
CHECKPOINTING = 4 / 3


def checkpointed_time(share: float) -> float:
    """The time of a step that computes a share of the layers again, over that of one without."""
    return 1 + share * (CHECKPOINTING - 1)


def this_machine(launch: Launch) -> tuple[Device, float]:
    """The device a training here would use, and the free bytes for each rank, found without torch.

    Ranks on a CPU share the machine's memory, and so do GPUs without memory of their own. With several GPUs,
    the first one represents all. The memory of a part of a GPU (MIG) is not known: infinite bytes are free.
    """
    here, seen = glance(), gpus()
    if seen and seen[0].part:
        total, free = 0, math.inf
    elif seen and seen[0].total and seen[0].free is not None:
        total, free = seen[0].total, float(seen[0].free)
    else:
        total, available = host.memory()
        free = available / launch.processes
    return Device(here.name, round(total / GIB), 0.0, here.fast_bf16, here.device, here.compiler), free


def setting_of(values: dict[str, Any], device: Device, launch: Launch) -> Setting:
    """The setting that a training file and a launch lead to on a device. values: of the training file."""
    ranks, split = launch.ranks, launch.tensor_parallel
    # The longest blocks of a run with phases need the most memory.
    micro, accumulation = batch_layout(*samples_of(values), ranks // split)
    setting = Setting(
        device.kind,
        ranks,
        longest_block(values),
        micro,
        accumulation,
        precision_of(values, device.kind, device.bf16),
        bool(values.get("torch_compile", device.compiler)),
        _checkpointed(values),
        optimizer_name(values),
        fsdp=launch.fsdp,
        tensor_parallel=split,
    )
    return replace(setting, **zero_of(launch.deepspeed)) if launch.deepspeed else setting


def _checkpointed(values: dict[str, Any]) -> int:
    """Every so many layers are computed again in the backward pass; 0: none."""
    every = (values.get("activation_checkpointing_kwargs") or {}).get("every_n_layers", 1)
    return every if values.get("activation_checkpointing") else 0


def zero_of(name: str) -> dict[str, Any]:
    """The fields of a `Setting` that configs/deepspeed/NAME.json decides."""
    deepspeed = read_json(CONFIGS / "deepspeed" / f"{name}.json")
    values = deepspeed.get("zero_optimization", {})
    bucket = values.get("reduce_bucket_size", 5e8)
    return {
        "zero": values.get("stage", 0),
        "offload_optimizer": offloads_optimizer(deepspeed),
        "offload_parameters": offloads_parameters(deepspeed),
        "bucket_elements": 0 if bucket == "auto" else int(bucket),
    }


def choose_optimizer(values: dict[str, Any], name: str) -> list[str]:
    """The options that make `name` the optimizer of a training with these values."""
    no_muon = without_muon(values)
    if name == DEFAULT and "optim" not in values:
        return no_muon
    return [*no_muon, f"--set pretrain.optim={name}"]


def ways_out(values: dict[str, Any], setting: Setting) -> Iterator[tuple[Setting, list[str]]]:
    """Changes that save memory, the cheapest first, each with the options that a user can give.

    The global batch stays the same. First come smaller micro-batches, which cost little; then checkpointing
    (a third more computation), ZeRO where there are several ranks, and on GPUs an 8-bit optimizer and at
    last offloading. A sharding by --fsdp or --tensor-parallel stays as it is.
    """
    ways: list[tuple[dict[str, Any], list[str]]] = [({}, [])]
    if not setting.checkpointing:
        ways.append(({"checkpointing": 1}, ["--set pretrain.activation_checkpointing=true"]))
    if not setting.fsdp and setting.tensor_parallel == 1:
        changes, options = ways[-1]
        ways += [(changes | more, options + other) for more, other in _other_optimizers(values, setting)]
    share = setting.micro_batch * setting.accumulation
    times = sequences_of_longest(values)  # a sample is as long as the longest block
    for changes, options in ways:
        for micro in (m for m in range(setting.micro_batch, 0, -1) if share % m == 0):
            smaller = [f"--set pretrain.per_device_train_batch_size={micro * times}"]
            changed = replace(setting, **changes, micro_batch=micro, accumulation=share // micro)
            yield changed, (smaller if micro != setting.micro_batch else []) + options


def _other_optimizers(values: dict[str, Any], setting: Setting) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Optimizer states that take less memory of a device, as in `ways_out`: sharded, of 8 bits, offloaded."""
    now, on_gpu = OPTIMIZERS[setting.optimizer], setting.device == "cuda"

    def deepspeed(*names: str) -> Iterator[tuple[dict[str, Any], list[str]]]:
        for name in names:
            fields = zero_of(name)
            if fields["zero"] < setting.zero:
                continue
            fits = (OFFLOAD if fields["offload_optimizer"] else ZERO) in now.sharding
            other = [] if fits else choose_optimizer(values, DEFAULT)
            chosen = {"optimizer": setting.optimizer if fits else DEFAULT}
            yield fields | chosen, [*other, f"--deepspeed {name}"]

    if setting.ranks > 1:
        yield from deepspeed("zero1", "zero2", "zero3")
    if on_gpu and not setting.zero and now.state.matrices > OPTIMIZERS[EIGHT_BIT].state.matrices:
        yield {"optimizer": EIGHT_BIT}, choose_optimizer(values, EIGHT_BIT)
    if on_gpu:
        yield from deepspeed("zero2_offload", "zero3_offload")


def fit(
    shape: Shape, values: dict[str, Any], setting: Setting, limit: float
) -> tuple[Setting, list[str]] | None:
    """The cheapest way to stay within `limit` bytes per device: the setting and the options for it.

    The options are empty where the training already fits. None: no change helps.
    """
    for changed, options in ways_out(values, setting):
        if memory(shape, changed)["peak"] <= limit:
            return changed, options
    return None
