"""Stage 11: make instruction pairs: count, filter, drop duplicates, split by headword.

Edit: configs/<recipe>/instruction.json. Writes: train.parquet, valid.parquet, funnel.json, funnel.md.
Run:  python fine-tuning/11_dataset.py --recipe tiny
"""

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
from recipe.conversations.instructions import (
    Pair,
    identity,
    no_pairs,
    pair_side,
    pairs_table,
    pretraining_overlap,
    read_pairs,
    reason_to_drop,
)
from recipe.conversations.read_rows import byte_order_marks
from recipe.corpus.download import require_data
from recipe.corpus.normalizing import make_normalizer
from recipe.corpus.shards import read_texts
from recipe.corpus.splitting import text_hash
from recipe.progress import progress
from recipe.project import DATA, RecipeError, read_json, write_json
from recipe.run.stage import Stage, run_stage

TEXTS = ("instruction", "input", "output", "source", "headword")
TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMA = pa.schema([*((column, pa.string()) for column in TEXTS), ("history", TURNS)])


def main(stage: Stage) -> None:
    """Read every kind of pair, keep the good ones, cap translations at their share of the whole."""
    config = stage.config["instruction"]
    require_data(
        read_json(stage.inputs["01_download"] / "stage.json")["figures"], stage.config["dataset"], DATA
    )
    normalize = make_normalizer(stage.config["dataset"])
    valid_share = config.get("valid_share", 0.05)
    sides: dict[str, list[Pair]] = {"train": [], "valid": []}
    funnel: dict[str, dict] = {}
    seen: set[bytes] = set()
    # Translations last: their share is one of all the others.
    for kind, spec in sorted(config["pairs"].items(), key=lambda item: item[0] == "translation"):
        dropped: Counter[str] = Counter()
        kept: dict[str, list[Pair]] = {"train": [], "valid": []}
        for pair in progress(read_pairs(kind, spec, normalize), kind, "pairs"):
            reason = reason_to_drop(pair, packaged="source" in spec)
            if not reason and identity(pair) in seen:
                reason = "duplicate"
            if reason:
                dropped[reason] += 1
                continue
            seen.add(identity(pair))
            kept[pair_side(pair, valid_share)].append(pair)
        if "source" in spec and kind == "translation":
            for side, pairs in kept.items():
                most = allowed(len(sides[side]), config.get("translation_share", 1.0))
                # By hash, so that which pairs stay does not depend on their order.
                pairs.sort(key=lambda pair: text_hash(pair.headword + pair.instruction))
                dropped["over translation_share"] += max(0, len(pairs) - most)
                del pairs[most:]
        for side, pairs in kept.items():
            sides[side] += pairs
        out = sum(map(len, kept.values()))
        funnel[kind] = {"in": out + dropped.total(), "out": out, "dropped": dict(dropped)}
        marks = byte_order_marks(f"instruction.json: pairs.{kind}", spec)
        if marks:
            funnel[kind]["byte_order_marks"] = marks
        stage.say(
            f"{kind}: {out:,} of {out + dropped.total():,} pairs kept; dropped {dict(dropped) or 'none'}"
            + (f"; byte order marks taken off {marks} files" if marks else "")
        )
    for side, pairs in sides.items():
        if not pairs:
            raise RecipeError(
                f"no pairs on the {side} side: too few. Add pairs or change instruction.valid_share"
            )
        rows = [{column: getattr(pair, column) for column in SCHEMA.names} for pair in pairs]
        pq.write_table(
            pa.Table.from_pylist(rows, SCHEMA), stage.folder / f"{side}.parquet", compression="zstd"
        )
    overlap = pretraining_overlap(sides, read_texts(stage.inputs["02_dataset"], "valid"))
    stage.say(f"pairs that share a sentence with the validation text of pretraining: {overlap}")
    stage.figures = {"pairs": funnel, "pretraining_overlap": overlap}
    write_json(stage.folder / "funnel.json", stage.figures)
    (stage.folder / "funnel.md").write_text(pairs_table(funnel, stage.config, overlap), "utf-8")
    stage.headline = f"{len(sides['train']):,} training pairs, {len(sides['valid']):,} for validation"


def allowed(others: int, share: float) -> int:
    """How many translations make up at most `share` beside `others` other pairs; alone, all may stay."""
    return int(others * share / (1 - share)) if others and share < 1 else 2**62


if __name__ == "__main__":
    run_stage(
        __file__,
        __doc__,
        main,
        ("instruction", "dataset"),
        ("01_download", "02_dataset"),
        skip=no_pairs,
    )
