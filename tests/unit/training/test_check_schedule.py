"""Learning rate schedules: a training follows the one that is asked for, and a fault stops it."""

import math

import pytest
import torch
from recipe.project import Refused
from recipe.training import trainer

pytest_plugins = ["tiny_training"]

SCHEDULES = [
    ("constant", {}, 0, [1, 1, 1, 1, 1, 1]),
    ("constant_with_warmup", {}, 2, [0, 0.5, 1, 1, 1, 1]),
    ("linear", {}, 2, [0, 0.5, 1, 0.75, 0.5, 0.25]),
    ("cosine", {}, 2, [0, 0.5, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ("cosine_with_min_lr", {"min_lr_rate": 0.2}, 2, [0, 0.5, 1, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, None]),
    ("cosine_with_min_lr", {"min_lr": 2e-3}, 2, [0, 0.5, 1, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, None]),
    ("cosine_with_restarts", {"num_cycles": 2}, 2, [0, 0.5, 1, 0.5, 1, 0.5]),
    ("polynomial", {"lr_end": 2e-3, "power": 2.0}, 2, [0, 0.5, 1, 0.2 + 0.8 * 0.5625, 0.4, 0.25]),
    ("inverse_sqrt", {"timescale": 4}, 2, [0, 0.5, 1, 2 / math.sqrt(5), 2 / math.sqrt(6), 2 / math.sqrt(7)]),
    ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "linear"}, 2, [0, 0.5, 1, 1, 1, 0.5]),
    ("warmup_stable_decay", {"num_decay_steps": 4, "num_cycles": 1}, 0, [1, 1, 1, 0.5, 0, 0.5]),
    ("warmup_stable_decay", {"num_decay_steps": 4, "decay_type": "1-sqrt"}, 0, [1, 1, 1, 0.5, None, None]),
]


@pytest.mark.parametrize(
    ("kind", "options", "warmup", "expected", "muon"),
    [(*schedule, None) for schedule in SCHEDULES] + [(*SCHEDULES[5], 0.02), (*SCHEDULES[6], 0.02)],
)
def test_schedule_is_active(train, kind, options, warmup, expected, muon):
    figures, rows, _ = train(
        lr_scheduler_type=kind, lr_scheduler_kwargs=options, warmup_steps=warmup, muon_learning_rate=muon
    )
    peak = muon or 1e-2  # the Trainer logs the rate of the first group
    for row, share in zip([row for row in rows if "loss" in row], expected, strict=True):
        assert share is None or row["learning_rate"] == pytest.approx(share * peak, rel=1e-9)
    active = figures["active"]
    assert active["scheduler"] == f"{kind} (LambdaLR)" and active["learning_rates"][warmup] == peak
    assert active["optimizer"] == ("MuonAdamW" if muon else "AdamW") and active["fused"] == (not muon)


def test_the_rate_of_a_phase_holds_from_its_first_step_on(train):
    rows = train(lr_scheduler_type="constant", phases=[{"until_step": 3, "rate": 0.5}, {}])[1]
    rates = [row["learning_rate"] for row in rows if "loss" in row]
    assert rates == pytest.approx([0.5e-2] * 3 + [1e-2] * 3, rel=1e-9)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize(("steps", "warmup"), [(2, 2), (1, 0.1)])
def test_a_warm_up_as_long_as_the_run_is_no_fault(train, kind, steps, warmup):
    """The rates at steps beyond the run differ between libraries and mean nothing."""
    active = train(lr_scheduler_type=kind, warmup_steps=warmup, max_steps=steps)[0]["active"]
    assert max(active["learning_rates"]) == steps


@pytest.mark.parametrize(
    ("kind", "other"), [("cosine", "linear"), ("warmup_stable_decay", "constant_with_warmup")]
)
def test_another_schedule_than_asked_for_stops_the_run(train, monkeypatch, kind, other):
    stock = trainer.RecipeTrainer.create_scheduler

    def wrong(self, num_training_steps, optimizer=None):
        asked, options = self.args.lr_scheduler_type, self.args.lr_scheduler_kwargs
        self.args.lr_scheduler_type, self.args.lr_scheduler_kwargs = type(asked)(other), {}
        scheduler = stock(self, num_training_steps, optimizer)
        self.args.lr_scheduler_type, self.args.lr_scheduler_kwargs = asked, options
        return scheduler

    monkeypatch.setattr(trainer.RecipeTrainer, "create_scheduler", wrong)
    options = {"num_decay_steps": 2} if kind == "warmup_stable_decay" else {}
    with pytest.raises(Refused, match=f"learning rate at step 5: {kind} is"):
        train(lr_scheduler_type=kind, lr_scheduler_kwargs=options, warmup_steps=2)


def test_an_optimizer_that_leaves_its_schedule_stops_the_run(train, monkeypatch):
    def detached(self, num_training_steps, optimizer=None):
        other = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(other, lambda step: 1 - step / 6)
        return self.lr_scheduler

    monkeypatch.setattr(trainer.RecipeTrainer, "create_scheduler", detached)
    with pytest.raises(Refused, match=r"learning rates are \[0.01, 0.01\], its scheduler's \[0.00833"):
        train()
