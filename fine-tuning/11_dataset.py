"""Stage 11: make instruction pairs: read, filter, drop duplicates, split by headword, count.

Edit: configs/<recipe>/instruction.json. Writes: train.parquet, valid.parquet, funnel.json, funnel.md.
Run:  python fine-tuning/11_dataset.py --recipe tiny
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from recipe.config.instruction import VALID_SHARE
from recipe.conversations.instructions import (
    Pair,
    Sides,
    cap_share,
    counts_of,
    no_pairs,
    pairs_table,
    pretraining_overlap,
    read_pairs,
    require_sides,
    select,
)
from recipe.conversations.read_rows import byte_order_marks
from recipe.corpus.characters import make_dialogue_normalizer
from recipe.corpus.normalizing import make_normalizer
from recipe.corpus.packaged_pairs import PACKAGED_PAIRS
from recipe.corpus.shards import read_texts
from recipe.progress import progress
from recipe.project import listed, write_json, write_text
from recipe.run.stage import Stage, require_downloads, run_stage

TEXTS = ("instruction", "input", "output", "source", "headword")
TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("trained", pa.bool_())]))
SCHEMA = pa.schema([*((column, pa.string()) for column in TEXTS), ("history", TURNS)])


def main(stage: Stage) -> None:
    """Read the pairs of every entry, split those that are kept, write both sides and the counts."""
    config = stage.config["instruction"]
    require_downloads(stage)
    # Packaged pairs are made from the pretraining text; users' own conversations keep their layout.
    figures: Counter[str] = Counter()
    normalize_corpus = make_normalizer(stage.config["dataset"], figures)
    normalize_dialogue = make_dialogue_normalizer(stage.config["dataset"], figures)
    sides: Sides = {"train": [], "valid": []}
    funnel: dict[str, dict[str, Any]] = {}
    seen: set[bytes] = set()
    # Translations come last: their share depends on the number of all other pairs.
    for name, spec in sorted(config["pairs"].items(), key=lambda entry: is_translation(*entry)):
        unused: Counter[str] = Counter()
        normalize = normalize_corpus if "source" in spec else normalize_dialogue
        pairs = progress(read_pairs(name, spec, normalize, unused), name, "pairs")
        judged = "source" in spec and PACKAGED_PAIRS[name].judged
        kept, dropped = select(pairs, judged, config.get("valid_share", VALID_SHARE), seen)
        if is_translation(name, spec):
            dropped["over translation_share"] += cap_share(kept, sides, config.get("translation_share", 1.0))
        for side, found in kept.items():
            sides[side] += found
        out = sum(map(len, kept.values()))
        funnel[name] = counts_of(out, dropped, unused, figures)
        marks = byte_order_marks(f"instruction.json: pairs.{name}", spec)
        if marks:
            funnel[name]["byte_order_marks"] = marks
        stage.say(
            f"{name}: {out:,} of {out + dropped.total():,} pairs kept; dropped: {listed(dropped)}"
            + (f"; byte order marks removed from {marks} files" if marks else "")
            + (f"; columns that are not used: {', '.join(unused)}" if unused else "")
        )
    require_sides(sides)
    for side, found in sides.items():
        write_side(stage.folder, side, found)
    texts = read_texts(stage.inputs["02_dataset"], "valid")
    overlap = pretraining_overlap(sides, texts, normalize_corpus)
    stage.say(
        "pairs that share a sentence with the validation text of pretraining (they are kept): "
        f"{listed(overlap)}"
    )
    stage.figures = {"pairs": funnel, "pretraining_overlap": overlap}
    write_json(stage.folder / "funnel.json", stage.figures)
    write_text(stage.folder / "funnel.md", pairs_table(funnel, stage.config, overlap))
    stage.headline = f"{len(sides['train']):,} training pairs, {len(sides['valid']):,} for validation"


def is_translation(name: str, spec: dict[str, Any]) -> bool:
    """Whether an entry of instruction.json is the packaged translations, which have a share of their own."""
    return "source" in spec and name == "translation"


def write_side(folder: Path, side: str, pairs: list[Pair]) -> None:
    """Write train.parquet or valid.parquet."""
    rows = [{column: getattr(pair, column) for column in SCHEMA.names} for pair in pairs]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / f"{side}.parquet", compression="zstd")


if __name__ == "__main__":
    run_stage(
        __file__,
        __doc__,
        main,
        ("instruction", "dataset"),
        ("01_download", "02_dataset"),
        skip=no_pairs,
    )
