"""Attention on a CPU that computes only what packed documents can see.

PyTorch's own computes every pair of places of a block and hides most of them by a mask: those behind, and
those of other documents. Here each chunk of queries looks only at keys from the document of its first query
on, and at none behind it. On a GPU FlashAttention-2 does the same, from the same ``position_ids``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "documents"  # by which attn_implementation asks for it
QUERIES = 128  # to a chunk, so that its scores stay in the second-level cache; 256 was no faster
# Where the keys of a chunk may begin: few shapes of matrices, since oneDNN makes and keeps a kernel for each.
KEYS = 64


def chunks(position_ids: Tensor) -> Iterator[tuple[int, int, int, int, Tensor]]:
    """(row, first key, first query, end of both, hidden) of each chunk of queries.

    The keys begin with the document of the first query, or up to `KEYS` before. hidden: bool [queries, keys],
    what a query must not see: keys of documents before its own, and keys behind it.
    position_ids: int64 [rows, places]. A document begins where it is 0, and at the beginning of a row.
    """
    places = torch.arange(position_ids.shape[1])
    begins = (places - position_ids).clamp(min=0)
    for row, of_row in enumerate(begins):
        for here in range(0, len(places), QUERIES):
            end, first = min(here + QUERIES, len(places)), int(of_row[here]) // KEYS * KEYS
            keys, queries = places[first:end], slice(here, end)
            hidden = (keys < of_row[queries, None]) | (keys > places[queries, None])
            yield row, first, here, end, hidden


def _weights(query: Tensor, key: Tensor, hidden: Tensor) -> Tensor:
    """The share of each key in each query: [groups, heads of a group * queries, keys].

    query: [groups, heads of a group * queries, size], scaled; key: [groups, keys, size].
    """
    scores = query @ key.transpose(1, 2)
    scores.view(len(key), -1, *hidden.shape).masked_fill_(hidden, float("-inf"))
    return torch.softmax(scores, -1)


@torch.library.custom_op("recipe::document_attention", mutates_args=())
def document_attention(query: Tensor, key: Tensor, value: Tensor, position_ids: Tensor) -> Tensor:
    """Causal attention inside each document: [rows, heads, places, size], of the arguments' type.

    query: [rows, heads, places, size], scaled. key and value: [rows, groups, places, size]; heads are a
    multiple of groups, and neighbouring heads share one. position_ids: see `chunks`.
    """
    out, groups = torch.empty_like(query), key.shape[1]
    for row, first, here, end, hidden in chunks(position_ids):
        queries, keys = query[row, :, here:end], key[row, :, first:end]
        weights = _weights(_by_group(queries, groups), keys, hidden)
        out[row, :, here:end] = (weights @ value[row, :, first:end]).view(queries.shape)
    return out


def _by_group(heads: Tensor, groups: int) -> Tensor:
    """[heads, places, size] as [groups, heads of a group * places, size]."""
    return heads.reshape(groups, -1, heads.shape[-1])


@torch.library.custom_op("recipe::document_attention_backward", mutates_args=())
def document_attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, position_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `document_attention`'s query, key and value; the weights are computed once more."""
    of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    groups = key.shape[1]
    for row, first, here, end, hidden in chunks(position_ids):
        places, seen = (row, slice(None), slice(here, end)), (row, slice(None), slice(first, end))
        queries, of_out = _by_group(query[places], groups), _by_group(gradient[places], groups)
        weights = _weights(queries, key[seen], hidden)
        of_weights = of_out @ value[seen].transpose(1, 2)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_query[places] = (of_scores @ key[seen]).view(query[places].shape)
        of_key[seen] += of_scores.transpose(1, 2) @ queries
        of_value[seen] += weights.transpose(1, 2) @ of_out
    return of_query, of_key, of_value


# What torch.compile and autograd want to know of the two.
document_attention.register_fake(lambda query, *_: torch.empty_like(query))
document_attention_backward.register_fake(
    lambda _, query, key, value, *__: (
        torch.empty_like(query),
        torch.empty_like(key),
        torch.empty_like(value),
    )
)
document_attention.register_autograd(
    lambda ctx, gradient: (*document_attention_backward(gradient, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for the attention `NAME`: [rows, places, heads, size].

    Whatever is no packed block (padded prompts, a cache), and dropout of attention, goes to PyTorch's own.
    """
    packed = attention_mask is None and position_ids is not None and query.shape[2] == key.shape[2]
    if not packed or dropout:
        if packed:
            attention_mask = _visible(position_ids)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **keywords
        )
    # Under autocast, norms and rotations give float32 from bfloat16; PyTorch's own would be cast likewise.
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key = (query * scale).to(value.dtype), key.to(value.dtype)
    out = document_attention(query, key, value, position_ids.expand(len(query), -1))
    return out.transpose(1, 2), None


def _visible(position_ids: Tensor) -> Tensor:
    """What each place of packed documents sees, as a mask: bool [rows, 1, places, places]."""
    document = (position_ids == 0).cumsum(-1)
    same = document[:, None, :, None] == document[:, None, None, :]
    return same.tril()


def mask(**keywords: Any) -> Tensor | None:
    """The mask that goes with `attend`: none for packed blocks, else that of PyTorch's attention."""
    packed = keywords["attention_mask"] is None and keywords["q_length"] == keywords["kv_length"]
    windowed = (keywords.get("local_size") or keywords["kv_length"]) < keywords["kv_length"]
    return None if packed and not windowed else sdpa_mask(**keywords)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)
