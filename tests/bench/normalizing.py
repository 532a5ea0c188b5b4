"""What normalising the pretraining text costs and buys: neologdn, characters only, or nothing.

The same documents of the recipe tiny, without near duplicates and without those that no normalising can save,
are written in three ways:

- ``neologdn``: the default of dataset.json.
- ``keep``: ``"layout": "keep"``, which replaces characters and leaves spaces and lines as they are.
- ``nothing``: as the readers give them.

For each of them a tokenizer is trained with the settings of tiny, and a model of 3.3M parameters with the
rates of tiny. All of them train the same number of steps of the same size, which take the same time. Each
model is then measured on the held-out documents, all of them, in all three forms. Bits are always divided by
the bytes of the held-out text as the readers give it, so that each column has one divisor.

Run (about 4 minutes for each row, nothing else running), after `bash run_all.sh --recipe tiny --to 01`:
    .venv/bin/python tests/bench/normalizing.py [--forms neologdn keep nothing] [--seeds 1] [--steps 600]
"""

import argparse
import json
import math
import os
import platform
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "pretrain"))
TINY = {file: json.loads((ROOT / f"configs/tiny/{file}.json").read_text("utf-8")) for file in (
    "dataset", "tokenizer", "model", "pretrain"
)}  # fmt: skip
MODEL = TINY["model"] | {"hidden_size": 192, "intermediate_size": 576, "num_attention_heads": 3}
MODEL |= {"num_key_value_heads": 1}
FORMS = ("neologdn", "keep", "nothing")


def documents(data: Path) -> Iterator[str]:
    """The raw documents of the training sources that stage 02 would keep, without copies."""
    from recipe.corpus.cleaning import make_cleaner
    from recipe.corpus.minhash import MINHASH, MinHash
    from recipe.corpus.sources import read

    minhash, seen = MinHash(**MINHASH), set()
    for name, source in TINY["dataset"]["sources"].items():
        clean = make_cleaner(TINY["dataset"], source)
        for document in read(name, source, data) if not source.get("held_out") else ():
            keys = minhash.keys(document.text)
            bands = set() if keys is None else set(enumerate(keys.tolist()))
            if not document.dropped and not clean(document.text)[1] and seen.isdisjoint(bands):
                seen |= bands
                yield document.text


def in_form(form: str, texts: list[str]) -> list[str]:
    """The texts in one of FORMS."""
    from recipe.corpus.normalizing import make_normalizer

    if form == "nothing":
        return texts
    return list(map(make_normalizer({"layout": form}), texts))


def train(texts: list[str], steps: int, seed: int, folder: Path) -> Any:
    """Train a tokenizer and a model on texts; returns both, the model as stage 06 loads it."""
    from recipe.model.build import build_model, for_inference, load_model
    from recipe.tokenization.encode_text import document_ids
    from recipe.tokenization.packing import PackedBlocks
    from recipe.tokenization.sample import sample_lines
    from recipe.tokenization.token_files import TokenFile, write_token_file
    from recipe.tokenization.train import sample_bytes, train_tokenizer
    from recipe.training import training
    from recipe.training.prepare import prepare

    share = sample_bytes(TINY["tokenizer"]) / sum(len(text.encode("utf-8")) for text in texts)
    tokenizer = train_tokenizer(sample_lines(texts, share, random.Random(0)), TINY["tokenizer"]).tokenizer
    write_token_file(folder / "train", (document_ids(tokenizer, text) for text in texts), len(tokenizer))
    values = TINY["pretrain"] | {
        "max_steps": steps,
        "seed": seed,
        "save_strategy": "no",
        "eval_strategy": "no",
    }
    plan = {"recipe": "bench-normalizing", "config": {"pretrain": values, "model": MODEL}, "deepspeed": None}
    plan |= {"folder": str(folder), "ranks": 1, "fsdp": False, "tensor_parallel": 1, "new_optimizer": False}
    run = prepare(plan | {"host": platform.node(), "parent": os.getpid()}, "pretrain")
    batch, block = values["global_batch_size"], values["block_size"]
    tokens = TokenFile(folder / "train")
    samples = PackedBlocks(tokens, block, tokenizer.pad_token_id, seed, steps * batch)
    model = build_model(MODEL, tokenizer, run.choice.attention, seed)
    figures = training.train_model(run, model, tokenizer, samples, PackedBlocks(tokens, block, 0, 0, batch))
    return tokenizer, for_inference(load_model(folder)), figures


def main() -> None:
    """Print a row for each training."""
    from recipe.corpus.splitting import is_valid_side, text_hash
    from recipe.evaluation.metrics import computes_in_bf16, evaluate_texts
    from recipe.tokenization.report import compression

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--forms", nargs="+", default=FORMS, choices=FORMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    arguments = parser.parse_args()
    sides: dict[bool, list[str]] = {False: [], True: []}
    for text in documents(arguments.data):
        sides[is_valid_side(text_hash(text), TINY["dataset"]["valid_share"])].append(text)
    size = sum(len(text.encode("utf-8")) for text in sides[True])
    held_out = {form: in_form(form, sides[True]) for form in FORMS}
    print(f"held out: {len(sides[True]):,} documents, {size / 1e6:.2f} MB\n")
    print("| read as | seed | tokens/s | MB read | bytes/token, held out as it is |", end="")
    print(" bits/byte: as it is | keep | neologdn |\n|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    bf16, block = computes_in_bf16(TINY["pretrain"]), TINY["pretrain"]["block_size"]
    for seed in arguments.seeds:
        for form in arguments.forms:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                texts = in_form(form, sides[False])
                tokenizer, model, figures = train(texts, arguments.steps, seed, folder)
                read = figures["tokens"] * compression(tokenizer, texts)["bytes_per_token"]
                packed = compression(tokenizer, sides[True])["bytes_per_token"]
                bits = [
                    evaluate_texts(model, tokenizer, held_out[other], block, 16, folder, other, bf16)[
                        "loss_sum"
                    ]
                    / math.log(2)
                    / size
                    for other in reversed(FORMS)
                ]
            cells = [form, str(seed), f"{figures['tokens_per_second']:,.0f}", f"{read / 1e6:.2f}"]
            print(
                "| " + " | ".join(cells + [f"{packed:.3f}"] + [f"{b:.4f}" for b in bits]) + " |", flush=True
            )


if __name__ == "__main__":
    main()
