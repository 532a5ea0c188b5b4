"""Stage 02: raw documents to clean ones: extract, normalise, filter, drop duplicates, split.

Edit: configs/<recipe>/dataset.json.
Writes: {train,valid}-<source>-<number>.parquet, funnel.json, funnel.md (with samples of dropped
documents), funnel.png.
Run:  python pretrain/02_dataset.py --recipe tiny
"""

from recipe.corpus import funnel, pipeline
from recipe.corpus.sources import licence
from recipe.project import DATA, write_json, write_text
from recipe.run.stage import Stage, require_downloads, run_stage


def main(stage: Stage) -> None:
    """Build the corpus; every document and byte of every source is counted."""
    config = stage.config["dataset"]
    require_downloads(stage)
    funnels, leaks = pipeline.build(config, DATA, stage.folder)
    for name, f in funnels.items():
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in f.documents_dropped.most_common()) or "none"
        stage.say(f"{name}: {f.documents_in:,} documents in, {f.documents_out:,} kept, dropped {dropped}")
    stage.figures = {name: f.as_json() for name, f in funnels.items()}
    licences = {name: licence(spec) for name, spec in config["sources"].items()}
    write_json(
        stage.folder / "funnel.json", {"sources": stage.figures, "licences": licences, "leakage": leaks}
    )
    write_text(stage.folder / "funnel.md", funnel.funnel_table(funnels))
    funnel.picture(funnels, stage.folder / "funnel.png")
    kept, read = (sum(getattr(f, key) for f in funnels.values()) / 1e6 for key in ("bytes_out", "bytes_in"))
    documents = sum(f.documents_out for f in funnels.values())
    stage.headline = f"{documents:,} documents, {kept:.1f} MB kept of {read:.1f} MB"


if __name__ == "__main__":
    run_stage(__file__, __doc__, main, ("dataset",), ("01_download",), resumable=True)
