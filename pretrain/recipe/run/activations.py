"""Make ``activations.json``: the bytes that a layer keeps for its backward pass, by architecture and mode.

`preflight` must not import torch, so it reads this table. The bytes per token of one layer are measured on
small models and split into what they grow with: the hidden size, the widths of queries and of keys (or
values), the intermediate size, and the length of a sequence (the attention mask). Run this after changing a
version in requirements.txt:

    python -m recipe.run.activations
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from recipe.config.known_keys import MODEL_TYPES
from recipe.model.losses import return_loss_only
from recipe.tokenization.packing import pack

# How a layer computes. mixed: float32 weights under autocast. half: bf16 weights, as under DeepSpeed.
MODES = ("mixed", "fp32", "half", "mixed compiled", "fp32 compiled")
# 168 or 336 tokens: different from every width below.
BLOCK, ROWS, VOCABULARY = 56, 3, 100
# Hidden size, query and key widths, intermediate size (with experts: of all that a token uses), and the
# experts of a token.
SHAPES = (
    (96, 128, 64, 352, 1),
    (192, 128, 64, 352, 1),
    (96, 256, 64, 352, 1),
    (96, 128, 128, 352, 1),
    (96, 128, 64, 736, 1),
    (96, 128, 64, 352, 2),
)
Sizes = tuple[int, int, int, int, int]
# GPT-2's dropouts. `memory` adds what a CPU keeps for them.
DROPOUTS = ("attn_pdrop", "embd_pdrop", "resid_pdrop")


def small_model(kind: str, layers: int, shape: Sizes) -> Any:
    """A model of `layers` layers with heads of width 32.

    shape: an entry of `SHAPES`. GPT-2 and GPT-NeoX use only the hidden and the intermediate size, and only a
    mixture of experts uses the last.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    hidden, query, key, intermediate, chosen = shape
    if kind == "gpt2":
        values = {"n_embd": hidden, "n_layer": layers, "n_head": hidden // 32, "n_inner": intermediate}
    else:
        values = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": intermediate}
        values["num_attention_heads"] = hidden // 32
    if kind not in ("gpt2", "gpt_neox"):
        values |= {"num_attention_heads": query // 32, "num_key_value_heads": key // 32, "head_dim": 32}
    if kind == "qwen3_moe":
        values |= {"num_experts": 4, "num_experts_per_tok": chosen}
        values |= {"moe_intermediate_size": intermediate // chosen}
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, pad_token_id=0, **values)
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    model.config.use_cache = False
    return_loss_only(model)
    return model.train()


def saved_bytes(model: Any, mode: str, block: int) -> int:
    """The bytes of all tensors kept for the backward pass of one batch, without weights and their casts."""
    precision, _, compiled = mode.partition(" ")
    if precision == "half":
        model.bfloat16()
    weights = {
        tuple(shape) for p in model.parameters() for shape in (p.shape, p.mT.shape if p.ndim > 1 else ())
    }
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    # The partitioner decides what is kept; the code that Inductor generates later does not change it.
    run = torch.compile(model, backend="aot_eager_decomp_partition") if compiled else model
    window = np.arange(ROWS * (block + 1)).reshape(ROWS, -1) % VOCABULARY
    samples = [pack(row, np.array([0, block // 2]), block, 0) for row in window]
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    # By address. Holding the tensors keeps an address from being used twice.
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own and tuple(tensor.shape) not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed"),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        run(**batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def bytes_per_token(kind: str, mode: str, shape: Sizes, block: int = BLOCK) -> float:
    """The bytes per token that one more layer of this shape keeps."""
    torch._dynamo.reset()
    one, two = (saved_bytes(small_model(kind, layers, shape), mode, block) for layers in (1, 2))
    return (two - one) / (ROWS * block)


def coefficients(kind: str, mode: str) -> list[float]:
    """Bytes per token and layer, per unit of hidden size, query and key width, intermediate size, block.

    GPT-2 and GPT-NeoX have 0 for the two widths, which follow from the hidden size. Before the block a
    mixture of experts has another one, per unit of the hidden size and expert of a token.
    """
    base = SHAPES[0]
    start = bytes_per_token(kind, mode, base)
    found = []
    for axis, shape in enumerate(SHAPES[1:] if kind == "qwen3_moe" else SHAPES[1:5]):
        fixed = kind in ("gpt2", "gpt_neox") and axis in (1, 2)
        grown = start if fixed else bytes_per_token(kind, mode, shape)
        found.append((grown - start) / (shape[axis] - base[axis]))
    if kind == "qwen3_moe":
        found[4] /= base[0]
        found[0] -= found[4]  # a wider hidden size had wider copies, too
    found.append((bytes_per_token(kind, mode, base, 2 * BLOCK) - start) / BLOCK)
    return [round(number, 3) for number in found]


def main() -> None:
    """Measure all architectures and modes, and write the table (takes some minutes)."""
    transformers.logging.set_verbosity_error()
    table = {kind: {mode: coefficients(kind, mode) for mode in MODES} for kind in MODEL_TYPES}
    rows = [f'  "{kind}": ' + json.dumps(modes) for kind, modes in table.items()]
    path = Path(__file__).with_name("activations.json")
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main()
