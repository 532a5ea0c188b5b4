"""Plain python, torchrun and deepspeed really train, on CPU with 2 ranks, and reach the same losses."""

import json
import shutil

import pytest

pytestmark = pytest.mark.slow

# AdamW: under ZeRO Muon is refused. One global batch of 8 sequences, however many ranks share it.
COMMON = ("--set", "pretrain.muon_learning_rate=null", "--set", "pretrain.logging_steps=1")
PRECISION = {"fp32": ("--set", "pretrain.bf16=false"), "bf16": ("--set", "pretrain.bf16=true")}
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
# Each way to join two ranks: its options, and what the proof must find.
WAYS = {
    "ddp": ((), "DDP 2"),
    "zero1": (("--deepspeed", "zero1"), "ZeRO-1"),
    "zero2": (("--deepspeed", "zero2"), "ZeRO-2"),
    "zero3": (("--deepspeed", "zero3"), "ZeRO-3"),
    "fsdp": (("--fsdp",), "FSDP2 2"),
    "tp": (("--tensor-parallel", "2"), "TP 2"),
}


@pytest.fixture(scope="module")
def prepared(make_project):
    project = make_project()
    project.run("run_all.sh", "--recipe", "mini", "--to", "04")
    return project


def train(project, name, *options, stage="05_pretrain", file="pretrain/05_pretrain.sh"):
    shutil.copytree(project.folder / "configs/mini", project.folder / "configs" / name)
    project.run("run_all.sh", "--recipe", name, "--to", "04")
    # --force: train, do not take the finished twin of another launcher
    result = project.run(file, "--recipe", name, "--force", *COMMON, *options, timeout=900)
    rows = project.output(name, stage, "metrics.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, rows) if "loss" in row]
    return losses, project.figures(name, stage), result


@pytest.fixture(scope="module")
def alone(prepared):
    return {kind: train(prepared, f"alone-{kind}", *options)[0] for kind, options in PRECISION.items()}


@pytest.mark.parametrize("kind", PRECISION)
@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_reach_the_losses_of_one(prepared, alone, way, kind):
    options, parallel = WAYS[way]
    losses, figures, result = train(prepared, f"{way}-{kind}", "--nproc", "2", *options, *PRECISION[kind])
    active = figures["active"]
    assert active["ranks"] == 2 and active["global_batch"] == 8
    assert active["accumulation"] == (2 if way == "tp" else 1)  # tensor parallel ranks read the same batches
    assert active["precision"] == kind and active["parallel"] == parallel
    launcher = "deepspeed.launcher" if "--deepspeed" in options else "torch.distributed.run"
    assert launcher in result.stdout
    assert len(losses) == len(alone[kind]) == 20
    worst = max(abs(a - b) / b for a, b in zip(losses, alone[kind], strict=True))
    print(f"{way} {kind}: {worst:.1e}")
    assert worst <= TOLERANCE[kind], f"{way} {kind}: {worst:.2e}"
    assert losses[-1] < losses[0]


def test_muon_is_muon_on_two_ranks(prepared):
    options = ("--set", "pretrain.muon_learning_rate=0.02")
    one, _, _ = train(prepared, "muon-1", *options)
    two, figures, _ = train(prepared, "muon-2", *options, "--nproc", "2")
    assert figures["active"]["optimizer"] == "MuonAdamW"
    # Muon orthogonalises in bf16, which widens the rounding of the all-reduce; the first step is exact.
    assert abs(two[0] - one[0]) / one[0] < 1e-6
    assert max(abs(a - b) / b for a, b in zip(two, one, strict=True)) < 1e-2


@pytest.mark.parametrize("way", ["ddp", "zero2", "fsdp"])
def test_tuning_runs_on_two_ranks(prepared, way):
    options, parallel = WAYS[way]
    name = f"tune-{way}"
    shutil.copytree(prepared.folder / "configs/mini", prepared.folder / "configs" / name)
    prepared.edit(name, "pretrain", muon_learning_rate=None)
    prepared.run("run_all.sh", "--recipe", name, "--to", "11")
    prepared.run(
        "fine-tuning/12_finetune.sh", "--recipe", name, "--force", "--nproc", "2", *options, timeout=900
    )
    assert prepared.figures(name, "12_finetune")["active"]["parallel"] == parallel


def test_compiled_training_on_two_ranks_is_still_parallel(prepared):
    """What `run_all.sh --nproc 2` runs where a compiler is found: torch.compile around DDP."""
    losses, figures, _ = train(prepared, "compiled", "--nproc", "2", "--set", "pretrain.torch_compile=true")
    active = figures["active"]
    assert active["compiled"] and active["ranks"] == 2 and active["parallel"] == "DDP 2"
    assert losses[-1] < losses[0] - 1
