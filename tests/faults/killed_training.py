"""Kill a training again and again: `python killed_training.py PLAN KILLS SAVES SEED`.

PLAN: the plan of a training child, as stage 05 writes it. The modules are imported once, and each attempt is
a fork that runs the real training script, so that 200 kills take minutes. Each training is killed at random
moments, SAVES of the KILLS inside a save, until it has ended; then the next one begins. Prints JSON: for each
kill the last step that was logged and the step that the next attempt began with; for each training how its
curve and its weights differ from those of one that was not killed. A training that differs is kept in PLAN's
folder as ``wrong-N``.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

# Heavy, and the same for all attempts.
import datasets  # noqa: F401
import torch  # noqa: F401
import transformers.trainer  # noqa: F401
from recipe.training import training

SCRIPT = Path(training.__file__).parents[2] / "run_clm.py"


def start(plan: dict[str, Any]) -> int:
    """Fork a child that trains by the plan; returns its process id."""
    child = os.fork()
    if child:
        return child
    folder = Path(plan["folder"])
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    (folder / "plan.json").write_text(json.dumps(plan))
    sys.argv = [str(SCRIPT), str(folder / "plan.json")]
    code = 1
    try:
        exec(compile(SCRIPT.read_text(), SCRIPT, "exec"), {"__name__": "__main__", "__file__": str(SCRIPT)})
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(child: int) -> bool:
    """Whether the child has ended; an error in it ends this program."""
    process, status = os.waitpid(child, os.WNOHANG)
    if process and status and not os.WIFSIGNALED(status):
        raise SystemExit(f"the training ended with {status}")
    return bool(process)


def saving(folder: Path) -> bool:
    """Whether a checkpoint without its manifest is being written."""
    folders = folder.glob("checkpoints/checkpoint-*")
    return any(not (checkpoint / "manifest.json").exists() for checkpoint in folders)


def steps(folder: Path) -> list[int]:
    """The steps in metrics.jsonl; a last line that was cut short does not count."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def result(folder: Path) -> tuple[list[tuple[int, float, float]], bytes]:
    """The curve and the weights of a finished training."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    curve = [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]
    return curve, (folder / "model.safetensors").read_bytes()


def main(plan: dict[str, Any], kills: int, saves: int, seed: int) -> dict[str, Any]:
    """Train once in one go, then kill `kills` times; see the docstring of this file."""
    draw, root = random.Random(seed), Path(plan["folder"])
    plan |= {"parent": os.getpid()}

    def fresh(name: str) -> dict[str, Any]:
        folder = root / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return plan | {"folder": str(folder)}

    straight = fresh("straight")
    began = time.monotonic()
    child = start(straight)
    while not ended(child):
        time.sleep(0.01)
    seconds = time.monotonic() - began
    expected = result(Path(straight["folder"]))
    found: list[dict[str, Any]] = []
    differences: list[list[str]] = []
    while len(found) < kills or sum(kill["in_save"] for kill in found) < saves:
        now = fresh("killed")
        folder, done = Path(now["folder"]), False
        while not done:
            before = max(steps(folder), default=0)
            child = start(now)
            in_save = len(found) % kills < saves and bool(draw.getrandbits(1)) or len(found) < saves
            until = time.monotonic() + draw.uniform(0.1, 1.1) * seconds
            while (
                not (done := ended(child)) and time.monotonic() < until and not (in_save and saving(folder))
            ):
                time.sleep(0.001)
            if done:
                break
            if in_save:
                time.sleep(draw.uniform(0, 0.02))
            inside = saving(folder)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            reached = max(steps(folder), default=0)
            found.append({"in_save": inside, "reached": reached, "before": before})
            good = [int(p.parent.name.split("-")[1]) for p in folder.glob("checkpoints/*/manifest.json")]
            found[-1]["continues_at"] = max(good, default=0)
        curve, weights = result(folder)
        wrong = ["weights"] * (weights != expected[1])
        wrong += [
            f"step {now} for {then}" for then, now in zip(expected[0], curve, strict=False) if then != now
        ]
        wrong += ["another number of steps"] * (len(curve) != len(expected[0]))
        if wrong:
            shutil.copytree(folder, root / f"wrong-{len(differences)}", dirs_exist_ok=True)
        differences.append(wrong)
    return {"kills": found, "differences": differences, "seconds": seconds}


if __name__ == "__main__":
    path, *numbers = sys.argv[1:]
    print(json.dumps(main(json.loads(Path(path).read_text()), *map(int, numbers))))
