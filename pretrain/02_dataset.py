"""Stage 02: from raw documents to clean ones: extract, normalise, filter, drop duplicates, split.

Edit: configs/<recipe>/dataset.json. Writes: {train,valid}-<source>-<number>.parquet, funnel.json, funnel.md,
funnel.png. Run:  python pretrain/02_dataset.py --recipe tiny
"""

import shutil

from recipe import corpus, funnel
from recipe.download import licence, require_data
from recipe.engine import engine
from recipe.outputs import DATA, Stage, read_json, run_stage, write_json


def main(stage: Stage) -> None:
    """Run the phases of recipe.corpus, then account for every document."""
    config = stage.config["dataset"]
    sources = config["sources"]
    require_data(read_json(stage.inputs["01_download"] / "stage.json")["figures"], config, DATA)
    raw, clean = stage.folder / "raw", stage.folder / "clean"
    clean.mkdir(exist_ok=True)
    with engine(config.get("engine", {}), stage.folder) as phases:
        phases.run("read", [corpus.Read(config, DATA, raw)], len(sources))
        shards = [(name, path) for name in sources for path in sorted((raw / name).glob("*.parquet"))]
        phases.run("clean", [corpus.Clean(config, shards, clean)], len(shards))
        removed = corpus.duplicates(phases, config, clean, len(shards))
        numbered = [(name, int(path.stem)) for name, path in shards]
        phases.run("write", [corpus.Write(config, numbered, clean, removed, stage.folder)], len(shards))
    funnels = corpus.merge_funnels(clean, numbered, sources)
    leaks = corpus.drop_leaks(stage.folder, funnels)
    for name, f in funnels.items():
        corpus.check_size(name, sources[name], f)
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in f.documents_dropped.most_common())
        stage.say(
            f"{name}: {f.documents_in:,} documents in, {f.documents_out:,} kept, dropped {dropped or 'none'}"
        )
    table = {
        "sources": {name: f.as_json() for name, f in funnels.items()},
        "licences": {name: licence(spec) for name, spec in sources.items()},
        "leakage": leaks,
    }
    write_json(stage.folder / "funnel.json", table)
    (stage.folder / "funnel.md").write_text(funnel.markdown(funnels), "utf-8")
    funnel.picture(funnels, stage.folder / "funnel.png")
    for folder in (
        stage.folder / "logs",
        raw,
        clean,
    ):  # the markers first: without what they mark they would lie
        shutil.rmtree(folder)
    stage.figures = table["sources"]
    stage.headline = (
        f"{sum(f.documents_out for f in funnels.values()):,} documents, "
        f"{sum(f.bytes_out for f in funnels.values()) / 1e6:.1f} MB kept of "
        f"{sum(f.bytes_in for f in funnels.values()) / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    run_stage(__file__, __doc__, main, ("dataset",), ("01_download",), resumable=True)
