"""How soon the recipe tiny reaches the final loss of a common recipe's rates, and of another architecture.

Every peer trains on the same tokens in the same batches as tiny, alone, one after the other, and stage 06
measures all of them.

- ``rates``: the same model with the rates of a published 300M Japanese Mistral: AdamW, lr 6e-4, eps 1e-4,
  beta2 0.95, cosine, 5 % warm-up.
- ``mistral``: the rates of tiny on a Mistral of the same shape (Qwen3 without the norm of queries and keys).

Run (about 8 minutes each, nothing else running):  .venv/bin/python tests/bench/rates.py [rates] [mistral]
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS = {
    "rates": (
        "pretrain",
        {
            "learning_rate": 6e-4,
            "muon_learning_rate": None,
            "adam_epsilon": 1e-4,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.05,
        },
    ),
    "mistral": ("model", {"model_type": "mistral", "sliding_window": None}),
}


def run(recipe: str) -> tuple[list[dict], dict]:
    """Train and evaluate a recipe; its validation rows, and its figures of stage 06."""
    subprocess.run(
        ["bash", "run_all.sh", "--recipe", recipe, "--to", "06"], cwd=ROOT, check=True, stdout=sys.stderr
    )
    folder = ROOT / "outputs" / recipe
    rows = [json.loads(line) for line in (folder / "05_pretrain/metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if "eval_loss" in r], json.loads(
        (folder / "06_evaluate/metrics.json").read_text()
    )


def run_peer(name: str) -> tuple[list[dict], dict]:
    """Train and evaluate a copy of tiny with a peer's settings."""
    file, values = PEERS[name]
    folder = ROOT / "configs" / f"bench-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "configs/tiny", folder)
    try:
        path = folder / f"{file}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2))
        return run(folder.name)
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Print all runs side by side, and the share of each peer's time after which tiny was already better."""
    names = sys.argv[1:] or list(PEERS)
    results = {"tiny": run("tiny")} | {name: run_peer(name) for name in names}
    print("| run | step | seconds | valid bits/byte | in domain (stage 06) | out of domain |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, (rows, metrics) in results.items():
        for row in rows:
            cells = [name, str(row["step"]), f"{row['seconds']:.0f}", f"{row['eval_bits_per_byte']:.4f}"]
            for domain in ("in_domain", "out_of_domain"):
                cells.append(f"{metrics[domain]['bits_per_byte']:.4f}" if row is rows[-1] else "")
            print("| " + " | ".join(cells) + " |")
    for name in names:
        last = results[name][0][-1]
        first = next((row for row in results["tiny"][0] if row["eval_loss"] <= last["eval_loss"]), None)
        if first is None:
            print(f"\ntiny never reached the final loss of {name}")
        else:
            share = f"{first['seconds'] / last['seconds']:.0%} of its time"
            print(f"\ntiny was below the final loss of {name} at step {first['step']}, after {share}")


if __name__ == "__main__":
    main()
