"""Time and memory of stage 02 as its input grows: time must be linear, and memory constant.

The input consists of random lines of a finished dataset, in documents of 12 lines, so that it can have any
size without exact duplicates. Each size runs in a process of its own, through all phases (reading, cleaning
with the rules of an encyclopaedia, exact and MinHash deduplication, splitting, the check for leaks), with a
worker per core. Memory is the peak of the largest single process.

Run (about 5 minutes, nothing else running; 3 GB of disk):
    .venv/bin/python tests/bench/corpus.py [outputs/tiny/02_dataset] [MEGABYTES ...]
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from recipe.corpus import pipeline
from recipe.corpus.shards import read_texts

SIZES = (50, 100, 250, 500, 1000)
LINES = 12


def write_input(path: Path, megabytes: int, pool: list[str]) -> int:
    """Write documents of random lines as .jsonl, `megabytes` of text in all; return their number."""
    draw, size, documents = random.Random(megabytes), 0, 0
    with path.open("w", encoding="utf-8") as handle:
        while size < megabytes * 1e6:
            text = "\n".join(draw.choices(pool, k=LINES))
            handle.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size += len(text.encode("utf-8"))
            documents += 1
    return documents


def build(path: Path, folder: Path) -> None:
    """Build the dataset of one input and print its figures; run as a process of its own."""
    config = {
        "sources": {"bench": {"source": "files", "paths": [str(path)], "rules": "encyclopaedia"}},
        "valid_share": 0.01,
    }
    folder.mkdir()
    started = time.monotonic()
    funnels, _ = pipeline.build(config, folder, folder)
    seconds = time.monotonic() - started
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    own, largest_child = (resource.getrusage(kind).ru_maxrss / 1024 for kind in kinds)
    scaffold = sum(p.stat().st_size for p in (folder / "clean/duplicates").rglob("*") if p.is_file())
    kept = funnels["bench"].documents_out
    print(
        json.dumps({"seconds": seconds, "own": own, "worker": largest_child, "kept": kept, "disk": scaffold})
    )


def main(dataset: Path, sizes: list[int]) -> None:
    """Print a row for each size."""
    pool = [line for text in read_texts(dataset, "train") for line in text.split("\n") if len(line) >= 20]
    print(f"{os.cpu_count()} cores\n")
    print(
        "| MB in | documents | kept | seconds | MB/s | peak MiB: parent | worker | deduplication, "
        "bytes/document |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for megabytes in sizes:
        with tempfile.TemporaryDirectory() as top:
            path, folder = Path(top) / "input.jsonl", Path(top) / "out"
            documents = write_input(path, megabytes, pool)
            command = [sys.executable, __file__, "--build", str(path), str(folder)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            f = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {megabytes:,} | {documents:,} | {f['kept']:,} | {f['seconds']:.1f} "
                f"| {megabytes / f['seconds']:.1f} | {f['own']:.0f} | {f['worker']:.0f} "
                f"| {f['disk'] / documents:.0f} |",
                flush=True,
            )
            shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--build"]:
        build(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        root = Path(__file__).resolve().parents[2]
        given = [Path(a) for a in sys.argv[1:] if not a.isdigit()]
        main(
            given[0] if given else root / "outputs/tiny/02_dataset",
            [int(a) for a in sys.argv[1:] if a.isdigit()] or list(SIZES),
        )
