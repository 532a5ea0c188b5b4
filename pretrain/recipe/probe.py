"""Find the fastest settings by measuring: micro-batch x activation checkpointing x compile (x ZeRO stage).

``bash pretrain/05_pretrain.sh --probe`` trains a few steps of each combination, each in a process of its own
under the launcher that the training itself would use. A combination that runs out of memory, crashes or is
killed costs only itself. The table goes to ``outputs/<recipe>/probe.md`` and ``probe.json``, and the best
combination is printed as options to paste.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recipe import preflight
from recipe.config import load_recipe
from recipe.launch import Launch, add_options, child_environment, command, launch_of, visible_gpus
from recipe.outputs import OUTPUTS, RecipeError, Refused, read_json, stage_arguments, stage_folder, write_json

STEPS = 5  # of which the first, which compiles, is not measured
LIMIT = 1800  # seconds for one combination
SLOWER = 0.95  # a larger micro-batch below this share of the speed before ends the climb
HOPELESS = 1.3  # times the memory there is, by the preflight's sum: not even tried
OUT_OF_MEMORY = re.compile(r"OutOfMemoryError|out of memory|can't allocate memory|not enough memory", re.I)
KILLED = re.compile(r"SIGKILL|exitcode\s*:\s*-9|return code = -9")
# What a probe leaves out of a training.
SHORT = {
    "max_steps": STEPS,
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "report_to": "none",
    "sample_steps": None,
    "logging_steps": 1,
}


def attempt(
    line: list[str], folder: Path, environment: dict[str, str], limit: float = LIMIT
) -> dict[str, Any]:
    """Run one command in `folder` to whatever end; ``outcome`` tells which.

    ``ok`` (with the figures it wrote to result.json), ``out of memory``, ``killed``, ``too slow``, or
    ``failed`` with the last line it wrote as ``reason``.
    """
    log = folder / "log"
    with log.open("w") as handle:
        child = subprocess.Popen(
            line, env=environment, stdout=handle, stderr=handle, start_new_session=True, cwd=folder
        )
        # Should memory run out, the kernel is to kill this process and none beside it.
        with contextlib.suppress(OSError):
            Path(f"/proc/{child.pid}/oom_score_adj").write_text("1000")
        try:
            code: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # also what a dead launcher left behind
            child.wait()
    text = log.read_text(errors="replace")
    if code is None:
        return {"outcome": "too slow", "reason": f"not finished after {limit:.0f} s"}
    if code == 0 and (folder / "result.json").exists():
        return {"outcome": "ok"} | read_json(folder / "result.json")
    if OUT_OF_MEMORY.search(text):
        return {"outcome": "out of memory"}
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL) or KILLED.search(text):
        return {"outcome": "killed", "reason": "SIGKILL: most likely the machine's memory ran out"}
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return {"outcome": "failed", "reason": lines[-1][:300] if lines else f"exit {code}"}


def combinations(values: dict[str, Any], ranks: int) -> Iterator[tuple[str | None, bool, bool]]:
    """(DeepSpeed file or None, checkpointing, compile), those worth comparing.

    ZeRO only where ranks share something, never with Muon; torch.compile only without ZeRO, where there is a
    compiler, and unless pretrain.json says false.
    """
    compiler = shutil.which("g++") and values.get("torch_compile", True)
    stages = ["zero1", "zero2", "zero3"] if ranks > 1 and not values.get("muon_learning_rate") else []
    for deepspeed, checkpointing, compiled in itertools.product(
        [None, *stages], (False, True), (False, True)
    ):
        if not (compiled and (deepspeed or not compiler)):
            yield deepspeed, checkpointing, compiled


def micro_batches(share: int) -> list[int]:
    """The powers of two, and all of it, that divide a rank's share of the global batch."""
    return sorted({2**n for n in range(share.bit_length()) if share % 2**n == 0} | {share})


def climb(micros: list[int], measure: Callable[[int], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Measure ever larger micro-batches until one fails, or is clearly slower than the one before."""
    before = 0.0
    for micro in micros:
        row = measure(micro)
        yield row
        if row["outcome"] != "ok" or row["tokens_per_second"] < SLOWER * before:
            return
        before = row["tokens_per_second"]


def options_of(row: dict[str, Any]) -> str:
    """The options of 05_pretrain.sh and run_all.sh that train with a row's settings."""
    parts = [f"--set pretrain.per_device_train_batch_size={row['micro_batch']}"]
    parts.append(f"--set pretrain.gradient_checkpointing={str(row['checkpointing']).lower()}")
    if row["deepspeed"]:
        parts.append(f"--deepspeed {row['deepspeed']}")
    else:
        parts.append(f"--set pretrain.torch_compile={str(row['compiled']).lower()}")
    return " ".join(parts)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, the fastest first."""
    lines = [
        "| micro-batch | checkpointing | compiled | ZeRO | tokens/s | GFLOP/s | peak GiB | outcome |",
        "|---:|---|---|---|---:|---:|---:|---|",
    ]
    for row in sorted(rows, key=lambda row: -row.get("tokens_per_second", 0)):
        figures = ["", "", ""]
        if row["outcome"] == "ok":
            figures = [
                f"{row['tokens_per_second']:,.0f}",
                f"{row['flops_per_second'] / 1e9:,.0f}",
                f"{row['peak_memory_bytes'] / 2**30:.2f}",
            ]
        yes = {True: "yes", False: "no"}
        outcome = row["outcome"] + (f": {row['reason']}" if row.get("reason") else "")
        cells = [str(row["micro_batch"]), yes[row["checkpointing"]], yes[row["compiled"]]]
        cells += [row["deepspeed"] or "", *figures, outcome.replace("|", "/")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(
    script: str, plan: dict[str, Any], deepspeed: str | None, checkpointing: bool, compiled: bool, micro: int
) -> dict[str, Any]:
    """A row of the table: the plan's training with these settings, for `STEPS` steps.

    At most two micro-batches are accumulated: the second is where the memory is fullest, and more would only
    take time. The optimizer's share of a step is therefore somewhat larger than in the training.
    """
    ranks, values = plan["ranks"], plan["config"]["pretrain"]
    accumulation = min(2, values["global_batch_size"] // ranks // micro)
    changed = values | SHORT
    changed |= {
        "per_device_train_batch_size": micro,
        "global_batch_size": micro * ranks * accumulation,
        "gradient_checkpointing": checkpointing,
        "torch_compile": compiled,
    }
    row = {"micro_batch": micro, "checkpointing": checkpointing, "compiled": compiled, "deepspeed": deepspeed}
    here, free = preflight.this_machine()
    shape = preflight.shape_of(plan["config"]["model"], preflight.vocabulary_of(plan["config"]))
    peak = preflight.memory(shape, preflight.setting_of(changed, here, ranks, deepspeed))["peak"]
    if peak * (ranks if here.kind == "cpu" else 1) > HOPELESS * free:
        reason = f"about {peak / 2**30:.0f} GiB a rank by the preflight, {free / 2**30:.0f} GiB are free"
        return row | {"outcome": "not tried", "reason": reason}
    launch = Launch(processes=ranks, deepspeed=deepspeed)
    path = launch.check(plan["config"] | {"pretrain": changed}, "pretrain")
    with tempfile.TemporaryDirectory(prefix="probe-") as name:
        folder = Path(name)
        changed_plan = plan | {
            "config": plan["config"] | {"pretrain": changed},
            "deepspeed": str(path) if path else None,
            "fsdp": False,
            "tensor_parallel": 1,
            "parent": os.getpid(),
            "host": platform.node(),
            "folder": name,
            "probe": True,
        }
        write_json(folder / "plan.json", changed_plan)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") if visible_gpus() else None
        line = command(script, [str(folder / "plan.json")], launch, path, visible)
        row |= attempt(line, folder, child_environment(os.environ, ranks))
    if row["outcome"] == "ok":
        row["flops_per_second"] = row["mfu"] * row["gemm_peak_flops"] * ranks
    return row


def search(script: str, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure every combination worth it; each row is printed when it is there."""
    values, ranks = plan["config"]["pretrain"], plan["ranks"]
    share, rest = divmod(values["global_batch_size"], ranks)
    if rest:
        raise Refused(f"global_batch_size: {values['global_batch_size']} does not divide into {ranks} ranks")
    if ranks > 1 and values.get("muon_learning_rate"):
        print("ZeRO is left out: it has no Muon (--set pretrain.muon_learning_rate=null)", flush=True)
    rows: list[dict[str, Any]] = []
    for deepspeed, checkpointing, compiled in combinations(values, ranks):
        for row in climb(
            micro_batches(share),
            lambda micro, way=(deepspeed, checkpointing, compiled): measure(script, plan, *way, micro),
        ):
            rows.append(row)
            print(table([row]).splitlines()[-1], flush=True)
    return rows


def main(script: Path) -> None:
    """Probe a recipe whose stages 03 and 04 are done, with the options of 05_pretrain.sh."""
    parser = stage_arguments("Measure settings of stage 05 and name the fastest.")
    add_options(parser)
    arguments = parser.parse_args()
    recipe = arguments.recipe
    config = load_recipe(recipe, arguments.overrides)
    inputs = {stage: stage_folder(recipe, stage) for stage in ("03_tokenizer", "04_tokenize")}
    for stage, folder in inputs.items():
        if not (folder / "stage.json").exists():
            raise Refused(f"--probe needs {stage}. Run `bash run_all.sh --recipe {recipe} --to 04`")
    plan = {
        "recipe": recipe,
        "config": config,
        "ranks": launch_of(arguments).ranks,
        "inputs": {name: str(path) for name, path in inputs.items()},
    }
    rows = search(str(script), plan)
    measured = [row for row in rows if row["outcome"] == "ok"]
    folder = OUTPUTS / recipe
    shown = table(rows)
    if not measured:
        raise RecipeError(f"no setting ran:\n{shown}\nSee what `05_pretrain.sh --dry-run` suggests")
    best = max(measured, key=lambda row: row["tokens_per_second"])
    write_json(folder / "probe.json", {"best": best, "options": options_of(best), "rows": rows})
    (folder / "probe.md").write_text(shown + "\n", "utf-8")
    print(f"\n{shown}\n\nfastest: {options_of(best)}", flush=True)


if __name__ == "__main__":
    sys.exit("run: bash pretrain/05_pretrain.sh --probe")
