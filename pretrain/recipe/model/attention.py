"""Attention on a CPU that computes only the pairs of positions in the same document.

PyTorch's attention computes every pair of positions of a block and masks most of them: later keys, and keys
of other documents. Here a chunk of queries uses only the keys from the start of its first query's document to
its last query. On a GPU `recipe.model.varlen` does the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "documents"  # the value of attn_implementation
# Queries of a chunk: its scores stay in the second-level cache; 256 was not faster.
QUERIES = 128
# Rows whose chunks are computed together: fewer and larger matrix products; 8 was at most 7 % faster.
ROWS = 4
# The keys of a chunk begin at a multiple of this: oneDNN makes and keeps a kernel for each shape of matrices.
KEYS = 64


def chunks(position_ids: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """(rows, queries, keys) of each chunk.

    The keys begin where the documents of all first queries have begun, or up to `KEYS` before it, and end at
    the last query. position_ids: int64 [rows, positions]; a document begins where it is 0, and at the start
    of a row.
    """
    firsts = torch.arange(0, position_ids.shape[1], QUERIES)
    begins = (firsts - position_ids[:, ::QUERIES]).clamp(min=0) // KEYS * KEYS
    for first_row, of_rows in zip(range(0, len(begins), ROWS), begins.split(ROWS), strict=True):
        rows = slice(first_row, first_row + len(of_rows))
        for here, first in zip(firsts.tolist(), of_rows.amin(0).tolist(), strict=True):
            end = min(here + QUERIES, position_ids.shape[1])
            yield rows, slice(here, end), slice(first, end)


def _weights(query: Tensor, key: Tensor, hidden: Tensor) -> Tensor:
    """The attention weights: [rows * groups, queries * heads of a group, keys].

    query: [rows * groups, queries * heads of a group, size], scaled; key: [rows * groups, keys, size].
    hidden: the mask that is added to the scores, [rows, queries, keys].
    """
    scores = query @ key.transpose(1, 2)
    rows, queries, keys = hidden.shape
    scores.view(rows, -1, queries, len(query[0]) // queries, keys).add_(hidden[:, None, :, None])
    return torch.softmax(scores, -1)


@torch.library.custom_op("recipe::document_attention", mutates_args=())
def document_attention(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, position_ids: Tensor
) -> Tensor:
    """Causal attention inside each document; shape and type are those of query.

    query: [rows, groups, positions, heads of a group, size], scaled. key and value: [rows, groups, positions,
    size]. All are contiguous. hidden: of the same type, [rows, 1, positions, positions], 0 where a query sees
    a key, else minus infinity. position_ids: see `chunks`.
    """
    out = torch.empty_like(query)
    for rows, queries, keys in chunks(position_ids):
        here, seen = (rows, slice(None), queries), (rows, slice(None), keys)
        asked = query[here].flatten(2, 3).flatten(0, 1)
        weights = _weights(asked, key[seen].flatten(0, 1), hidden[rows, 0, queries, keys])
        out[here] = (weights @ value[seen].flatten(0, 1)).view_as(out[here])
    return out


@torch.library.custom_op("recipe::document_attention_backward", mutates_args=())
def document_attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, position_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `document_attention`'s query, key and value; it computes the weights again."""
    of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    gradient = gradient.contiguous()
    for rows, queries, keys in chunks(position_ids):
        here, seen = (rows, slice(None), queries), (rows, slice(None), keys)
        asked, of_out = (x[here].flatten(2, 3).flatten(0, 1) for x in (query, gradient))
        keys_seen, values_seen = (x[seen].flatten(0, 1) for x in (key, value))
        weights = _weights(asked, keys_seen, hidden[rows, 0, queries, keys])
        of_weights = of_out @ values_seen.transpose(1, 2)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_query[here] = (of_scores @ keys_seen).view_as(query[here])
        of_key[seen] += (of_scores.transpose(1, 2) @ asked).view_as(key[seen])
        of_value[seen] += (weights.transpose(1, 2) @ of_out).view_as(value[seen])
    return of_query, of_key, of_value


# torch.compile and autograd need this.
document_attention.register_fake(lambda query, *_: torch.empty_like(query))
document_attention_backward.register_fake(
    lambda _, query, key, value, *__: (
        torch.empty_like(query),
        torch.empty_like(key),
        torch.empty_like(value),
    )
)
document_attention.register_autograd(
    lambda ctx, gradient: (*document_attention_backward(gradient, *ctx.saved_tensors), None, None),
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
    """The function that transformers calls for the attention `NAME`: [rows, positions, heads, size].

    Batches other than packed blocks (padded prompts, a cache) and attention with dropout use PyTorch's.
    """
    packed = attention_mask is not None and attention_mask.is_floating_point()  # made by `mask` below
    if not packed or position_ids is None or dropout:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **keywords
        )
    rows, heads, positions, size = query.shape
    scale = size**-0.5 if scaling is None else scaling
    # Under autocast, norms and rotations give float32 from bfloat16; PyTorch's own would be cast likewise.
    query, key = (query * scale).to(value.dtype), key.to(value.dtype)
    grouped = query.view(rows, key.shape[1], -1, positions, size).transpose(2, 3)
    out = document_attention(
        grouped.contiguous(),
        key.contiguous(),
        value.contiguous(),
        attention_mask.to(value.dtype),
        position_ids.expand(rows, -1),
    )
    return out.transpose(1, 2).reshape(rows, positions, heads, size), None


def mask(**keywords: Any) -> Tensor | None:
    """The mask for `attend`.

    For packed blocks floating point [rows, 1, positions, positions], to be added to the scores; else
    PyTorch's, true where a query sees a key, or None.
    """
    packed = keywords["attention_mask"] is None and keywords["q_length"] == keywords["kv_length"]
    windowed = (keywords.get("local_size") or keywords["kv_length"]) < keywords["kv_length"]
    if not packed or windowed:
        return sdpa_mask(**keywords)
    visible = sdpa_mask(**keywords | {"allow_is_causal_skip": False})
    # In the type of the scores, so that no layer has to cast it.
    mixed = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if mixed else keywords.get("dtype", torch.float32)
    return torch.where(visible, 0.0, float("-inf")).to(dtype)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)
