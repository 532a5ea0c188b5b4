"""Stage 05 as a user runs it: what pretrain.json asks for is in the record, in the log and on the board."""

import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow

TWO_RANKS = {
    "ddp": (("--nproc", "2"), "DDP 2"),
    "zero3": (("--nproc", "2", "--deepspeed", "zero3"), "ZeRO-3"),
    "fsdp": (("--nproc", "2", "--fsdp"), "FSDP2 2"),
    "tp": (("--nproc", "2", "--tensor-parallel", "2"), "TP 2"),
}
WATCHED = {"muon_learning_rate": None, "z_loss": 0.1, "sample_steps": [4, 12], "max_grad_norm": 0.7}


def train(project, name, *options, **changes):
    """Train a copy of the recipe with changed values; its figures and the rows of its log."""
    project.copy(name)
    project.edit(name, "pretrain", **changes)
    project.run("run_all.sh", "--recipe", name, "--to", "04")
    # --force: train, do not reuse an equal finished stage
    project.run("pretrain/05_pretrain.sh", "--recipe", name, "--force", *options, timeout=900)
    return project.figures(name, "05_pretrain"), project.log(name)


def rows_of(project, name, file):
    return [json.loads(line) for line in project.output(name, "05_pretrain", file).read_text().splitlines()]


def column(rows, key):
    return [row[key] for row in rows if "loss" in row and key in row]


def test_compiled_muon_with_z_loss_and_a_late_decay(prepared):
    figures, rows = train(
        prepared, "late", torch_compile=True, z_loss=1e-3, sample_steps=[4, 12], eval_steps=5, seed=7,
        lr_scheduler_type="warmup_stable_decay", warmup_steps=3, weight_decay=0.1,
        lr_scheduler_kwargs={"num_decay_steps": 5, "decay_type": "linear"},
    )  # fmt: skip
    active = figures["active"]
    assert active["compiled"] and active["optimizer"] == "MuonAdamW" and active["seed"] == 7
    assert active["z_loss"] == 1e-3 and active["weight_decay"] == 0.1 and active["neftune"] is None
    assert active["scheduler"] == "warmup_stable_decay (LambdaLR)"
    rates = [0, 1 / 3, 2 / 3] + [1.0] * 13 + [0.8, 0.6, 0.4, 0.2]
    assert column(rows, "learning_rate") == pytest.approx([0.02 * rate for rate in rates])
    # At the start all tokens are equally likely, so that Z is the size of the vocabulary.
    assert column(rows, "z_loss")[0] == pytest.approx(1e-3 * math.log(400) ** 2, rel=0.05)
    assert column(rows, "loss")[0] == pytest.approx(math.log(400), rel=0.05)
    assert column(rows, "loss")[-1] < column(rows, "loss")[0] - 2
    # At every fifth step, and where samples are written.
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 5, 10, 12, 15, 20]
    samples = rows_of(prepared, "late", "samples.jsonl")
    assert [row["step"] for row in samples] == [0, 4, 12, 20]
    assert samples[0]["text"] != samples[-1]["text"]


def test_compiled_adamw_with_a_floor_and_clipping(prepared):
    figures, rows = train(
        prepared, "floor", torch_compile=True, muon_learning_rate=None,
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1},
        max_grad_norm=0.5, optim="adamw_torch_fused",
    )  # fmt: skip
    active = figures["active"]
    assert active["compiled"] and active["optimizer"] == "AdamW" and active["fused"]
    assert active["gradient_clipping"] == 0.5 and active["z_loss"] is None
    rates = [0.01 * (0.1 + 0.45 * (1 + math.cos(math.pi * step / 20))) for step in range(20)]
    assert column(rows, "learning_rate") == pytest.approx(rates)
    assert max(column(rows, "grad_norm")) > 0.5  # logged before clipping
    assert not column(rows, "z_loss")
    assert not prepared.output("floor", "05_pretrain", "samples.jsonl").exists()


def test_seed_decides_the_curve(prepared):
    same = {"lr_scheduler_type": "constant", "max_steps": 6, "save_steps": 3}
    curves = [train(prepared, f"seed{n}", seed=seed, **same)[1] for n, seed in enumerate((1, 1, 2))]
    first, again, other = (column(rows, "loss") for rows in curves)
    assert first == again and first[0] != other[0]
    assert set(column(curves[0], "learning_rate")) == {0.02}


@pytest.fixture(scope="module")
def alone(prepared):
    return train(prepared, "alone", **WATCHED)[1]


@pytest.mark.parametrize("way", TWO_RANKS)
def test_two_ranks_log_the_same_as_one(prepared, alone, way):
    options, parallel = TWO_RANKS[way]
    figures, rows = train(prepared, way, *options, **WATCHED)
    active = figures["active"]
    assert active["parallel"] == parallel and active["global_batch"] == 8
    assert active["z_loss"] == 0.1 and active["gradient_clipping"] == 0.7
    for key in ("loss", "z_loss", "grad_norm", "learning_rate"):
        assert column(rows, key) == pytest.approx(column(alone, key), rel=1e-4), key
    found, expected = ([row["eval_loss"] for row in part if "eval_loss" in row] for part in (rows, alone))
    assert found == pytest.approx(expected, rel=1e-4) and len(found) == 4
    steps = [row["step"] for row in rows_of(prepared, way, "samples.jsonl")]
    assert steps == [0, 4, 12, 20]
    one_step = [row for row in rows if "tokens_per_second" in row][-1]
    shares = [one_step[f"rank{rank}/tokens_per_second"] for rank in (0, 1)]
    # All ranks measure the same steps; the slowest decides, and no token counts twice.
    assert sum(shares) == pytest.approx(one_step["tokens_per_second"], rel=0.2)
    board = EventAccumulator(str(prepared.output(way, "05_pretrain", "tensorboard")))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    names = ("mfu", "seconds_left", "grad_norm", "bits_per_byte", "z_loss")
    assert {f"train/{name}" for name in names} | {"eval/bits_per_byte"} <= tags
    ranks = {f"train/rank{n}/{name}" for n in (0, 1) for name in ("tokens_per_second", "memory_gib")}
    assert ranks <= tags
