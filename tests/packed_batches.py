"""Batches of packed documents with their bounds, and what a small model computes from them."""

from typing import Any

import torch
from recipe.tokenization.packing import collate_with_bounds, pack
from transformers import AutoConfig, AutoModelForCausalLM


def packed(*rows: list[int]) -> dict[str, Any]:
    """A batch of rows, each given by the lengths of its documents; the last of a row may be padding."""
    torch.manual_seed(0)
    block = sum(rows[0])
    samples = []
    for lengths in rows:
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).numpy()
        samples.append(pack(torch.randint(3, 90, (block + 1,)).numpy(), starts, block, pad=0))
    return collate_with_bounds(samples)


def loss_and_gradients(
    attention: str, batch: dict[str, Any], **values: Any
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss and all gradients of a small model of the shape `values`, on the batch's device."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(vocab_size=97, use_cache=False, **values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    loss = model.to(batch["input_ids"].device).train()(**batch).loss
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]
