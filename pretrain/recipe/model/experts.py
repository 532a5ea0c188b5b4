"""Mixtures of experts: their products in the precision of autocast, and the balance of their load."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

# On a CPU, the tokens of an expert are padded to a multiple of this number.
MULTIPLE = 64


class _Cast:
    """The experts of a layer as `grouped_mm_experts_forward` reads them, with weights of another type."""

    def __init__(self, experts: torch.nn.Module, dtype: torch.dtype) -> None:
        self.experts = experts
        self.gate_up_proj = experts.gate_up_proj.to(dtype)
        self.down_proj = experts.down_proj.to(dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.experts, name)


def grouped_mm(experts: torch.nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """transformers' experts, in the type of autocast where it is on.

    Autocast does not know grouped products: with float32 weights transformers computes them in float32, while
    all other matrices are cast, and says nothing.

    hidden: [tokens, hidden size]. index, weights: the experts that a token uses and their shares, [tokens,
    experts of a token].
    """
    device, tokens = hidden.device.type, len(hidden)
    if torch.is_autocast_enabled(device):
        experts = _Cast(experts, torch.get_autocast_dtype(device))
        if device == "cpu":
            hidden, index, weights = even_groups(hidden, index, weights, experts.num_experts)
    return grouped_mm_experts_forward(experts, hidden, index, weights)[:tokens]


def even_groups(hidden: Tensor, index: Tensor, weights: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Add tokens that are 0, so that each of `count` experts has a multiple of `MULTIPLE` tokens.

    For 16-bit products, oneDNN compiles a kernel for each new number of rows, which takes longer than the
    product itself, and keeps a thousand of them, 0.9 MB each. The experts have other numbers of tokens at
    each step. Returns the arguments as they are where the added tokens would be more than an eighth.
    """
    slots, chosen = count * (MULTIPLE - 1), index.shape[1]
    if index.numel() < 8 * slots:
        return hidden, index, weights
    loads = torch.histc(index.float(), bins=count, min=0, max=count - 1)
    used = torch.arange(MULTIPLE - 1, device=index.device) < (-loads % MULTIPLE)[:, None]
    # An expert of the number `count` does not exist, and grouped products leave its tokens out.
    added = torch.where(used, torch.arange(count, device=index.device)[:, None], count).flatten()
    added = pad(added, (0, -slots % chosen), value=count).view(-1, chosen)
    zeros = hidden.new_zeros(len(added), hidden.shape[1])
    shares = weights.new_zeros(added.shape)
    return torch.cat([hidden, zeros]), torch.cat([index, added]), torch.cat([weights, shares])


# The implementation that transformers takes by default, so that every way to load a model has it.
ExpertsInterface.register("grouped_mm", grouped_mm)


def balance(router_logits: tuple[Tensor, ...], top_k: int) -> tuple[Tensor, Tensor]:
    """The auxiliary loss of the routers, and the share of the tokens' choices that each expert gets.

    Fedus et al. (2022, "Switch Transformers", equations 4 to 6), for each layer on its own, and the mean of
    the layers: `top_k` where the load is balanced, as transformers scales it, which mixes the layers, so that
    one can hide what another does.

    router_logits: of each layer, [tokens, experts]. Returns float32: the loss [], and without a gradient the
    shares [layers, experts], which sum to 1 in each layer.
    """
    losses, shares = [], []
    for logits in router_logits:
        chances = logits.float().softmax(-1)
        chosen = torch.zeros_like(chances).scatter_(-1, chances.topk(top_k, -1).indices, 1.0).mean(0)
        losses.append(chances.shape[-1] * (chosen * chances.mean(0)).sum())
        shares.append(chosen / top_k)
    return torch.stack(losses).mean(), torch.stack(shares).detach()
