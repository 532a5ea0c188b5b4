"""The loss that a model returns in training, with an optional z-loss."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import PreTrainedModel

from recipe.tokenization.packing import IGNORED


def return_loss_only(model: PreTrainedModel, z_loss: float = 0.0) -> None:
    """Let the model's forward return only its loss when it is given labels, with an optional z-loss.

    The logits (batch x block x vocabulary) are by far the largest tensor of a step. Returned, they would be
    kept, and accelerate would convert them to float32 outside the compiled graph.

    z_loss: the coefficient of ``log(Z)**2``, Z being the softmax's denominator; it keeps the logits from
    drifting (Chowdhery et al., 2022, section 5: 1e-4). It is added in training only, so that the loss of an
    evaluation can be compared with that of other models. The forward then also returns ``z_loss``, detached:
    the part of the loss that is not cross entropy.
    """
    forward = model.forward
    if z_loss:
        model.loss_function = cross_entropy_and_z

    @functools.wraps(forward)
    def loss_of(*arguments: Any, **keywords: Any) -> Any:
        output = forward(*arguments, **keywords)
        if output.loss is None:
            return output
        if not z_loss:
            return {"loss": output.loss}
        cross_entropy, z = output.loss[0], output.loss[1]
        if not model.training:
            return {"loss": cross_entropy.clone()}
        share = z_loss * z
        return {"loss": cross_entropy + share, "z_loss": share.detach()}

    model.forward = loss_of


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
