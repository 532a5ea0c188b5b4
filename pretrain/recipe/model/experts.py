"""Mixtures of experts: their products in the precision of autocast, and the balance of their load."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward


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
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        experts = _Cast(experts, torch.get_autocast_dtype(device))
    return grouped_mm_experts_forward(experts, hidden, index, weights)


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
