"""Steps with NaN, infinity or a spike are skipped."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from recipe.project import RecipeError, read_json
from recipe.training import trainer
from recipe.training.skip_bad_steps import MOST_BACK, MOST_IN_A_ROW, Guard
from safetensors.torch import load_file
from tiny_training import losses_of

pytest_plugins = ["tiny_training"]

STEPS = {"logging_steps": 1, "lr_scheduler_type": "constant"}


@pytest.fixture
def inject(monkeypatch):
    """Multiply the loss of chosen steps by a factor: gradients follow.

    Returns the weights before each step. ``start.steps`` are the chosen steps, which may be changed.
    """
    seen = {}

    def start(factor, *steps):
        start.steps = set(steps)
        stock = trainer.RecipeTrainer.compute_loss

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            step = self.state.global_step + 1
            seen.setdefault(step, torch.cat([p.detach().flatten() for p in self.model.parameters()]))
            loss, outputs = stock(self, model, inputs, True, num_items_in_batch)
            loss = loss * factor if step in start.steps else loss
            return (loss, outputs) if return_outputs else loss

        monkeypatch.setattr(trainer.RecipeTrainer, "compute_loss", compute_loss)
        return seen

    return start


@pytest.mark.parametrize("muon", [None, 0.02])
@pytest.mark.parametrize("factor", [math.nan, math.inf, 100.0])
def test_a_step_with_a_bad_loss_changes_no_weight(train, inject, factor, muon):
    weights = inject(factor, 3)
    figures, _, folder = train(**STEPS, muon_learning_rate=muon, weight_decay=0.1)
    assert figures["skipped_steps"] == [3]
    assert torch.equal(weights[3], weights[4])
    for step in (1, 2, 4, 5):
        assert not torch.equal(weights[step], weights[step + 1])
    assert all(torch.isfinite(value).all() for value in weights.values())
    (row,) = map(json.loads, (folder / "skipped.jsonl").read_text().splitlines())
    assert row["step"] == 3 and row["reason"].startswith("a loss of")


def test_the_true_loss_of_a_skipped_step_is_logged_and_only_of_this_step(train, inject):
    inject(math.nan, 3)
    assert [math.isfinite(loss) for loss in losses_of(train(**STEPS)[1])] == [True, True, False, *[True] * 3]


@pytest.mark.parametrize(("skipped", "saved"), [([2], {3, 4}), ([4, 5], {2})])
def test_a_checkpoint_that_is_due_at_a_skipped_step_follows_after_the_next_good_one(
    train, inject, skipped, saved
):
    inject(math.nan, *skipped)
    _, _, folder = train(**STEPS | {"save_strategy": "steps", "save_steps": 2, "max_steps": 5})
    manifests = folder.glob("checkpoints/*/manifest.json")
    assert {path.parent.name for path in manifests} == {f"checkpoint-{step}" for step in saved}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("poisoned", "found"), [(4, 4), (5, 6)])
def test_weights_that_are_not_finite_are_neither_saved_nor_published(
    train, tmp_path, monkeypatch, value, poisoned, found
):
    """The weights break after a step whose loss was good, when fewer steps are left than may be skipped."""
    stock = Guard.on_step_end

    def poison(guard, args, state, control, **objects):
        if state.global_step == poisoned:
            with torch.no_grad():
                guard.trainer.model.transformer.h[0].mlp.c_fc.weight[1, 2] = value
        stock(guard, args, state, control, **objects)

    monkeypatch.setattr(Guard, "on_step_end", poison)
    words = "the weight transformer.h.0.mlp.c_fc.weight is NaN or infinite, so nothing is saved"
    with pytest.raises(RecipeError, match=f"step {found}: {words}"):
        train(**STEPS, save_strategy="steps", save_steps=2)
    saved = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors")}
    assert saved == {f"run/checkpoints/checkpoint-{step}" for step in (2, 4) if step < poisoned or found > 4}


def test_a_model_with_a_loss_that_is_not_finite_is_not_published(train, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.RecipeTrainer, "evaluate", lambda self: {"eval_loss": math.nan})
    with pytest.raises(RecipeError, match="the loss on the validation side is nan after the last step"):
        train(**STEPS)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_nan_gradient_is_skipped_although_the_loss_is_finite(train, monkeypatch):
    stock = trainer.RecipeTrainer._get_grad_norm

    def broken(self, *arguments, **keywords):
        if self.state.global_step == 1:
            next(self.model.parameters()).grad.fill_(math.nan)
            keywords["grad_norm"] = torch.tensor(math.nan)
            arguments = arguments[:1]
        return stock(self, *arguments, **keywords)

    monkeypatch.setattr(trainer.RecipeTrainer, "_get_grad_norm", broken)
    figures, rows, _ = train(**STEPS)
    assert figures["skipped_steps"] == [2] and all(math.isfinite(loss) for loss in losses_of(rows))


def test_the_same_steps_are_skipped_again_after_an_interruption(train, inject, monkeypatch):
    """An earlier run has left a list; its steps are skipped although their losses are good now."""
    weights = inject(1.0)
    stock = Guard.on_train_begin

    def with_a_list(guard, *arguments, **objects):
        (guard.folder / "skipped.jsonl").write_text('{"step": 2}\n{"step": 4}\n{"st')
        stock(guard, *arguments, **objects)

    monkeypatch.setattr(Guard, "on_train_begin", with_a_list)
    assert train(**STEPS)[0]["skipped_steps"] == [2, 4]
    assert torch.equal(weights[2], weights[3]) and torch.equal(weights[4], weights[5])
    assert not torch.equal(weights[3], weights[4])


def test_too_many_skipped_steps_in_a_row_stop_the_training(train, inject):
    weights = inject(math.nan, *range(2, 20))
    with pytest.raises(
        RecipeError, match=f"{MOST_IN_A_ROW} steps in a row were skipped, the last is {MOST_IN_A_ROW + 1}"
    ):
        train(**STEPS | {"max_steps": 12})
    assert max(weights) == MOST_IN_A_ROW + 1 and torch.equal(weights[2], weights[MOST_IN_A_ROW + 1])


def test_the_next_run_judges_afresh_where_one_has_stopped(train, inject):
    """Step 2 is good now; steps that are bad again are no new ones, and stop nothing."""
    weights = inject(math.nan, *range(2, 20))
    with pytest.raises(RecipeError, match="5 steps in a row were skipped"):
        train(**STEPS | {"max_steps": 9})
    weights.clear()
    inject.steps = {3, 4, 5, 6, 7, 8}
    assert train(**STEPS | {"max_steps": 9})[0]["skipped_steps"] == [3, 4, 5, 6, 7, 8]
    assert not torch.equal(weights[2], weights[3]) and torch.equal(weights[3], weights[9])


def test_a_listed_window_may_be_longer_than_five_steps(train, inject, tmp_path):
    weights = inject(1.0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/skipped.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(2, 9)))
    assert train(**STEPS | {"max_steps": 9})[0]["skipped_steps"] == list(range(2, 9))
    assert torch.equal(weights[2], weights[9])


SLOW = STEPS | {"learning_rate": 1e-4, "max_steps": 30, "save_strategy": "steps", "save_steps": 10}


def final_weights(folder):
    return load_file(folder / "model.safetensors")


def assert_equal(one, other):
    assert all(torch.equal(one[name], other[name]) for name in one)


class Killed(Exception):
    pass


def test_a_spike_is_judged_equally_on_both_sides_of_a_resume(train, inject, monkeypatch):
    """The spike comes three steps after the checkpoint, so only the kept window can tell it."""
    inject(2.0, 23)
    figures, _, straight = train("straight", **SLOW)
    assert figures["skipped_steps"] == [23]
    with monkeypatch.context() as patch:
        stock = Guard.on_step_end

        def kill(guard, args, state, control, **objects):
            stock(guard, args, state, control, **objects)
            if state.global_step == 21:
                raise Killed

        patch.setattr(Guard, "on_step_end", kill)
        with pytest.raises(Killed):
            train("stopped", **SLOW)
    figures, _, stopped = train("stopped", **SLOW)
    assert figures["skipped_steps"] == [23]
    assert (stopped / "skipped.jsonl").read_text() == (straight / "skipped.jsonl").read_text()
    assert_equal(final_weights(straight), final_weights(stopped))


def test_a_log_after_a_resume_counts_the_steps_before_the_checkpoint(train, monkeypatch):
    settings = STEPS | {"logging_steps": 4, "max_steps": 8, "save_strategy": "steps", "save_steps": 3}
    straight = losses_of(train("straight", **settings)[1])
    with monkeypatch.context() as patch:

        def kill(guard, args, state, control, **objects):
            if state.global_step == 7:  # the last checkpoint is that of step 6
                raise Killed

        patch.setattr(Guard, "on_step_end", kill)
        with pytest.raises(Killed):
            train("stopped", **settings)
    assert losses_of(train("stopped", **settings)[1]) == pytest.approx(straight, rel=1e-6)


def test_without_a_rule_only_nan_and_infinity_are_skipped(train, inject):
    inject(2.0, 23)
    assert train(**SLOW | {"spikes": None})[0]["skipped_steps"] == []


def test_the_training_goes_back_and_skips_a_window_at_a_lower_rate(train, inject, monkeypatch):
    """A run that goes back, a run that is stopped after that and continues: the same weights."""
    settings = SLOW | {"spikes": {"back": 2, "skip": 4, "rate": 0.5}, "save_steps": 5}
    inject(2.0, 23)
    for name in ("one", "two"):
        with pytest.raises(SystemExit) as stopped:
            train(name, **settings)
        assert stopped.value.code == 1
    with monkeypatch.context() as patch:
        stock = Guard.on_step_end

        def kill(guard, args, state, control, **objects):
            stock(guard, args, state, control, **objects)
            if state.global_step == 27:
                raise Killed

        patch.setattr(Guard, "on_step_end", kill)
        with pytest.raises(Killed):
            train("two", **settings)
    results = [train(name, **settings) for name in ("one", "two")]
    for figures, rows, folder in results:
        assert figures["skipped_steps"] == [21, 22, 23, 24]
        (row,) = map(json.loads, (folder / "skipped.jsonl").read_text().splitlines())
        assert (row["step"], row["back_to"], row["skip"], row["rate"]) == (23, 15, [21, 24], 0.5)
        rates = {row["step"]: row["learning_rate"] for row in rows if "loss" in row}
        assert rates[15] == 1e-4 and rates[16] == rates[30] == 5e-5
    assert_equal(final_weights(results[0][2]), final_weights(results[1][2]))


def test_checkpoints_of_the_way_that_was_given_up_are_deleted(train, inject):
    settings = SLOW | {"spikes": {"back": 2}, "save_steps": 5}
    inject(2.0, 23)
    with pytest.raises(SystemExit):
        train(**settings)
    _, rows, folder = train(**settings)
    (row,) = map(json.loads, (folder / "skipped.jsonl").read_text().splitlines())
    assert row["back_to"] == 15 and [row["step"] for row in rows if "loss" in row] == list(range(1, 31))
    states = {path.parent.name: read_json(path) for path in folder.glob("checkpoints/*/trainer_state.json")}
    times = {
        name: state["stateful_callbacks"]["Guard"]["attributes"]["times_back"]
        for name, state in states.items()
    }
    assert times == {f"checkpoint-{step}": int(step > 15) for step in (5, 10, 15, 20, 25)}


def test_going_back_to_the_same_checkpoint_ends_after_some_times(train, inject):
    settings = STEPS | {"learning_rate": 1e-4, "max_steps": 12, "spikes": {"back": 1}}
    inject(math.nan, *range(3, 12))
    for _ in range(MOST_BACK):
        with pytest.raises(SystemExit):
            train(**settings, save_steps=100)
    with pytest.raises(RecipeError, match=f"step 8: a loss of nan; .*gone back to step 0 {MOST_BACK} times"):
        train(**settings, save_steps=100)


def test_a_loss_that_falls_or_doubles_is_no_spike(train, inject):
    inject(2.0, 3, 5)
    assert train(**STEPS)[0]["skipped_steps"] == []


def test_a_phase_with_a_higher_loss_is_not_skipped(train, inject):
    """The text of the second phase is harder. In the phase before it, such a loss is a spike."""
    inject(2.0, 22, *range(26, 31))
    figures = train(**SLOW, phases=[{"until_step": 25}, {}])[0]
    assert figures["skipped_steps"] == [22]


@pytest.mark.parametrize(("fp16", "counted"), [(False, 1), (True, 0)])
def test_the_schedule_counts_a_step_that_deepspeed_leaves_out(tmp_path, fp16, counted):
    """Else every later rate is a step late, and the check of a resumed training refuses it."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    guard, arguments = Guard(tmp_path, None), SimpleNamespace(fp16=fp16)
    for deepspeed, skipped, steps in ((True, False, 0), (False, True, 0), (True, True, counted)):
        accelerator = SimpleNamespace(optimizer_step_was_skipped=skipped)
        guard.trainer = SimpleNamespace(
            accelerator=accelerator,
            is_deepspeed_enabled=deepspeed,
            lr_scheduler=scheduler,
            save_postponed=False,
        )
        guard.on_optimizer_step(arguments, None, None)
        guard.on_step_end(arguments, None, None)
        assert scheduler.last_epoch == steps


@pytest.mark.parametrize("clipping", [0, 1.0])
def test_a_step_of_fp16_is_skipped_with_and_without_clipping(tmp_path, clipping):
    """The scaler of a GPU, here on the CPU: it is asked for the step's gradients exactly once."""
    model = torch.nn.Linear(2, 1)
    optimizer, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cpu")
    guard = Guard(tmp_path, None)
    unscale = SimpleNamespace(unscale_gradients=lambda: scaler.unscale_(optimizer))
    guard.trainer = SimpleNamespace(
        accelerator=unscale, step_loss=math.nan, gradient_norm=None, is_deepspeed_enabled=False
    )
    before = model.weight.clone()
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    if clipping:
        scaler.unscale_(optimizer)
    asked = SimpleNamespace(fp16=True, bf16=False, max_grad_norm=clipping, device=torch.device("cpu"))
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    guard.on_pre_optimizer_step(asked, state, None, model=model)
    scaler.step(optimizer)
    assert guard.skipped == {1} and torch.equal(model.weight, before)
