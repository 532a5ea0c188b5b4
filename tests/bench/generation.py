"""Generation speed: generate() in a loop, in batches, with a static cache and with torch.compile.

The model is a trained one. Every prompt gets the same number of new tokens, sampled as in the recipe tiny.
The first run of each method is not measured; the last column shows how much longer it took (compilation).
Below the table: whether batches of 8 with the best cache are at least twice as fast as the loop.

Run (about 2 minutes, nothing else running; run tiny to stage 05 first, or name another model folder):
    .venv/bin/python tests/bench/generation.py [MODEL_FOLDER]
"""

import copy
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, CompileConfig, GenerationConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "pretrain"))
PROMPTS, NEW, ROUNDS = 16, 48, 3
TEXTS = ("今日は", "このコマンドは、指定されたファイルを", "彼女は昨日", "大規模言語モデルとは、")
LOOP, BATCH = "generate() in a loop", "batch 8"


def configs(tokenizer: Any) -> dict[str, GenerationConfig]:
    """tiny's sampling with transformers' default cache, with a static one, and with decoding compiled."""
    from recipe.config.keys import read_config
    from recipe.evaluation.generation import generation_config
    from recipe.project import CONFIGS

    values = read_config(CONFIGS / "tiny/generation.json") | {"max_new_tokens": NEW, "min_new_tokens": NEW}
    static = generation_config(values | {"cache_implementation": "static"}, tokenizer)
    compiled = copy.deepcopy(static)
    compiled.compile_config = CompileConfig(dynamic=False, mode="default")
    compiled.compile_config._compile_all_devices = True  # without this only on GPUs
    plain = generation_config(values, tokenizer)
    return {"": plain, ", static cache": static, ", static cache, compiled": compiled}


def main() -> None:
    """Measure and print the table."""
    from recipe.evaluation.generation import generate_all
    from recipe.model.build import for_inference, load_model
    from recipe.project import OUTPUTS
    from recipe.tokenization.encode_text import prompt_ids

    transformers.logging.set_verbosity_error()
    scratch = tempfile.TemporaryDirectory()  # an empty cache, so that the first run compiles
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch.name
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUTS / "tiny/05_pretrain"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), for_inference(load_model(folder))
    prompts = [prompt_ids(tokenizer, TEXTS[i % len(TEXTS)]) for i in range(PROMPTS)]
    caches = configs(tokenizer)

    def loop() -> None:
        for prompt in prompts:
            ids = torch.tensor([prompt], device=model.device)
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=caches[""])

    def batches(size: int, config: GenerationConfig) -> Callable[[], object]:
        return lambda: generate_all(model, tokenizer, prompts, config, 0, size)

    ways: dict[str, Callable[[], object]] = {
        LOOP: loop,
        "batch 16": batches(16, caches[""]),
        **{BATCH + name: batches(8, config) for name, config in caches.items()},
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):  # in turn, so that other load affects all
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
            print(f"round {turn} of {ROUNDS}, {name}: {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)
    best = {name: min(times[1:]) for name, times in seconds.items()}
    print(f"{PROMPTS} prompts, {NEW} new tokens each, on {model.device}, best of {ROUNDS}\n")
    print("| way | tokens/s | ratio | first run, s more |\n|---|---:|---:|---:|")
    for name, time_ in best.items():
        first = max(0.0, seconds[name][0] - time_)
        print(f"| {name} | {PROMPTS * NEW / time_:,.0f} | {best[LOOP] / time_:.2f} | {first:.1f} |")
    fastest = min((BATCH + name for name in caches), key=best.__getitem__)
    ratio = best[LOOP] / best[fastest]
    print(f"\n{fastest}: {ratio:.2f} times the loop: {'at least 2' if ratio >= 2 else 'BELOW 2'}")


if __name__ == "__main__":
    main()
