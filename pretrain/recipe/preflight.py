"""What a training will take, before it starts: parameters, memory, steps, disk and time, without torch.

`report` is what ``05_pretrain.sh --dry-run`` prints. Figures are computed; only a rate taken from an earlier
run on this machine is measured, and each line says which it is. Computed memory is checked against measured
peaks on a CPU by ``tests/bench/preflight.py``; for GPUs the same sums are used untried.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipe.config import CONFIGS, batch_layout
from recipe.download import is_own, own_files
from recipe.fetching import free_bytes, require_space
from recipe.outputs import DATA, OUTPUTS, Refused, read_json

GIB = 2**30

# ------------------------------------------------------------------------------------------------ parameters

# What transformers takes where model.json says nothing (its config classes; a test compares).
DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8},
    "llama": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "attention_bias": False, "mlp_bias": False},
    "qwen3": {"hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "attention_bias": False},
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}
    | {"tie_word_embeddings": True, "attn_pdrop": 0.1},
    "gpt_neox": {"hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44}
    | {"num_attention_heads": 64, "attention_bias": True},
}
# GPT-2's names for what the others call otherwise.
GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a model. query, key: widths of all heads together. The counts are parameters.

    matrices: of the layers, two-dimensional. vectors: norms and biases. embeddings: tokens and learned
    positions. output: the output matrix, 0 where it is tied to the embeddings.
    """

    kind: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    query: int
    key: int
    attention_dropout: float
    matrices: int
    vectors: int
    embeddings: int
    output: int

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once."""
        return self.matrices + self.vectors + self.embeddings + self.output

    def flops_per_token(self, block_size: int) -> float:
        """As `modeling.flops_per_token` counts them."""
        attention = 6 * self.layers * self.query * block_size
        return 6 * (self.matrices + self.vocabulary * self.hidden) + attention


def shape_of(model: dict[str, Any], vocabulary: int) -> Shape:
    """The sizes of the model that model.json describes, of a type named in `DEFAULTS`."""
    kind = model["model_type"]
    values = DEFAULTS[kind] | {key: value for key, value in model.items() if value is not None}

    def size(name: str, default: int = 0) -> int:
        return values.get(name) or values.get(GPT2_NAMES.get(name, "")) or default

    hidden, layers, heads = (size(n) for n in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    intermediate = size("intermediate_size", 4 * hidden)
    head = size("head_dim", hidden // heads)
    query, key = heads * head, size("num_key_value_heads", heads) * head
    tied = values.get("tie_word_embeddings", False)
    embeddings = vocabulary * hidden
    if kind in ("gpt2", "gpt_neox"):  # a fused matrix of queries, keys and values; layer norms with a bias
        query = key = hidden
        matrices = 4 * hidden * hidden + 2 * hidden * intermediate
        attention_bias = 4 * hidden if values.get("attention_bias", True) else 0
        vectors = attention_bias + intermediate + hidden + 4 * hidden
        last = 2 * hidden
        if kind == "gpt2":
            embeddings += values["n_positions"] * hidden
    else:
        matrices = 2 * hidden * query + 2 * hidden * key + 3 * hidden * intermediate
        vectors = 2 * hidden + (2 * head if kind == "qwen3" else 0)
        if values.get("attention_bias"):
            vectors += query + 2 * key + hidden
        if values.get("mlp_bias"):
            vectors += 2 * intermediate + hidden
        last = hidden
    return Shape(
        kind,
        vocabulary,
        hidden,
        intermediate,
        layers,
        heads,
        query,
        key,
        values.get("attn_pdrop", 0.0) if kind == "gpt2" else values.get("attention_dropout", 0.0),
        layers * matrices,
        layers * vectors + last,
        embeddings,
        0 if tied else vocabulary * hidden,
    )


def vocabulary_of(config: dict[str, dict[str, Any]]) -> int:
    """The size of the vocabulary. Raises Refused where only the published tokenizer itself knows it."""
    size = config["model"].get("vocab_size") or config["tokenizer"].get("vocab_size")
    if not size:
        raise Refused("model.json: vocab_size: a published tokenizer's size must stand here to be known now")
    return size


# ---------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Setting:
    """How a training runs. precision: ``bf16``, ``fp16`` or ``fp32``; optimizer: ``AdamW``, ``8-bit AdamW``
    or ``Muon``; zero: DeepSpeed's stage, 0 without DeepSpeed; offload: optimizer or also parameters on the
    host.
    """

    device: str
    ranks: int
    block_size: int
    micro_batch: int
    accumulation: int
    precision: str
    compiled: bool
    checkpointing: bool
    optimizer: str
    zero: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket_elements: int = 0

    @property
    def mode(self) -> str:
        """The row of activations.json."""
        precision = "fp32" if self.precision == "fp32" else "half" if self.zero else "mixed"
        return precision + (" compiled" if self.compiled and not self.zero else "")


# Bytes for each logit at the peak of the loss, on a CPU what the bench leaves when all else is subtracted.
# Uncompiled: four float32 copies (logits, log-probabilities, two gradients). Compiled and fused: the 16-bit
# logits and their gradient.
LOGIT_BYTES = {"mixed": 16, "fp32": 16, "half": 16, "mixed compiled": 4, "fp32 compiled": 6}
# What a process holds before it has a model: libraries (CPU, measured); a GPU's context and its allocator's
# slack (assumed).
PROCESS_BYTES = {"cpu": 0.55e9, "cuda": 1.0e9}
COMPILER_BYTES = 0.13e9  # on a CPU, measured


@functools.cache
def activation_table() -> dict[str, dict[str, list[float]]]:
    """Bytes per token and layer by architecture and mode, made by ``python -m recipe.activations``."""
    return json.loads(Path(__file__).with_name("activations.json").read_text("utf-8"))


def activation_bytes(shape: Shape, setting: Setting) -> float:
    """What all layers keep for the backward pass of one micro-batch.

    With checkpointing only each layer's input is kept, and one layer at a time is computed again.
    """
    tokens = setting.micro_batch * setting.block_size
    sizes = (shape.hidden, shape.query, shape.key, shape.intermediate, setting.block_size)
    factors = activation_table()[shape.kind][setting.mode]
    layer = sum(factor * size for factor, size in zip(factors, sizes, strict=True))
    if setting.device == "cpu" and shape.attention_dropout:
        # PyTorch's CPU kernel knows no dropout: the plain one keeps three float32 scores of each pair, and
        # queries, keys and values in float32.
        layer += 12 * shape.heads * setting.block_size + 6 * shape.hidden
    if setting.checkpointing:
        residual = 2 if setting.mode == "half" else 4
        return tokens * (shape.layers * residual * shape.hidden + layer)
    return tokens * shape.layers * layer


def memory(shape: Shape, setting: Setting) -> dict[str, float]:
    """Bytes per device at the peak of a step, by what they hold; ``peak`` is the most held at once.

    Adam's 16 bytes a parameter are 4 + 12/N, 2 + 14/N and 16/N on N ranks under ZeRO-1, 2 and 3
    (Rajbhandari et al., 2020). Without DeepSpeed weights, gradients and both moments are float32, and
    autocast keeps a 16-bit copy of the matrices besides; DistributedDataParallel keeps a second copy of the
    gradients in its buckets. ``host`` is what offloading puts into the memory of the machine, per rank.
    """
    count, ranks, zero = shape.parameters, setting.ranks, setting.zero
    inner = shape.matrices
    element = 2 if zero and setting.precision != "fp32" else 4
    states = {
        "AdamW": (16 - 2 * element) * count,
        "8-bit AdamW": 2 * count,
        "Muon": 4 * inner + 8 * (count - inner),
    }[setting.optimizer]
    weights, gradients = element * count, element * count
    parts = {
        "weights": weights / (ranks if zero >= 3 else 1),
        "gradients": gradients / (ranks if zero >= 2 else 1),
        "optimizer": states / (ranks if zero else 1),
        "buckets": 0.0,
        "casts": 0.0,
        "activations": activation_bytes(shape, setting),
        "logits": LOGIT_BYTES[setting.mode]
        * float(setting.micro_batch * setting.block_size * shape.vocabulary),
        "process": PROCESS_BYTES[setting.device],
    }
    host = 0.0
    if setting.offload_optimizer:
        host, parts["optimizer"] = host + parts["optimizer"], 0.0
    if setting.offload_parameters:
        host, parts["weights"] = host + parts["weights"], 0.0
    if zero:
        # Buckets of 16-bit gradients: 4.5 times their size with overlap (transformers' DeepSpeed guide).
        parts["buckets"] = 4.5 * element * min(setting.bucket_elements, count)
        if zero >= 3:  # the matrices of the layer at work, whole, and those of the next
            parts["buckets"] += 2 * element * shape.matrices / shape.layers
    else:
        if ranks > 1:
            parts["buckets"] = gradients
        if setting.precision != "fp32":
            parts["casts"] = 2.0 * (shape.matrices + shape.vocabulary * shape.hidden)
        if setting.device == "cpu" and setting.compiled:
            parts["process"] += COMPILER_BYTES
    # The gradients grow while the activations go, unless those of an earlier micro-batch or a launcher's
    # buckets are there from the start.
    forward = parts["casts"] + parts["activations"] + parts["logits"]
    kept = parts["process"] + parts["weights"] + parts["optimizer"] + parts["buckets"]
    early = setting.accumulation > 1 or setting.ranks > 1
    peak = kept + (parts["gradients"] + forward if early else max(parts["gradients"], forward))
    return parts | {"peak": peak, "host": host}


# ------------------------------------------------------------------------------------------- profiles of GPUs


@dataclass(frozen=True)
class Device:
    """A device to train on. flops: its peak in 16-bit products with float32 sums, dense, by its maker."""

    name: str
    gigabytes: float
    flops: float
    bf16: bool
    kind: str = "cuda"


PROFILES = (
    Device("RTX 4060", 8, 30e12, True),
    Device("RTX 3060", 12, 25e12, True),
    Device("T4 (fp16, no FlashAttention-2)", 16, 65e12, False),
    Device("RTX 4090", 24, 165e12, True),
    Device("A100 40 GB", 40, 312e12, True),
    Device("A100 80 GB", 80, 312e12, True),
)
# An assumption. System A's published 98 hours on an RTX 4090 (10.7e9 tokens) are 39 %.
ASSUMED_MFU = 0.4
USABLE = 0.94  # of a GPU's memory: the driver and fragmentation take the rest


def setting_of(values: dict[str, Any], device: Device, ranks: int, deepspeed: str | None) -> Setting:
    """The setting that pretrain.json and the options of the launcher ask for on a device."""
    micro, accumulation = batch_layout(
        values["global_batch_size"], values["per_device_train_batch_size"], ranks
    )
    half = "bf16" if device.bf16 else "fp16" if device.kind == "cuda" else "fp32"
    wanted = [name for name in ("bf16", "fp16") if name in values]
    if wanted:
        half = next((name for name in wanted if values[name]), "fp32")
    setting = Setting(
        device.kind,
        ranks,
        values["block_size"],
        micro,
        accumulation,
        half,
        bool(values.get("torch_compile", shutil.which("g++"))),
        bool(values.get("gradient_checkpointing")),
        _optimizer(values),
    )
    return replace(setting, **zero_of(deepspeed)) if deepspeed else setting


def _optimizer(values: dict[str, Any]) -> str:
    if values.get("muon_learning_rate"):
        return "Muon"
    return "8-bit AdamW" if "8bit" in values.get("optim", "") else "AdamW"


def zero_of(name: str) -> dict[str, Any]:
    """The fields of a `Setting` that configs/deepspeed/NAME.json decides."""
    values = read_json(CONFIGS / "deepspeed" / f"{name}.json").get("zero_optimization", {})
    bucket = values.get("reduce_bucket_size", 5e8)
    return {
        "zero": values.get("stage", 0),
        "offload_optimizer": values.get("offload_optimizer", {}).get("device", "none") != "none",
        "offload_parameters": values.get("offload_param", {}).get("device", "none") != "none",
        "bucket_elements": 0 if bucket == "auto" else int(bucket),
    }


def ways_out(values: dict[str, Any], setting: Setting) -> Iterator[tuple[Setting, list[str]]]:
    """Ever costlier changes by which a training takes less memory, each with the options that make it.

    The global batch stays. First smaller micro-batches, which cost little; then checkpointing (a third more
    computing), ZeRO where there are ranks to share with, an 8-bit optimizer (GPUs only), offloading at last.
    """
    share = setting.micro_batch * setting.accumulation
    micros = [m for m in range(setting.micro_batch, 0, -1) if share % m == 0]
    no_muon = ["--set pretrain.muon_learning_rate=null"] if values.get("muon_learning_rate") else []
    checkpointing = ["--set pretrain.gradient_checkpointing=true"]
    plans: list[tuple[dict[str, Any], list[str]]] = [({}, [])]
    if not setting.checkpointing:
        plans.append(({"checkpointing": True}, checkpointing))
    changes, options = plans[-1]
    stages = ["zero1", "zero2", "zero3"] if setting.ranks > 1 else []
    for name in [*stages, "8-bit", "zero2_offload", "zero3_offload"]:
        if name == "8-bit":
            if setting.device == "cuda" and not setting.zero:
                eight_bit = [*options, *no_muon, "--set pretrain.optim=adamw_bnb_8bit"]
                plans.append((changes | {"optimizer": "8-bit AdamW"}, eight_bit))
            continue
        fields = zero_of(name)
        if fields["zero"] >= setting.zero:
            changed = changes | fields | {"optimizer": "AdamW"}
            plans.append((changed, [*options, *no_muon, f"--deepspeed {name}"]))
    for changes, options in plans:
        for micro in micros:
            smaller = [f"--set pretrain.per_device_train_batch_size={micro}"]
            changed = replace(setting, **changes, micro_batch=micro, accumulation=share // micro)
            yield changed, (smaller if micro != setting.micro_batch else []) + options


def fit(
    shape: Shape, values: dict[str, Any], setting: Setting, limit: float
) -> tuple[Setting, list[str]] | None:
    """The cheapest way to stay below `limit` bytes per device, no options where nothing need change; None
    where nothing helps.
    """
    for changed, options in ways_out(values, setting):
        if memory(shape, changed)["peak"] <= limit:
            return changed, options
    return None


# ----------------------------------------------------------------------------------------- steps, disk, time


def training_tokens(recipe: str) -> int | None:
    """Training tokens that stage 04 has counted; None before it has run."""
    record = OUTPUTS / recipe / "04_tokenize" / "stage.json"
    return read_json(record)["figures"]["totals"]["train"]["tokens"] if record.exists() else None


def step_count(values: dict[str, Any], tokens: int | None) -> int | None:
    """Optimizer steps: max_steps, or by num_train_epochs over `tokens`; None while they are unknown."""
    if values.get("max_steps", 0) > 0:
        return values["max_steps"]
    if tokens is None:
        return None
    blocks = -(-tokens // values["block_size"])
    return math.ceil(values.get("num_train_epochs", 3) * blocks / values["global_batch_size"])


def checkpoint_bytes(shape: Shape, setting: Setting) -> int:
    """One checkpoint: the weights, and what the optimizer holds; under ZeRO of all ranks."""
    one = replace(setting, ranks=1, offload_optimizer=False, offload_parameters=False)
    parts = memory(shape, one)
    return int(parts["weights"] + parts["optimizer"])


def training_disk(shape: Shape, setting: Setting, values: dict[str, Any], steps: int | None) -> int | None:
    """Bytes of stage 05: the checkpoints kept, one more while it replaces the oldest, and the model.

    None when their number is unknown: all are kept (no save_total_limit) and the steps are not known yet.
    """
    strategy = values.get("save_strategy", "steps")
    saved = None
    if strategy == "no":
        saved = 0
    elif strategy == "epoch":
        saved = math.ceil(values.get("num_train_epochs", 3))
    elif steps:
        every = values.get("save_steps", 500)
        saved = steps // max(1, math.ceil(every * steps) if every < 1 else int(every))
    limit = values.get("save_total_limit")
    counts = [n for n in (saved, limit + 1 if limit else None) if n is not None]
    if not counts:
        return None
    return min(counts) * checkpoint_bytes(shape, setting) + 4 * shape.parameters


# Bytes on disk at the fullest moment of stages 02 to 04 for each byte of text: raw, clean and final shards,
# signatures of near-duplicates. Measured on `tiny`: 1.0; half more for documents that are shorter.
DATA_FACTOR = 1.5
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".parquet")
COMPRESSION = 4.5  # what xz and bz2 make of Japanese text


def data_disk(dataset: dict[str, Any], missing: dict[str, int]) -> float:
    """Bytes that stages 01 to 04 need on top of what is there: `disk_gigabytes` of dataset.json, else by the
    sources' sizes as far as they are known.

    missing: bytes still to be downloaded by source. A hub's dataset has no known size before it is read.
    """
    if "disk_gigabytes" in dataset:
        return dataset["disk_gigabytes"] * 1e9
    total = float(sum(missing.values()))
    for name, spec in dataset["sources"].items():
        sizes = {url: missing[name] for url in [str(spec.get("url", ""))] if url}
        if is_own(spec):
            sizes = {str(path): path.stat().st_size for path in own_files(name, spec) if path.is_file()}
        limit = spec.get("maximum_megabytes", math.inf) * 1e6
        text = sum(size * (COMPRESSION if _compressed(file) else 1) for file, size in sizes.items())
        total += DATA_FACTOR * min(text, limit)
    return total


def _compressed(file: str) -> bool:
    return file.rstrip("']").endswith(COMPRESSED)


def require_data_space(recipe: str, dataset: dict[str, Any], missing: dict[str, int]) -> None:
    """Raise Refused, before anything is downloaded, unless the disk has room for stages 01 to 04.

    What this recipe's sources and outputs take already counts towards `disk_gigabytes`.
    """
    needed = data_disk(dataset, missing)
    if "disk_gigabytes" in dataset:
        folders = [*(DATA / name for name in dataset["sources"]), OUTPUTS / recipe]
        files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
        needed = max(0, needed - sum(file.stat().st_size for file in files))
    require_space(
        OUTPUTS, int(needed), "the data of stages 01 to 04 (dataset.json: disk_gigabytes, or computed)"
    )


def measured_rate(recipe: str, hardware: str) -> tuple[float, str] | None:
    """FLOP/s of an earlier training on this hardware, all ranks together, and where it was measured.

    This recipe's own record first, then the newest of the others. hardware: as stage.json names it.
    """
    records = sorted(
        OUTPUTS.glob("*/05_pretrain/stage.json"), key=lambda p: (p.parts[-3] == recipe, p.stat().st_mtime)
    )
    for path in reversed(records):
        figures = read_json(path)["figures"]
        if figures.get("hardware") == hardware and figures.get("mfu"):
            ranks = (figures.get("active") or {}).get("ranks", 1)
            return figures["mfu"] * figures["gemm_peak_flops"] * ranks, f"recipe {path.parts[-3]}"
    return None


def this_machine() -> tuple[Device, float]:
    """The device a training here would use, and the bytes it has free; found without torch."""
    if shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free,compute_cap"]
        text = subprocess.run(
            [*query, "--format=csv,noheader,nounits"], capture_output=True, text=True
        ).stdout
        if text.strip():
            name, total, free, capability = (part.strip() for part in text.splitlines()[0].split(","))
            device = Device(name, round(float(total) / 1024), 0.0, float(capability) >= 8)
            return device, float(free) * 2**20
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(facts[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    flags = Path("/proc/cpuinfo").read_text()
    half = "avx512_bf16" in flags or "amx_bf16" in flags
    return Device("CPU", round(total / GIB), 0.0, half, "cpu"), free


# ---------------------------------------------------------------------------------------------------- report


def report(
    recipe: str, config: dict[str, dict[str, Any]], ranks: int, deepspeed: str | None
) -> Iterator[str]:
    """The lines of a preflight: what training this recipe takes, here and on the usual GPUs."""
    values = config["pretrain"]
    shape = shape_of(config["model"], vocabulary_of(config))
    here, free = this_machine()
    setting = setting_of(values, here, ranks, deepspeed)
    tokens = training_tokens(recipe)
    steps = step_count(values, tokens)
    per_step = values["global_batch_size"] * values["block_size"]
    yield (
        f"parameters   {shape.parameters:,}: {shape.kind}, {shape.layers} layers of {shape.hidden}, "
        f"vocabulary {shape.vocabulary:,}"
    )
    yield (
        f"step         {values['global_batch_size']} x {values['block_size']} = {per_step:,} tokens: "
        f"micro-batch {setting.micro_batch} x accumulation {setting.accumulation} x {ranks} "
        f"{'ranks' if ranks > 1 else 'rank'}"
    )
    if steps:
        epochs = f" = {steps * per_step / tokens:.2f} epochs of {tokens:,}" if tokens else ""
        yield f"training     {steps:,} steps, {steps * per_step:,} tokens{epochs}"
    else:
        yield "training     steps are known after stage 04 (num_train_epochs)"
    yield from _memory_lines(shape, setting)
    disk = training_disk(shape, setting, values, steps)
    if disk is not None:
        size = checkpoint_bytes(shape, setting)
        kept = f"checkpoints of {size / 1e9:.2f} GB and the model"
        yield f"disk         {disk / 1e9:.1f} GB for {kept} (computed)"
    if "disk_gigabytes" in config["dataset"]:
        wanted, free_disk = config["dataset"]["disk_gigabytes"], free_bytes(OUTPUTS) / 1e9
        yield f"             {wanted:,.0f} GB for stages 01 to 04 (dataset.json); {free_disk:,.0f} GB free"
    work = shape.flops_per_token(values["block_size"]) * (steps * per_step if steps else 1e9)
    unit = "" if steps else " per 1e9 tokens"
    yield "device                                    settings of pretrain.json, or what must change to fit"
    rate = measured_rate(recipe, here.name)
    limit = free / ranks if here.kind == "cpu" else free  # the ranks share a CPU's memory
    yield _device_line(here, limit, values, shape, setting, work, unit, rate)
    for device in PROFILES:
        on_it = setting_of(values, device, ranks, deepspeed)
        limit = device.gigabytes * GIB * USABLE
        speed = device.flops * ASSUMED_MFU * ranks
        tabulated = (speed, f"tabulated: {device.flops / 1e12:.0f} TFLOP/s x {ASSUMED_MFU:.0%} assumed")
        yield _device_line(device, limit, values, shape, on_it, work, unit, tabulated)


def _memory_lines(shape: Shape, setting: Setting) -> Iterator[str]:
    parts = memory(shape, setting)
    held = ", ".join(
        f"{name} {parts[name] / GIB:.2f}"
        for name in (
            "weights",
            "gradients",
            "optimizer",
            "casts",
            "buckets",
            "activations",
            "logits",
            "process",
        )
        if parts[name]
    )
    yield f"memory       {parts['peak'] / GIB:.2f} GiB per device at the peak (computed): {held}"
    other = replace(setting, checkpointing=not setting.checkpointing)
    saved = activation_bytes(shape, other) / GIB
    yield (
        f"             activations {saved:.2f} GiB {'with' if other.checkpointing else 'without'} "
        "gradient_checkpointing"
    )
    yield "             weights, gradients and AdamW's moments in GiB per device, by devices (computed):"
    counts = (1, 2, 4, 8)
    yield f"             {'':22}" + "".join(f"{count:>8}" for count in counts) + "  bytes a parameter"
    rows = ("plain", "16"), ("zero1", "4 + 12/N"), ("zero2", "2 + 14/N"), ("zero3", "16/N")
    for name, formula in rows:
        fields = {"zero": int(name[-1]) if name != "plain" else 0}
        fields |= {"offload_optimizer": False, "offload_parameters": False}
        cells = ""
        for count in counts:
            states = memory(
                shape, replace(setting, ranks=count, optimizer="AdamW", precision="bf16", **fields)
            )
            held_bytes = states["weights"] + states["gradients"] + states["optimizer"]
            cells += f"{held_bytes / GIB:>8.2f}"
        yield f"             {name:22}{cells}  {formula}"


def _device_line(
    device: Device,
    limit: float,
    values: dict[str, Any],
    shape: Shape,
    setting: Setting,
    work: float,
    unit: str,
    rate: tuple[float, str] | None,
) -> str:
    name = (
        f"{device.gigabytes:.0f} GB {device.name}"
        if device.kind == "cuda"
        else f"this machine, {device.name}"
    )
    head = f"  {name:40}"
    peak = memory(shape, setting)["peak"]
    found = fit(shape, values, setting, limit)
    if found is None:
        return (
            f"{head}does not fit: {peak / GIB:.1f} of {limit / GIB:.1f} GiB, and no change of settings helps"
        )
    changed, options = found
    hours = ""
    if rate:
        factor = 4 / 3 if changed.checkpointing and not setting.checkpointing else 1
        hours = f"; {_duration(work * factor / rate[0])}{unit} ({rate[1]})"
    if not options:
        return f"{head}fits: {peak / GIB:.1f} of {limit / GIB:.1f} GiB{hours}"
    after = memory(shape, changed)
    host = f" and {after['host'] / GIB:.1f} on the host" if after["host"] else ""
    change = f"{after['peak'] / GIB:.1f} GiB{host} with {' '.join(options)}"
    return f"{head}does not fit: {peak / GIB:.1f} of {limit / GIB:.1f} GiB; {change}{hours}"


def _duration(seconds: float) -> str:
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 100 * 3600 else f"{seconds / 86400:.0f} days"
