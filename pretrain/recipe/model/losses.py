"""The loss that a model returns in training, with an optional z-loss, and the routers' auxiliary loss."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from recipe.model.experts import balance
from recipe.tokenization.packing import IGNORED


def return_loss_only(model: PreTrainedModel, z_loss: float = 0.0) -> None:
    """Let the model's forward return only its loss when it is given labels, with what is added to it.

    The logits (batch x block x vocabulary) are by far the largest tensor of a step. Returned, they would be
    kept, and accelerate would convert them to float32 outside the compiled graph.

    z_loss: the coefficient of ``log(Z)**2``, Z being the softmax's denominator; it keeps the logits from
    drifting (Chowdhery et al., 2022, section 5: 1e-4). It is added in training only, so that the loss of an
    evaluation can be compared with that of other models. The forward then also returns ``z_loss``, detached:
    the part of the loss that is not cross entropy.

    A mixture of experts with a ``router_aux_loss_coef`` in its config also returns ``router_aux_loss``,
    likewise, and ``expert_shares`` (see `recipe.model.experts.balance`). transformers 5.23 would add the
    whole auxiliary loss to each micro-batch of each rank; here each adds its part, by its trained positions.
    """
    forward = model.forward
    if z_loss:
        model.loss_function = cross_entropy_and_z
    balancing = router_loss_weight(model.config)
    if balancing:
        # Of transformers' own; the config keeps the coefficient. An adapter is around the model.
        getattr(model, "get_base_model", lambda: model)().router_aux_loss_coef = 0.0

    @functools.wraps(forward)
    def loss_of(*arguments: Any, **keywords: Any) -> Any:
        balanced = balancing and model.training and keywords.get("labels") is not None
        output = forward(*arguments, **keywords | ({"output_router_logits": True} if balanced else {}))
        if output.loss is None:
            return output
        cross_entropy, z = (output.loss[0], output.loss[1]) if z_loss else (output.loss, None)
        if not model.training:
            return {"loss": cross_entropy.clone()}
        added: dict[str, torch.Tensor] = {}
        found: dict[str, torch.Tensor] = {}
        if z is not None:
            added["z_loss"] = z_loss * z
        if balanced:
            auxiliary, shares = balance(output.router_logits, model.config.num_experts_per_tok)
            part = balancing * auxiliary
            if keywords.get("num_items_in_batch") is not None:
                part = part * (keywords["labels"] != IGNORED).sum() / keywords["num_items_in_batch"]
            added["router_aux_loss"], found["expert_shares"] = part, shares
        loss = cross_entropy + sum(added.values())
        return {"loss": loss} | {name: share.detach() for name, share in added.items()} | found

    model.forward = loss_of


def router_loss_weight(config: PreTrainedConfig) -> float:
    """The coefficient of the routers' auxiliary loss; 0 for a model without experts."""
    return getattr(config, "router_aux_loss_coef", 0.0)


def cross_entropy_and_z(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """Cross entropy and ``log(Z)**2``, float32 [2]: sums over the trained positions, divided by their number.

    logits: [..., vocab_size]. shift_labels: the next tokens [...], ``IGNORED`` where nothing is trained;
    without them they are made from `labels`. num_items_in_batch: the divisor; by default the number of this
    batch's trained positions.
    """
    if shift_labels is None:
        shift_labels = next_tokens(labels)
    flat = logits.float().reshape(-1, vocab_size)
    targets = shift_labels.reshape(-1).to(flat.device)
    trained = targets != IGNORED
    log_z = flat.logsumexp(-1)
    chosen = flat.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    each = torch.stack([log_z - chosen, log_z.square()])
    total = torch.where(trained, each, 0.0).sum(-1)
    return total / (trained.sum() if num_items_in_batch is None else num_items_in_batch)


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """The labels [rows, positions] of the next positions, `IGNORED` at the end of a row."""
    return torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]
