"""Attention on a GPU over packed documents, by the FlashAttention kernels that PyTorch carries itself.

The batch says where documents begin (`recipe.tokenization.packing.collate_with_bounds`), so that no mask is
built, and a compiled model waits for nothing. On a CPU `recipe.model.attention` does the same.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before PyTorch 2.10; `recipe.config.choice.choose` does not choose this kernel then
    varlen_attn = None

NAME = "varlen"  # the value of attn_implementation
# PyTorch 2.11 takes as many heads of keys as of queries.
GROUPS = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls for the attention `NAME`: [rows, positions, heads, size].

    query: [rows, heads, positions, size]; key and value: the same, or with fewer heads. cu_seq_lens_q: int32
    [documents + 1], where in rows x positions the documents begin, and the end. max_length_q: no document is
    longer. A query of a layer with `sliding_window` w sees itself and the w - 1 positions before it.

    Batches without bounds (padded prompts, a cache) use PyTorch's other attention. Raises RuntimeError for
    such a batch in training: without bounds documents would silently see each other.
    """
    if cu_seq_lens_q is None:
        if module.training and attention_mask is None:
            raise RuntimeError(f"attention {NAME}: the batch does not say where its documents begin")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **keywords
        )
    rows, heads, positions, size = query.shape
    grouped = {"enable_gqa": True} if GROUPS and key.shape[1] != heads else {}
    if not grouped and key.shape[1] != heads:
        key, value = (part.repeat_interleave(heads // part.shape[1], 1) for part in (key, value))
    # Under autocast, norms and rotations give float32 from bfloat16; PyTorch's own would be cast likewise.
    query, key, value = (
        part.to(value.dtype).transpose(1, 2).reshape(rows * positions, -1, size)
        for part in (query, key, value)
    )
    out = varlen_attn(
        query,
        key,
        value,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(sliding_window - 1 if sliding_window else -1, 0),
        **grouped,
    )
    return out.view(rows, positions, heads, size), None


def for_any_number_of_documents(batch: dict[str, Any]) -> None:
    """Let torch.compile make one graph for all numbers of bounds in a batch on its device."""
    for key in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if key in batch:
            torch._dynamo.maybe_mark_dynamic(batch[key], 0)


def mask(**keywords: Any) -> Tensor | None:
    """The mask for `attend`: None for packed blocks, else PyTorch's."""
    packed = keywords["attention_mask"] is None and keywords["q_length"] == keywords["kv_length"]
    return None if packed else sdpa_mask(**keywords)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)
