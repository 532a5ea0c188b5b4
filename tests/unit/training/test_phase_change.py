"""A training with phases: rates, blocks and rotary embeddings change, and it can be resumed at any step."""

import json
from statistics import median_high

import pytest
import torch
from recipe.model.build import flops_per_token
from recipe.training import training
from recipe.training.skip_bad_steps import Guard
from safetensors.torch import load_file
from tiny_training import losses_of
from transformers import AutoModelForCausalLM

pytest_plugins = ["tiny_training"]

QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}
PHASES = [
    {"until_step": 3},
    {"until_step": 5, "sources": {"clean": 1}, "rate": 0.5},
    {"block_size": 64, "rope_theta": 5e5},
]
VALUES = {"max_steps": 8, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 1}


def weights(folder):
    return load_file(folder / "model.safetensors")


class Killed(Exception):
    pass


def test_what_changes_and_that_a_resume_at_any_step_changes_nothing(train, monkeypatch):
    figures, rows, straight = train("straight", QWEN3, **VALUES, phases=PHASES)
    rates = [row["learning_rate"] for row in rows if "loss" in row]
    assert rates == pytest.approx([0.01] * 3 + [0.005] * 2 + [0.01] * 3)
    assert figures["active"]["global_batch"] == 4
    config = json.loads((straight / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 5e5
    early = json.loads((straight / "checkpoints/checkpoint-5/config.json").read_text())
    assert early["rope_parameters"]["rope_theta"] == 10000.0
    for stop in (3, 6):
        with monkeypatch.context() as patch:
            stock = Guard.on_step_begin

            def kill(guard, args, state, control, stop=stop, stock=stock, **objects):
                stock(guard, args, state, control, **objects)
                if state.global_step == stop:
                    raise Killed

            patch.setattr(Guard, "on_step_begin", kill)
            with pytest.raises(Killed):
                train(f"stopped{stop}", QWEN3, **VALUES, phases=PHASES)
        _, again, stopped = train(f"stopped{stop}", QWEN3, **VALUES, phases=PHASES)
        assert losses_of(again) == losses_of(rows)
        one, other = weights(straight), weights(stopped)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_mfu_counts_the_blocks_of_the_phase_and_the_higher_peak(train, monkeypatch):
    """A CPU that others share may be faster after the training than before it."""
    peaks = iter([1e6, 4e6])
    monkeypatch.setattr(training, "gemm_peak", lambda *_: next(peaks))
    settings = {"max_steps": 4, "phases": [{"until_step": 2, "block_size": 64}, {}]}
    figures, rows, folder = train("run", QWEN3, **settings)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for row in rows[1:4]:  # the first step compiles, and is not measured
        flops = flops_per_token(model, 64 if row["step"] <= 2 else 32)
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * flops / 1e6, rel=1e-3)
    assert figures["gemm_peak_flops"] == 4e6
    assert figures["mfu"] == median_high([row["mfu"] for row in rows if "mfu" in row]) / 4


def test_an_evaluation_before_the_first_step_is_in_the_phase(train):
    settings = {"max_steps": 1, "eval_on_start": True}
    losses = []
    for name, theta, phases in (
        ("a", 10.0, []),
        ("b", 10000.0, [{"rope_theta": 10.0}]),
        ("c", 10000.0, [{}]),
    ):
        model = QWEN3 | {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
        rows = train(name, model, **settings, phases=phases)[1]
        losses += [row["eval_loss"] for row in rows if row["step"] == 0]
    assert losses[0] == losses[1] != losses[2]


def test_rotary_embeddings_change_what_is_computed(train):
    """With one phase of another rope_theta, the first loss is another one."""
    settings = VALUES | {"max_steps": 1, "save_strategy": "no"}
    settings.pop("save_steps")
    plain = losses_of(train("plain", QWEN3, **settings)[1])
    assert losses_of(train("one", QWEN3, **settings, phases=[{}])[1]) == plain
    assert losses_of(train("other", QWEN3, **settings, phases=[{"rope_theta": 10.0}])[1]) != plain
