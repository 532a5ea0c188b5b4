"""Stage 03: train a tokenizer or take over a published one, as a fast Hugging Face tokenizer, and prove it.

Edit: configs/<recipe>/tokenizer.json. Writes: a folder that AutoTokenizer loads, spm.model (kinds unigram and
bpe), new_pieces.json (what a published tokenizer was extended by), report.json, report.md, report.png.
Run:  python pretrain/03_tokenizer.py --recipe tiny
"""

import os
import random
from collections.abc import Iterator
from typing import Any

from recipe.corpus.shards import read_texts, side_sources
from recipe.progress import progress
from recipe.project import DATA, RecipeError, write_json
from recipe.run.freshness import weights
from recipe.run.stage import Stage, run_stage

SIDE_BYTES = 1_000_000  # text per source for the compression table
PROOF_TEXTS = 2_000


def main(stage: Stage) -> None:
    """Make the tokenizer by the training side, save it, prove what was saved, measure on held-out text."""
    import sentencepiece as spm
    from recipe.config.recipe import check_special_ids
    from recipe.tokenization.report import describe, gate, losses, markdown, picture
    from transformers import AutoTokenizer

    config, dataset = stage.config["tokenizer"], stage.inputs["02_dataset"]
    kind = config.get("kind", "unigram")
    tokenizer, model = make(stage)
    tokenizer.save_pretrained(stage.folder)
    if model:
        (stage.folder / "spm.model").write_bytes(model)
    # From here on what is tested is what a user loads: the saved folder.
    tokenizer = AutoTokenizer.from_pretrained(stage.folder)
    ids = {
        key: getattr(tokenizer, key)
        for key in ("pad_token_id", "unk_token_id", "bos_token_id", "eos_token_id")
    }
    check_special_ids(stage.config, ids, len(tokenizer), f"configs/{stage.recipe}")
    valid = {s: list(read_texts(dataset, "valid", s, SIDE_BYTES)) for s in side_sources(dataset, "valid")}
    texts = [text for part in valid.values() for text in part]
    if not texts:
        raise RecipeError("no held-out text to prove the tokenizer on. Add text or raise dataset.valid_share")
    random.Random(config.get("seed", 0)).shuffle(texts)
    if kind in ("published", "word-bpe"):
        proof = losses(tokenizer, texts[:PROOF_TEXTS])
        result = f"{proof['exact_lines']:.1%} of lines come back exactly"
    else:
        processor = spm.SentencePieceProcessor(model_proto=model) if model else None
        proof = gate(tokenizer, texts[:PROOF_TEXTS], processor)
        result = f"{proof['lossless']:,} texts come back exactly"
    others, missing = published_to_compare(config.get("compare", []))
    described = describe({"this": tokenizer, **others}, valid)
    write_json(stage.folder / "report.json", {"proof": proof, "tokenizers": described, "missing": missing})
    (stage.folder / "report.md").write_text(markdown(described, proof, missing), "utf-8")
    picture(described, stage.folder / "report.png")
    held_out = {name for name, spec in stage.config["dataset"]["sources"].items() if spec.get("held_out")}
    sources = described["this"]["sources"]
    inside = [figures for source, figures in sources.items() if source not in held_out]
    mean = sum(f["tokens"] * f["bytes_per_token"] for f in inside) / max(1, sum(f["tokens"] for f in inside))
    stage.figures = {"proof": proof, "bytes_per_token": mean, **described["this"], "special_ids": ids}
    stage.headline = f"{kind}, {len(tokenizer):,} pieces, {mean:.2f} bytes/token on held-out text, {result}"


def make(stage: Stage) -> tuple[Any, bytes | None]:
    """The tokenizer that tokenizer.json asks for, and its SentencePiece model if it was trained as one."""
    from recipe.config.initial_model import NEW_PIECES, NewPieces, check_rows
    from recipe.tokenization.published import find_published, load_published, take_over
    from recipe.tokenization.train import expected_memory, train_tokenizer

    config = stage.config["tokenizer"]
    kind = config.get("kind", "unigram")
    bound = expected_memory(kind, int(config.get("training_megabytes", 10) * 1e6))
    if kind != "published" or config.get("new_pieces"):
        stage.say(f"trains in at most {bound / 1e9:.1f} GB of memory")
    if kind == "published":
        published = load_published(find_published(config["published"], config.get("revision")))
        sentences = sample(stage) if config.get("new_pieces") else ()
        tokenizer, old_ids = take_over(published, config, sentences)
        pieces = NewPieces(len(tokenizer) - len(old_ids), old_ids)
        check_rows(stage.config["pretrain"], pieces)
        if old_ids:
            write_json(stage.folder / NEW_PIECES, pieces._asdict())
        return tokenizer, None
    return train_tokenizer(sample(stage), config)


def sample(stage: Stage) -> Iterator[str]:
    """The seeded sample of the training side, by source weight; segmented where the kind wants it."""
    from recipe.tokenization.train import draw_sample

    config = stage.config["tokenizer"]
    bound = int(config.get("training_megabytes", 10) * 1e6)
    drawn_by = weights(stage.config)["weights"]
    found = draw_sample(stage.inputs["02_dataset"], drawn_by, bound, config.get("seed", 0))
    stage.say(f"samples {found.drawn / 1e6:.1f} MB of {found.bytes / 1e6:.1f} MB")
    lines = progress(found.lines, "sampling", "sentences")
    if config.get("segmenter"):
        from recipe.tokenization.word_segmenter import make_segmenter

        return make_segmenter(config["segmenter"], DATA).parallel(lines, os.cpu_count() or 1)
    return lines


def published_to_compare(names: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Published tokenizers that are at hand, by name, and for each that is not the reason."""
    from recipe.tokenization.published import find_published, load_published, take_over

    found, missing = {}, {}
    for name in names:
        try:
            published = load_published(find_published(name, local_files_only=True))
            found[name] = take_over(published, {"kind": "published", "published": name}, ())[0]
        except RecipeError as error:
            missing[name] = str(error)
    return found, missing


if __name__ == "__main__":
    run_stage(__file__, __doc__, main, ("tokenizer",), ("02_dataset",))
