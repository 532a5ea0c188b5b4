"""Checkpoints that can be trusted, the optimizer that is asked for, the arithmetic of steps."""

import json
import math

import pytest
import torch
from recipe.model.build import flops_per_token
from recipe.model.optimizers import MuonAdamW
from recipe.training import checkpoints, training
from recipe.training.proof import joined, parallel_wish
from transformers import AutoModelForCausalLM, Qwen3Config, TrainingArguments


def checkpoint(folder, step, finished=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (path / name).write_bytes(f"{name} {step}".encode() * 50)
    if finished:
        checkpoints.write_manifest(path)
    return path


def test_newest_whole_checkpoint_is_used(tmp_path, capsys):
    good = checkpoint(tmp_path, 90)
    checkpoint(tmp_path, 100, finished=False)
    assert checkpoints.newest_good_checkpoint(tmp_path) == good
    assert "checkpoint-100 is not used: it was never finished" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("kind", ["missing", "truncated", "bit"])
def test_damage_is_found(tmp_path, capsys, name, kind):
    good, bad = checkpoint(tmp_path, 90), checkpoint(tmp_path, 100)
    path = bad / name
    content = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[:-1])
    else:
        content[7] ^= 1
        path.write_bytes(content)
    assert checkpoints.newest_good_checkpoint(tmp_path) == good
    assert f"checkpoint-100 is not used: {name}" in capsys.readouterr().out


def test_no_checkpoint_is_no_checkpoint(tmp_path):
    assert checkpoints.newest_good_checkpoint(tmp_path) is None


def tiny_model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        Qwen3Config(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            tie_word_embeddings=True,
        )
    )


def optimizer_of(model):
    return MuonAdamW(model, 0.02, 0.003, (0.9, 0.95), 1e-8, 0.1)


def test_every_parameter_has_one_optimizer_and_matrices_have_muon():
    model = tiny_model()
    optimizer = optimizer_of(model)
    muon, adamw = (
        [id(p) for group in part.param_groups for p in group["params"]] for part in optimizer.parts
    )
    assert sorted(muon + adamw) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[i].split(".")[-2] for i in muon} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert all(group["weight_decay"] == 0 for group in optimizer.parts[1].param_groups)


@pytest.mark.parametrize("loaded", [False, True])
def test_scheduler_moves_both_optimizers(loaded):
    optimizer = optimizer_of(tiny_model())
    if loaded:
        optimizer.load_state_dict(optimizer_of(tiny_model()).state_dict())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [0.01, 0.0015]


def test_resumed_optimizer_steps_identically():
    def steps(model, optimizer, numbers):
        for number in numbers:
            torch.manual_seed(number)
            model(input_ids=torch.randint(40, (2, 8)), labels=torch.randint(40, (2, 8))).loss.backward()
            optimizer.step()
            model.zero_grad()

    straight = tiny_model()
    steps(straight, optimizer_of(straight), range(6))
    first = tiny_model()
    optimizer = optimizer_of(first)
    steps(first, optimizer, range(3))
    resumed = tiny_model()
    resumed.load_state_dict(first.state_dict())
    again = optimizer_of(resumed)
    again.load_state_dict(optimizer.state_dict())
    steps(resumed, again, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize(
    ("steps", "epochs", "wanted"),
    [(-1, 1.0, (13, 2)), (-1, 3.0, (38, 4)), (5, 1.0, (5, 1)), (30, 1.0, (30, 3))],
)
def test_total_steps(tmp_path, steps, epochs, wanted):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, num_train_epochs=epochs, use_cpu=True
    )
    assert training.total_steps(arguments, 100, 8) == wanted
    assert wanted[1] * 100 >= wanted[0] * 8


def test_flops_count_matrices_and_output():
    model = tiny_model()
    matrices = 4 * 16 * 16 + 3 * 16 * 32
    assert flops_per_token(model, 10) == 6 * (matrices + 40 * 16) + 6 * 1 * 2 * 8 * 10


def test_how_ranks_are_to_be_joined(tmp_path):
    path = tmp_path / "z.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
    assert parallel_wish(4, str(path), False, 1) == "ZeRO-2, optimizer on cpu"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}}}))
    assert parallel_wish(4, str(path), False, 1) == "ZeRO-3"
    assert parallel_wish(4, None, True, 1) == "FSDP2 4"
    assert parallel_wish(4, None, False, 4) == "TP 4"
    assert parallel_wish(4, None, False, 2) == parallel_wish(4, None, True, 2) == "FSDP2 2 x TP 2"
    assert parallel_wish(4, None, False, 1) == "DDP 4"
    assert parallel_wish(1, None, False, 1) == joined(tiny_model()) == "one process"


def test_evaluation_weighs_tokens_not_batches():
    from recipe.evaluation.metrics import combine

    parts = [
        {"documents": 1, "bytes": 30, "characters": 10, "tokens": 10, "loss_sum": 20.0},
        {"documents": 2, "bytes": 60, "characters": 20, "tokens": 40, "loss_sum": 40.0},
    ]
    total = combine(parts)
    assert total["loss"] == 60 / 50
    assert total["bits_per_byte"] == pytest.approx(60 / math.log(2) / 90)
    assert total["perplexity"] == pytest.approx(math.exp(1.2))
