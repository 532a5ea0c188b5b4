"""The speed that is measured, what is written for the boards, rows of an interrupted run."""

import math
from types import SimpleNamespace

import pytest
import torch
from recipe.training import callbacks
from tiny_training import rows_of
from transformers import TrainerState

pytest_plugins = ["tiny_training"]


@pytest.mark.parametrize("pause", ["on_evaluate", "on_save"])
def test_the_speed_leaves_pauses_out(monkeypatch, pause):
    clock = iter([0.0, 10.0, 60.0, 62.0, 62.0])  # begin, end of step 1, end of the pause, end of step 2
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    meter, state = callbacks.Meter(100, lambda step: 1.0, 1.0, None), TrainerState(max_steps=9)
    meter.on_train_begin(SimpleNamespace(device=torch.device("cpu")), state, None)
    state.global_step = 1
    meter.on_step_end(None, state, None)
    getattr(meter, pause)(None, state, None)
    state.global_step, logs = 2, {"loss": 1.0}
    meter.complete(logs, state, torch.device("cpu"))
    assert logs["tokens_per_second"] == 50.0


def test_every_figure_is_on_the_board(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    figures, rows, folder = train(eval_strategy="steps", eval_steps=3, report_to="none")
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    expected = {"loss", "bits_per_byte", "grad_norm", "learning_rate", "tokens_per_second", "mfu"}
    expected |= {"seconds_left", "rank0/tokens_per_second", "rank0/memory_gib"}
    tags = set(board.Tags()["scalars"])
    assert {f"train/{name}" for name in expected} | {"eval/loss", "eval/bits_per_byte"} <= tags
    last = [row for row in rows if "loss" in row][-1]
    assert board.Scalars("train/bits_per_byte")[-1].value == pytest.approx(last["bits_per_byte"], rel=1e-6)
    # bytes_per_token is 3 here: bits of a token over its bytes.
    assert last["bits_per_byte"] == pytest.approx(last["loss"] / math.log(2) / 3, rel=1e-12)
    assert last["mfu"] > 0 and last["seconds_left"] == 0
    assert 0.1 < last["rank0/memory_gib"] < 24 and last["rank0/tokens_per_second"] > 0
    assert [row["step"] for row in rows if "eval_bits_per_byte" in row] == [3, 6]


def test_wandb_offline_holds_the_figures(train, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="could not run: wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    _, _, folder = train(report_to="wandb")
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert summary["train/rank0/memory_gib"] > 0.1 and summary["train/bits_per_byte"] > 0
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert list((folder / "tensorboard").iterdir())


def test_trackio_holds_the_figures(train, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is first imported
    pytest.importorskip("trackio", reason="could not run: trackio is not installed")
    train(report_to=["trackio"])
    content = b"".join(path.read_bytes() for path in (tmp_path / "trackio").rglob("*") if path.is_file())
    assert b"rank0/memory_gib" in content


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 0}\n{"step": 3}\n{"step": 5}\n{"st')
    assert callbacks.keep_rows(path, 3) == [{"step": 0}, {"step": 3}] == rows_of(path)
    assert callbacks.keep_rows(path, 0) == [] == rows_of(path)
    assert callbacks.keep_rows(tmp_path / "none", 3) == []


def test_this_run_decides_how_often_it_logs_and_a_continued_one_does_not_evaluate_first(train):
    evaluation = {"eval_on_start": True, "save_strategy": "steps", "save_steps": 2}
    train(**evaluation, max_steps=3)
    _, rows, _ = train(**evaluation, logging_steps=2)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 4, 6]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 6]


def test_the_first_step_of_a_phase_may_take_as_long_as_the_first_of_the_run():
    """It compiles the model. The watchdog knows the time of the others."""
    calls = []
    life = SimpleNamespace(started=None)

    def step(number):
        life.started = 1.0
        calls.append("step")

    def unpaced(number):
        life.started = None
        calls.append("unpaced")

    life.step, life.unpaced = step, unpaced
    heartbeat, state = callbacks.Heartbeat(life, [0, 2]), TrainerState()
    control = SimpleNamespace(should_evaluate=False, should_save=False)
    heartbeat.on_train_begin(None, state, control)
    found = []
    for number in range(4):
        calls.clear()
        state.global_step = number
        heartbeat.on_step_begin(None, state, control)
        state.global_step = number + 1
        heartbeat.on_step_end(None, state, control)
        found.append(" ".join(calls))
    assert found == ["step unpaced", "step step", "unpaced step unpaced", "step step"]
