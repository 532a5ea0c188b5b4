"""Generation speed: tokens/s of plain generate() in a loop, of batches, and with a static cache and
torch.compile.

The model is a finished one (outputs/tiny/05_pretrain unless another folder is named): every prompt gets the
same number of new tokens, sampled as tiny samples. Every way runs once unmeasured first; what that first run
cost beyond the others (compiling) is a column of its own. Under the table: whether batches of 8 are at least
twice as fast as the loop.

Run:  python tests/bench/generation.py [MODEL_FOLDER]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from recipe.config import read_config
from recipe.generation import generate_all, generation_config
from recipe.modeling import for_inference, load_model
from recipe.outputs import CONFIGS, OUTPUTS
from recipe.tokenizer import prompt_ids
from transformers import AutoTokenizer

PROMPTS, NEW, ROUNDS = 32, 48, 3
TEXTS = ("今日は", "このコマンドは、指定されたファイルを", "彼女は昨日", "大規模言語モデルとは、")


def main() -> None:
    """Measure and print the table."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUTS / "tiny/05_pretrain"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), for_inference(load_model(folder))
    values = read_config(CONFIGS / "tiny/generation.json") | {"max_new_tokens": NEW, "min_new_tokens": NEW}
    config = generation_config(values, tokenizer)
    static = generation_config(values | {"cache_implementation": "static"}, tokenizer)
    prompts = [prompt_ids(tokenizer, TEXTS[i % len(TEXTS)]) for i in range(PROMPTS)]

    def loop() -> None:
        for prompt in prompts:
            ids = torch.tensor([prompt], device=model.device)
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)

    def batches(size: int, generation=config) -> Callable[[], object]:
        return lambda: generate_all(model, tokenizer, prompts, generation, 0, size)

    ways: dict[str, Callable[[], object]] = {
        "generate() in a loop": loop,
        "generate_all, batch 1": batches(1),
        "generate_all, batch 8": batches(8),
        "generate_all, batch 32": batches(32),
        "batch 8, static cache": batches(8, static),
        "batch 8, static cache, compiled": batches(8, static),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    plain = model.forward
    compiled = torch.compile(plain, dynamic=False)
    for _ in range(ROUNDS + 1):  # in turn, so that a busy moment meets all of them
        for name, run in ways.items():
            model.forward = compiled if "compiled" in name else plain
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    best = {name: min(times[1:]) for name, times in seconds.items()}
    print(f"{folder}: {PROMPTS} prompts, {NEW} new tokens each, on {model.device}, best of {ROUNDS}\n")
    print("| way | tokens/s | ratio | first run, s more |\n|---|---:|---:|---:|")
    for name, time_ in best.items():
        first = max(0.0, seconds[name][0] - time_)
        ratio = best["generate() in a loop"] / time_
        print(f"| {name} | {PROMPTS * NEW / time_:,.0f} | {ratio:.2f} | {first:.1f} |")
    ratio = best["generate() in a loop"] / best["generate_all, batch 8"]
    print(f"\nbatch 8: {ratio:.2f} times the loop: {'at least 2' if ratio >= 2 else 'BELOW 2'}")


if __name__ == "__main__":
    main()
