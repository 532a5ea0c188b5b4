"""The steps of a training."""

from types import SimpleNamespace

import pytest
from recipe.config.choice import Choice
from recipe.hardware import Hardware
from recipe.project import Refused
from recipe.training.extended import EXTENDED
from recipe.training.prepare import _trainer_values, check_steps, place, prepare, total_steps
from tiny_training import plan_of
from transformers import TrainingArguments


@pytest.mark.parametrize(
    ("steps", "epochs", "expected"),
    [(-1, 1.0, (13, 2)), (-1, 3.0, (38, 4)), (5, 1.0, (5, 1)), (30, 1.0, (30, 3)), (-1, 1.12, (14, 2))],
)
def test_total_steps(tmp_path, steps, epochs, expected):
    """1.12 * 100 is a little more than 112 in floating point, and 112 are 14 steps."""
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, num_train_epochs=epochs, use_cpu=True
    )
    assert total_steps(arguments, 100, 8) == expected
    assert expected[1] * 100 >= expected[0] * 8


def test_a_warm_up_longer_than_the_steps_of_the_epochs_is_refused(tmp_path, monkeypatch, capsys):
    values = {
        "block_size": 8,
        "global_batch_size": 8,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
    }
    values |= {"warmup_steps": 14, "eval_strategy": "steps", "eval_steps": 20, "bf16": False}
    for name in ("TENSORBOARD_LOGGING_DIR", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run = prepare(plan_of(tmp_path, {"pretrain": values, "model": {}}), "pretrain")
    run.arguments.max_steps = total_steps(run.arguments, 100, 8)[0]
    with pytest.raises(Refused, match="pretrain.json: warmup_steps: 14, more than the 13 steps of the run"):
        check_steps(run, values, "pretrain", 100)
    check_steps(run, values | {"warmup_steps": 13}, "pretrain", 100)
    (tmp_path / EXTENDED).write_text('{"from": 8, "steps": 8, "rewarm": true}')
    with pytest.raises(Refused, match="warmup_steps: 6, more than the 5 steps"):
        check_steps(run, values | {"warmup_steps": 6}, "pretrain", 100)
    said = capsys.readouterr().out
    assert "eval_steps: 20, but the run has 13 steps" in said
    assert "over its data" not in said
    check_steps(run, values | {"warmup_steps": 0}, "pretrain", 25)
    assert "pretrain.json: the run goes 4.2 times over its data. Up to 4" in capsys.readouterr().out
    check_steps(run, values | {"warmup_steps": 0}, "finetune", 25)
    assert "over its data" not in capsys.readouterr().out


def test_pinned_batches_reach_a_gpu_without_a_wait(tmp_path):
    values = {"block_size": 8, "global_batch_size": 4, "per_device_train_batch_size": 4}
    plan, choice = plan_of(tmp_path, {"pretrain": values}), Choice("bf16", "varlen", True)
    for device in ("cuda", "cpu"):
        seen = Hardware(device, "one", (9, 0), (2, 13), True, (), True)
        native = _trainer_values(plan, "pretrain", values, seen, choice)
        assert native["dataloader_pin_memory"] == (device == "cuda")
        assert native["accelerator_config"] == {"non_blocking": device == "cuda"}


def test_a_process_trains_on_one_gpu_of_several(tmp_path, monkeypatch):
    """The Trainer would split a micro-batch among all visible ones by torch.nn.DataParallel."""

    class TwoVisible(TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 2

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("TENSORBOARD_LOGGING_DIR", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    values = {"block_size": 8, "global_batch_size": 4, "per_device_train_batch_size": 4, "bf16": False}
    run = prepare(plan_of(tmp_path, {"pretrain": values, "model": {}}), "pretrain", TwoVisible)
    assert (run.arguments.n_gpu, run.arguments.train_batch_size) == (1, 4)


def test_what_a_killed_sharded_run_has_left_is_not_published(tmp_path):
    """Rank 0 writes the whole model for the others; the same training may go on without --fsdp."""
    (tmp_path / "unsharded").mkdir()
    (tmp_path / "unsharded/model.safetensors").write_bytes(b"half")
    run = SimpleNamespace(sharded=False, is_main=True, folder=tmp_path)
    assert place(run, lambda: "a model") == "a model" and not list(tmp_path.iterdir())
