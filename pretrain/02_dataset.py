"""Stage 02: clean the text: normalise, filter, drop exact duplicates, split into train and valid.

Edit: configs/<recipe>/dataset.json. Writes: train-<source>-<k>.parquet, valid-<source>-<k>.parquet,
funnel.json, funnel.md.
Run:  python pretrain/02_dataset.py --recipe tiny
"""

import pyarrow as pa
import pyarrow.parquet as pq
from recipe.cleaning import Funnel, clean
from recipe.download import LICENCES, require_data
from recipe.outputs import DATA, RecipeError, Stage, read_json, run_stage, write_json
from recipe.progress import progress
from recipe.sources import read

SCHEMA = pa.schema([("id", pa.string()), ("source", pa.string()), ("text", pa.string())])
BATCH = 1024  # documents held in memory before they are written


def main(stage: Stage) -> None:
    """Read every source document by document, clean it, write what is left, account for the rest."""
    config = stage.config["dataset"]
    require_data(read_json(stage.inputs["01_download"] / "stage.json")["figures"], config, DATA)
    funnels: dict[str, Funnel] = {}
    seen: set[bytes] = set()
    for name, spec in config["sources"].items():
        funnel = funnels[name] = Funnel()
        writers = {
            side: pq.ParquetWriter(stage.folder / f"{side}-{name}-00000.parquet", SCHEMA, compression="zstd")
            for side in (["valid"] if spec.get("held_out") else ["train", "valid"])
        }
        rows = {side: [] for side in writers}
        for document in progress(
            clean(read(name, spec, DATA), name, config, seen, funnel), name, "documents"
        ):
            side = "valid" if document.valid else "train"
            rows[side].append({"id": document.id, "source": name, "text": document.text})
            if len(rows[side]) == BATCH:
                writers[side].write_table(pa.Table.from_pylist(rows[side], SCHEMA))
                rows[side].clear()
        for side, writer in writers.items():
            writer.write_table(pa.Table.from_pylist(rows[side], SCHEMA))
            writer.close()
        check_size(name, spec, funnel)
        stage.say(
            f"{name}: {funnel.documents_in:,} documents in, {funnel.documents_out:,} kept, dropped "
            + (", ".join(f"{n:,} {reason}" for reason, n in funnel.documents_dropped.items()) or "none")
        )
    table = {
        "sources": {name: funnel.as_json() for name, funnel in funnels.items()},
        "licences": {name: LICENCES[spec["source"]] for name, spec in config["sources"].items()},
    }
    write_json(stage.folder / "funnel.json", table)
    (stage.folder / "funnel.md").write_text(markdown(funnels), "utf-8")
    kept = sum(funnel.bytes_out for funnel in funnels.values()) / 1e6
    stage.figures = table["sources"]
    stage.headline = (
        f"{sum(f.documents_out for f in funnels.values()):,} documents, {kept:.1f} MB kept of "
        f"{sum(f.bytes_in for f in funnels.values()) / 1e6:.1f} MB"
    )


def check_size(name: str, spec: dict, funnel: Funnel) -> None:
    """Stop when a source is suspiciously small: a half-empty mirror must not become a half-trained model."""
    least = spec.get("minimum_megabytes", 0)
    if funnel.bytes_out < least * 1e6 or not funnel.documents_out:
        raise RecipeError(
            f"sources.{name}: only {funnel.bytes_out / 1e6:.2f} MB are left, dataset.json wants "
            f"minimum_megabytes {least}: "
            f"{funnel.documents_in} documents in, dropped {dict(funnel.documents_dropped)}. Look at "
            f"data/{name}/, lower "
            "the minimum, or remove the source"
        )


def markdown(funnels: dict[str, Funnel]) -> str:
    """The funnel as a table for people."""
    reasons = sorted({reason for funnel in funnels.values() for reason in funnel.documents_dropped})
    head = [
        "source",
        "documents in",
        *(f"dropped: {reason}" for reason in reasons),
        "kept",
        "MB in",
        "MB trimmed",
        "MB kept",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for name, f in funnels.items():
        cells = [
            name,
            f"{f.documents_in:,}",
            *(f"{f.documents_dropped[reason]:,}" for reason in reasons),
            f"{f.documents_out:,}",
            *(f"{n / 1e6:.2f}" for n in (f.bytes_in, f.bytes_trimmed, f.bytes_out)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_stage(__file__, __doc__, main, ("dataset",), ("01_download",))
