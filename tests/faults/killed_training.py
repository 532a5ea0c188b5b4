"""Kill a training again and again: `python killed_training.py PLAN KILLS SAVES SEED`, or `... PLAN`.

PLAN: the plan of a training child, as stage 05 writes it. The modules are imported once, and each attempt is
a fork that runs the real training script, so that 200 kills take minutes. Each training is killed at random
moments, SAVES of the KILLS inside a save, until it has ended; then the next one begins. Prints JSON: for each
kill the last step that was logged and the step that the next attempt began with; for each training how its
curve and its weights differ from those of one that was not killed. A training that differs is kept in PLAN's
folder as ``wrong-N``.

With PLAN alone each training is killed once, when it has three checkpoints; then the newest or the two newest
are damaged in one of the ways of `DAMAGES`, and it continues.
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


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve(path: Path) -> None:
    """Cut the second half off."""
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    """A manifest that names no file."""
    path.write_text("{}")


DAMAGES = [
    (damage, name)
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json")
    for damage in (flip, halve, Path.unlink)
] + [(halve, "manifest.json"), (empty, "manifest.json")]


def fresh(plan: dict[str, Any], name: str) -> dict[str, Any]:
    """The plan in an empty folder."""
    folder = Path(plan["root"], name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return plan | {"folder": str(folder)}


def to_the_end(plan: dict[str, Any]) -> tuple[list[tuple[int, float, float]], bytes]:
    """Train without a kill; see `result`."""
    child = start(plan)
    while not ended(child):
        time.sleep(0.01)
    return result(Path(plan["folder"]))


def good_steps(folder: Path) -> list[int]:
    """The steps of complete checkpoints, in order."""
    return sorted(int(path.parent.name.split("-")[1]) for path in folder.glob("checkpoints/*/manifest.json"))


def compare(root: Path, number: int, folder: Path, expected: tuple[list[Any], bytes]) -> list[str]:
    """How a finished training differs from the expected one."""
    curve, weights = result(folder)
    wrong = ["weights"] * (weights != expected[1])
    wrong += [f"step {now} for {then}" for then, now in zip(expected[0], curve, strict=False) if then != now]
    wrong += ["another number of steps"] * (len(curve) != len(expected[0]))
    if wrong:
        shutil.copytree(folder, root / f"wrong-{number}", dirs_exist_ok=True)
    return wrong


def damage_all(plan: dict[str, Any]) -> dict[str, Any]:
    """Each of `DAMAGES` at the newest and at the two newest checkpoints; see the docstring of this file."""
    expected = to_the_end(fresh(plan, "straight"))
    differences = []
    for number, (damage, name) in enumerate(DAMAGES * 2):
        now = fresh(plan, "damaged")
        folder = Path(now["folder"])
        child = start(now)
        while len(good_steps(folder)) < 3:
            assert not ended(child), "the training ended before its third checkpoint"
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for step in good_steps(folder)[-1 if number < len(DAMAGES) else -2 :]:
            damage(folder / f"checkpoints/checkpoint-{step}" / name)
        to_the_end(now)
        differences.append(compare(Path(plan["root"]), number, folder, expected))
    return {"differences": differences}


def kill_all(plan: dict[str, Any], kills: int, saves: int, seed: int) -> dict[str, Any]:
    """Train once in one go, then kill `kills` times; see the docstring of this file."""
    draw = random.Random(seed)
    began = time.monotonic()
    expected = to_the_end(fresh(plan, "straight"))
    seconds = time.monotonic() - began
    found: list[dict[str, Any]] = []
    differences: list[list[str]] = []
    while len(found) < kills or sum(kill["in_save"] for kill in found) < saves:
        now = fresh(plan, "killed")
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
            found[-1]["continues_at"] = max(good_steps(folder), default=0)
        differences.append(compare(Path(plan["root"]), len(differences), folder, expected))
    return {"kills": found, "differences": differences, "seconds": seconds}


if __name__ == "__main__":
    path, *numbers = sys.argv[1:]
    plan = json.loads(Path(path).read_text())
    plan |= {"parent": os.getpid(), "root": plan["folder"]}
    print(json.dumps(kill_all(plan, *map(int, numbers)) if numbers else damage_all(plan)))
