"""Numbers about a model: loss, perplexity, bits per byte and per character; variety of what it writes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from recipe.hardware import detect
from recipe.progress import progress
from recipe.tokenization.packing import IGNORED, PackedBlocks
from recipe.tokenization.token_files import TokenFile, write_token_file

ROWS = 256  # tokens whose logits are in float32 at a time: tests/bench/evaluation.py
WINDOW_RULE = (
    "Documents stand end to end in blocks of {block_size} tokens without overlap, as in training. A "
    "token sees what stands before it in its own document and block; what a block's end cuts off begins "
    "anew. Every token but a document's first is predicted, the end token too; bits are divided by the "
    "bytes (characters) of the text alone."
)


@torch.inference_mode()
def total_loss(
    model: PreTrainedModel, samples: Dataset, batch_size: int, name: str, bf16: bool = False
) -> tuple[float, int]:
    """Summed negative log likelihood in nats, and the number of predicted tokens.

    samples: items as `PackedBlocks` gives them; documents in a block do not see each other, exactly as in
    training (no attention mask and no cache: with either, transformers would let them). bf16: matrix products
    in bfloat16, by autocast; the softmax over the vocabulary and sums are in float32 or more in any case.
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
            loss += _sum_of_losses(logits.flatten(0, 1), labels.to(model.device))
            count += int((labels != IGNORED).sum())
    return loss.item(), count


def _sum_of_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross entropy of logits [tokens, vocabulary], float64 [].

    A few rows at a time: the logits are the largest tensor by far, and in float32, in one piece, they and
    their softmax would leave every cache.
    """
    pieces = zip(logits.split(ROWS), labels.split(ROWS), strict=True)
    losses = [
        torch.nn.functional.cross_entropy(rows.float(), wanted, ignore_index=IGNORED, reduction="sum")
        for rows, wanted in pieces
    ]
    return torch.stack(losses).double().sum()


def computes_in_bf16(training: dict[str, Any]) -> bool:
    """Whether an evaluation computes in bf16: where training does, and this machine has the units for it.

    training: pretrain.json or finetune.json. By how much the loss differs from float32's is measured by
    tests/bench/evaluation.py.
    """
    wanted = training.get("bf16", "fp16" not in training)  # as `recipe.hardware.choose`
    return bool(wanted) and detect().fast_bf16


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

    Window rule: documents as `document_ids` gives them, end to end, in blocks of `block_size` without
    overlap, as in training. A token sees what stands before it in its own document and its own block: of a
    document that a block's end cuts, or that is longer than a block, the part in the next block begins
    without context. Its first token is still predicted, from the last block. Every token but a document's
    first is predicted once.

    With a start token every byte of the text counts, without one the first token's do not. So does each
    document's end: bits are those of text and ends, divided by the UTF-8 bytes (characters) of the text
    alone.
    """
    from recipe.tokenization.encode_text import document_ids

    prefix = folder / f".{name}"
    documents = (document_ids(tokenizer, text) for text in texts)
    write_token_file(prefix, documents, len(tokenizer))
    samples = PackedBlocks(TokenFile(prefix), block_size, tokenizer.pad_token_id)
    loss, count = total_loss(model, samples, batch_size, name, bf16)
    for suffix in (".bin", ".idx"):
        prefix.with_suffix(suffix).unlink()
    size = sum(len(text.encode("utf-8")) for text in texts)
    characters = sum(map(len, texts))
    return {
        "documents": len(texts),
        "bytes": size,
        "characters": characters,
        "tokens": count,
        "loss_sum": loss,
        "loss": loss / count,
        "perplexity": math.exp(loss / count),
        "bits_per_byte": loss / math.log(2) / size,
        "bits_per_character": loss / math.log(2) / characters,
    }


def combine(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """The figures of several sets of documents taken together, from their sums."""
    parts = list(parts)
    total = {
        key: sum(part[key] for part in parts)
        for key in ("documents", "bytes", "characters", "tokens", "loss_sum")
    }
    loss = total["loss_sum"] / total["tokens"]
    bits = total["loss_sum"] / math.log(2)
    return total | {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": bits / total["bytes"],
        "bits_per_character": bits / total["characters"],
    }


def repetition(text: str, n: int = 8) -> float:
    """The share of character n-grams that occurred before in the same text: 0 for none, near 1 for a loop."""
    grams = [text[i : i + n] for i in range(len(text) - n + 1)]
    return 1 - len(Counter(grams)) / len(grams) if grams else 0.0


def distinct(texts: list[str], n: int) -> float:
    """Different character n-grams over all n-grams of some texts (Li et al., 2016: distinct-n); 0 for
    none.
    """
    grams = Counter(text[i : i + n] for text in texts for i in range(len(text) - n + 1))
    return len(grams) / grams.total() if grams else 0.0


def losses_table(rows: dict[str, dict[str, float]]) -> str:
    """The figures of `evaluate_texts` as a Markdown table, a row per name."""
    columns = ("documents", "bytes", "tokens", "loss", "perplexity", "bits_per_byte", "bits_per_character")
    lines = [
        "| text | " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|---" + "|---:" * 7 + "|",
    ]
    for name, figures in rows.items():
        cells = [f"{figures[c]:,.0f}" if c in columns[:3] else f"{figures[c]:.4g}" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def comparison(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Figures of stage 14 as a table, before and after tuning; those that are no single numbers are left
    out.
    """
    lines = ["| held-out instructions | before | after |", "|---|---:|---:|"]
    for key, value in before.items():
        if not isinstance(value, dict):
            cells = [f"{x:,}" if isinstance(x, int) else f"{x:.4g}" for x in (value, after[key])]
            lines.append(f"| {key.replace('_', ' ')} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"
