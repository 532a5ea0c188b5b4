"""What it costs to check a stage's inputs by sha256: seconds per GB, and the share of each finished stage.

Run (about a minute, nothing else running), after `bash run_all.sh --recipe tiny`:
    .venv/bin/python tests/bench/verification.py
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "pretrain"))
PARTS, PART = 4, 250_000_000  # files, and bytes of each


def main() -> None:
    from recipe.project import OUTPUTS, read_record
    from recipe.run.integrity import damage, describe_files, parts_read

    with tempfile.TemporaryDirectory() as folder:
        for number in range(PARTS):
            (Path(folder) / f"{number}.parquet").write_bytes(os.urandom(PART))
        began = time.perf_counter()
        describe_files(Path(folder))
        print(f"1 GB in {PARTS} files: {time.perf_counter() - began:.2f} s on {os.cpu_count()} cores\n")
    print("| stage | seconds | MB read and checked | seconds to check | share |")
    print("|---|---|---|---|---|")
    for final in sorted((OUTPUTS / "tiny").glob("[0-9]*")):
        record = json.loads((final / "stage.json").read_text("utf-8"))
        size, began = 0, time.perf_counter()
        for stage, parts in parts_read(final.name, record["wanted"]["inputs"]).items():
            folder = OUTPUTS / "tiny" / stage
            inputs = read_record(folder)
            assert not damage(folder, inputs, parts)
            size += sum(file["bytes"] for file in inputs["files"].values())
        seconds = time.perf_counter() - began
        print(
            f"| {final.name} | {record['seconds']:.1f} | {size / 1e6:.1f} | {seconds:.3f} "
            f"| {seconds / record['seconds']:.2%} |"
        )


if __name__ == "__main__":
    main()
