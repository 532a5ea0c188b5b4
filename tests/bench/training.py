"""Pretraining compared with the stock Trainer: tokens/s, time to the first million tokens, memory, loss.

All rows train the same model from the same initial weights on the same tokens in the same order, 8 x 512 of
them per step, by AdamW with the same rates. Each row is a process of its own, one after the other, and all
rows are repeated.

- ``stock fp32``: transformers' Trainer as transformers' own run_clm.py uses it: blocks that are cut anywhere,
  attention across documents, float32.
- ``stock bf16, compiled``: the same with bf16 and torch.compile. The ratios compare with it.
- ``stock bf16, compiled, packed``: the same on our packed blocks, without attention across
  documents (position_ids).
- ``ours``: stage 05.

The loss is that of the saved model on the same packed validation blocks, in float32. The first repeat
compiles with an empty cache: its start counts in the time to a million tokens, the rest of which is computed
from the median step. MFU is relative to the fastest bf16 matrix product within a second after the row,
because the speed of the machine changes from minute to minute.

Run (about 20 minutes, nothing else running):
    .venv/bin/python tests/bench/training.py [6m] [30m]
    .venv/bin/python tests/bench/training.py profile      the time of the parts of a step (2 minutes)
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "pretrain"))
RECIPE = "bench-training"
OUTPUTS = ROOT / "outputs" / RECIPE
TOKENIZER = OUTPUTS / "03_tokenizer"
BLOCK, BATCH, REPEATS, VALID = 512, 8, 3, 32
SHAPES = {
    "6m": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 5},
    "30m": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}
STEPS = {"6m": 30, "30m": 12}
RATES = {"learning_rate": 1e-3, "weight_decay": 0.1, "adam_beta2": 0.95, "warmup_steps": 4, "seed": 42}
ROWS = {
    "stock fp32": {},
    "stock bf16, compiled": {"bf16": True, "torch_compile": True},
    "stock bf16, compiled, packed": {"bf16": True, "torch_compile": True},
    "ours": None,
}


def model_values(shape: str) -> dict[str, Any]:
    """model.json of tiny in another shape."""
    return json.loads((ROOT / "configs/tiny/model.json").read_text()) | SHAPES[shape]


def blocks(side: str, count: int) -> Any:
    """The first `count` packed blocks of a side; the training side in the order of stage 05."""
    from recipe.tokenization.packing import PackedBlocks
    from recipe.tokenization.token_files import TokenFile

    seed = RATES["seed"] if side == "train" else None
    return PackedBlocks(TokenFile(OUTPUTS / "04_tokenize" / side), BLOCK, 0, seed, count)


def stock(name: str, shape: str, folder: Path) -> None:
    """Train as run_clm.py does; a line per step goes to metrics.jsonl, the model to the folder."""
    from recipe.model.build import build_model
    from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments, default_data_collator

    class Steps(TrainerCallback):
        """Note when each step ended."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """Append the time."""
            with (folder / "metrics.jsonl").open("a") as handle:
                handle.write(json.dumps({"loss": 0, "seconds": time.perf_counter()}) + "\n")

    samples = blocks("train", BATCH * STEPS[shape])
    if "packed" not in name:  # the stock loss shifts the labels by itself
        ids = [samples[item]["input_ids"] for item in range(BATCH * STEPS[shape])]
        samples = [{"input_ids": row, "labels": row} for row in ids]
    model = build_model(model_values(shape), AutoTokenizer.from_pretrained(TOKENIZER), "sdpa", RATES["seed"])
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS[shape],
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_steps=STEPS[shape],
        **RATES,
        **ROWS[name],
    )
    trainer = Trainer(
        model, arguments, data_collator=default_data_collator, train_dataset=samples, callbacks=[Steps()]
    )
    trainer.train()
    trainer.save_model(str(folder))


@contextmanager
def recipe() -> Iterator[None]:
    """The data of tiny as a recipe of its own; its configs are removed afterwards."""
    folder = ROOT / "configs" / RECIPE
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "configs/tiny", folder)
    try:
        bash("run_all.sh", "--recipe", RECIPE, "--to", "04")
        yield
    finally:
        shutil.rmtree(folder)


def configure(shape: str) -> None:
    """Let stage 05 train this shape by AdamW."""
    folder = ROOT / "configs" / RECIPE
    (folder / "model.json").write_text(json.dumps(model_values(shape)))
    values = RATES | {"block_size": BLOCK, "global_batch_size": BATCH, "per_device_train_batch_size": BATCH}
    values |= {"max_steps": STEPS[shape], "logging_steps": 1, "eval_blocks": VALID, "save_strategy": "no"}
    (folder / "pretrain.json").write_text(json.dumps(values))


def bash(*arguments: str, **keywords: Any) -> None:
    """Run one of the project's scripts; its output goes to stderr."""
    subprocess.run(["bash", *arguments], cwd=ROOT, check=True, stdout=sys.stderr, **keywords)


def measure(name: str, shape: str, cache: Path) -> dict[str, float]:
    """Seconds of a median step and to the end of the first, peak GiB, loss, FLOP/s of a matrix product."""
    from recipe.hardware import gemm_peak

    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    with tempfile.TemporaryDirectory() as temporary:
        ours = name == "ours"
        folder = OUTPUTS / "05_pretrain" if ours else Path(temporary)
        work = OUTPUTS / ".05_pretrain.work" if ours else folder  # until the stage is published
        (work / "metrics.jsonl").unlink(missing_ok=True)
        first: list[float] = []
        started = time.perf_counter()
        watcher = threading.Thread(target=_wait_for_line, args=(work / "metrics.jsonl", first), daemon=True)
        watcher.start()
        if ours:
            line = ["bash", "pretrain/05_pretrain.sh", "--recipe", RECIPE, "--force"]
        else:
            line = [sys.executable, __file__, "stock", name, shape, str(folder)]
        child = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=sys.stderr)
        _, status, used = os.wait4(child.pid, 0)
        if status:
            raise SystemExit(f"{name} failed")
        watcher.join()
        rows = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        ends = [row["seconds"] for row in rows if "loss" in row]
        return {
            "step": statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False)),
            "first": first[0] - started,
            "memory": used.ru_maxrss / 2**20,
            "loss": valid_loss(folder),
            "peak": gemm_peak("cpu", "bf16", 1.0),
        }


def _wait_for_line(path: Path, found: list[float]) -> None:
    while not (path.exists() and path.stat().st_size):
        time.sleep(0.05)
    found.append(time.perf_counter())


def valid_loss(folder: Path) -> float:
    """Loss of a saved model on the validation blocks, float32, nats per token."""
    import torch
    from recipe.model.build import load_model

    model, samples = load_model(folder), blocks("valid", VALID)
    total = count = 0.0
    for item in range(VALID):
        sample = {key: value[None] for key, value in samples[item].items()}
        with torch.inference_mode():
            trained = (sample["shift_labels"] >= 0).sum().item()
            total += model(**sample, use_cache=False).loss.item() * trained
        count += trained
    return total / count


def compare(shape: str) -> None:
    """Run all rows, one after the other, and print the table."""
    from recipe.model.build import build_model, flops_per_token, parameter_count
    from transformers import AutoTokenizer

    results: dict[str, list[dict[str, float]]] = {name: [] for name in ROWS}
    configure(shape)
    with tempfile.TemporaryDirectory() as caches:
        for repeat in range(REPEATS):
            for number, name in enumerate(ROWS):
                results[name].append(measure(name, shape, Path(caches) / str(number)))
                print(f"{repeat + 1}: {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    model = build_model(model_values(shape), AutoTokenizer.from_pretrained(TOKENIZER), "sdpa", 0)
    flops, peaks = flops_per_token(model, BLOCK), [run["peak"] for runs in results.values() for run in runs]
    steps = {name: statistics.median(run["step"] for run in runs) for name, runs in results.items()}
    print(
        f"\n{parameter_count(model):,} parameters, {STEPS[shape]} steps of {BATCH} x {BLOCK} tokens, "
        f"median of {REPEATS}; bf16 GEMM peak {min(peaks) / 1e9:.0f} to {max(peaks) / 1e9:.0f} GFLOP/s\n"
    )
    print("| trainer | tokens/s | least to most | ratio | MFU | first 1M tokens | peak memory | valid loss |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, runs in results.items():
        speeds = sorted(BATCH * BLOCK / run["step"] for run in runs)
        speed = BATCH * BLOCK / steps[name]
        mfu = statistics.median(BATCH * BLOCK * flops / run["step"] / run["peak"] for run in runs)
        million = runs[0]["first"] + (1e6 / (BATCH * BLOCK) - 1) * steps[name]
        print(
            f"| {name} | {speed:,.0f} | {speeds[0]:,.0f} to {speeds[-1]:,.0f} | "
            f"{steps['stock bf16, compiled'] / steps[name]:.2f} | {mfu:.0%} | {million:.0f} s | "
            f"{max(run['memory'] for run in runs):.2f} GiB | "
            f"{statistics.median(run['loss'] for run in runs):.4f} |"
        )


def profile(shape: str) -> None:
    """Print the time of the parts of a compiled bf16 step in milliseconds, stock and ours."""
    import torch
    from recipe.model.build import build_model
    from recipe.model.losses import return_loss_only
    from torch.profiler import ProfilerActivity
    from transformers import AutoTokenizer

    tokenizer, samples = AutoTokenizer.from_pretrained(TOKENIZER), blocks("train", 6 * BATCH)
    table: dict[str, dict[str, float]] = {}
    for name in ("stock bf16, compiled", "ours"):
        torch.compiler.reset()
        model = build_model(
            model_values(shape), tokenizer, "documents" if name == "ours" else "sdpa", 0
        ).train()
        model.config.use_cache = False
        if name == "ours":
            return_loss_only(model)
        call = torch.compile(model)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

        def step(number: int, name: str = name, call: Any = call, optimizer: Any = optimizer) -> None:
            rows = [samples[number * BATCH + row] for row in range(BATCH)]
            batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
            if name != "ours":
                batch = {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
            with torch.autocast("cpu", torch.bfloat16):
                output = call(**batch)
            if name != "ours":
                output["logits"] = output["logits"].float()  # as accelerate does with all outputs
            output["loss"].backward()
            torch.nn.utils.clip_grad_norm_(call.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        step(0), step(1)
        with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
            for number in range(2, 6):
                step(number)
        table[name] = _parts(profiler.key_averages(), 4)
    print(f"\n{shape}, milliseconds a step:\n\n| | " + " | ".join(table) + " |\n|---|---:|---:|")
    for part in table["ours"]:
        print(f"| {part} | " + " | ".join(f"{row[part]:.0f}" for row in table.values()) + " |")


def _parts(events: Any, steps: int) -> dict[str, float]:
    """Milliseconds per step of each part, from the profiler's table; the parts add up to the total."""
    own = {event.key: event.self_cpu_time_total / steps / 1000 for event in events}
    whole = {event.key: event.cpu_time_total / steps / 1000 for event in events}
    attention = [key for key in whole if "attention" in key and ("recipe::" in key or "flash" in key)]
    parts = {
        "matrix products of the layers and the output": own.get("aten::mm", 0),
        "attention": sum(whole[key] for key in attention),
        "norms, rotations, activations, loss (fused kernels)": sum(
            time for key, time in own.items() if "CompiledFxGraph" in key
        ),
        "optimizer": sum(time for key, time in whole.items() if key.startswith("Optimizer.step")),
    }
    total = sum(own.values())
    return parts | {"everything else": total - sum(parts.values()), "total": total}


def main() -> None:
    """Run the process of a row, the profile, or the tables."""
    words = sys.argv[1:]
    if words[:1] == ["stock"]:
        stock(words[1], words[2], Path(words[3]))
        return
    show = profile if words[:1] == ["profile"] else compare
    with recipe():
        for shape in [word for word in words if word in SHAPES] or SHAPES:
            show(shape)


if __name__ == "__main__":
    main()
