"""A spike from which the training goes back by itself: the launcher starts it again, without a person."""

import json

import pytest

pytestmark = pytest.mark.slow

STEPS = ("pretrain.max_steps=30", "pretrain.eval_steps=30", "pretrain.muon_learning_rate=null")
STEPS += ("pretrain.learning_rate=1e-4",)
OPTIONS = [part for setting in STEPS for part in ("--set", setting)]


@pytest.fixture(scope="module")
def project(make_project):
    """A project whose pretraining has twice the loss in step 23."""
    project = make_project()
    trainer = project.folder / "pretrain/recipe/training/trainer.py"
    text = trainer.read_text()
    line = "            loss = super().training_step(model, inputs, *rest)\n"
    assert text.count(line) == 1
    double = "            loss = loss * 2 if self.state.global_step == 22 else loss\n"
    trainer.write_text(text.replace(line, line + double))
    project.run("run_all.sh", "--recipe", "mini", "--to", "04")
    return project


@pytest.mark.parametrize(
    ("options", "row"),
    [
        (
            ("--nproc", "2", "--set", 'pretrain.spikes={"back": 2, "skip": 3}'),
            {"step": 23, "back_to": 15, "skip": [22, 24]},
        ),
        (("--nproc", "2", "--deepspeed", "zero2"), {"step": 23, "back_to": 20, "skip": [23, 23]}),
    ],
)
def test_the_training_goes_back_without_a_person(project, options, row):
    output = project.run("pretrain/05_pretrain.sh", "--recipe", "mini", "--force", *OPTIONS, *options).stdout
    assert f"continues from checkpoint-{row['back_to']}" in output
    assert f"The training goes back to step {row['back_to']}" in output
    path = project.output("mini", "05_pretrain", "skipped.jsonl")
    (written,) = map(json.loads, path.read_text().splitlines())
    assert row == {key: written[key] for key in row}
    first, last = row["skip"]
    assert project.figures("mini", "05_pretrain")["skipped_steps"] == list(range(first, last + 1))
    rows = {row["step"]: row for row in project.log("mini") if "loss" in row}
    assert list(rows) == list(range(1, 31))
    # Every step counts in the schedule, also those that are skipped.
    for step, logged in rows.items():
        assert logged["learning_rate"] == pytest.approx(1e-4 * (31 - step) / 30)
