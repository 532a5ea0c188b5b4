"""Opening a packed dataset of 1e9 tokens in 2e6 documents, and reading its blocks in random order.

For comparison, in the same run: Megatron-LM's own reader on the same files (a document of 500 tokens is one
read), and a `datasets` table of ready-made blocks. The token file is sparse: it takes 50 MB of disk.

Run (about 20 seconds, nothing else running):  .venv/bin/python tests/bench/packing.py
"""

import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "pretrain"))
TOKENS, DOCUMENT, BLOCK, READS, TABLE_BLOCKS = 10**9, 500, 1024, 20_000, 20_000


def rss() -> float:
    """Resident memory now, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def make(prefix: Path) -> None:
    """Write the index and a sparse file of zeros."""
    from recipe.tokenization.token_files import write_index

    write_index(prefix.with_suffix(".idx"), np.dtype("<u2"), [np.full(TOKENS // DOCUMENT, DOCUMENT, "<i4")])
    with prefix.with_suffix(".bin").open("wb") as handle:
        handle.truncate(2 * TOKENS)


def measure(open_it: Callable[[], Any], read: Callable[[Any], Any] = lambda item: item) -> str:
    """Seconds and MB of opening, and microseconds of a random read of data that was not read before."""
    before, started = rss(), time.perf_counter()
    dataset = open_it()
    opened, memory = time.perf_counter() - started, rss() - before
    draw = random.Random(0)
    items = [draw.randrange(len(dataset)) for _ in range(READS)]
    started = time.perf_counter()
    for item in items:
        read(dataset[item])
    each = (time.perf_counter() - started) / READS
    return f"{opened:.4f} {memory:.1f} {each * 1e6:.1f}"


def run(kind: str, folder: Path) -> str:
    """One measurement, in a process of its own."""
    prefix = folder / "train"
    if kind.startswith("ours"):
        import torch  # noqa: F401 (its import is not measured)
        from recipe.tokenization.packing import PackedBlocks
        from recipe.tokenization.token_files import TokenFile

        documents = TOKENS // DOCUMENT
        sources = None
        if "weighted" in kind:
            sources = [(0, documents // 2, 2.0), (documents // 2, documents, 0.5)]
        return measure(lambda: PackedBlocks(TokenFile(prefix), BLOCK, 0, 42, 1, sources))
    if kind == "megatron":
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        return measure(lambda: IndexedDataset(str(prefix)), np.array)  # it returns a view: read it
    import datasets

    def blocks() -> datasets.Dataset:
        return datasets.load_from_disk(str(folder / "table")).with_format("torch")

    return measure(blocks)


def make_table(folder: Path) -> None:
    """A table with the same four columns, one block per row."""
    import datasets

    datasets.disable_progress_bars()
    row = np.zeros((TABLE_BLOCKS, BLOCK), np.int64)
    columns = ("input_ids", "position_ids", "labels", "shift_labels")
    table = datasets.Dataset.from_dict(dict.fromkeys(columns, row[:100]))
    datasets.concatenate_datasets([table] * (TABLE_BLOCKS // 100)).save_to_disk(str(folder / "table"))


def main() -> None:
    """Print the table; ratios are of the time to read a block, ours = 1."""
    kinds = {
        "ours": "PackedBlocks, shuffled",
        "ours weighted": "PackedBlocks, shuffled, two weights",
        "megatron": "megatron-core IndexedDataset (one document, ids only)",
        "datasets": f"datasets, blocks made before ({TABLE_BLOCKS:,} of them)",
    }
    with tempfile.TemporaryDirectory() as name:
        make(Path(name) / "train")
        make_table(Path(name))
        results = {}
        for kind in kinds:
            line = [sys.executable, "-W", "ignore", __file__, kind, name]
            done = subprocess.run(line, check=True, capture_output=True, text=True)
            results[kind] = [float(part) for part in done.stdout.split()[-3:]]
    print(f"{TOKENS:.0e} tokens, {TOKENS // DOCUMENT:,} documents, blocks of {BLOCK}, {READS:,} reads\n")
    print("| reader | open (s) | memory of opening (MB) | random read (µs) | ratio |")
    print("|---|---:|---:|---:|---:|")
    for kind, (opened, memory, each) in results.items():
        ratio = each / results["ours"][2]
        print(f"| {kinds[kind]} | {opened:.4f} | {memory:.1f} | {each:.1f} | {ratio:.1f} |")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(run(sys.argv[1], Path(sys.argv[2])))
    else:
        main()
