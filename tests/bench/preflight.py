"""How near the preflight's peak memory is to the measured one, for several models and modes, on a CPU.

Each row is a real training of a few steps by run_clm.py, in a process of its own, started as `--probe` starts
it. Compiled rows start from an empty cache. The aim is to stay within 15 %. On a GPU the rows are others, and
what is measured is what PyTorch reserves, without the context of CUDA, which the computed peak includes. Name
rows to run only those.

Run:  .venv/bin/python tests/bench/preflight.py [ROW]...
"""

import json
import os
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from recipe.config.recipe import load_recipe
from recipe.hardware import count_gpus
from recipe.project import ROOT
from recipe.run import fitting, probe
from recipe.run.launch_options import Launch
from recipe.run.memory import memory, shape_of
from recipe.tokenization.token_files import write_token_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

SIX_MILLION = {"model_type": "qwen3", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
SIX_MILLION |= {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
THIRTY = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 7}
THIRTY |= {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}
FORTY_EIGHT = {"model_type": "mistral", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6}
FORTY_EIGHT |= {"num_attention_heads": 8, "num_key_value_heads": 8}
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12}
FP32, MUON = {"bf16": False}, {"muon_learning_rate": 0.01}
ONE, TWO = Launch(), Launch(processes=2)
# model, vocabulary, block, micro-batch, micro-batches accumulated, checkpointing, compiled, other keys,
# launch
ROWS: dict[str, tuple[Any, ...]] = {
    "6M one block": (SIX_MILLION, 8000, 64, 1, 1, False, False, {}, ONE),
    "6M": (SIX_MILLION, 8000, 256, 16, 1, False, False, {}, ONE),
    "6M compiled": (SIX_MILLION, 8000, 256, 16, 1, False, True, {}, ONE),
    "6M Muon compiled": (SIX_MILLION, 8000, 256, 32, 2, False, True, MUON, ONE),
    "6M fp32": (SIX_MILLION, 8000, 256, 32, 1, False, False, FP32, ONE),
    "6M checkpointing": (SIX_MILLION, 8000, 256, 64, 1, True, False, {}, ONE),
    "30M": (THIRTY, 16000, 512, 8, 2, False, False, {}, ONE),
    "30M compiled": (THIRTY, 16000, 512, 8, 2, False, True, {}, ONE),
    "30M checkpointing compiled": (THIRTY, 16000, 512, 8, 2, True, True, {}, ONE),
    "48M": (FORTY_EIGHT, 32000, 1024, 2, 1, False, False, {}, ONE),
    "109M GPT-2": (GPT2, 30000, 512, 2, 2, False, False, {}, ONE),
    "30M DDP 2": (THIRTY, 16000, 512, 1, 2, False, False, {}, TWO),
    "30M ZeRO-2, 2 ranks": (THIRTY, 16000, 512, 1, 2, False, False, {}, replace(TWO, deepspeed="zero2")),
    "30M FSDP2, 2 ranks": (THIRTY, 16000, 512, 1, 2, False, False, {}, replace(TWO, fsdp=True)),
    "30M TP 2": (THIRTY, 16000, 512, 1, 2, False, False, {}, replace(TWO, tensor_parallel=2)),
    "109M GPT-2 FSDP2, 2 ranks": (GPT2, 30000, 512, 1, 2, False, False, {}, replace(TWO, fsdp=True)),
    "109M GPT-2 ZeRO-3, 2 ranks": (GPT2, 30000, 512, 1, 2, False, False, {}, replace(TWO, deepspeed="zero3")),
}

MISTRAL, MEDIUM, TINY = (
    load_recipe(name)["model"] for name in ("mistral-300m", "gpt2-medium-aozora", "tiny")
)
ON_A_GPU: dict[str, tuple[Any, ...]] = {
    "mistral-300m, 4": (MISTRAL, 32_000, 1024, 4, 1, False, False, {}, ONE),
    "mistral-300m, 4, checkpointing": (MISTRAL, 32_000, 1024, 4, 1, True, False, {}, ONE),
    "mistral-300m, 16": (MISTRAL, 32_000, 1024, 16, 1, False, True, {}, ONE),
    "mistral-300m, 16, checkpointing": (MISTRAL, 32_000, 1024, 16, 1, True, False, {}, ONE),
    "gpt2-medium, 8": (MEDIUM, 32_000, 1024, 8, 1, False, False, {}, ONE),
    "tiny, 16": (TINY, 8000, 512, 16, 1, False, False, {}, ONE),
}


def inputs(folder: Path, vocabulary: int) -> dict[str, Path]:
    """What stages 03 and 04 would give: a tokenizer of `vocabulary` words, and random tokens."""
    words = {f"w{i}": i for i in range(vocabulary)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")),
        pad_token="w0",
        bos_token="w2",
        eos_token="w3",
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    draw = np.random.default_rng(0)
    for side in ("train", "valid"):
        write_token_file(
            folder / side, (draw.integers(4, vocabulary, 300).tolist() for _ in range(3000)), vocabulary
        )
    totals = {"tokens": 900_000, "bytes": 3_600_000, "documents": 3000, "largest_id": vocabulary - 1}
    sides = ("train", "valid")
    counted = {"totals": dict.fromkeys(sides, totals), "sources": dict.fromkeys(sides, {})}
    (folder / "stage.json").write_text(json.dumps({"figures": counted}))
    return {"03_tokenizer": folder / "tokenizer", "04_tokenize": folder}


def run(name: str) -> tuple[dict[str, float], dict[str, Any], int]:
    """(computed bytes by part, the probe's row, parameters) of one training."""
    model, vocabulary, block, micro, accumulation, checkpointing, compiled, more, launch = (ROWS | ON_A_GPU)[
        name
    ]
    values = {
        "block_size": block,
        "global_batch_size": micro * accumulation * launch.ranks // launch.tensor_parallel,
        "per_device_train_batch_size": micro,
        "learning_rate": 1e-4,
    } | more
    config = {
        "dataset": {"sources": {}},
        "tokenizer": {"vocab_size": vocabulary},
        "model": model,
        "pretrain": values,
        "generation": {"prompts": []},
    }
    chosen = values | {"activation_checkpointing": checkpointing, "torch_compile": compiled}
    here, _ = fitting.this_machine(launch)
    shape = shape_of(model, vocabulary)
    computed = memory(shape, fitting.setting_of(chosen, here, launch))
    with tempfile.TemporaryDirectory() as folder:
        probe.OUTPUTS = Path(folder)
        (probe.OUTPUTS / "bench").mkdir()
        plan = {"recipe": "bench", "config": config, "inputs": inputs(Path(folder), vocabulary)}
        script = ROOT / "pretrain/run_clm.py"
        row = probe.measure(script, plan, probe.Way(launch, int(checkpointing), compiled), micro)
    return computed, row, shape.parameters


def main() -> None:
    """Print computed and measured peaks."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a row's training ends, too
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor-")
    heads = ["training", "parameters", "computed MiB", "measured MiB", "computed / measured", "tokens/s"]
    # What is measured on a GPU, the bytes that PyTorch has reserved, is without the context of the process.
    heads += ["without the process"] if count_gpus() else []
    print(f"| {' | '.join(heads)} |\n|---{'|---:' * (len(heads) - 1)}|", flush=True)
    for name in sys.argv[1:] or (ON_A_GPU if count_gpus() else ROWS):
        computed, row, parameters = run(name)
        peak = computed["peak"]
        if row["outcome"] != "ok":
            print(f"| {name} | {parameters:,} | {row} |", flush=True)
            continue
        measured = row["peak_memory_bytes"]
        cells = [name, f"{parameters:,}", f"{peak / 2**20:,.0f}", f"{measured / 2**20:,.0f}"]
        cells += [f"{peak / measured:.3f}", f"{row['tokens_per_second']:,.0f}"]
        cells += [f"{(peak - computed['process']) / measured:.3f}"] if count_gpus() else []
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
