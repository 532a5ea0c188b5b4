"""The output matrix and the loss, forward and backward: all logits at once against chunks, time and memory.

bf16 autocast over float32 weights, as in a training. Each row is a process of its own. Memory is what the
process has at its peak beyond what it had before the first step: resident on a CPU, allocated on a GPU.
Liger's fused kernel is a row on a GPU where liger-kernel is installed.

Run (a minute):  .venv/bin/python tests/bench/loss.py [POSITIONS [WIDTH [VOCABULARY]]]
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "pretrain"))
SIZES = (2048, 512, 32_000)
ROWS = ("whole", "whole, compiled", "chunks", "chunks, compiled")
STEPS = 7


def loss_function(name: str) -> Callable:
    """(hidden, head, targets) to the mean loss."""
    import torch
    from recipe.model.chunked_loss import _loss_or_logits

    def whole(hidden, head, targets):
        return torch.nn.functional.cross_entropy(head(hidden).float(), targets)

    def chunks(hidden, head, targets):
        return _loss_or_logits(head)(hidden, targets)[0] / len(targets)

    def liger(hidden, head, targets):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy(hidden, head.weight, targets)

    chosen = {"whole": whole, "chunks": chunks, "liger": liger}[name.split(",")[0]]
    return torch.compile(chosen) if "compiled" in name else chosen


def measure(name: str, positions: int, width: int, vocabulary: int) -> dict[str, float]:
    """Median milliseconds of a step, peak MiB, and the loss."""
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(kind):
        hidden = torch.randn(positions, width, requires_grad=True)
        head = torch.nn.Linear(width, vocabulary, bias=False)
        targets = torch.randint(vocabulary, (positions,))
    compute, times = loss_function(name), []
    before = torch.cuda.memory_allocated() if kind == "cuda" else _resident()
    for _ in range(STEPS):
        started = time.perf_counter()
        with torch.autocast(kind, torch.bfloat16):
            loss = compute(hidden, head, targets)
        loss.backward()
        hidden.grad = head.weight.grad = None
        if kind == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if kind == "cuda" else _resident()
    middle = statistics.median(times[2:])  # the first steps compile
    return {"ms": 1000 * middle, "mib": (peak - before) / 2**20, "loss": loss.item()}


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure one row, or print the table."""
    if sys.argv[1:2] == ["row"]:
        print(json.dumps(measure(sys.argv[2], *map(int, sys.argv[3:]))))
        return
    sizes = [*map(int, sys.argv[1:]), *SIZES[len(sys.argv) - 1 :]]
    print("{} positions x {} x vocabulary {}\n".format(*sizes))
    print("| loss | ms | peak MiB | loss |\n|---|---:|---:|---:|", flush=True)
    # The compiled ones, which take longest, are the last.
    liger = ["liger"] if find_spec("liger_kernel") else []
    for name in sorted([*ROWS, *liger], key=lambda name: "compiled" in name):
        line = [sys.executable, __file__, "row", name, *map(str, sizes)]
        ended = subprocess.run(line, stdout=subprocess.PIPE, text=True, env=os.environ)
        row = json.loads(ended.stdout.splitlines()[-1]) if ended.returncode == 0 else None
        shown = f"{row['ms']:.1f} | {row['mib']:,.0f} | {row['loss']:.5f}" if row else "failed | |"
        print(f"| {name} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
