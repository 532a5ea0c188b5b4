"""The memory of a training step, computed from model.json and the settings, without torch.

``tests/bench/preflight.py`` compares the results with peaks measured on a CPU. On the one GPU that they were
compared with, an H200, the memory was 11 % more than computed (README.md).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.config.choice import CHUNK, CHUNKS, choose_loss
from recipe.config.model import DEFAULTS, experts_of
from recipe.config.optimizers import OPTIMIZERS

# GPT-2's names for the keys of the other architectures.
GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
}


# Numbers in the norms of a layer, and in biases that its type always has: of the hidden size, the size of a
# head, the widths of queries and of keys.
VECTORS: dict[str, Callable[[int, int, int, int], int]] = {
    **dict.fromkeys(("llama", "mistral"), lambda hidden, head, query, key: 2 * hidden),
    "qwen2": lambda hidden, head, query, key: 2 * hidden + query + 2 * key,
    "qwen3": lambda hidden, head, query, key: 2 * hidden + 2 * head,
    "olmo2": lambda hidden, head, query, key: 2 * hidden + query + key,
    "gemma3_text": lambda hidden, head, query, key: 4 * hidden + 2 * head,
    "qwen3_moe": lambda hidden, head, query, key: 2 * hidden + 2 * head,
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    query, key: widths of all heads together. intermediate: with experts what a token uses, the mean of the
    layers. `matrices` to `active` are numbers of parameters. matrices: the weights of the layers, of two
    dimensions or three. vectors: norms and biases. embeddings: of tokens and of learned positions. output:
    the output matrix, 0 where it is tied to the embeddings. active: the part of `matrices` that a token uses.
    experts_of_token: the experts that a token uses in a layer, 0 without experts. softcapping: whether the
    logits are capped before the loss.
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
    active: int
    experts_of_token: float = 0
    softcapping: bool = False

    @property
    def parameters(self) -> int:
        """The number of parameters; tied ones count once."""
        return self.matrices + self.vectors + self.embeddings + self.output

    @property
    def active_parameters(self) -> int:
        """The number of parameters that a token uses."""
        return self.parameters - self.matrices + self.active

    def groups_of_rank(self, tensor_parallel: int) -> tuple[float, float, float, float]:
        """Matrices, embeddings, output and vectors on each of the ranks that share the matrices, by
        transformers' own plans.
        """
        embeddings = self.embeddings if self.kind == "gpt_neox" else self.embeddings / tensor_parallel
        return self.matrices / tensor_parallel, embeddings, self.output / tensor_parallel, self.vectors

    def of_rank(self, tensor_parallel: int) -> float:
        """The parameters on each of the ranks that share the matrices."""
        return sum(self.groups_of_rank(tensor_parallel))

    def flops_per_token(self, block_size: int) -> float:
        """FLOPs of a training step per token, as `recipe.model.build.flops_per_token` counts them."""
        attention = 6 * self.layers * self.query * block_size
        return 6 * (self.active + self.vocabulary * self.hidden) + attention


def shape_of(model: dict[str, Any], vocabulary: int) -> Shape:
    """The sizes of the model that model.json describes.

    model: its values; ``model_type`` is a key of `DEFAULTS`. vocabulary: the number of tokens.
    """
    kind = model["model_type"]
    values = DEFAULTS[kind] | {
        key: value
        for key, value in model.items()
        # null: transformers gives each head its own keys and values.
        if value is not None or key == "num_key_value_heads"
    }

    def size(name: str, default: int = 0) -> int:
        return values.get(name) or values.get(GPT2_NAMES.get(name, "")) or default

    hidden, layers, heads = (size(n) for n in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    intermediate = size("intermediate_size", 4 * hidden)
    head = size("head_dim", hidden // heads)
    query, key = heads * head, size("num_key_value_heads", heads) * head
    tied = values.get("tie_word_embeddings", False)
    embeddings = vocabulary * hidden
    experts = experts_of(values)
    if kind in ("gpt2", "gpt_neox"):
        # One fused matrix for queries, keys and values; layer norms with a bias.
        query = key = hidden
        matrices = 4 * hidden * hidden + 2 * hidden * intermediate
        attention_bias = 4 * hidden if values.get("attention_bias", True) else 0
        vectors = attention_bias + intermediate + hidden + 4 * hidden
        last = 2 * hidden
        if kind == "gpt2":
            embeddings += values["n_positions"] * hidden
    else:
        matrices = 2 * hidden * query + 2 * hidden * key + 3 * hidden * intermediate
        vectors = VECTORS[kind](hidden, head, query, key)
        if values.get("attention_bias"):
            vectors += query + 2 * key + hidden
        if values.get("mlp_bias"):
            vectors += 2 * intermediate + hidden
        last = hidden
    matrices *= layers
    active = matrices
    if experts:
        # In the layers with experts, these and their router replace the feed-forward part.
        one = 3 * hidden * experts.width
        others = experts.layers * (3 * hidden * intermediate - experts.count * hidden)
        matrices += experts.layers * experts.count * one - others
        active += experts.layers * experts.of_token * one - others
        wide = experts.layers * experts.of_token * experts.width
        intermediate = (wide + (layers - experts.layers) * intermediate) // layers
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
        matrices,
        layers * vectors + last,
        embeddings,
        0 if tied else vocabulary * hidden,
        active,
        experts.of_token * experts.layers / layers if experts else 0,
        bool(values.get("final_logit_softcapping")),
    )


@dataclass(frozen=True)
class Setting:
    """How a training runs.

    block_size: tokens of a sequence. micro_batch: sequences of a rank at once. accumulation: micro-batches of
    a step. checkpointing: every so many layers are computed again; 0: none. precision: ``bf16``, ``fp16`` or
    ``fp32``. optimizer: a name in `OPTIMIZERS`. zero: DeepSpeed's stage, 0 without DeepSpeed.
    offload_optimizer, offload_parameters: kept in the host's memory. bucket_elements: gradients that
    DeepSpeed reduces at once. tensor_parallel: ranks that share each matrix.
    """

    device: str
    ranks: int
    block_size: int
    micro_batch: int
    accumulation: int
    precision: str
    compiled: bool
    checkpointing: int
    optimizer: str
    zero: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket_elements: int = 0
    fsdp: bool = False
    tensor_parallel: int = 1

    @property
    def mode(self) -> str:
        """The row of activations.json. Under ZeRO and FSDP2 the layers compute with 16-bit weights."""
        if self.precision == "fp32":
            return "fp32 compiled" if self.compiled else "fp32"
        if self.zero or self.fsdp:
            return "half"
        return "mixed compiled" if self.compiled else "mixed"


# Bytes per logit at the peak of the loss, measured on a CPU: what remains when all else is subtracted.
# Without torch.compile: four float32 copies (logits, log-probabilities, two gradients). With it: the 16-bit
# logits and their gradient. Measure again (tests/bench/preflight.py) when recipe/model/losses.py changes.
LOGIT_BYTES = {"mixed": 16, "fp32": 16, "half": 16, "mixed compiled": 4, "fp32 compiled": 6}
# What a process holds without a model: libraries on a CPU (measured); the context and the allocator's reserve
# on a GPU (assumed).
PROCESS_BYTES = {"cpu": 0.55e9, "cuda": 1.0e9}
# What torch.compile adds on a CPU, measured from an empty cache, of dense models and of a mixture of experts
# of 4 layers. Its graph is larger, and its backward part is compiled while all activations exist.
COMPILER_BYTES, EXPERTS_COMPILER_BYTES = 0.13e9, 0.34e9
# What communication over gloo takes on CPUs, measured. For ZeRO-1 and 2 it is part of the buckets.
GLOO_BYTES = 0.2e9
# Share of the peak that is added on a CPU under ZeRO-3 and FSDP2, measured: freed weights leave gaps between
# activations, which the heap does not return. MALLOC_MMAP_THRESHOLD_=1048576 avoids nearly all of it, but
# training is slower then.
FRAGMENTATION = 0.15
# Bytes per logit that a mixture of experts adds in 16 bits on a CPU, where one process keeps the memory of
# freed tensors (`recipe.run.processes.kept_memory`). Measured in 60 compiled steps of 4 layers: the 16-bit
# logits found no hole and were put at a new place five times within the first 15, then not again; so were
# those of the first evaluation, in 16 and in 32 bits. Where large tensors go back to the system, the logits
# have no new places. Likely cause: oneDNN keeps a kernel for each new number of tokens that an expert gets,
# and some of them lie where the logits were.
HOLES = 5 * 2 + 6


@functools.cache
def activation_table() -> dict[str, dict[str, list[float]]]:
    """Bytes per token and layer by architecture and mode, made by ``python -m recipe.run.activations``."""
    return json.loads(Path(__file__).with_name("activations.json").read_text("utf-8"))


def activation_bytes(shape: Shape, setting: Setting) -> float:
    """Bytes that all layers keep for the backward pass of one micro-batch.

    Of a checkpointed layer only the input is kept, and one layer at a time is computed again. Tensor
    parallelism splits only what is as wide as the heads or as the intermediate size. On a CPU attention is
    that of `recipe.model.attention`; its layers share one mask, which is small compared with the logits.
    """
    tokens = setting.micro_batch * setting.block_size
    split = setting.tensor_parallel
    widths = [shape.hidden, shape.query / split, shape.key / split, shape.intermediate / split]
    if shape.experts_of_token:
        widths.append(shape.experts_of_token * shape.hidden)  # the copies of a token for its experts
    *factors, mask = activation_table()[shape.kind][setting.mode]
    layer = sum(factor * size for factor, size in zip(factors, widths, strict=True))
    if setting.device != "cpu" or shape.attention_dropout:
        layer += mask * setting.block_size
    if setting.device == "cpu" and shape.attention_dropout:
        # PyTorch's fast CPU kernel has no dropout. The plain one keeps three float32 scores per pair of
        # tokens, and queries, keys and values in float32.
        layer += 12 * shape.heads * setting.block_size + 6 * shape.hidden
    if setting.checkpointing:
        residual = 2 if setting.mode == "half" else 4
        inputs_only = math.ceil(shape.layers / setting.checkpointing)
        kept = shape.layers - inputs_only + 1  # with the one that is computed again
        return tokens * (inputs_only * residual * shape.hidden + kept * layer)
    return tokens * shape.layers * layer


def logit_bytes(shape: Shape, setting: Setting) -> float:
    """Bytes of the logits of a micro-batch, and of all that is made from them, at the peak of the loss."""
    logits = setting.micro_batch * setting.block_size * shape.vocabulary
    chosen = choose_loss(setting.device, logits, setting.compiled, setting.tensor_parallel)
    if chosen != CHUNKS or shape.experts_of_token or shape.softcapping:  # see `recipe.training.training`
        return LOGIT_BYTES[setting.mode] * logits
    # The output matrix's gradient in float32, and its product with the gradient of the loss. Then the logits
    # of a chunk are gone, but their memory remains reserved.
    return (12 if setting.precision == "fp32" else 8) * CHUNK + 8 * shape.vocabulary * shape.hidden


def memory(shape: Shape, setting: Setting) -> dict[str, float]:
    """Bytes per device in a training step, by purpose; ``peak`` is the largest sum at one moment.

    AdamW's 16 bytes per parameter are 4 + 12/N, 2 + 14/N and 16/N on N ranks under ZeRO-1, 2 and 3
    (Rajbhandari et al., 2020). Without DeepSpeed weights, gradients and both moments are float32: 16, and
    16/N under FSDP2. Other optimizers have other states (`recipe.config.optimizers`). ``host`` is what
    offloading keeps in the machine's memory, per rank.
    """
    count, replicas = shape.of_rank(setting.tensor_parallel), setting.ranks // setting.tensor_parallel
    matrices = (shape.matrices + shape.vocabulary * shape.hidden) / setting.tensor_parallel
    half = setting.precision != "fp32"
    element = 2 if setting.zero and half else 4
    groups = shape.groups_of_rank(setting.tensor_parallel)
    state = OPTIMIZERS[setting.optimizer].state
    states = sum(size * each for size, each in zip(groups, state, strict=True))
    if element == 2:
        states += 4 * count  # ZeRO's float32 copy of the 16-bit weights
    stage = 3 if setting.fsdp else setting.zero
    parts = {
        "weights": element * count / (replicas if stage >= 3 else 1),
        "gradients": element * count / (replicas if stage >= 2 else 1),
        "optimizer": states / (replicas if stage >= 1 else 1),
        "buckets": _bucket_bytes(shape, setting, count),
        # Autocast keeps a 16-bit copy of the matrices, including the output matrix.
        "casts": 2 * matrices if half and not stage else 0,
        "activations": activation_bytes(shape, setting),
        "logits": logit_bytes(shape, setting),
        "process": PROCESS_BYTES[setting.device],
    }
    if setting.device == "cpu" and setting.compiled:
        parts["process"] += EXPERTS_COMPILER_BYTES if shape.experts_of_token else COMPILER_BYTES
    if setting.device == "cpu" and setting.ranks > 1 and setting.zero in (0, 3):
        parts["process"] += GLOO_BYTES
    host = 0.0
    if setting.offload_optimizer:
        host, parts["optimizer"] = host + parts["optimizer"], 0
    if setting.offload_parameters:
        host, parts["weights"] = host + parts["weights"], 0
    # Gradients grow while activations are freed. With accumulation or several ranks, all gradients (or their
    # buckets) exist from the start.
    forward = parts["casts"] + parts["activations"] + parts["logits"]
    kept = parts["process"] + parts["weights"] + parts["optimizer"] + parts["buckets"]
    early = setting.accumulation > 1 or setting.ranks > 1
    peak = kept + (parts["gradients"] + forward if early else max(parts["gradients"], forward))
    parts["fragmentation"] = _fragmentation_bytes(shape, setting, peak)
    return parts | {"peak": peak + parts["fragmentation"], "host": host}


def _fragmentation_bytes(shape: Shape, setting: Setting, peak: float) -> float:
    """Bytes of the holes in a CPU's heap that tensors leave and others do not fit into.

    peak: what the tensors and the process take together. For a GPU, the allocator's reserve is part of the
    process.
    """
    if setting.device != "cpu":
        return 0
    if setting.fsdp or setting.zero >= 3:
        return FRAGMENTATION * peak
    if shape.experts_of_token and setting.ranks == 1 and setting.precision == "bf16":
        return HOLES * setting.micro_batch * setting.block_size * shape.vocabulary
    return 0


def _bucket_bytes(shape: Shape, setting: Setting, count: float) -> float:
    """Bytes of the buffers in which ranks exchange gradients, and of gathered weights."""
    half = setting.precision != "fp32"
    # The layer that computes, and the next one.
    layers = 2 * shape.matrices / shape.layers / setting.tensor_parallel
    if setting.zero:
        # 4.5 times the buckets of gradients with overlap (transformers' DeepSpeed guide).
        element = 2 if half else 4
        gathered = element * layers if setting.zero == 3 else 0
        return 4.5 * element * min(setting.bucket_elements, count) + gathered
    if setting.fsdp:
        # Embeddings and output stay gathered. Their gradients and those of a layer are reduced in float32.
        outer = (shape.embeddings + shape.output) / setting.tensor_parallel
        # With accumulation, the Trainer keeps all gradients whole and splits their sum.
        reduced = max(layers / 2, outer) + (count if setting.accumulation > 1 else 0)
        return (2 if half else 4) * (layers + outer) + 4 * reduced
    # DistributedDataParallel's buckets are a second copy of the gradients.
    return 4 * count if setting.ranks > setting.tensor_parallel else 0
