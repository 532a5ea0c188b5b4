"""Stage 03: make the tokenizer, trained here or published elsewhere, and check that it loses no text.

Edit: configs/<recipe>/tokenizer.json. Writes: a folder that AutoTokenizer loads, spm.model (kinds unigram and
bpe), new_pieces.json (the tokens added to a published tokenizer), report.json, report.md, report.png.
Run:  python pretrain/03_tokenizer.py --recipe tiny
"""

import random
from collections.abc import Iterator
from typing import Any

from recipe import host
from recipe.config.dataset import held_out_sources
from recipe.config.tokenizer import SPECIAL_TOKENS, kind_of
from recipe.corpus.shards import read_texts, side_sources
from recipe.progress import progress
from recipe.project import DATA, RecipeError, write_json, write_text
from recipe.run.freshness import weights
from recipe.run.stage import Stage, run_stage

SIDE_BYTES = 1_000_000  # of held-out text per source, for the table of compression
CHECKED_TEXTS = 2_000


def main(stage: Stage) -> None:
    """Make the tokenizer from the training side and save it; check and measure it on held-out text."""
    from recipe.config.recipe import check_special_ids
    from recipe.tokenization.report import describe, draw_report, report_tables
    from recipe.tokenization.save import load_tokenizer, save_tokenizer

    config, dataset = stage.config["tokenizer"], stage.inputs["02_dataset"]
    tokenizer, model = make(stage)
    save_tokenizer(tokenizer, stage.folder)
    if model:
        (stage.folder / "spm.model").write_bytes(model)
    # From here on the saved folder is tested, as a user loads it.
    tokenizer = load_tokenizer(stage.folder)
    ids = {f"{key}_id": getattr(tokenizer, f"{key}_id") for key in SPECIAL_TOKENS}
    check_special_ids(stage.config, ids, len(tokenizer), f"configs/{stage.recipe}")
    valid = {s: list(read_texts(dataset, "valid", s, SIDE_BYTES)) for s in side_sources(dataset, "valid")}
    check, result = check_texts(tokenizer, model, [text for part in valid.values() for text in part], config)
    others, missing = published_to_compare(config.get("compare", []))
    described = describe({"this": tokenizer, **others}, valid)
    write_json(stage.folder / "report.json", {"check": check, "tokenizers": described, "missing": missing})
    write_text(stage.folder / "report.md", report_tables(described, check, missing))
    draw_report(described, stage.folder / "report.png")
    held_out = held_out_sources(stage.config["dataset"])
    sources = described["this"]["sources"]
    inside = [figures for source, figures in sources.items() if source not in held_out]
    mean = sum(f["tokens"] * f["bytes_per_token"] for f in inside) / max(1, sum(f["tokens"] for f in inside))
    stage.figures = {"check": check, "bytes_per_token": mean, **described["this"], "special_ids": ids}
    stage.headline = (
        f"{config.get('kind', 'unigram')}, vocabulary of {len(tokenizer):,}, {mean:.2f} bytes/token on "
        f"held-out text, {result}"
    )


def make(stage: Stage) -> tuple[Any, bytes | None]:
    """The tokenizer that tokenizer.json asks for, and its SentencePiece model or None."""
    from recipe.config.initial_model import NEW_PIECES, NewPieces, check_rows
    from recipe.tokenization.published import find_published, load_published, take_over
    from recipe.tokenization.train import train_tokenizer

    config = stage.config["tokenizer"]
    if kind_of(config).trained:
        return train_tokenizer(sample(stage), config)
    published = load_published(find_published(config["published"], config.get("revision")))
    tokenizer, old_ids = take_over(published, config, sample(stage) if config.get("new_pieces") else ())
    start, own = tokenizer.bos_token, published.tokens.get("bos_token")
    by = (
        "as the published tokenizer" if start == own else f"by tokenizer.json (published: {own or 'nothing'})"
    )
    stage.say(f"puts {start or 'nothing'} before every document, {by}")
    pieces = NewPieces(len(tokenizer) - len(old_ids), old_ids)
    check_rows(stage.config["pretrain"], pieces)
    if old_ids:
        write_json(stage.folder / NEW_PIECES, pieces._asdict())
    return tokenizer, None


def sample(stage: Stage) -> Iterator[str]:
    """The seeded sample of the training side, by source weight; segmented if the kind has a segmenter."""
    from recipe.tokenization.sample import draw_sample
    from recipe.tokenization.train import expected_memory, sample_bytes

    config = stage.config["tokenizer"]
    stage.say(f"trains in at most {expected_memory(config) / 1e9:.1f} GB of memory")
    source_weights = weights(stage.config)
    found = draw_sample(
        stage.inputs["02_dataset"], source_weights, sample_bytes(config), config.get("seed", 0)
    )
    stage.say(f"samples {found.drawn / 1e6:.1f} MB of {found.bytes / 1e6:.1f} MB")
    lines = progress(found.lines, "sampling", "sentences")
    if config.get("segmenter"):
        from recipe.tokenization.word_segmenter import make_segmenter

        return make_segmenter(config["segmenter"], DATA).parallel(lines, host.cores())
    return lines


def check_texts(
    tokenizer: Any, model: bytes | None, texts: list[str], config: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """Encode and decode held-out texts; the figures, and the result in words.

    Raises RecipeError without texts, and when a kind that must lose nothing loses text.
    """
    import sentencepiece as spm
    from recipe.tokenization.report import check_lossless, measure_lost_text

    if not texts:
        raise RecipeError("no held-out text to check the tokenizer on. Add text or raise dataset.valid_share")
    random.Random(config.get("seed", 0)).shuffle(texts)
    if kind_of(config).lossless:
        processor = spm.SentencePieceProcessor(model_proto=model) if model else None
        figures = check_lossless(tokenizer, texts[:CHECKED_TEXTS], processor)
        return figures, f"{figures['lossless']:,} texts come back exactly"
    figures = measure_lost_text(tokenizer, texts[:CHECKED_TEXTS])
    return figures, f"{figures['exact_lines']:.1%} of lines come back exactly"


def published_to_compare(names: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Published tokenizers by name, as far as they are on this machine; for the others the reason."""
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
