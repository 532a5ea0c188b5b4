"""Stage 03: train a SentencePiece tokenizer with byte fallback and prove its fast Hugging Face form
identical.

Edit: configs/<recipe>/tokenizer.json. Writes: spm.model, a folder that AutoTokenizer loads, report.json.
Run:  python pretrain/03_tokenizer.py --recipe tiny
"""

import os
import random

from recipe.outputs import RecipeError, Stage, run_stage, write_json
from recipe.progress import progress
from recipe.shards import document_bytes, read_texts, side_sources

SIDE_BYTES = 1_000_000  # text per source for the compression table
PARITY_TEXTS = 2_000


def main(stage: Stage) -> None:
    """Train on a seeded sample of the training side, convert, pass the parity gate, measure on the held-out
    side.
    """
    import sentencepiece as spm
    from recipe.tokenizer import compression, parity, sample_lines, save, to_fast, train_sentencepiece
    from transformers import AutoTokenizer

    config, dataset, threads = stage.config["tokenizer"], stage.inputs["02_dataset"], os.cpu_count() or 1
    seed = config.get("seed", 0)
    total = document_bytes(dataset, "train")
    sentences = sample_lines(
        read_texts(dataset, "train"), int(config.get("training_megabytes", 10) * 1e6), total, seed
    )
    stage.say(
        f"trains on up to {config.get('training_megabytes', 10)} MB of {total / 1e6:.1f} MB with "
        f"{threads} threads"
    )
    model = train_sentencepiece(progress(sentences, "sampling", "sentences"), config, threads)
    processor = spm.SentencePieceProcessor(model_proto=model)
    save(stage.folder, model, to_fast(processor))
    # From here on what is tested is what a user loads: the saved folder.
    fast = AutoTokenizer.from_pretrained(stage.folder)
    valid = {
        source: list(read_texts(dataset, "valid", source, SIDE_BYTES))
        for source in side_sources(dataset, "valid")
    }
    texts = [text for part in valid.values() for text in part]
    random.Random(seed).shuffle(texts)
    report = {"parity": parity(processor, fast, list(progress(texts[:PARITY_TEXTS], "parity", "documents")))}
    if report["parity"]["identical_ids"] < 10:
        raise RecipeError("parity gate: fewer than 10 texts could be compared. Add text to the dataset")
    report["sources"] = {
        source: compression(processor, part, threads) for source, part in valid.items() if part
    }
    report["vocabulary"] = {
        "size": len(fast),
        "longest": sorted((fast.convert_ids_to_tokens(i) for i in range(len(fast))), key=len, reverse=True)[
            :20
        ],
    }
    write_json(stage.folder / "report.json", report)
    held_out = {name for name, spec in stage.config["dataset"]["sources"].items() if spec.get("held_out")}
    inside = [figures for source, figures in report["sources"].items() if source not in held_out]
    mean = sum(f["tokens"] * f["bytes_per_token"] for f in inside) / max(1, sum(f["tokens"] for f in inside))
    stage.figures = report | {"bytes_per_token": mean}
    stage.headline = (
        f"{len(fast):,} pieces, {mean:.2f} bytes/token on held-out text, "
        f"{report['parity']['identical_ids']:,} texts with identical ids"
    )


if __name__ == "__main__":
    run_stage(__file__, __doc__, main, ("tokenizer",), ("02_dataset",))
