"""A finished training that is made longer: the same as one run of that length, and what is said about it."""

import pytest

pytestmark = pytest.mark.slow

DECAY = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 8}}


@pytest.fixture(scope="module")
def project(prepared):
    return prepared


def recipe(project, name, **pretrain):
    project.copy(name)
    project.edit(name, "pretrain", **pretrain)
    project.run("run_all.sh", "--recipe", name, "--to", "04")


def curve(project, name):
    return [(row["step"], row["loss"], row["learning_rate"]) for row in project.log(name) if "loss" in row]


@pytest.mark.parametrize(
    ("schedule", "step"), [({"lr_scheduler_type": "constant"}, 15), (DECAY | {"save_total_limit": 1}, 10)]
)
def test_an_extended_training_equals_one_of_the_full_length(project, schedule, step):
    name = schedule["lr_scheduler_type"]
    recipe(project, name, max_steps=20, **schedule)
    project.run("pretrain/05_pretrain.sh", "--recipe", name)
    project.edit(name, "pretrain", max_steps=30)
    words = f"only its length was raised (max_steps: 20 -> 30): goes on from step {step} of 20"
    assert words in project.run("run_all.sh", "--recipe", name, "--dry-run").stdout
    assert words in project.run("run_all.sh", "--recipe", name, "--to", "05").stdout
    assert project.figures(name, "05_pretrain")["extended"] == [{"from": step, "steps": 20, "rewarm": False}]
    recipe(project, f"{name}-whole", max_steps=30, **schedule)
    project.run("pretrain/05_pretrain.sh", "--recipe", f"{name}-whole", "--force")
    assert project.figures(f"{name}-whole", "05_pretrain")["extended"] == []
    assert curve(project, name) == curve(project, f"{name}-whole")
    assert project.digest(name, "05_pretrain") == project.digest(f"{name}-whole", "05_pretrain")
    assert "done before" in project.run("pretrain/05_pretrain.sh", "--recipe", name).stdout


def test_a_schedule_that_has_ended_is_refused_or_warmed_up_again(project):
    recipe(project, "ended", max_steps=20, warmup_steps=5)
    project.run("pretrain/05_pretrain.sh", "--recipe", "ended")
    project.edit("ended", "pretrain", max_steps=30)
    refused = project.run("run_all.sh", "--recipe", "ended", "--to", "05", check=False)
    assert refused.returncode == 2 and 'Add "extend": "rewarm"' in refused.stderr
    assert len(curve(project, "ended")) == 20
    project.edit("ended", "pretrain", extend="rewarm", keep_checkpoints=False)
    project.run("pretrain/05_pretrain.sh", "--recipe", "ended")
    rates = [rate for _, _, rate in curve(project, "ended")]
    # The Trainer logs the rate of Muon's group, whose peak is 0.02.
    rises, falls = [0.2 * step for step in range(5)], [1 - 0.1 * step for step in range(10)]
    assert rates[15:20] == pytest.approx([0.02 * share for share in rises])
    assert rates[20:] == pytest.approx([0.02 * share for share in falls])
    assert not project.output("ended", "05_pretrain", "checkpoints").exists()
    project.edit("ended", "pretrain", max_steps=40)
    refused = project.run("pretrain/05_pretrain.sh", "--recipe", "ended", check=False)
    assert refused.returncode == 2 and "has none (keep_checkpoints" in refused.stderr
