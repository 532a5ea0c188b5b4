"""Encoding a corpus: stage 04 on one core and on two, against `datasets.map` with the fast tokenizer.

The code of stage 04 encodes COPIES shards, each with the training side of a recipe's stage 02, in a process
that is bound to one core or to two. ``whole`` is the time from the start of the interpreter to the joined and
flushed files. ``warm`` subtracts the time that stage 04 needs for a single document. The peer is bound to one
core and encodes the same text once, with the same tokenizer, by `Dataset.map(batched=True)`, which also
writes its table; only the map is timed.

Run (about a minute and 1 GB in the temporary folder, nothing else running):
    .venv/bin/python tests/bench/encoding.py [OUTPUTS/RECIPE] [COPIES]
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "pretrain"))


def make(outputs: Path, folder: Path, copies: int) -> int:
    """Write shards of stage 02: `copies` times the training side, and one document; the bytes of text."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    from recipe.corpus.shards import list_shards

    source = outputs / "02_dataset"
    table = pa.concat_tables([pq.read_table(shard.path) for shard in list_shards(source, "train")])
    for name, rows, number in (("large", table, copies), ("small", table[:1], 1)):
        (folder / name).mkdir()
        (folder / name / "stage.json").write_text("{}")
        first = folder / name / "train-text-00000.parquet"
        pq.write_table(rows, first, compression="zstd", row_group_size=1024)
        for k in range(1, number):
            os.link(first, first.with_name(f"train-text-{k:05d}.parquet"))
        pq.write_table(table[:1], folder / name / "valid-text-00000.parquet")
    return copies * pc.sum(pc.binary_length(table["text"])).as_py()


def stage(dataset: Path, tokenizer: Path, folder: Path) -> None:
    """Run the main function of stage 04 on a folder of shards."""
    import runpy

    from recipe.project import fsync_tree
    from recipe.run.stage import Stage

    config = {"dataset": {"sources": {"text": {}}}}
    inputs = {"02_dataset": dataset, "03_tokenizer": tokenizer}
    folder.mkdir()
    main = runpy.run_path(str(ROOT / "pretrain/04_tokenize.py"))["main"]
    main(Stage("04_tokenize", "bench", config, inputs, folder, None, 0))
    fsync_tree(folder)  # as a stage does before it renames its folder


def peer(dataset: Path, tokenizer: Path, folder: Path) -> float:
    """Seconds of datasets.map for one shard; it also writes its result."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    fast = AutoTokenizer.from_pretrained(tokenizer)
    table = datasets.Dataset.from_parquet(
        str(dataset / "train-text-00000.parquet"), cache_dir=str(folder / "cache")
    )
    started = time.perf_counter()
    table.map(
        lambda rows: {"input_ids": fast(rows["text"])["input_ids"]},
        batched=True,
        remove_columns=table.column_names,
        cache_file_name=str(folder / "table.arrow"),
    )
    return time.perf_counter() - started


def run(cores: str, *arguments: str) -> tuple[float, str]:
    """Seconds and output of this script in a process that is bound to the given cores."""
    line = ["taskset", "-c", cores, sys.executable, "-W", "ignore", __file__, *arguments]
    started = time.perf_counter()
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    return time.perf_counter() - started, done.stdout


def main() -> None:
    """Print the table; the ratio is MB/s relative to the peer."""
    outputs = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "outputs/tiny").resolve()
    copies = int(sys.argv[2]) if len(sys.argv) > 2 else 24
    tokenizer = str(outputs / "03_tokenizer")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make(outputs, folder, copies) / 1e6
        seconds = {}
        for cores in ("0", "0,1"):
            for kind in ("small", "large"):
                out = str(folder / f"out-{kind}-{cores}")
                seconds[kind, cores], _ = run(cores, "stage", str(folder / kind), tokenizer, out)
                shutil.rmtree(out)
        _, printed = run("0", "peer", str(folder / "large"), tokenizer, name)
        theirs = size / copies / json.loads(printed.split()[-1])
    rows = [("datasets.map, fast tokenizer, 1 core (only the map)", theirs)]
    for cores, said in (("0", "1 core"), ("0,1", "2 cores")):
        rows.append((f"stage 04, {said}, whole", size / seconds["large", cores]))
        rows.append((f"stage 04, {said}, warm", size / (seconds["large", cores] - seconds["small", cores])))
    print(f"{size:.0f} MB of text in {copies} shards; the peer: {size / copies:.0f} MB\n")
    print("| encoder | MB/s | ratio |\n|---|---:|---:|")
    for said, speed in rows:
        print(f"| {said} | {speed:.1f} | {speed / theirs:.1f} |")
    print(f"\n2 cores against 1: whole {rows[3][1] / rows[1][1]:.2f}, warm {rows[4][1] / rows[2][1]:.2f}")


if __name__ == "__main__":
    if len(sys.argv) == 5 and sys.argv[1] == "stage":
        stage(*map(Path, sys.argv[2:]))
    elif len(sys.argv) == 5 and sys.argv[1] == "peer":
        print(peer(*map(Path, sys.argv[2:])))
    else:
        main()
