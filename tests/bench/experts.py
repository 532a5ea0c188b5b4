"""A mixture of experts against a dense model of as many active parameters: tokens/s, and loss at equal steps.

Both are `tiny` but for its feed-forward part and its number of steps, on the same tokens in the same batches
with the same rates. The mixture has 8 experts of half the width in each layer, of which a token uses 2 (the
planner's, `recipe.run.plan.model_of`): only the routers make it larger for a token.

Run (about 10 minutes on one core, nothing else running; stages 01 to 04 of tiny are run first):
    .venv/bin/python tests/bench/experts.py [STEPS]
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "pretrain"))
STEPS = 150
EXPERTS = (0, 8)


def run(experts: int, steps: int) -> dict:
    """Train a copy of tiny with so many experts, 0 for the dense model; the figures and the last rows."""
    from recipe.project import CONFIGS, OUTPUTS
    from recipe.run.plan import model_of

    name = f"bench-experts-{experts}"
    folder = CONFIGS / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(OUTPUTS / name, ignore_errors=True)
    shutil.copytree(CONFIGS / "tiny", folder)
    try:
        values = json.loads((CONFIGS / "tiny/model.json").read_text())
        model = model_of(values["num_hidden_layers"], experts) | {
            "max_position_embeddings": values["max_position_embeddings"]
        }
        (folder / "model.json").write_text(json.dumps(model))
        pretrain = json.loads((folder / "pretrain.json").read_text())
        length = {"max_steps": steps, "eval_steps": steps, "save_strategy": "no", "sample_steps": None}
        (folder / "pretrain.json").write_text(json.dumps(pretrain | length))
        line = ["bash", "run_all.sh", "--recipe", name, "--to", "05"]
        subprocess.run(line, cwd=ROOT, check=True, stdout=sys.stderr)
        stage = OUTPUTS / name / "05_pretrain"
        rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
        found = json.loads((stage / "stage.json").read_text())["figures"]
        return found | {"valid": rows[-1], "trained": [row for row in rows if "loss" in row][-1]}
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Print a row for each model."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else STEPS
    found = {experts: run(experts, steps) for experts in EXPERTS}
    print("| model | parameters | active | tokens/s | ratio | MFU | GiB | valid loss | bits/byte | load |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for experts, figures in found.items():
        active, speed = figures["active"], figures["tokens_per_second"]
        trained = figures["trained"]
        cells = [
            f"{experts} experts" if experts else "dense",
            f"{active['parameters']:,}",
            f"{active['active_parameters'] or active['parameters']:,}",
            f"{speed:,.0f}",
            f"{speed / found[0]['tokens_per_second']:.2f}",
            f"{figures['mfu']:.0%}",
            f"{figures['peak_memory_bytes'] / 2**30:.2f}",
            f"{figures['valid']['eval_loss']:.4f}",
            f"{figures['valid']['eval_bits_per_byte']:.4f}",
            f"{trained['expert_load_min']:.2f} to {trained['expert_load_max']:.2f}" if experts else "",
        ]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
