"""How much sooner the recipe tiny reaches what the learning rates of a common recipe reach.

The peer is the same model on the same tokens and batches with the rates of a published 300M Japanese Mistral:
AdamW, lr 6e-4, eps 1e-4, beta2 0.95, cosine, 5 % warm-up. Both train alone, one after the other, and stage 06
measures both.

Run (about 15 minutes, nothing else running):  .venv/bin/python tests/bench/rates.py
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEER = {
    "learning_rate": 6e-4,
    "muon_learning_rate": None,
    "adam_epsilon": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
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


def main() -> None:
    """Print both runs side by side, and the share of the peer's time after which ours was already better."""
    peer = ROOT / "configs" / "bench-peer-rates"
    shutil.rmtree(peer, ignore_errors=True)
    shutil.copytree(ROOT / "configs/tiny", peer)
    try:
        path = peer / "pretrain.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | PEER, indent=2))
        results = {"tiny": run("tiny"), "peer rates": run(peer.name)}
    finally:
        shutil.rmtree(peer)
    print("| run | step | seconds | valid bits/byte | in domain (stage 06) | out of domain |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, (rows, metrics) in results.items():
        for row in rows:
            cells = [name, str(row["step"]), f"{row['seconds']:.0f}", f"{row['eval_bits_per_byte']:.4f}"]
            for domain in ("in_domain", "out_of_domain"):
                cells.append(f"{metrics[domain]['bits_per_byte']:.4f}" if row is rows[-1] else "")
            print("| " + " | ".join(cells) + " |")
    wanted = results["peer rates"][0][-1]
    first = next((row for row in results["tiny"][0] if row["eval_loss"] <= wanted["eval_loss"]), None)
    if first is None:
        print("\ntiny never reached the peer's final loss")
    else:
        share = first["seconds"] / wanted["seconds"]
        print(
            f"\ntiny was below the peer's final loss at step {first['step']}, after {share:.0%} of its time"
        )


if __name__ == "__main__":
    main()
