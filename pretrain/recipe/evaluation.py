"""Numbers about a model: loss, perplexity, bits per byte and per character; repetition of what it writes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from recipe.packing import IGNORED, PackedBlocks
from recipe.progress import progress
from recipe.token_files import TokenFile, write_token_file


@torch.inference_mode()
def total_loss(model: PreTrainedModel, samples: Dataset, batch_size: int, name: str) -> tuple[float, int]:
    """Summed negative log likelihood in nats, in float32, and the number of predicted tokens.

    samples: items as `PackedBlocks` gives them; documents in a block do not see each other, exactly as in
    training (no attention mask and no cache: with either, transformers would let them).
    """
    model.eval()
    loss, count = 0.0, 0
    loader = DataLoader(samples, batch_size=batch_size)
    for batch in progress(loader, name, "batches", len(loader)):
        batch = {key: value.to(model.device) for key, value in batch.items()}
        logits = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        labels = batch["shift_labels"].flatten()
        loss += torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum"
        ).item()
        count += int((labels != IGNORED).sum())
    return loss, count


def evaluate_texts(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: list[str],
    block_size: int,
    batch_size: int,
    folder: Path,
    name: str,
) -> dict[str, float]:
    """Loss, perplexity, bits per byte and bits per character of a model on documents.

    Window rule: documents as `document_ids` gives them, end to end, in blocks of `block_size` without
    overlap, as in training. Every token but a document's first is predicted: with a start token every byte of
    the text counts, without one the first token's do not. So does each document's end: bits are those of text
    and ends, divided by the UTF-8 bytes (characters) of the text alone.
    """
    from recipe.tokenizer import document_ids

    prefix = folder / f".{name}"
    documents = (document_ids(tokenizer, text) for text in texts)
    write_token_file(prefix, documents, len(tokenizer))
    samples = PackedBlocks(TokenFile(prefix), block_size, tokenizer.pad_token_id)
    loss, count = total_loss(model, samples, batch_size, name)
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


def markdown(rows: dict[str, dict[str, float]]) -> str:
    """The figures as a table, a row per name."""
    columns = ("documents", "bytes", "tokens", "loss", "perplexity", "bits_per_byte", "bits_per_character")
    lines = [
        "| text | " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|---" + "|---:" * 7 + "|",
    ]
    for name, figures in rows.items():
        cells = [f"{figures[c]:,.0f}" if c in columns[:3] else f"{figures[c]:.4g}" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
