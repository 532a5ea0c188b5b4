"""The loss over a large vocabulary without ever holding all logits: a few positions at a time.

The logits of a batch (positions x vocabulary) are the largest tensor of a step, and their gradient is as
large. Here the output matrix and the loss are one operation: it computes the logits of a chunk of positions,
their loss and at once their gradients, and goes on to the next chunk. Nothing is computed twice, as in the
fused linear cross entropy of Liger (Hsu et al., 2024, arXiv:2410.10989), but with PyTorch's own kernels, so
that it runs on every device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_utils import unwrap_peft_model

from recipe.config.choice import CHUNK, CHUNKS, LIGER, WHOLE
from recipe.model.losses import next_tokens
from recipe.tokenization.packing import IGNORED


@torch.library.custom_op("recipe::chunked_loss", mutates_args=())
def chunked_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, gradients: bool, trained_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of ``hidden @ weight.T``, and its gradients of both.

    hidden: [positions, width] in the type that matrices are multiplied in. weight: [vocabulary, width], any
    floating type. targets: int64 [positions], ``IGNORED`` where nothing is trained. gradients,
    trained_weight: which gradients are needed.

    Returns sums over the positions, float32 [2]: cross entropy + z-loss, and the z-loss alone; the gradient
    of `hidden`, in its type; the gradient of `weight`, float32. A gradient that is not needed is empty. The
    sums are divided later: in fp16 the gradients of a mean would be too small for the type.
    """
    matrix = weight.to(hidden.dtype)
    sums = hidden.new_zeros(2, dtype=torch.float32)
    of_hidden = torch.empty_like(hidden if gradients else hidden[:0])
    of_weight = torch.zeros_like(weight if gradients and trained_weight else weight[:0], dtype=torch.float32)
    rows = max(1, CHUNK // len(weight))
    for begin in range(0, len(hidden), rows):
        part = slice(begin, begin + rows)
        trained = (targets[part] != IGNORED).unsqueeze(1)
        target = targets[part].clamp(min=0).unsqueeze(1)
        logits = hidden[part] @ matrix.T
        log_softmax = logits.log_softmax(-1, dtype=torch.float32)
        entropy = -log_softmax.gather(1, target)
        log_z = logits.gather(1, target).float() + entropy
        z = z_loss * log_z.square()
        sums += torch.stack([torch.where(trained, each, 0.0).sum() for each in (entropy + z, z)])
        if not gradients:
            continue
        of_logits = log_softmax.exp_()
        if z_loss:
            of_logits *= 1 + 2 * z_loss * log_z
        of_logits.scatter_add_(1, target, -torch.ones_like(log_z))
        of_logits = of_logits.to(hidden.dtype)
        # Zeros in the narrow factors, not in the logits.
        of_hidden[part] = torch.where(trained, of_logits @ matrix, 0.0)
        if trained_weight:
            of_weight += _product(of_logits.T, torch.where(trained, hidden[part], 0.0))
    return sums, of_hidden, of_weight


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The matrix product; on a GPU in float32: the sums of fp16 gradients can be too large for fp16."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


@chunked_loss.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, gradients: bool, trained_weight: bool):
    return (
        hidden.new_empty(2, dtype=torch.float32),
        torch.empty_like(hidden if gradients else hidden[:0]),
        torch.empty_like(weight if gradients and trained_weight else weight[:0], dtype=torch.float32),
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, weight, *_, ctx.trained_weight = inputs
    ctx.weight_type = weight.dtype
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, of_sums: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    of_hidden, of_weight = ctx.saved_tensors
    scale = of_sums[0]
    of_weight = (of_weight * scale).to(ctx.weight_type) if ctx.trained_weight else None
    return of_hidden * scale, of_weight, None, None, None, None


chunked_loss.register_autograd(_backward, setup_context=_keep_gradients)


def return_loss_in_chunks(model: PreTrainedModel, z_loss: float = 0.0) -> None:
    """As `recipe.model.losses.return_loss_only`, without ever holding all logits.

    The loss is computed in the forward of the output matrix, because ZeRO-3 and FSDP2 gather the matrix for
    exactly this call. Tensor parallelism, which splits it over the vocabulary, is not supported.
    """
    model = unwrap_peft_model(model)
    head, forward = model.get_output_embeddings(), model.forward
    head.forward = _loss_or_logits(head)

    @functools.wraps(forward)
    def loss_of(
        *arguments: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **keywords: Any,
    ) -> Any:
        if labels is None:
            return forward(*arguments, **keywords)
        hidden = model.base_model(*arguments, **keywords).last_hidden_state
        targets = (next_tokens(labels) if shift_labels is None else shift_labels).reshape(-1)
        sums = head(hidden.flatten(0, -2), targets, z_loss if model.training else 0.0)
        count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        output = {"loss": sums[0] / count}
        return output | {"z_loss": sums[1].detach() / count} if z_loss and model.training else output

    model.forward = loss_of


def active_loss(model: PreTrainedModel) -> str:
    """How a model computes its loss: `WHOLE`, `CHUNKS` or `LIGER`."""
    model = unwrap_peft_model(model)
    if model.forward.__module__.startswith("liger_kernel."):
        return LIGER
    head = model.get_output_embeddings()
    return CHUNKS if hasattr(head.forward, "in_chunks") else WHOLE


def _loss_or_logits(head: torch.nn.Linear) -> Callable[..., Tensor]:
    """The forward of an output matrix: with targets it returns the sums of `chunked_loss`."""
    logits_of = head.forward

    def forward(hidden: Tensor, targets: Tensor | None = None, z_loss: float = 0.0) -> Tensor:
        if targets is None:
            return logits_of(hidden)
        kind = hidden.device.type
        mixed = torch.is_autocast_enabled(kind)
        hidden = hidden.to(torch.get_autocast_dtype(kind) if mixed else head.weight.dtype)
        trained = head.weight.requires_grad
        return chunked_loss(hidden, head.weight, targets, z_loss, torch.is_grad_enabled(), trained)[0]

    forward.in_chunks = True
    return forward
