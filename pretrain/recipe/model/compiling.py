"""torch.compile for each part of a model on its own, so that equal layers are compiled once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel
from transformers.trainer_utils import unwrap_peft_model

# Parts that are hardly more than one kernel.
_ONE_KERNEL = (torch.nn.Embedding, torch.nn.Dropout)


def compile_parts(model: PreTrainedModel) -> None:
    """Compile the layers of a model, what is around them, and its loss over whole logits, in place.

    As one graph, a model takes longer to compile the more layers it has. Here all layers of one kind share a
    graph, as in torchtitan. Call it after `recipe.model.losses.return_loss_only`, which may replace the loss.
    """
    # The layers share their code, whose cache has an entry for each kind of layer, shape and mode.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.optimize_ddp = False  # it would split each layer as if it were a whole model
    model = unwrap_peft_model(model)
    for part in _parts(model.base_model):
        part.forward = torch.compile(part.forward)
    model.loss_function = torch.compile(model.loss_function)


def _parts(decoder: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for child in decoder.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from child
        elif not isinstance(child, _ONE_KERNEL):
            yield child
