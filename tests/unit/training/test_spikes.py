"""The rule for spikes is a function of a sequence of (loss, gradient norm)."""

import json
import math
import random

import pytest
from recipe.config.settings import SpikeRule
from recipe.training.checkpoints import write_manifest
from recipe.training.spikes import delete_given_up, read_skipped, spike, window_to_skip

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def healthy(steps, seed=0, level=2.0, noise=0.05):
    """A loss that falls quickly from 9 to `level` and then stays there; norms that vary by a quarter."""
    draw = random.Random(seed)
    for step in range(steps):
        loss = level + (9 - level) * math.exp(-step / 40) + draw.gauss(0, noise)
        yield loss, 0.6 * math.exp(draw.gauss(0, 0.25)) * (1 + 4 * math.exp(-step / 10))


def spikes_in(steps):
    """(position, reason) of each spike; spikes do not enter the window."""
    rule, window = SpikeRule(), []
    for position, (loss, norm) in enumerate(steps):
        if reason := spike(window, loss, norm, rule.deviations):
            yield position, reason
        else:
            window = [*window, (loss, norm)][-rule.window :]


def found(steps):
    return [position for position, _ in spikes_in(steps)]


@pytest.mark.parametrize("seed", range(3))
def test_healthy_steps_are_no_spikes(seed):
    """Also while the loss falls quickly, and where it hardly varies."""
    assert found(healthy(2000, seed)) == found(healthy(2000, seed, noise=0.001)) == []


@pytest.mark.parametrize(("loss", "norm"), [(8.0, 0.6), (3.0, 0.6), (2.0, 60.0), (2.0, 12.0)])
@pytest.mark.parametrize("position", [300, 1500])
def test_a_loss_from_2_to_8_and_a_high_gradient_norm_are_seen(position, loss, norm):
    steps = list(healthy(2000))
    steps[position] = (loss, norm)
    ((seen, reason),) = spikes_in(steps)
    assert seen == position
    assert reason.startswith(f"a loss of {loss:g}" if loss > 2 else f"a gradient norm of {norm:g}")


def test_a_series_of_spikes_does_not_move_the_limit():
    steps = list(healthy(600))
    steps[400:430] = [(6.0, 3.0)] * 30
    assert found(steps) == list(range(400, 430))


def test_early_only_a_loss_of_several_times_the_highest_is_a_spike():
    assert found([(9.0, 1.0), (20.0, 50.0), (900.0, 1.0), (9.0, 1.0)]) == [2]
    assert found([(900.0, 1.0)]) == []


def test_a_loss_that_is_mostly_0_has_no_spikes():
    """As the hinge loss of preferences has; a loss that falls to 0 from the first step on, too."""
    assert found([(0.0, 1.0)] * 10 + [(0.1, 1.0)] + [(0.0, 1.0)] * 30 + [(0.1, 1.0), (5.0, 1.0)]) == []


def test_a_training_without_gradient_norms_is_judged_by_its_loss():
    steps = [(loss, None) for loss, _ in healthy(300)]
    assert found([*steps, (8.0, None)]) == [300]


def test_the_list_says_what_is_skipped_and_how_often_the_training_went_back(tmp_path):
    rows = [{"step": 3}, {"step": 7}, {"step": 8}, {"step": 8, "stopped": [7, 8]}, {"step": 8}]
    rows += [{"step": 20, "back_to": 10, "skip": [18, 21], "rate": 0.5}]
    rows += [{"step": 30, "back_to": 20, "skip": [30, 30], "rate": 0.5}]
    (tmp_path / "skipped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"st')
    skipped = read_skipped(tmp_path)
    assert skipped.steps == {3, 8, 18, 19, 20, 21, 30} and skipped.doubted == {7, 8}
    assert [skipped.rate(step) for step in (0, 9, 10, 19, 20, 99)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert read_skipped(tmp_path / "none").steps == set()


@pytest.mark.parametrize("damaged", [False, True])
def test_newer_checkpoints_are_deleted_only_if_an_older_one_is_good(tmp_path, capsys, damaged):
    for step in (10, 20):
        checkpoint = tmp_path / f"checkpoints/checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        for name in FILES:
            (checkpoint / name).write_text("{}")
        write_manifest(checkpoint)
    (tmp_path / "skipped.jsonl").write_text('{"step": 25, "back_to": 10, "skip": [25, 25], "rate": 1.0}\n')
    if damaged:
        (tmp_path / "checkpoints/checkpoint-10/optimizer.pt").write_text("damaged")
    delete_given_up(tmp_path)
    assert (tmp_path / "checkpoints/checkpoint-20").exists() == damaged
    assert ("cannot go back to step 10" in capsys.readouterr().out) == damaged


@pytest.mark.parametrize(
    ("step", "back_to", "count", "window"),
    [(50, 40, 1, (50, 50)), (50, 40, 4, (48, 51)), (50, 40, 100, (41, 140)), (41, 40, 3, (41, 43))],
)
def test_the_window_contains_the_spike_and_begins_after_the_checkpoint(step, back_to, count, window):
    assert window_to_skip(step, back_to, count) == window
