"""A mixture of experts against a dense model of equal active parameters: tokens/s and loss.

Both are copies of the recipe tiny with a model of `recipe.run.plan.model_of`: the feed-forward part of each
layer is dense, or becomes experts of half its width of which a token uses 2. So a token meets as many weights
in both, but for the routers. Both train by stage 05, with the rates of tiny, on the same tokens in the same
batches, one after the other. The last two columns are the peak memory of stage 05, measured and as the
preflight computes it.

Run (about 5 minutes for each row on one core, nothing else running), after `bash run_all.sh --to 04`:
    .venv/bin/python tests/bench/experts.py [--experts 0 8] [--steps 150]
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "pretrain"))


def train(experts: int, steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train a copy of tiny with so many experts; the figures of stage 05, and the last of each logged one."""
    from recipe.config.recipe import load_recipe
    from recipe.project import stage_folder
    from recipe.run import preflight
    from recipe.run.launch_options import Launch
    from recipe.run.memory import memory
    from recipe.run.plan import model_of

    folder = ROOT / f"configs/bench-experts-{experts}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "configs/tiny", folder)
    layers = json.loads((folder / "model.json").read_text())["num_hidden_layers"]
    changes = {
        "model": model_of(layers, experts),
        "pretrain": json.loads((folder / "pretrain.json").read_text()),
    }
    changes["pretrain"] |= {"max_steps": steps, "eval_steps": steps, "save_steps": steps}
    try:
        for file, values in changes.items():
            (folder / f"{file}.json").write_text(json.dumps(values, indent=2))
        command = ["bash", "run_all.sh", "--recipe", folder.name, "--to", "05", "--force"]
        subprocess.run([*command[:-1], "--to", "04"], cwd=ROOT, check=True, stdout=sys.stderr)
        shape, setting, _ = preflight.on_this_machine(folder.name, load_recipe(folder.name), Launch())
        subprocess.run([*command, "--from", "05"], cwd=ROOT, check=True, stdout=sys.stderr)
    finally:
        shutil.rmtree(folder)
    trained = stage_folder(folder.name, "05_pretrain")
    last: dict[str, Any] = {}
    for line in (trained / "metrics.jsonl").read_text().splitlines():
        last |= json.loads(line)
    figures = json.loads((trained / "stage.json").read_text())["figures"]
    return figures | {"computed_memory_bytes": memory(shape, setting)["peak"]}, last


def main() -> None:
    """Print a row for each number of experts; the ratio compares the speed with that of the first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, nargs="+", default=[0, 8])
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    results = {experts: train(experts, arguments.steps) for experts in arguments.experts}
    first = results[arguments.experts[0]][0]["tokens_per_second"]
    head = "| experts | parameters | active | tokens/s | ratio | loss | bits/byte | busiest | idlest "
    print(head + "| peak GiB | computed |\n" + "|---:" * 11 + "|")
    for experts, (figures, last) in results.items():
        active, speed = figures["active"], figures["tokens_per_second"]
        used = active["active_parameters"] or active["parameters"]
        cells = [
            str(experts),
            f"{active['parameters']:,}",
            f"{used:,}",
            f"{speed:,.0f}",
            f"{speed / first:.2f}",
        ]
        cells += [f"{figures['eval_loss']:.4f}", f"{last['eval_bits_per_byte']:.4f}"]
        cells += [f"{last[key]:.2f}" if experts else "" for key in ("expert_load_max", "expert_load_min")]
        cells += [f"{figures[f'{kind}_memory_bytes'] / 2**30:.2f}" for kind in ("peak", "computed")]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
