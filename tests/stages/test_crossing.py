"""A checkpoint goes on under another number of ranks, and under another kind of parallelism."""

import functools
import shutil
import time

import pytest
from conftest import skip_bf16_without_units

pytestmark = pytest.mark.slow

# AdamW: under ZeRO Muon is refused. Weight decay: DeepSpeed's universal form must keep it apart for norms.
COMMON = ("--set", "pretrain.muon_learning_rate=null", "--set", "pretrain.weight_decay=0.1")
KINDS = {"fp32": ("--set", "pretrain.bf16=false"), "bf16": ("--set", "pretrain.bf16=true")}
KINDS["muon"] = (*KINDS["fp32"], "--set", "pretrain.muon_learning_rate=0.02")
# Muon orthogonalises in bf16 where it can.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "muon": 1e-2}
WAYS = {
    "one": (),
    "ddp": ("--nproc", "2"),
    "zero1": ("--nproc", "2", "--deepspeed", "zero1"),
    "zero2": ("--nproc", "2", "--deepspeed", "zero2"),
    "zero2-one": ("--nproc", "1", "--deepspeed", "zero2"),
    "zero3": ("--nproc", "2", "--deepspeed", "zero3"),
    "zero3-one": ("--nproc", "1", "--deepspeed", "zero3"),
    "fsdp": ("--nproc", "2", "--fsdp"),
    "tp": ("--nproc", "2", "--tensor-parallel", "2"),
}
STEPS = 20


def add_recipe(project, name):
    project.copy(name)
    project.run("run_all.sh", "--recipe", name, "--to", "04")


def line_of(name, way, kind):
    return ("pretrain/05_pretrain.sh", "--recipe", name, *COMMON, *KINDS[kind], *WAYS[way])


def curve(project, name):
    """(loss, learning rate) of each step."""
    return [(row["loss"], row["learning_rate"]) for row in project.log(name) if "loss" in row]


@pytest.fixture(scope="module")
def uninterrupted(prepared):
    @functools.cache
    def train(kind):
        add_recipe(prepared, f"whole-{kind}")
        prepared.run(*line_of(f"whole-{kind}", "one", kind), "--force", timeout=600)
        return curve(prepared, f"whole-{kind}")

    return train


@pytest.fixture(scope="module")
def stopped(prepared):
    """The name of a recipe whose training was stopped under one of the WAYS; each is trained once."""

    @functools.cache
    def train(way, kind):
        name = f"stopped-{way}-{kind}"
        add_recipe(prepared, name)
        # --force, so that the finished twin is not taken over.
        process = prepared.start(*line_of(name, way, kind), "--force")
        work = prepared.output(name, ".05_pretrain.work", "")
        ends = time.monotonic() + 240
        while not (work / "metrics.jsonl").exists():
            assert process.poll() is None and time.monotonic() < ends, process.communicate()[0]
            time.sleep(0.1)
        (work / "stop").touch()
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 143, output
        return name

    return train


@pytest.fixture
def go_on(prepared, stopped):
    """Continue a copy of a stopped training under another of the WAYS."""

    def train(before, after, kind, *options):
        source, name = stopped(before, kind), f"{before}-to-{after}-{kind}{len(options)}"
        prepared.copy(name)
        shutil.copytree(prepared.folder / "outputs" / source, prepared.folder / "outputs" / name)
        work = prepared.output(name, ".05_pretrain.work", "")
        step = max(int(path.name.split("-")[1]) for path in work.glob("checkpoints/checkpoint-*"))
        assert 0 < step < STEPS - 2
        result = prepared.run(*line_of(name, after, kind), *options, check=False, timeout=600)
        return name, step, result

    return train


def difference(found, expected):
    """The largest relative difference of losses; the learning rates are the same."""
    assert [rate for _, rate in found] == pytest.approx([rate for _, rate in expected], rel=1e-9)
    return max(abs(a - b) / b for (a, _), (b, _) in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        ("zero2", "zero2-one", "fp32"),
        ("zero2-one", "zero2", "fp32"),
        ("zero2", "zero2-one", "bf16"),
        ("zero1", "zero2-one", "bf16"),
        ("zero3", "zero3-one", "fp32"),
        ("zero3-one", "zero3", "bf16"),
        ("fsdp", "one", "fp32"),
        ("fsdp", "one", "muon"),
        ("tp", "ddp", "fp32"),
        ("tp", "fsdp", "fp32"),
    ],
)
def test_optimizer_state_goes_to_other_ranks(prepared, uninterrupted, go_on, before, after, kind):
    """The losses after the change are those of a training that was never interrupted."""
    skip_bf16_without_units(kind)
    name, step, result = go_on(before, after, kind)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"continues from checkpoint-{step}" in result.stdout
    assert ("converts the ZeRO shards" in result.stdout) == ("zero" in before)
    found = curve(prepared, name)
    worst = difference(found, uninterrupted(kind))
    print(f"{before} to {after}, {kind}: from step {step}, largest relative difference {worst:.1e}")
    assert len(found) == STEPS and worst <= TOLERANCE[kind]
    assert not list(prepared.output(name, "05_pretrain", "checkpoints").glob("converted*"))


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        ("ddp", "zero2", "fp32"),
        ("ddp", "tp", "fp32"),
        ("one", "zero3", "fp32"),
        ("fsdp", "zero3", "fp32"),
        ("zero2", "one", "bf16"),
        ("zero2", "zero3-one", "fp32"),
        ("zero3", "fsdp", "fp32"),
    ],
)
def test_weights_go_to_any_parallelism_by_an_option(prepared, uninterrupted, go_on, before, after, kind):
    """Refused without the option. With it, the next loss and all learning rates are those without a stop."""
    skip_bf16_without_units(kind)
    _, _, refused = go_on(before, after, kind)
    assert refused.returncode == 1 and "add --new-optimizer" in refused.stderr, refused.stdout
    name, step, result = go_on(before, after, kind, "--new-optimizer")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the optimizer state is lost and starts anew" in result.stdout
    found, expected = curve(prepared, name), uninterrupted(kind)
    next_loss = difference(found[: step + 1], expected[: step + 1])
    worst = difference(found, expected)
    print(f"{before} to {after}, {kind}: from step {step}, next loss {next_loss:.1e}, worst {worst:.1e}")
    assert len(found) == STEPS and next_loss <= TOLERANCE[kind]
    # The optimizer is really new.
    assert worst > TOLERANCE["fp32"]
