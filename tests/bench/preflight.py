"""How near the preflight's peak memory comes to the measured one, over models and modes, on a CPU.

Each row is a real training of a few steps through run_clm.py, in a process of its own, as `--probe` starts
it; compiled rows start from an empty cache. Wanted: within 15 %. Name some rows to run only those.

Run:  PYTHONPATH=pretrain .venv/bin/python tests/bench/preflight.py [ROW]...
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from recipe import preflight, probe
from recipe.outputs import ROOT
from recipe.packing import write_token_file
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
# model, vocabulary, block, micro-batch, micro-batches accumulated, checkpointing, compiled, other keys
FP32, MUON = {"bf16": False}, {"muon_learning_rate": 0.01}
ROWS: dict[str, tuple[Any, ...]] = {
    "6M one block": (SIX_MILLION, 8000, 64, 1, 1, False, False, {}),
    "6M one block compiled": (SIX_MILLION, 8000, 64, 1, 1, False, True, {}),
    "6M": (SIX_MILLION, 8000, 256, 16, 1, False, False, {}),
    "6M compiled": (SIX_MILLION, 8000, 256, 16, 1, False, True, {}),
    "6M Muon compiled": (SIX_MILLION, 8000, 256, 32, 2, False, True, MUON),
    "6M fp32": (SIX_MILLION, 8000, 256, 32, 1, False, False, FP32),
    "6M fp32 compiled": (SIX_MILLION, 8000, 256, 32, 1, False, True, FP32),
    "6M checkpointing": (SIX_MILLION, 8000, 256, 64, 1, True, False, {}),
    "30M not accumulated": (THIRTY, 16000, 512, 8, 1, False, False, {}),
    "30M": (THIRTY, 16000, 512, 8, 2, False, False, {}),
    "30M compiled": (THIRTY, 16000, 512, 8, 2, False, True, {}),
    "30M checkpointing compiled": (THIRTY, 16000, 512, 8, 2, True, True, {}),
    "48M": (FORTY_EIGHT, 32000, 1024, 2, 1, False, False, {}),
    "48M compiled": (FORTY_EIGHT, 32000, 1024, 2, 1, False, True, {}),
    "109M GPT-2": (GPT2, 30000, 512, 2, 2, False, False, {}),
    "109M GPT-2 fp32": (GPT2, 30000, 512, 2, 1, False, False, FP32),
    "109M GPT-2 checkpointing": (GPT2, 30000, 512, 4, 1, True, False, {}),
}


def inputs(folder: Path, vocabulary: int) -> dict[str, str]:
    """Stages 03 and 04 in small: a tokenizer with so many words, and random tokens."""
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
    totals = {side: {"tokens": 900000, "bytes": 3600000, "documents": 3000} for side in ("train", "valid")}
    (folder / "stage.json").write_text(json.dumps({"figures": {"totals": totals}}))
    return {"03_tokenizer": str(folder / "tokenizer"), "04_tokenize": str(folder)}


def run(name: str) -> tuple[float, dict[str, Any], int]:
    """(computed peak bytes, the probe's row, parameters) of one training."""
    model, vocabulary, block, micro, accumulation, checkpointing, compiled, more = ROWS[name]
    values = {
        "block_size": block,
        "global_batch_size": micro * accumulation,
        "per_device_train_batch_size": micro,
        "learning_rate": 1e-4,
    } | more
    config = {"model": model | {"vocab_size": vocabulary}, "tokenizer": {}, "pretrain": values}
    here, _ = preflight.this_machine()
    wished = values | {"gradient_checkpointing": checkpointing, "torch_compile": compiled}
    shape = preflight.shape_of(model, vocabulary)
    computed = preflight.memory(shape, preflight.setting_of(wished, here, 1, None))
    with tempfile.TemporaryDirectory() as folder:
        plan = {
            "recipe": "bench",
            "config": config,
            "ranks": 1,
            "inputs": inputs(Path(folder), vocabulary),
        }
        row = probe.measure(str(ROOT / "pretrain/run_clm.py"), plan, None, checkpointing, compiled, micro)
    return computed["peak"], row, shape.parameters


def main() -> None:
    """Print computed and measured peaks."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor-")
    print("| training | parameters | computed MiB | measured MiB | computed / measured | tokens/s |")
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    for name in sys.argv[1:] or ROWS:
        computed, row, parameters = run(name)
        if row["outcome"] != "ok":
            print(f"| {name} | {parameters:,} | {row} |", flush=True)
            continue
        measured = row["peak_memory_bytes"]
        cells = [name, f"{parameters:,}", f"{computed / 2**20:,.0f}", f"{measured / 2**20:,.0f}"]
        cells += [f"{computed / measured:.3f}", f"{row['tokens_per_second']:,.0f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
