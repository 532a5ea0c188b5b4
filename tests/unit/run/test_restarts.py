"""A training that fails is started again by itself, as often as allowed, but not into the same fault."""

import os
import subprocess
import sys

import pytest
from recipe.run.restarts import FIRST_PAUSE, LONGEST_PAUSE, pause_before, why_no_restart


@pytest.mark.parametrize(
    ("failed", "most", "reason"),
    [
        ([5], 0, "--max-restarts N"),
        ([5], 1, ""),
        ([5, 7], 1, "used up"),
        ([5, 7], 2, ""),
        ([5, 7, 5], 3, ""),
        ([5, 5], 9, "failed twice right after step 5"),
        ([7, 0, 0], 9, "failed twice before its first step"),
        ([0], 9, ""),
    ],
)
def test_why_not(failed, most, reason):
    answer = why_no_restart(failed, most)
    assert reason in answer and bool(reason) == bool(answer)


def test_pauses_double_up_to_a_limit():
    pauses = [pause_before(restart) for restart in range(1, 12)]
    assert pauses[:3] == [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE] and pauses[-1] == LONGEST_PAUSE


# The launcher of a stage, in a process of its own, because it ends all its descendants.
LAUNCHER = """
import argparse, os, sys
from pathlib import Path
from recipe.config.recipe import load_recipe
from recipe.project import RecipeError
from recipe.run import launch, restarts
from recipe.run.launch_options import add_options
from recipe.run.stage import Stage

folder, script = Path(sys.argv[1]), Path(sys.argv[2])
restarts.FIRST_PAUSE = 0.01
launch.check_resources = lambda *_: None
parser = argparse.ArgumentParser()
add_options(parser)
arguments = parser.parse_args(sys.argv[3:])
lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
stage = Stage("05_pretrain", "tiny", load_recipe("tiny", []), {}, folder, arguments, lock)
try:
    launch._run_child(stage, script, folder)
except RecipeError as error:
    print(f"error: {error}")
    sys.exit(error.exit_code)
"""
# A training whose attempts end as the file `attempts` says: the last step, and how the process ends.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from recipe.training.watchdog import REFUSED, SignsOfLife

folder = Path(json.loads(Path(sys.argv[1]).read_text())["folder"])
(step, end), *rest = json.loads((folder / "attempts").read_text())
(folder / "attempts").write_text(json.dumps(rest))
SignsOfLife(folder / "ranks", 0).unpaced(step)
if end == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if end == "refused":
    (folder / "ranks" / REFUSED).touch()
sys.exit(0 if end == "done" else 1)
"""


@pytest.mark.parametrize(
    ("attempts", "left", "code", "words"),
    [
        ('[[5, "killed"], [7, "failed"], [9, "done"]]', "[]", 0, "Restart 2 of 2"),
        ('[[5, "killed"], [7, "killed"], [9, "killed"], [9, "done"]]', '[[9, "done"]]', 1, "are used up"),
        ('[[5, "failed"], [5, "failed"], [9, "done"]]', '[[9, "done"]]', 1, "twice right after step 5"),
        ('[[0, "refused"], [9, "done"]]', '[[9, "done"]]', 2, "refused to start"),
    ],
)
def test_launcher_restarts(tmp_path, attempts, left, code, words):
    (tmp_path / "run_clm.py").write_text(SCRIPT)
    (tmp_path / "attempts").write_text(attempts)
    result = subprocess.run(
        [sys.executable, "-c", LAUNCHER, tmp_path, tmp_path / "run_clm.py", "--max-restarts", "2"],
        env=os.environ | {"PYTHONPATH": ":".join(sys.path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == code, result.stdout + result.stderr
    assert words in result.stdout and (tmp_path / "attempts").read_text() == left
