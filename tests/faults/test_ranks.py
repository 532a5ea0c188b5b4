"""A rank that dies or freezes, another number of ranks after a stop, pickles in a checkpoint."""

import http.server
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import wait_for
from recipe.training.checkpoints import write_manifest

pytestmark = pytest.mark.slow

LONG = (
    "--set",
    "pretrain.max_steps=4000",
    "--set",
    "pretrain.save_steps=200",
    "--set",
    "pretrain.eval_steps=4000",
    "--set",
    "pretrain.spikes=null",  # at this rate the small text, read again and again, has some
)
STEPS = ("--set", "pretrain.max_steps=60", "--set", "pretrain.save_steps=10")
STEPS += ("--set", "pretrain.eval_steps=60")
ADAMW = ("--set", "pretrain.muon_learning_rate=null")


@pytest.fixture(scope="module")
def project(prepared):
    return prepared


def copy(project, name):
    project.copy(name)
    project.run("run_all.sh", "--recipe", name, "--to", "04")
    return project.folder / f"outputs/{name}/.05_pretrain.work"


def ranks(work):
    """The processes of the ranks, once all have done steps at a known speed."""
    signs = [json.loads(path.read_text()) for path in sorted(work.glob("ranks/rank[0-9]"))]
    return [sign["process"] for sign in signs if sign["limit"] == 90.0]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def curve(project, name):
    return [(row["step"], row["loss"]) for row in project.log(name) if "loss" in row]


@pytest.fixture
def webhook():
    """The messages that a webhook receives, and its address."""
    received = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield received, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("options", "number"),
    [((), 1), (("--nproc", "2"), 2), ((*ADAMW, "--nproc", "2", "--deepspeed", "zero2"), 2)],
)
def test_frozen_rank_ends_the_training_within_the_limit(project, monkeypatch, webhook, options, number):
    name = f"frozen{len(options)}"
    received, address = webhook
    monkeypatch.setitem(project.environment, "RECIPE_WEBHOOK", address)
    work = copy(project, name)
    run = project.start("pretrain/05_pretrain.sh", "--recipe", name, *LONG, *options)
    wait_for(lambda: len(ranks(work)) == number and list(work.glob("checkpoints/*/manifest.json")), run)
    os.kill(ranks(work)[-1], signal.SIGSTOP)
    started = time.monotonic()
    output = run.communicate(timeout=240)[0]
    assert run.returncode == 1, output
    assert 80 < time.monotonic() - started < 150
    assert f"rank{number - 1} (process" in output and "is frozen (SIGSTOP)" in output
    if number > 1:
        # The stacks of the rank that waits, in a step or for the other rank's part of a checkpoint.
        assert "Current thread" in output and "in _inner_training_loop" in output
    assert "run the same command again, without --force, to continue" in output
    assert len(received) == 1 and f"05_pretrain of recipe {name} on " in received[0]["text"]
    assert not project.output(name, "05_pretrain").exists()


@pytest.mark.parametrize("sharding", [(), (*ADAMW, "--deepspeed", "zero2")])
def test_killed_rank_ends_the_training_and_it_continues(project, sharding):
    name = f"killed{len(sharding)}"
    work = copy(project, name)
    options = ("--recipe", name, "--nproc", "2", *sharding, "--set", "pretrain.max_steps=300")
    options += ("--set", "pretrain.save_steps=20", "--set", "pretrain.eval_steps=300")
    run = project.start("pretrain/05_pretrain.sh", *options)
    wait_for(lambda: len(ranks(work)) == 2 and list(work.glob("checkpoints/*/manifest.json")), run)
    os.kill(ranks(work)[1], signal.SIGKILL)
    started = time.monotonic()
    output = run.communicate(timeout=150)[0]
    assert run.returncode == 1, output
    assert time.monotonic() - started < 90
    output = project.run("pretrain/05_pretrain.sh", *options, timeout=600).stdout
    assert "continues from checkpoint-" in output
    steps = [step for step, _ in curve(project, name)]
    assert steps == list(range(1, 301))


LESS_MEMORY = ("pretrain.per_device_train_batch_size=2", "pretrain.activation_checkpointing=true")


@pytest.mark.parametrize(
    ("name", "before", "after", "ranks"),
    [
        ("from1to2", (), ("--nproc", "2"), 2),
        ("from2to1", ("--nproc", "2"), (), 1),
        ("less-memory", (), [word for value in LESS_MEMORY for word in ("--set", value)], 1),
    ],
)
def test_other_ranks_or_less_memory_continue_with_the_same_samples(project, name, before, after, ranks):
    """The losses equal those of one process, so the curve shows the order of the samples."""
    if not (project.folder / "outputs/straight/05_pretrain").exists():
        copy(project, "straight")
        project.run("pretrain/05_pretrain.sh", "--recipe", "straight", *ADAMW, *STEPS)
    work = copy(project, name)
    # With --force, so that the finished twin is not taken over.
    options = ("--recipe", name, *ADAMW, *STEPS, "--force")
    run = project.start("pretrain/05_pretrain.sh", *options, *before)
    wait_for(lambda: list(work.glob("checkpoints/*/manifest.json")), run)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=120)
    assert run.returncode == 143
    output = project.run("pretrain/05_pretrain.sh", *options[:-1], *after).stdout
    assert "continues from checkpoint-" in output
    active = project.figures(name, "05_pretrain")["active"]
    assert active["ranks"] == ranks
    if name == "less-memory":
        assert (active["micro_batch"], active["activation_checkpointing"]) == (2, active["layers"])
    curves = curve(project, name), curve(project, "straight")
    assert [step for step, _ in curves[0]] == [step for step, _ in curves[1]] == list(range(1, 61))
    assert [loss for _, loss in curves[0]] == pytest.approx([loss for _, loss in curves[1]], rel=1e-4)


def test_changed_global_batch_is_refused_before_continuing(project):
    work = copy(project, "batch")
    run = project.start("pretrain/05_pretrain.sh", "--recipe", "batch", *LONG)
    wait_for(lambda: list(work.glob("checkpoints/*/manifest.json")), run)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=120)
    line = ("pretrain/05_pretrain.sh", "--recipe", "batch", *LONG, "--set", "pretrain.global_batch_size=16")
    result = project.run(*line, check=False)
    assert (
        result.returncode == 2
        and "global_batch_size: 8 -> 16" in result.stderr
        and "--force" in result.stderr
    )


class Payload:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("sharding", [(), (*ADAMW, "--nproc", "2", "--deepspeed", "zero2")])
def test_code_in_a_checkpoint_is_never_run(project, tmp_path, sharding):
    """A foreign checkpoint: every pickle in it is replaced, and its manifest agrees with them."""
    name = f"pickled{len(sharding)}"
    work = copy(project, name)
    line = ("pretrain/05_pretrain.sh", "--recipe", name, *sharding, *LONG)
    run = project.start(*line)
    wait_for(lambda: list(work.glob("checkpoints/*/manifest.json")), run)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=120)
    marks = []
    for checkpoint in work.glob("checkpoints/checkpoint-*"):
        pickles = [path for path in checkpoint.rglob("*") if path.suffix in (".pt", ".pth", ".bin")]
        assert pickles
        for path in pickles:
            marks.append(tmp_path / f"{checkpoint.name}-{path.name}.executed")
            path.write_bytes(pickle.dumps(Payload(marks[-1])))
        write_manifest(checkpoint)
    # Shards are converted for another number of ranks.
    for ranks in ((), ("--nproc", "1")) if sharding else ((),):
        result = project.run(*line, *ranks, check=False)
        assert result.returncode == 1, result.stdout
        assert "holds more than tensors and numbers" in result.stderr, result.stderr
    assert not [mark for mark in marks if mark.exists()]


ONE_BAD_RANK = """
import math, sys, types
from pathlib import Path
import torch, torch.distributed as dist
from recipe.config.settings import SpikeRule
from recipe.training.script import leave
from recipe.training.skip_bad_steps import Guard

dist.init_process_group("gloo")
rank = dist.get_rank()
guard, weight = Guard(Path(sys.argv[1]), SpikeRule()), torch.nn.Parameter(torch.zeros(2))
guard.trainer = types.SimpleNamespace(step_loss=0.0, gradient_norm=1.0, is_deepspeed_enabled=False)
arguments = types.SimpleNamespace(device=torch.device("cpu"), fp16=False, bf16=False)
for step, bad in enumerate((1.0, 1.0, float(sys.argv[2]), 1.0)):
    weight.grad = torch.ones(2)
    guard.trainer.step_loss = bad if rank == 1 else 1.0
    state = types.SimpleNamespace(global_step=step, is_world_process_zero=rank == 0)
    guard.on_pre_optimizer_step(arguments, state, None, model=torch.nn.ParameterList([weight]))
    print(f"rank {rank} step {step + 1} " + ("left out" if weight.grad is None else "taken"), flush=True)
leave(0)
"""


@pytest.mark.parametrize("loss", ["nan", "inf", "100"])
def test_all_ranks_skip_a_step_that_is_bad_on_one(tmp_path, loss):
    (tmp_path / "one_bad_rank.py").write_text(ONE_BAD_RANK)
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [str(tmp_path / "one_bad_rank.py"), str(tmp_path), loss],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    for rank in (0, 1):
        for step in (1, 2, 4):
            assert f"rank {rank} step {step} taken" in result.stdout, result.stdout + result.stderr
        assert f"rank {rank} step 3 left out" in result.stdout
    assert len(rows_of(tmp_path / "skipped.jsonl")) == 1


POISON_RANK_1 = """
import torch.distributed as dist
from recipe.config.settings import SpikeRule
from recipe.training.script import leave
from recipe.training.skip_bad_steps import Guard

stock = Guard.on_step_end

def poison(guard, args, state, control, **objects):
    if state.global_step == 10 and dist.get_rank() == 1:
        weight = list(guard.trainer.model.parameters())[3]
        part = getattr(weight, "ds_tensor", weight.data)
        part = part.to_local() if hasattr(part, "to_local") else part
        part.flatten()[0:1].fill_(float("nan"))
    stock(guard, args, state, control, **objects)

Guard.on_step_end = poison
"""


@pytest.mark.parametrize("options", [(), ("--fsdp",), ("--deepspeed", "zero3")])
def test_nan_in_the_weights_of_one_rank_stops_all(project, tmp_path, monkeypatch, options):
    """The rank that saves may be another one than the rank that holds the bad weight."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif 'LOCAL_RANK' in os.environ:\n    import poison_rank_1\n"
    )
    (tmp_path / "poison_rank_1.py").write_text(POISON_RANK_1)
    path = f"{tmp_path}:{project.environment['PYTHONPATH']}"
    monkeypatch.setitem(project.environment, "PYTHONPATH", path)
    name = "nan" + "-".join(options).replace("--", "")
    work = copy(project, name)
    # --force: an equal training of another test would be taken over.
    line = ("pretrain/05_pretrain.sh", "--recipe", name, *ADAMW, *STEPS, "--nproc", "2", *options, "--force")
    result = project.run(*line, check=False)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "step 10: the weight" in result.stderr and "is NaN or infinite" in result.stderr
    assert not list(work.glob("checkpoints/*/manifest.json"))
    assert not project.output(name, "05_pretrain").exists()
