"""Evaluation speed: the loss of 1 MB of text, ours against the stock Trainer's evaluation of the same blocks.

Text and model are those of the recipe tiny (run it to stage 05 first): the validation texts of all sources,
repeated until there are enough. All methods get the same packed blocks, 8 at a time, and run in turn, so that
other load on the machine affects all of them; the best round counts. The ratio is the time of the stock
Trainer in float32, its default, divided by the time of the row. The loss shows how exact bf16 is.

- ``ours``: `total_loss`, in bf16 where the machine has the units for it (as in stage 06), and in float32.
- ``Trainer``: `Trainer.evaluate`, in float32 and with bf16_full_eval, which also casts the weights. Its loss
  is a mean over blocks, which may have different numbers of tokens.

Run (about 3 minutes, nothing else running):  python tests/bench/evaluation.py [MEGABYTES]
"""

from __future__ import annotations

import copy
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipe.corpus.shards import read_texts
from recipe.evaluation.metrics import total_loss
from recipe.hardware import detect
from recipe.model.build import for_inference, load_model
from recipe.project import OUTPUTS
from recipe.tokenization.encode_text import document_ids
from recipe.tokenization.packing import IGNORED, PackedBlocks
from recipe.tokenization.token_files import TokenFile, write_token_file
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PrinterCallback, Trainer, TrainingArguments

ROUNDS, BATCH, BLOCK = 2, 8, 256


def enough(texts: list[str], size: float) -> list[str]:
    """Texts, repeated from the first one, until they have `size` bytes of UTF-8."""
    taken, total = [], 0
    for text in itertools.cycle(texts):
        if total >= size:
            return taken
        taken.append(text)
        total += len(text.encode())
    return taken


def trainer(model: Any, samples: Dataset, folder: str, bf16: bool) -> Callable[[], float]:
    """The stock Trainer's evaluation, as a function that returns its loss."""
    arguments = TrainingArguments(
        folder,
        per_device_eval_batch_size=BATCH,
        bf16_full_eval=bf16,
        use_cpu=model.device.type == "cpu",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    stock = Trainer(model, arguments, eval_dataset=samples)
    stock.remove_callback(PrinterCallback)
    return lambda: stock.evaluate()["eval_loss"]


def main() -> None:
    """Measure and print the table."""
    size = 1e6 * float(sys.argv[1] if len(sys.argv) > 1 else 1)
    folder = OUTPUTS / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(folder / "05_pretrain")
    model = for_inference(load_model(folder / "05_pretrain"))
    peer = for_inference(load_model(folder / "05_pretrain", "sdpa"))
    model.config.use_cache = peer.config.use_cache = False
    texts = enough(list(read_texts(folder / "02_dataset", "valid")), size)

    def ours(bf16: bool) -> Callable[[], float]:
        def loss() -> float:
            total, count = total_loss(model, samples, BATCH, "", bf16)
            return total / count

        return loss

    with tempfile.TemporaryDirectory() as work:
        write_token_file(Path(work) / "x", (document_ids(tokenizer, t) for t in texts), len(tokenizer))
        samples = PackedBlocks(TokenFile(Path(work) / "x"), BLOCK, tokenizer.pad_token_id)
        tokens = sum(int((sample["labels"] != IGNORED).sum()) for sample in samples)
        ways = {"Trainer, float32": trainer(peer, samples, work, False), "ours, float32": ours(False)}
        if detect().fast_bf16:
            ways |= {
                "Trainer, bf16": trainer(copy.deepcopy(peer), samples, work, True),
                "ours, bf16": ours(True),
            }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        losses: dict[str, float] = {}
        for _ in range(ROUNDS):
            for name, run in ways.items():
                started = time.perf_counter()
                losses[name] = run()
                seconds[name].append(time.perf_counter() - started)
    best = {name: min(times) for name, times in seconds.items()}
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f"{megabytes:.2f} MB, {len(samples):,} blocks of {BLOCK}, {tokens:,} tokens, on {model.device}\n")
    print("| evaluation | seconds | tokens/s | ratio | loss |\n|---|---:|---:|---:|---:|")
    for name, time_ in best.items():
        ratio = best["Trainer, float32"] / time_
        print(f"| {name} | {time_:.1f} | {tokens / time_:,.0f} | {ratio:.2f} | {losses[name]:.5f} |")


if __name__ == "__main__":
    main()
