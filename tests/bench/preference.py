"""DPO and GRPO (stage 13): tokens/s against trl's trainers as its example scripts use them.

All rows train the tuned model of the recipe tiny on the same rows, 16 preferences or 64 answers a step, with
the same rate. A token counts once for each time that it is read or written; padding does not count.

- ``trl``: ``DPOTrainer(model=…, args=DPOConfig(…), train_dataset=…)``, and the same of GRPO, by its defaults.
- ``trl, no checkpointing``: the same with ``gradient_checkpointing=False``, which these sizes allow.
- ``ours``: stage 13 (run_dpo.py, run_grpo.py).

Preferences are pairs of stage 11, each with the answer of another pair as the rejected one. Questions are
translations of Tatoeba, and the rewards are those of the example in fine-tuning/README.md. Each row is
measured in `--rounds` processes of its own, in turn; the speed is the median of all steps after the first.

Run (about 10 minutes on one core, nothing else running), after `bash run_all.sh --to 12`:
    .venv/bin/python tests/bench/preference.py [dpo] [grpo] [--rounds 3] [--steps 6]
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import transformers
from transformers import TrainerCallback

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "pretrain"), str(ROOT / "fine-tuning")]
MODEL, PAIRS = ROOT / "outputs/tiny/12_finetune", ROOT / "outputs/tiny/11_dataset/train.parquet"
ROWS = ("trl", "trl, no checkpointing", "ours")
BATCH = {"dpo": {"batch": 16, "micro": 16}, "grpo": {"batch": 64, "micro": 32}}
RATE, GROUP, LONGEST, CHARACTERS, PATTERN = 1e-6, 8, 32, 20, ".*。"


class Clock(TrainerCallback):
    """The tokens so far and the time at the end of each step."""

    marks: list[tuple[float, float]] = []  # one run in a process

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Note what both trainers log at each step."""
        if "loss" in logs:
            self.marks.append((logs.get("num_tokens", logs.get("tokens", 0)), time.perf_counter()))


def rows_of(method: str, count: int) -> list[dict[str, Any]]:
    """The same rows for all: short enough that nothing is cut or left out."""
    table = parquet.read_table(PAIRS).to_pylist()
    random.Random(0).shuffle(table)
    if method == "grpo":
        table = [row for row in table if row["source"] == "translation"]
    ask = [
        [{"role": "user", "content": "\n".join(filter(None, (r["instruction"], r["input"])))}] for r in table
    ]
    answers = [[{"role": "assistant", "content": row["output"]}] for row in table]
    others = answers[1:] + answers[:1]
    rows = [
        {"prompt": asked, "chosen": chosen, "rejected": rejected}
        for asked, chosen, rejected in zip(ask, answers, others, strict=True)
        if len(asked[0]["content"]) + max(len(a[0]["content"]) for a in (chosen, rejected)) < 200
    ][:count]
    if method == "dpo":
        return rows
    return [{"messages": row["prompt"] + row["chosen"]} for row in rows]


def train_ours(method: str, rows: list[dict[str, Any]], steps: int, folder: Path) -> None:
    """Stage 13 with a plan as the launcher writes it."""
    import run_dpo
    from recipe.config.recipe import load_recipe

    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    values = {
        "method": method,
        "pairs": {"bench": {"path": str(path)}},
        "valid_share": 0.02,
        "block_size": 256,
    }
    values |= {
        "global_batch_size": BATCH[method]["batch"],
        "per_device_train_batch_size": BATCH[method]["micro"],
    }
    values |= {"max_steps": steps, "learning_rate": RATE, "logging_steps": 1, "save_strategy": "no"}
    if method == "grpo":
        rewards = {"length": {"maximum": CHARACTERS}, "format": {"pattern": PATTERN, "weight": 0.5}}
        values |= {"rewards": rewards, "max_completion_length": LONGEST, "num_generations": GROUP}
    plan = {"recipe": "tiny", "config": load_recipe("tiny") | {"preference": values}, "deepspeed": None}
    plan |= {"folder": str(folder), "ranks": 1, "fsdp": False, "tensor_parallel": 1, "new_optimizer": False}
    plan |= {"host": platform.node(), "parent": os.getpid(), "inputs": {"12_finetune": str(MODEL)}}
    run_dpo.main(plan)


def train_stock(method: str, rows: list[dict[str, Any]], steps: int, folder: Path, **more: Any) -> None:
    """trl's trainer as its documentation shows it."""
    import re

    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

    batch, micro = BATCH[method]["batch"], BATCH[method]["micro"]
    more |= {"output_dir": str(folder), "per_device_train_batch_size": micro, "max_steps": steps}
    more |= {"gradient_accumulation_steps": batch // micro, "learning_rate": RATE, "logging_steps": 1}
    more |= {"save_strategy": "no", "report_to": "none", "use_cpu": True}
    if method == "dpo":
        DPOTrainer(model=str(MODEL), args=DPOConfig(**more), train_dataset=Dataset.from_list(rows)).train()
        return

    def length(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
        return [float(1 <= len(answer[0]["content"]) <= CHARACTERS) for answer in completions]

    def form(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
        return [float(bool(re.fullmatch(PATTERN, answer[0]["content"]))) for answer in completions]

    more |= {"num_generations": GROUP, "max_completion_length": LONGEST, "reward_weights": [1.0, 0.5]}
    questions = Dataset.from_list([{"prompt": row["messages"][:1]} for row in rows])
    GRPOTrainer(
        model=str(MODEL), reward_funcs=[length, form], args=GRPOConfig(**more), train_dataset=questions
    ).train()


def measure(method: str, row: str, steps: int) -> dict[str, Any]:
    """Train a row in this process; tokens/s of each step after the first, and the peak memory."""
    transformers.trainer.DEFAULT_CALLBACKS.append(Clock)
    rows = rows_of(method, 1000)
    with tempfile.TemporaryDirectory() as name:
        if row == "ours":
            train_ours(method, rows, steps + 1, Path(name))
        else:
            more = {} if row == "trl" else {"gradient_checkpointing": False}
            train_stock(method, rows, steps + 1, Path(name), **more)
    marks = Clock.marks
    speeds = [(b[0] - a[0]) / (b[1] - a[1]) for a, b in zip(marks, marks[1:], strict=False)]
    tokens = (marks[-1][0] - marks[0][0]) / (len(marks) - 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"speeds": speeds, "tokens": tokens, "peak": peak}


def main() -> None:
    """Print a table for each method; the ratio compares with the faster row of trl."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", default=list(BATCH), help="dpo, grpo (default: both)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(arguments.methods[0], arguments.row, arguments.steps)))
        return
    for method in arguments.methods:
        found: dict[str, list[dict[str, Any]]] = {row: [] for row in ROWS}
        for _ in range(arguments.rounds):
            for row in ROWS:
                command = [sys.executable, __file__, method, "--steps", str(arguments.steps), "--row", row]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found[row].append(json.loads(done.stdout.splitlines()[-1]))
        speeds = {row: [speed for one in each for speed in one["speeds"]] for row, each in found.items()}
        peer = max(statistics.median(speeds[row]) for row in ROWS if row != "ours")
        print(f"\n| {method} | tokens/s | least to most | ratio | tokens a step | peak memory |")
        print("|---|---:|---:|---:|---:|---:|")
        for row, each in found.items():
            middle, tokens = statistics.median(speeds[row]), statistics.mean(one["tokens"] for one in each)
            cells = [row, f"{middle:,.0f}", f"{min(speeds[row]):,.0f} to {max(speeds[row]):,.0f}"]
            cells += [f"{middle / peer:.2f}", f"{tokens:,.0f}", f"{max(one['peak'] for one in each):.2f} GiB"]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
