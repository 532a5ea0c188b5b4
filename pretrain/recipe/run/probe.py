"""Find the fastest settings by measuring: micro-batch, checkpointing, compile, attention, sharding.

``bash pretrain/05_pretrain.sh --probe`` trains a few steps with each combination, each in its own process
under the launcher that the training itself would use. A combination that runs out of memory, crashes or is
killed does not stop the others. The table is written to ``outputs/<recipe>/probe.md``, and the
fastest combination to ``probe.options`` (its options) and ``probe.json`` (its figures) in the same folder.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from recipe.config.choice import choose, usable_attention
from recipe.config.initial_model import find_initial
from recipe.config.launch import batch_layout
from recipe.config.model import model_values
from recipe.config.optimizers import without_muon
from recipe.config.phases import sequences_of_longest
from recipe.config.recipe import check_recipe, load_recipe
from recipe.config.training import attention_needs
from recipe.hardware import glance
from recipe.progress import progress, write_lines_without_a_terminal
from recipe.project import (
    OUTPUTS,
    RecipeError,
    Refused,
    is_finished,
    markdown_table,
    read_json,
    stage_folder,
    write_json,
    write_text,
)
from recipe.run import fitting, preflight
from recipe.run.launch_options import Launch, add_options, launch_of
from recipe.run.memory import memory
from recipe.run.processes import child_environment, command, kill, training_plan, visible_devices
from recipe.run.publication import hold
from recipe.run.stage import stage_arguments

# Steps of one measurement. The first one compiles and is not measured.
STEPS = 5
# Seconds for one combination.
LIMIT = 1800
# Each micro-batch is at least so many times the one before; closer ones would tell little more.
STRIDE = 1.3
# Larger micro-batches are left out once the speed falls below this share of the speed before.
SLOWER = 0.95
# A combination is left out when the preflight computes more than so many times the free memory.
HOPELESS = 1.3
OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|MemoryError|std::bad_alloc|out of memory|not enough memory"
    r"|(can't|cannot) allocate memory",
    re.I,
)
# The column of checkpointing, by `Way.checkpointed`.
CHECKPOINTED = {0: "no", 1: "yes", 2: "every second layer"}
# With either of them, TrainingArguments compiles, whatever torch_compile says.
NOT_COMPILED = {"torch_compile_backend": None, "torch_compile_mode": None}
# Below the table.
MEASURED = (
    "Micro-batches were raised until one failed or was slower. Activation checkpointing, which only saves "
    "memory, was measured where one failed without it."
)
# How the name of the folder of one measurement begins; a killed probe leaves its own.
TEMPORARY = ".probe-"
KILLED = re.compile(r"SIGKILL|exitcode\s*:\s*-9|return code = -9")
# What a probe leaves out of a training. A schedule may be longer than its few steps.
SHORT = {
    "max_steps": STEPS,
    "lr_scheduler_type": "constant",
    "lr_scheduler_kwargs": None,
    "warmup_steps": 0,
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "report_to": "none",
    "sample_steps": None,
    "phases": None,
    "logging_strategy": "steps",
    "logging_steps": 1,
}


def attempt(
    line: list[str], folder: Path, environment: dict[str, str], limit: float = LIMIT
) -> dict[str, Any]:
    """Run one command in `folder`, and say in ``outcome`` how it ended.

    The outcomes: ``ok`` (with the figures of its result.json), ``out of memory``, ``killed``, ``too slow``
    (not finished after `limit` seconds), and ``failed``, whose ``reason`` is its error or its last line.
    """
    log = folder / "log"
    with log.open("w") as handle:
        child = subprocess.Popen(
            line, env=environment, stdout=handle, stderr=handle, start_new_session=True, cwd=folder
        )
        # If memory runs out, the kernel kills this process first.
        with contextlib.suppress(OSError):
            Path(f"/proc/{child.pid}/oom_score_adj").write_text("1000")
        try:
            code: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if child.poll() is None:
                kill(child)
            # A launcher that has died may have left ranks behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
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
    # After a rank's own error torchrun writes many lines about which rank it was.
    said = [line for line in lines if line.startswith("error: ")] or lines[-1:] or [f"exit {code}"]
    return {"outcome": "failed", "reason": said[0].removeprefix("error: ")[:300]}


@dataclass(frozen=True)
class Way:
    """One way to train, apart from the micro-batch.

    checkpointed: every so many layers are computed again in the backward pass; 0: none. attention: an
    attn_implementation; None: the recipe's own.
    """

    launch: Launch
    checkpointed: int
    compiled: bool
    attention: str | None = None

    @property
    def values(self) -> dict[str, Any]:
        """The keys of pretrain.json that make it."""
        every = {"every_n_layers": self.checkpointed} if self.checkpointed > 1 else None
        attention = {"attn_implementation": self.attention} if self.attention else {}
        not_compiled = {} if self.compiled else NOT_COMPILED
        return attention | {
            "activation_checkpointing": self.checkpointed > 0,
            "activation_checkpointing_kwargs": every,
            "torch_compile": self.compiled,
            **not_compiled,
        }


def ways_to_train(
    values: dict[str, Any], model: dict[str, Any], launch: Launch, attention: Sequence[str], compiler: bool
) -> list[Way]:
    """The ways worth comparing: sharding x checkpointing x compile, then the other kernels of attention.

    Where the user has chosen no sharding for several ranks, one rank, DDP, the stages of ZeRO, FSDP2 and
    tensor parallelism over two ranks are compared, as far as the optimizer and the model work with them.
    values: of pretrain.json. model: of model.json. attention: the kernels that work here. compiler: whether
    there is one for torch.compile; it is left out where pretrain.json says false.
    """
    launches = [launch]
    if launch.ranks > 1 and not launch_words(launch):
        launches.insert(0, replace(launch, processes=1))
        others = [replace(launch, deepspeed=name) for name in ("zero1", "zero2", "zero3")]
        others += [replace(launch, fsdp=True), replace(launch, tensor_parallel=2)]
        launches += [other for other in others if _can_train(values, model, other)]
    compiles = [False, True] if compiler and values.get("torch_compile") is not False else [False]
    if values.get("fp8"):
        compiles = [True]
    ways = [Way(*row) for row in itertools.product(launches, (0, 2, 1), compiles)]
    kernels = [] if values.get("attn_implementation", "auto") != "auto" else attention
    return ways + [Way(launch, 0, compiles[-1], kernel) for kernel in kernels]


def _can_train(values: dict[str, Any], model: dict[str, Any], launch: Launch) -> bool:
    try:
        micro = {"per_device_train_batch_size": sequences_of_longest(values)}
        launch.check_sharding(values | micro, "pretrain", model)
    except Refused:
        return False
    return True


def micro_batches(share: int, own: int, least: int = 1) -> list[int]:
    """The micro-batches to measure, in ascending order.

    They divide `share`, a rank's share of the global batch in sequences, and are multiples of `least`: the
    sequences that are as long as the longest block of a later phase. Each is at least `STRIDE` times the one
    before, except `own`, the recipe's own micro-batch, which is always among them.
    """
    chosen: list[int] = []
    for micro in (micro for micro in range(least, share + 1, least) if share % micro == 0):
        if micro == own or not chosen or micro >= STRIDE * chosen[-1]:
            chosen.append(micro)
    return chosen


def climb(micros: list[int], measure: Callable[[int], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Measure larger and larger micro-batches until one fails or is clearly slower than the one before."""
    before = 0.0
    for micro in micros:
        row = measure(micro)
        yield row
        if row["outcome"] != "ok" or row["tokens_per_second"] < SLOWER * before:
            return
        before = row["tokens_per_second"]


def options_of(row: dict[str, Any], overrides: Sequence[str] = ()) -> str:
    """The options of 05_pretrain.sh and run_all.sh that train with a row's settings.

    overrides: the --set options of the probe itself, which the training needs, too.
    """
    parts = [f"--set {_word(override)}" for override in overrides]
    parts += [f"--set pretrain.per_device_train_batch_size={row['micro_batch']}"]
    parts += [f"--set {_word(f'pretrain.{key}={json.dumps(value)}')}" for key, value in row["values"].items()]
    return " ".join([*parts, row["launch"]]).strip()


def _word(override: str) -> str:
    """FILE.KEY=VALUE without blanks, because a shell splits the output of `cat probe.options` at blanks."""
    key, _, value = override.partition("=")
    try:
        value = json.loads(value)
    except json.JSONDecodeError:
        if " " not in value:
            return override
    return f"{key}={json.dumps(value, separators=(',', ':'))}".replace(" ", r"\u0020")


def launch_words(launch: Launch) -> str:
    """The options that shard over the ranks; empty for one process, or for DDP."""
    parts = [f"--deepspeed {launch.deepspeed}"] if launch.deepspeed else []
    parts += ["--fsdp"] if launch.fsdp else []
    parts += [f"--tensor-parallel {launch.tensor_parallel}"] if launch.tensor_parallel > 1 else []
    return " ".join(parts)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, the fastest first."""
    table = []
    for row in sorted(rows, key=lambda row: -row.get("tokens_per_second", 0)):
        figures = ["", "", ""]
        if row["outcome"] == "ok":
            figures = [
                f"{row['tokens_per_second']:,.0f}",
                f"{row['flops_per_second'] / 1e9:,.0f}",
                f"{row['peak_memory_bytes'] / fitting.GIB:.2f}",
            ]
        outcome = row["outcome"] + (f": {row['reason']}" if row.get("reason") else "")
        cells = [row["checkpointing"], row["compiled"], row["attention"], sharding_of(row)]
        table.append([str(row["micro_batch"]), *cells, *figures, outcome.replace("|", "/")])
    heads = ("micro-batch", "checkpointing", "compiled", "attention", "sharding")
    heads += ("tokens/s", "GFLOP/s", "peak GiB", "outcome")
    return "\n".join(markdown_table(heads, table, "rllllrrrl"))


def sharding_of(row: dict[str, Any]) -> str:
    """The column of sharding: the options, or what there is without any."""
    return row["launch"] or ("DDP" if row["ranks"] > 1 else "one rank")


def finalists(rows: list[tuple[Way, dict[str, Any]]]) -> list[tuple[Way, int]]:
    """The way and micro-batch of the fastest row of each sharding; empty unless several were measured."""
    best: dict[tuple[int, str], tuple[Way, int]] = {}
    for way, row in sorted(rows, key=lambda measured: measured[1].get("tokens_per_second", 0)):
        if row["outcome"] == "ok":
            best[row["ranks"], row["launch"]] = way, row["micro_batch"]
    return list(best.values()) if len(best) > 1 else []


def comparison(rows: list[dict[str, Any]], global_batch: int) -> str:
    """Rows of one global batch as a Markdown table, with their speed relative to one rank.

    communication: see `recipe.training.communication`, of rank 0 in the last step.
    """
    alone = next((row for row in rows if row["ranks"] == 1 and row["outcome"] == "ok"), None)
    table = []
    for row in rows:
        cells = [row["outcome"], "", "", ""]
        if row["outcome"] == "ok":
            speed = row["tokens_per_second"]
            speed_up = f"{speed / alone['tokens_per_second']:.2f}" if alone else ""
            share = f"{row['communication']:.0%}" if "communication" in row else ""
            cells = [f"{speed:,.0f}", speed_up, share, f"{row['peak_memory_bytes'] / fitting.GIB:.2f}"]
        table.append([sharding_of(row), str(row["ranks"]), str(row["micro_batch"]), *cells])
    heads = (
        "sharding",
        "ranks",
        "micro-batch",
        "tokens/s",
        "speed-up",
        "communication",
        "peak GiB of a rank",
    )
    title = f"With the global batch of the training, {global_batch} sequences a step:\n"
    return "\n".join([title, *markdown_table(heads, table)])


def measure(
    script: Path, plan: dict[str, Any], way: Way, micro: int, whole_batch: bool = False
) -> dict[str, Any]:
    """A row of the table: the plan's training with these settings, for `STEPS` steps.

    plan: ``recipe``, ``config`` and ``inputs``, as `recipe.run.launch` gives them to a training. At most two
    micro-batches are accumulated: memory is highest in the second one, and more would only take time. The
    optimizer's share of a step is therefore somewhat larger than in the training. whole_batch: accumulate
    the training's own global batch instead, so that rows can be compared.
    """
    values, launch = plan["config"]["pretrain"], way.launch
    replicas = launch.ranks // launch.tensor_parallel
    accumulation = min(2, values["global_batch_size"] // replicas // micro)
    values = values | SHORT | way.values | {"per_device_train_batch_size": micro}
    if not whole_batch:
        values["global_batch_size"] = micro * replicas * accumulation
    own = plan["config"]["pretrain"]
    changed = {key: value for key, value in way.values.items() if value is not None or key in own}
    row = {"micro_batch": micro, "values": changed, "launch": launch_words(launch)}
    row |= {"ranks": launch.ranks, "compiled": "yes" if way.compiled else "no"}
    row["checkpointing"] = CHECKPOINTED[way.checkpointed]
    row["attention"] = way.attention or values.get("attn_implementation", "auto")
    config = plan["config"] | {"pretrain": values}
    path = launch.check(config, "pretrain")
    shape, setting, free = preflight.on_this_machine(plan["recipe"], config, launch)
    peak = memory(shape, setting)["peak"]
    if peak > HOPELESS * free:
        needed, there = (f"{size / fitting.GIB:.0f} GiB" for size in (peak, free))
        reason = f"about {needed} per rank by the preflight, {there} are free"
        return row | {"outcome": "not tried", "reason": reason}
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=OUTPUTS / plan["recipe"]) as name:
        folder = Path(name)
        plan = training_plan(plan["recipe"], config, plan["inputs"], launch, path, folder)
        write_json(folder / "plan.json", plan | {"probe": True})
        line = command(str(script), [str(folder / "plan.json")], launch, path, visible_devices())
        row |= attempt(line, folder, child_environment(os.environ, launch.processes))
    if row["outcome"] == "ok":
        row["flops_per_second"] = row["mfu"] * row["gemm_peak_flops"] * launch.ranks
    return row


def search(script: Path, plan: dict[str, Any], launch: Launch) -> list[tuple[Way, dict[str, Any]]]:
    """Measure the ways to train, printing each row as soon as it is measured.

    Checkpointing only saves memory: it is measured where, without it, not every micro-batch fits.
    """
    values, model = plan["config"]["pretrain"], model_values(plan["config"])
    replicas = launch.ranks // launch.tensor_parallel
    own, accumulation = batch_layout(
        values["global_batch_size"], values["per_device_train_batch_size"], replicas
    )
    if launch.ranks > 1 and not launch_words(launch) and values.get("muon_learning_rate"):
        print(
            f"ZeRO is left out because it does not work with Muon ({' '.join(without_muon(values))})",
            flush=True,
        )
    here, needs = glance(), attention_needs(plan["config"], "pretrain")
    kernels = usable_attention(here, needs, choose(here, values, needs=needs))
    rows: list[tuple[Way, dict[str, Any]]] = []
    enough_memory: list[tuple[Launch, bool]] = []
    micros = micro_batches(own * accumulation, own, sequences_of_longest(values))
    for way in progress(ways_to_train(values, model, launch, kernels, here.compiler), "probe", "ways"):
        if (way.launch, way.compiled) in enough_memory and way.checkpointed:
            continue
        for row in climb(micros, lambda micro, way=way: measure(script, plan, way, micro)):
            rows.append((way, row))
            tqdm.write(table([row]).splitlines()[-1])
        if rows and rows[-1][1]["outcome"] == "ok":
            enough_memory.append((way.launch, way.compiled))
    return rows


def main(script: Path) -> None:
    """Probe a recipe whose stages 03 and 04 are done, with the options of 05_pretrain.sh."""
    parser = stage_arguments("Measure which settings of stage 05 are the fastest.")
    add_options(parser)
    arguments = parser.parse_args()
    write_lines_without_a_terminal()
    recipe, launch = arguments.recipe, launch_of(arguments)
    if launch.nodes > 1 or launch.hostfile:
        raise Refused("--probe measures on one machine. Leave --nnodes and --hostfile out")
    config = load_recipe(recipe, arguments.overrides)
    inputs = {stage: stage_folder(recipe, stage) for stage in ("03_tokenizer", "04_tokenize")}
    for stage, folder in inputs.items():
        if not is_finished(folder):
            raise Refused(f"--probe needs {stage}. Run `bash run_all.sh --recipe {recipe} --to 04`")
    if find_initial(config["pretrain"]):
        # Check again: the checkpoint's config.json has been fetched since.
        check_recipe(config, f"configs/{recipe}")
    launch.check(config, "pretrain", glance())
    plan = {"recipe": recipe, "config": config, "inputs": inputs}
    folder = OUTPUTS / recipe
    # A stage of the recipe at the same time would distort what is measured.
    with hold(folder, "--probe"):
        for killed in folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(killed)
        tried = search(script, plan, launch)
        compared = [measure(script, plan, way, micro, whole_batch=True) for way, micro in finalists(tried)]
    rows = [row for _, row in tried]
    shown = f"{table(rows)}\n\n{MEASURED}"
    if compared:
        shown += "\n\n" + comparison(compared, config["pretrain"]["global_batch_size"])
    # Where every comparison fails, the rows of the search still tell something.
    measured = [row for row in compared if row["outcome"] == "ok"]
    measured = measured or [row for row in rows if row["outcome"] == "ok"]
    if not measured:
        raise RecipeError(f"every setting failed:\n{shown}\nTry what `05_pretrain.sh --dry-run` suggests")
    fastest = max(measured, key=lambda row: row["tokens_per_second"])
    options = options_of(fastest, arguments.overrides)
    if arguments.nproc or fastest["ranks"] != launch.ranks:
        options += f" --nproc {fastest['ranks']}"
    write_text(folder / "probe.md", f"{shown}\n\nfastest: {options}\n")
    write_text(folder / "probe.options", options + "\n")
    write_json(folder / "probe.json", {"figures": fastest})
    print(f"\n{shown}\n\nfastest: {options}", flush=True)
    print(
        f"To train with it: bash run_all.sh --recipe {recipe} $(cat outputs/{recipe}/probe.options)",
        flush=True,
    )
