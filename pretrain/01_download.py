"""Stage 01: download the sources of dataset.json to data/.

Edit: configs/<recipe>/dataset.json (sources).
Writes: data/<source>/ with sha256 and versions, which all recipes share.
Run:  python pretrain/01_download.py --recipe tiny
"""

import time

from recipe.corpus.download import download, missing_bytes, require_data
from recipe.project import DATA, require_space
from recipe.run.preflight import require_data_space
from recipe.run.publication import hold
from recipe.run.stage import Stage, run_stage


def main(stage: Stage) -> None:
    """Download every source that is not complete yet."""
    records, megabytes, seconds = {}, 0.0, 0.0
    sources = stage.config["dataset"]["sources"]
    with hold(DATA, stage.name):
        needed = sum(missing_bytes(name, spec, DATA) for name, spec in sources.items())
        require_space(DATA, needed, "downloading")
        require_data_space(stage.recipe, stage.config["dataset"])
        for name, spec in sources.items():
            started = time.monotonic()
            records[name] = download(name, spec, DATA)
            took = time.monotonic() - started
            size = sum(file["bytes"] for file in records[name]["files"].values()) / 1e6
            stage.say(f"{name}: {len(records[name]['files'])} files, {size:.1f} MB in {took:.1f} s")
            megabytes, seconds = megabytes + size, seconds + took
    stage.figures = {"sources": records, "megabytes": megabytes, "download_seconds": seconds}
    stage.headline = f"{len(records)} sources, {megabytes:.1f} MB"


if __name__ == "__main__":
    run_stage(
        __file__,
        __doc__,
        main,
        ("dataset",),
        reusable=lambda figures, config: require_data(figures, config["dataset"], DATA),
    )
