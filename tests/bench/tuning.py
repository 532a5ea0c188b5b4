"""Instruction tuning: tokens/s with whole conversations packed into blocks, compared with padded batches.

The pairs, tokenizer and model shape are those of the recipe tiny (run it to stage 11 first). All rows train
with the stock Trainer, AdamW and the same precision, without compiling, on the same conversations in the same
order; padding does not count. The ratios compare with packing.

- ``packed``: blocks of `PackedConversations`, as stage 12 trains.
- ``padded``: batches of conversations, each padded to its longest (transformers' DataCollatorForSeq2Seq).
- ``grouped``: the same, with conversations of similar length together (the Trainer's group_by_length).

Run (about 2 minutes, nothing else running):  .venv/bin/python tests/bench/tuning.py
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "pretrain"))
BLOCKS, BLOCK, WARM_UP, STEPS = 16, 256, 1, 5


class Clock(TrainerCallback):
    """Seconds from the end of the warm-up to the end."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start after the warm-up, and note the time since."""
        if state.global_step == WARM_UP:
            self.started = time.perf_counter()
        self.seconds = time.perf_counter() - getattr(self, "started", time.perf_counter())


class Counted:
    """A collator that also counts the positions and the tokens of every batch."""

    def __init__(self, collate: Any) -> None:
        self.collate, self.batches = collate, []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate, and count."""
        tokens = sum(row["tokens"] for row in rows)
        batch = self.collate([{key: row[key] for key in row if key != "tokens"} for row in rows])
        self.batches.append((tokens, batch["input_ids"].numel()))
        return batch


def run(
    samples: list[dict[str, Any]], collate: Any, batch: int, tokenizer: Any, **more: Any
) -> tuple[float, float]:
    """Tokens/s, and the share of positions that are not padding."""
    from recipe.config.recipe import load_recipe
    from recipe.model.build import build_model

    model = build_model(load_recipe("tiny")["model"], tokenizer, "sdpa", 0)
    model.config.use_cache = False
    clock, counted = Clock(), Counted(collate)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=WARM_UP + STEPS,
            per_device_train_batch_size=batch,
            use_cpu=not torch.cuda.is_available(),
            bf16=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            logging_strategy="no",
            **more,
        )
        trainer = Trainer(model, arguments, data_collator=counted, train_dataset=samples, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    measured = counted.batches[WARM_UP : WARM_UP + STEPS]
    tokens, positions = (sum(column) for column in zip(*measured, strict=True))
    return tokens / clock.seconds, tokens / positions


def main() -> None:
    """Print the table; the ratio is the speed of packing divided by the row's speed."""
    from recipe.config.chat_templates import chat_template
    from recipe.conversations.encode import load_conversations
    from recipe.tokenization.packing import PackedConversations

    folder = ROOT / "outputs/tiny"
    tokenizer = AutoTokenizer.from_pretrained(folder / "03_tokenizer")
    tokenizer.chat_template = chat_template("chat")
    conversations, _ = load_conversations(folder / "11_dataset/train.parquet", tokenizer, BLOCK)
    conversations.sort(key=lambda conversation: hash(tuple(conversation[0])))  # mixes the kinds
    packing = PackedConversations(conversations, BLOCK, tokenizer.pad_token_id)
    packed = [
        packing[i] | {"tokens": sum(len(ids) for ids, _ in packing.bins[i])}
        for i in range(BLOCKS * (WARM_UP + STEPS + 1))
    ]
    padded = [
        {
            "input_ids": ids,
            "labels": [i if t else -100 for i, t in zip(ids, trained, strict=True)],
            "tokens": len(ids),
        }
        for ids, trained in conversations
    ]
    each = sum(row["tokens"] for row in packed) / len(packed)
    batch = round(
        BLOCKS * each / (sum(row["tokens"] for row in padded) / len(padded))
    )  # as many tokens a step
    pad = DataCollatorForSeq2Seq(tokenizer)
    sequential = {"train_sampling_strategy": "sequential"}
    results = {
        "packed": run(packed, default_data_collator, BLOCKS, tokenizer, **sequential),
        "padded": run(padded, pad, batch, tokenizer, **sequential),
        "grouped": run(padded, pad, batch, tokenizer, train_sampling_strategy="group_by_length"),
    }
    print(f"{len(padded):,} conversations, about {BLOCKS * each:,.0f} tokens a step, {STEPS} steps\n")
    print("| batches | tokens/s | positions that hold a token | ratio |")
    print("|---|---:|---:|---:|")
    for name, (speed, share) in results.items():
        print(f"| {name} | {speed:,.0f} | {share:.0%} | {results['packed'][0] / speed:.2f} |")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
