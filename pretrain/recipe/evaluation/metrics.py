"""Figures of a model: loss, perplexity, bits per byte and per character; variety of the text it writes."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from recipe.config.choice import precision_of
from recipe.hardware import detect
from recipe.progress import progress
from recipe.project import RecipeError, markdown_table
from recipe.tokenization.packing import IGNORED, PackedBlocks
from recipe.tokenization.token_files import TokenFile, write_token_file

ROWS = 256  # tokens whose logits are in float32 at a time: tests/bench/evaluation.py
WINDOW_RULE = (
    "The documents are packed one after another into blocks of {block_size} tokens without overlap, as in "
    "training. A token sees only the tokens before it in its own document and block: where the end of a "
    "block cuts a document, the rest starts without context. Every token except the first of a document is "
    "predicted, the end token as well. Bits are divided by the bytes (characters) of the text without end "
    "tokens."
)


@torch.inference_mode()
def total_loss(
    model: PreTrainedModel, samples: Dataset, batch_size: int, name: str, bf16: bool = False
) -> tuple[float, int]:
    """Summed negative log likelihood in nats, and the number of predicted tokens.

    samples: items of `PackedBlocks`. Documents in a block do not see each other, as in training; with an
    attention mask or a cache, transformers would let them. bf16: compute matrix products in bfloat16 by
    autocast; the softmax over the vocabulary and the sums are always in float32 or float64. Raises
    RecipeError when the loss is NaN or infinite.
    """
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=model.device)
    count = 0
    loader = DataLoader(samples, batch_size=batch_size)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        for batch in progress(loader, name, "batches", len(loader)):
            labels = batch["shift_labels"].flatten()
            batch = {key: batch[key].to(model.device) for key in ("input_ids", "position_ids")}
            logits = model(**batch, use_cache=False).logits
            loss += sum_of_losses(logits.flatten(0, 1), labels.to(model.device))
            count += int((labels != IGNORED).sum())
    if not loss.isfinite():
        raise RecipeError(
            f"{name}: the loss of {model.name_or_path} is {loss.item()}, so nothing is written. Its "
            "weights are damaged, or it computes beyond the range of its numbers: train it again with --force"
        )
    return loss.item(), count


def sum_of_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross entropy of logits [tokens, vocabulary], float64 [].

    Only `ROWS` tokens at a time are in float32: the logits are the largest tensor by far, and as a whole they
    and their softmax do not fit into a processor's cache.
    """
    losses = [
        torch.nn.functional.cross_entropy(rows.float(), targets, ignore_index=IGNORED, reduction="sum")
        for rows, targets in zip(logits.split(ROWS), labels.split(ROWS), strict=True)
    ]
    return torch.stack(losses).double().sum()


def computes_in_bf16(training: dict[str, Any]) -> bool:
    """Whether to evaluate in bf16: if training does, and this machine has fast units for it.

    training: pretrain.json or finetune.json. tests/bench/evaluation.py measures how far the loss is from that
    in float32.
    """
    here = detect()
    return here.fast_bf16 and precision_of(training, here.device, here.fast_bf16) == "bf16"


def evaluate_texts(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: list[str],
    block_size: int,
    batch_size: int,
    folder: Path,
    name: str,
    bf16: bool = False,
) -> dict[str, float]:
    """Loss, perplexity, bits per byte and bits per character of a model on documents.

    `WINDOW_RULE` says what is predicted from what. The first token of the rest of a cut document is predicted
    from the end of the block before. With a start token, every byte of the text is predicted; without one,
    the bytes of the first token are not.

    folder: where the tokens are kept during the calculation. name: for the progress line.
    """
    from recipe.tokenization.encode_text import document_ids

    prefix = folder / f".{name}"
    documents = (document_ids(tokenizer, text) for text in texts)
    write_token_file(prefix, documents, len(tokenizer))
    samples = PackedBlocks(TokenFile(prefix), block_size, tokenizer.pad_token_id)
    loss, count = total_loss(model, samples, batch_size, name, bf16)
    for suffix in (".bin", ".idx"):
        prefix.with_suffix(suffix).unlink()
    sums = {
        "documents": len(texts),
        "bytes": sum(len(text.encode("utf-8")) for text in texts),
        "characters": sum(map(len, texts)),
        "tokens": count,
        "loss_sum": loss,
    }
    return combine([sums])


def combine(parts: list[dict[str, float]]) -> dict[str, float]:
    """The figures of several sets of documents together, calculated from their sums."""
    total = {
        key: sum(part[key] for part in parts)
        for key in ("documents", "bytes", "characters", "tokens", "loss_sum")
    }
    loss = total["loss_sum"] / total["tokens"]
    bits = total["loss_sum"] / math.log(2)
    return total | {
        "loss": loss,
        "perplexity": perplexity(loss, "the texts"),
        "bits_per_byte": bits / total["bytes"],
        "bits_per_character": bits / total["characters"],
    }


def perplexity(loss: float, where: str) -> float:
    """The perplexity of a mean loss in nats. Raises RecipeError where it is beyond the range of numbers.

    where: what was measured, for the message.
    """
    try:
        return math.exp(loss)
    except OverflowError as error:
        raise RecipeError(
            f"{where}: a mean loss of {loss:.4g} nats per token, whose perplexity is beyond the range of "
            "numbers. The weights of the model are damaged: train it again with --force"
        ) from error


def repetition(text: str) -> float:
    """The share of character 8-grams that are repeated in a text: 0 for none, nearly 1 for a loop."""
    grams = [text[i : i + 8] for i in range(len(text) - 7)]
    return 1 - len(Counter(grams)) / len(grams) if grams else 0.0


def distinct(texts: list[str], n: int) -> float:
    """The share of different n-grams of characters in all of some texts (distinct-n, Li et al., 2016).

    It is 0 when the texts have no n-gram.
    """
    grams = Counter(text[i : i + n] for text in texts for i in range(len(text) - n + 1))
    return len(grams) / grams.total() if grams else 0.0


def losses_table(rows: dict[str, dict[str, float]]) -> str:
    """The figures of `evaluate_texts` as a Markdown table, a row per name."""
    columns = ("documents", "bytes", "tokens", "loss", "perplexity", "bits_per_byte", "bits_per_character")
    heads = ["text", *(column.replace("_", " ") for column in columns)]
    cells = [
        [name, *(f"{figures[c]:,.0f}" if c in columns[:3] else f"{figures[c]:.4g}" for c in columns)]
        for name, figures in rows.items()
    ]
    return "\n".join(markdown_table(heads, cells)) + "\n"


def comparison(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Figures of stage 14 as a Markdown table, before and after tuning.

    Figures that are not single numbers are left out.
    """
    rows = []
    for key, value in before.items():
        if not isinstance(value, dict):
            cells = [f"{x:,}" if isinstance(x, int) else f"{x:.4g}" for x in (value, after[key])]
            rows.append([key.replace("_", " "), *cells])
    return "\n".join(markdown_table(("held-out instructions", "before", "after"), rows)) + "\n"
