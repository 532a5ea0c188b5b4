"""What a GPU does with mistral-300m and small: speed against the stock Trainer, waiting, attention, hours.

All tokens are random, so that nothing must be downloaded. Each row is a process of its own, and is printed as
soon as it is measured. gpu.sh runs all sections. With `--tiny` each section is rehearsed with the smallest
sizes, also on a CPU: such figures say nothing about speed.

- ``training``: 16 x 1,024 tokens a step. The stock Trainer reads random tokens without documents, by bf16,
  compiled (the peer) and uncompiled (as transformers' own run_clm.py does). Ours is run_clm.py of this
  project on packed documents of 300 tokens, started as `--probe` starts it. "First step": seconds to its end,
  after the model is built, with an empty cache of compiled code. Of ours also what NVML says, and the share
  of the time in which the GPU runs no kernel, over four of the steps (torch.profiler).
- ``documents``: the same with blocks of 4,096 tokens and 8 layers, without the uncompiled row.
- ``attention``: ours, 4 layers, by each kernel that works here, and varlen with a sliding window.
- ``fp8``: ours, 4 layers, in bf16 and with the layers in fp8, with the loss of the last step.
- ``muon``: a step of Muon with AdamW for the rest, and one of AdamW alone, without a training around them.
- ``small``: the recipe `small` as it is shipped, for 200 steps: tokens/s, MFU, memory, and the hours that its
  whole pretraining would take at that speed. On a card that needs more time than gpu.sh gives, run it alone.

Run:  .venv/bin/python tests/bench/gpu.py [--tiny] SECTION...
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCH), str(BENCH.parents[1] / "pretrain")]
# The processes of a row inherit the environment.
TINY = "--tiny" in sys.argv or "BENCH_TINY" in os.environ
if TINY:
    os.environ["BENCH_TINY"] = "1"
MODEL = {
    "model_type": "mistral",
    "hidden_size": 64 if TINY else 1024,
    "intermediate_size": 128 if TINY else 2400,
    "num_hidden_layers": 2 if TINY else 24,
    "num_attention_heads": 4 if TINY else 16,
    "num_key_value_heads": 2 if TINY else 8,
    "max_position_embeddings": 4096,
    "sliding_window": None,
}
SHALLOW = MODEL | {"num_hidden_layers": 2 if TINY else 8}
SHALLOWEST = MODEL | {"num_hidden_layers": 2 if TINY else 4}
WINDOW = 64 if TINY else 1024
VOCABULARY = 1000 if TINY else 32_000
TOKENS = 1024 if TINY else 16 * 1024  # of a step
BLOCK, LONG = (128, 512) if TINY else (1024, 4096)
STEPS = 6 if TINY else 25
STEPS_OF_RECIPE = 6 if TINY else 200
PROFILED = range(2, 4) if TINY else range(10, 15)  # steps
IDLE = "idle.json"
PEER, EAGER = "stock, compiled", "stock"


def ours(
    block: int, model: dict[str, Any] = MODEL, script: Path | None = None, **more: Any
) -> dict[str, Any]:
    """The probe's row of a training by run_clm.py, with the seconds of the first step."""
    micro = TOKENS // block
    values = {"block_size": block, "global_batch_size": micro, "per_device_train_batch_size": micro}
    config = {
        "dataset": {"sources": {}},
        "tokenizer": {"vocab_size": VOCABULARY},
        "model": model,
        "pretrain": values | {"learning_rate": 1e-4} | more,
        "generation": {"prompts": []},
    }
    return trained(config, STEPS, script)


def trained(
    config: dict[str, Any], steps: int, script: Path | None = None, limit: float = 240
) -> dict[str, Any]:
    """The probe's row of so many steps by run_clm.py, with the seconds of the first step.

    config: a recipe. limit: seconds that it may take.
    """
    from preflight import inputs
    from recipe.project import ROOT, read_json, read_json_lines
    from recipe.run import probe
    from recipe.run.launch_options import Launch

    attempt, values, vocabulary = probe.attempt, config["pretrain"], config["tokenizer"]["vocab_size"]

    def attempt_and_look(line: list[str], folder: Path, environment: dict[str, str]) -> dict[str, Any]:
        row = attempt(line, folder, environment, limit)
        if row["outcome"] == "ok":
            logged = read_json_lines(folder / "metrics.jsonl")
            row |= {"first": logged[0]["seconds"], "loss": [s["loss"] for s in logged if "loss" in s][-1]}
            row |= {key: logged[-1].get(f"rank0/{key}") for key in ("gpu_percent", "watts")}
            row |= read_json(folder / IDLE) if (folder / IDLE).exists() else {}
        return row

    micro, way = values["per_device_train_batch_size"], probe.Way(Launch(), 0, True)
    probe.SHORT["max_steps"], probe.attempt = steps, attempt_and_look
    with tempfile.TemporaryDirectory() as folder:
        probe.OUTPUTS = Path(folder)
        (probe.OUTPUTS / "bench").mkdir()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
        plan = {"recipe": "bench", "config": config, "inputs": inputs(Path(folder), vocabulary)}
        row = probe.measure(script or ROOT / "pretrain/run_clm.py", plan, way, micro, whole_batch=True)
    probe.attempt = attempt
    return row


def stock(name: str, block: int, layers: int) -> dict[str, float]:
    """Train by the stock Trainer in this process: seconds of a median step and of the first, peak bytes."""
    import torch
    from recipe.hardware import peak_memory
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    ends: list[float] = []

    class Clock(TrainerCallback):
        """Note when each step has ended on the device."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            """The start."""
            ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """A step."""
            if kind == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    model = MODEL | {"num_hidden_layers": layers, "vocab_size": VOCABULARY, "use_cache": False}
    config = AutoConfig.for_model(**model)
    micro = TOKENS // block
    ids = torch.randint(4, VOCABULARY, (STEPS * micro, block))
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        max_steps=STEPS,
        per_device_train_batch_size=micro,
        bf16=True,
        torch_compile=name == PEER,
        use_cpu=kind == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    samples = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model, arguments, train_dataset=samples, callbacks=[Clock()]).train()
    steps = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    return {"step": statistics.median(steps[2:]), "first": steps[0], "memory": peak_memory(kind)}


def stock_apart(name: str, block: int, layers: int) -> dict[str, float] | None:
    """`stock` in a process of its own, with an empty cache of compiled code; None if it fails."""
    line = [sys.executable, __file__, "stock", name, str(block), str(layers)]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        ended = subprocess.run(line, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(ended.stdout.splitlines()[-1]) if ended.returncode == 0 else None


def compare(block: int, model: dict[str, Any], rows: tuple[str, ...]) -> None:
    """The table of one block size: the peer, ours, and what else `rows` names."""
    from recipe.hardware import gemm_peak
    from recipe.run.memory import shape_of

    peak = gemm_peak(_device(), "bf16")
    flops = shape_of(model, VOCABULARY).flops_per_token(block)
    size = f"{model['num_hidden_layers']} layers, {TOKENS // block} x {block} tokens a step"
    print(f"\n{size}, {_name()}, bf16 peak {peak / 1e12:.0f} TFLOP/s\n")
    print("| trainer | tokens/s | ratio | MFU | first step | peak GiB |")
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    of_peer, own = 0.0, {}
    for name in rows:
        if name == "ours":
            row = own = ours(block, model, Path(__file__))
            speed, memory = row.get("tokens_per_second"), row.get("peak_memory_bytes")
        else:
            row = stock_apart(name, block, model["num_hidden_layers"]) or {}
            speed, memory = TOKENS / row["step"] if row else None, row.get("memory")
        if not speed:
            print(f"| {name} | failed {row} |", flush=True)
            continue
        of_peer = speed if name == PEER else of_peer
        ratio = f"{speed / of_peer:.2f}" if of_peer else ""
        cells = f"{ratio} | {speed * flops / peak:.0%} | {row['first']:.0f} s | {memory / 2**30:.1f}"
        print(f"| {name} | {speed:,.0f} | {cells} |", flush=True)
    if own.get("watts") is not None:
        print(f"\nGPU: {own['gpu_percent']:.0f} % utilisation, {own['watts']:.0f} W (NVML)")
    if "idle" in own:
        print(f"\nidle, {len(PROFILED) - 1} steps of ours, {own['ms']:.0f} ms: {own['idle']:.1%}", flush=True)


def whole_recipe(name: str) -> None:
    """A recipe with its own model, batch and accumulation, for `STEPS_OF_RECIPE` steps."""
    from recipe.config.recipe import load_recipe
    from recipe.run import preflight
    from recipe.run.launch_options import Launch
    from recipe.run.memory import memory

    config = load_recipe(name)
    values, model = config["pretrain"], config["model"]
    if TINY:
        config["tokenizer"]["vocab_size"] = VOCABULARY
        model |= {key: SHALLOW[key] for key in model if key in SHALLOW and key != "model_type"}
        model["head_dim"] = 16
        values |= {"block_size": BLOCK, "global_batch_size": 8, "per_device_train_batch_size": 2}
    planned = values["max_steps"] * values["global_batch_size"] * values["block_size"]
    shape, setting, _ = preflight.on_this_machine(name, config, Launch())
    computed = memory(shape, setting)["peak"] / 2**30
    row = trained(config, STEPS_OF_RECIPE, limit=1800)
    if row["outcome"] != "ok":
        print(f"\n{name}: {row}")
        return
    active, speed = row["active"], row["tokens_per_second"]
    layout = f"{active['micro_batch']} x {active['accumulation']} x {values['block_size']}"
    print(f"\n{name}, {STEPS_OF_RECIPE} steps of {layout} tokens, {_name()}, {planned:,} tokens planned\n")
    print("| parameters | tokens/s | MFU | first step | peak GiB | computed GiB | hours, extrapolated |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    print(
        f"| {active['parameters']:,} | {speed:,.0f} | {row['mfu']:.0%} | {row['first']:.0f} s | "
        f"{row['peak_memory_bytes'] / 2**30:.2f} | {computed:.2f} | {planned / speed / 3600:.2f} |"
    )


def kernels() -> None:
    """Ours by each attention kernel."""
    rows = {name: {"attn_implementation": name} for name in ("varlen", "flex_attention", "sdpa")}
    if _device() == "cpu":
        rows = {name: {"attn_implementation": name} for name in ("documents", "sdpa")}
    heading = f"{SHALLOWEST['num_hidden_layers']} layers, {TOKENS // LONG} x {LONG} tokens a step, {_name()}"
    print(f"\n{heading}\n\n| attention | tokens/s | peak GiB |\n|---|---:|---:|")
    # Of a window the model decides; `auto` is varlen on a GPU.
    for name, values in (rows | {f"auto, window of {WINDOW}": {}}).items():
        row = ours(LONG, SHALLOWEST | ({} if values else {"sliding_window": WINDOW}), **values)
        if row["outcome"] == "ok":
            cells = f"{row['tokens_per_second']:,.0f} | {row['peak_memory_bytes'] / 2**30:.1f}"
        else:
            cells = f"{row['outcome']}: {row.get('reason', '')[:100]} |"
        print(f"| {name} | {cells} |", flush=True)


def optimizer_steps() -> None:
    """Milliseconds of a step of Muon and of AdamW over the same random gradients."""
    import torch
    from recipe.model.optimizers import MuonAdamW
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(_device()):
        config = AutoConfig.for_model(**MODEL | {"vocab_size": VOCABULARY})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    found = []
    for name, optimizer in {
        "Muon, AdamW for the rest": MuonAdamW(model, 0.01, 1e-3, (0.9, 0.95), 1e-8, 0.1),
        "AdamW": torch.optim.AdamW(model.parameters(), fused=True),
    }.items():
        times = []
        for _ in range(STEPS):
            started = time.perf_counter()
            optimizer.step()
            if _device() == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        found.append(f"{name} {1000 * statistics.median(times[2:]):.1f} ms")
    print(f"\nMuon: a step of {_name()}, {MODEL['num_hidden_layers']} layers: {'; '.join(found)}")


def in_fp8() -> None:
    """Ours without and with fp8."""
    layers = SHALLOWEST["num_hidden_layers"]
    print(f"\n{layers} layers, {TOKENS // BLOCK} x {BLOCK} tokens a step, {_name()}\n")
    print("| products of the layers | tokens/s | last loss | peak GiB |\n|---|---:|---:|---:|")
    for name in ("bf16", "fp8"):
        try:
            row = ours(BLOCK, SHALLOWEST, fp8=name == "fp8")
        except Exception as error:  # refused: no fp8 units, or no torchao
            row = {"outcome": "refused", "reason": str(error)}
        if row["outcome"] == "ok":
            memory = row["peak_memory_bytes"] / 2**30
            cells = f"{row['tokens_per_second']:,.0f} | {row['loss']:.4f} | {memory:.1f}"
        else:
            cells = f"{row['outcome']}: {row.get('reason', '')[:100]} | |"
        print(f"| {name} | {cells} |", flush=True)


def profiled_training() -> None:
    """What `compare` starts in place of run_clm.py: the same training, with some steps profiled."""
    import run_clm
    import torch
    from recipe.training import training
    from recipe.training.communication import covered
    from recipe.training.script import run_script
    from torch.profiler import DeviceType, ProfilerActivity
    from transformers import TrainerCallback

    cuda = torch.cuda.is_available()
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    folder, stock_callbacks = Path(sys.argv[1]).parent, training._callbacks

    class Profile(TrainerCallback):
        """Starts and stops the profiler between steps."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Profile the steps after PROFILED's first up to its last."""
            if state.global_step == PROFILED[0]:
                # Noting what the CPU does as well would slow the launches of kernels.
                kind = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
                self.profiler = torch.profiler.profile(activities=[kind])
                self.profiler.start()
            if state.global_step == PROFILED[-1]:
                if cuda:
                    torch.cuda.synchronize()
                self.profiler.stop()
                events = [
                    event
                    for event in self.profiler.events()
                    if event.device_type == wanted and not event.is_user_annotation
                ]
                spans = [(event.time_range.start, event.time_range.end) for event in events]
                begin, end = min(span[0] for span in spans), max(span[1] for span in spans)
                figures = {"idle": 1 - covered(spans) / (end - begin), "ms": (end - begin) / 1000}
                (folder / IDLE).write_text(json.dumps(figures))

    training._callbacks = lambda *rest: [*stock_callbacks(*rest), Profile()]
    run_script(run_clm.main)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _name() -> str:
    import torch

    return torch.cuda.get_device_name() if _device() == "cuda" else "CPU"


def main() -> None:
    """Run the process of a row, or the sections that are named."""
    # A job that gpu.sh cuts off ends its training, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    words = [word for word in sys.argv[1:] if word != "--tiny"]
    if words[0].endswith("plan.json"):
        profiled_training()
    elif words[0] == "stock":
        print("\n" + json.dumps(stock(words[1], *map(int, words[2:]))))
    sections = {
        "training": lambda: compare(BLOCK, MODEL, (PEER, "ours", EAGER)),
        "documents": lambda: compare(LONG, SHALLOW, (PEER, "ours")),
        "attention": kernels,
        "fp8": in_fp8,
        "muon": optimizer_steps,
        "small": lambda: whole_recipe("small"),
    }
    for word in words:
        if word in sections:
            sections[word]()


if __name__ == "__main__":
    main()
