"""A training that is killed at any moment continues, and ends as if nothing had happened."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults
KILLS, SAVES, EVERY = 200, 50, 4


def plan_of(project, name, *options):
    """The plan that stage 05 gives to its training child, taken from a run that is stopped at once."""
    work = project.folder / f"outputs/{name}/.05_pretrain.work"
    run = project.start("pretrain/05_pretrain.sh", "--recipe", name, *options)
    while not (work / "plan.json").exists():
        assert run.poll() is None, run.communicate()[0]
    plan = (work / "plan.json").read_text()
    run.kill()
    run.wait()
    return json.loads(plan)


@pytest.fixture
def campaign(make_project, tmp_path):
    """Run killed_training.py with these numbers on a training of 16 steps, and return what it prints."""
    project = make_project()
    project.run("run_all.sh", "--recipe", "mini", "--to", "04")
    values = {"max_steps": 16, "save_steps": EVERY, "save_total_limit": 3, "eval_steps": 16, "eval_blocks": 1}
    options = [part for key, value in values.items() for part in ("--set", f"pretrain.{key}={value}")]
    plan = plan_of(project, "mini", *options) | {"folder": str(tmp_path)}
    (tmp_path / "plan.json").write_text(json.dumps(plan))

    def run(*numbers):
        script = Path(__file__).with_name("killed_training.py")
        command = [sys.executable, script, tmp_path / "plan.json", *map(str, numbers)]
        run = subprocess.run(command, env=project.environment, capture_output=True, text=True)
        logs = "".join(path.read_text()[-3000:] for path in tmp_path.glob("*/log.txt"))
        assert run.returncode == 0, run.stderr + logs
        return json.loads(run.stdout.splitlines()[-1])

    return run


@pytest.mark.timeout(3600)
def test_random_kills(campaign, fault_row):
    report = campaign(KILLS, SAVES, 1)
    kills, wrong = report["kills"], [found for found in report["differences"] if found]
    lost = max(kill["reached"] - kill["continues_at"] for kill in kills)
    inside = sum(kill["in_save"] for kill in kills)
    fault_row(
        f"SIGKILL at a random moment ({inside} inside a save)", len(kills), len(kills), len(wrong), lost
    )
    assert len(kills) >= KILLS and inside >= SAVES
    assert not wrong, wrong
    # The newest checkpoint may be the one that was being written.
    assert lost <= 2 * EVERY


def test_damaged_checkpoints(campaign, fault_row):
    """Bits, halves and whole files of the newest or the two newest are gone when the training continues."""
    differences = campaign()["differences"]
    wrong = [found for found in differences if found]
    fault_row(
        "a damage of the newest or the two newest checkpoints", len(differences), len(differences), len(wrong)
    )
    assert not wrong, wrong
