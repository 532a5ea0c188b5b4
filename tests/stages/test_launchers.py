"""Every launcher and every kind of parallelism trains on a CPU and reaches the losses of one process."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import skip_bf16_without_units, wait_for
from safetensors import safe_open

pytestmark = pytest.mark.slow

# AdamW: under ZeRO Muon is refused. One global batch of 8 sequences, however many ranks share it.
COMMON = ("--set", "pretrain.muon_learning_rate=null", "--set", "pretrain.logging_steps=1")
PRECISION = {"fp32": ("--set", "pretrain.bf16=false"), "bf16": ("--set", "pretrain.bf16=true")}
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
# Each kind of parallelism: its options, and what must be active.
WAYS = {
    "ddp": (("--nproc", "2"), "DDP 2"),
    "zero1": (("--nproc", "2", "--deepspeed", "zero1"), "ZeRO-1"),
    "zero2": (("--nproc", "2", "--deepspeed", "zero2"), "ZeRO-2"),
    "zero3": (("--nproc", "2", "--deepspeed", "zero3"), "ZeRO-3"),
    "fsdp": (("--nproc", "2", "--fsdp"), "FSDP2 2"),
    "tp": (("--nproc", "2", "--tensor-parallel", "2"), "TP 2"),
    "fsdp-tp": (("--nproc", "4", "--tensor-parallel", "2"), "FSDP2 2 x TP 2"),
}


def train(project, name, *options, stage="05_pretrain", file="pretrain/05_pretrain.sh"):
    project.copy(name)
    project.run("run_all.sh", "--recipe", name, "--to", "04")
    # --force, so that the finished twin of another launcher is not taken over.
    result = project.run(file, "--recipe", name, "--force", *COMMON, *options, timeout=900)
    return project.losses(name, stage), project.figures(name, stage), result


def close(losses, expected, kind):
    assert len(losses) == len(expected) == 20 and losses[-1] < losses[0]
    worst = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
    print(f"{kind}: largest relative difference {worst:.1e}")
    return worst <= TOLERANCE[kind]


@pytest.fixture(scope="module")
def alone(prepared):
    """The losses of one process, by precision, once for all tests."""
    return functools.cache(lambda kind: train(prepared, f"alone-{kind}", *PRECISION[kind])[0])


@pytest.fixture(scope="module")
def together(prepared):
    """A training by each of the WAYS, once for all tests: losses, figures, and the finished process."""
    return functools.cache(
        lambda way, kind: train(prepared, f"{way}-{kind}", *WAYS[way][0], *PRECISION[kind])
    )


@pytest.mark.parametrize(
    ("way", "kind"), [(way, kind) for way in WAYS for kind in PRECISION if (way, kind) != ("fsdp-tp", "bf16")]
)
def test_ranks_together_reach_the_losses_of_one(together, alone, way, kind):
    skip_bf16_without_units(kind)
    options, parallel = WAYS[way]
    losses, figures, result = together(way, kind)
    active = figures["active"]
    assert active["ranks"] == int(options[1]) and active["global_batch"] == 8
    # Ranks that share matrices read the same batches.
    assert active["accumulation"] == (2 if way == "tp" else 1)
    assert active["precision"] == kind and active["parallel"] == parallel
    launcher = "deepspeed.launcher" if "--deepspeed" in options else "torch.distributed.run"
    assert launcher in result.stdout
    assert close(losses, alone(kind), kind)


MUON = ("--set", "pretrain.muon_learning_rate=0.02")


@pytest.fixture(scope="module")
def muon_alone(prepared):
    return train(prepared, "muon-alone", *MUON)[0]


@pytest.mark.parametrize("way", ["ddp", "fsdp", "tp", "fsdp-tp"])
def test_muon_is_muon_on_several_ranks(prepared, muon_alone, way):
    one, (options, parallel) = muon_alone, WAYS[way]
    two, figures, _ = train(prepared, f"muon-{way}", *MUON, *options)
    assert figures["active"]["optimizer"] == "MuonAdamW" and figures["active"]["parallel"] == parallel
    # In bf16, where Muon has it, the rounding of the all-reduce grows; the first step is exact.
    assert abs(two[0] - one[0]) / one[0] < 1e-6
    assert max(abs(a - b) / b for a, b in zip(two, one, strict=True)) < 1e-2


@pytest.mark.parametrize("way", ["ddp", "zero2", "fsdp"])
def test_tuning_runs_on_two_ranks(prepared, way):
    options, parallel = WAYS[way]
    name = f"tune-{way}"
    prepared.copy(name)
    prepared.edit(name, "pretrain", muon_learning_rate=None)
    prepared.run("run_all.sh", "--recipe", name, "--to", "11")
    prepared.run("fine-tuning/12_finetune.sh", "--recipe", name, "--force", *options, timeout=900)
    assert prepared.figures(name, "12_finetune")["active"]["parallel"] == parallel


@pytest.mark.parametrize("way", [way for way in WAYS if way != "fsdp-tp"])
def test_compiled_training_on_two_ranks_is_still_parallel(prepared, alone, way):
    """What `run_all.sh --nproc 2` runs on a machine with a compiler."""
    options, parallel = WAYS[way]
    losses, figures, _ = train(
        prepared, f"{way}-compiled", *options, *PRECISION["fp32"], "--set", "pretrain.torch_compile=true"
    )
    active = figures["active"]
    assert active["compiled"] and active["ranks"] == 2 and active["parallel"] == parallel
    assert close(losses, alone("fp32"), "fp32")


def stubs(folder, **scripts):
    """Executables in place of a cluster's; they run their commands on this machine."""
    folder.mkdir()
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_two_nodes_by_hand(prepared, alone):
    """The same command on both nodes, each with its own rank; here both are this machine."""
    name = "two-nodes"
    prepared.copy(name)
    prepared.run("run_all.sh", "--recipe", name, "--to", "04")
    port = str(20000 + os.getpid() % 10000)
    line = ("pretrain/05_pretrain.sh", "--recipe", name, "--force", *COMMON, *PRECISION["fp32"])
    line += ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", port)
    other = prepared.start(*line, "--node-rank", "1")
    output = prepared.run(*line, "--node-rank", "0", timeout=600).stdout
    joined, _ = other.communicate(timeout=120)
    assert other.returncode == 0, joined
    assert "--nnodes 2 --node-rank 0" in output and "--nnodes 2 --node-rank 1" in joined
    active = prepared.figures(name, "05_pretrain")["active"]
    assert active["parallel"] == "DDP 2" and active["ranks"] == 2 and active["global_batch"] == 8
    assert close(prepared.losses(name), alone("fp32"), "fp32")


def test_slurm_job_over_two_nodes_stops_at_its_limit_and_continues(prepared, alone, tmp_path, monkeypatch):
    """srun starts both launchers; torchrun joins them over 127.0.0.1."""
    cluster = stubs(
        tmp_path / "bin",
        scontrol='[[ $1 == show ]] && echo 127.0.0.1 || echo "$@" >>"$SLURM_SUBMIT_DIR/scontrol.log"',
        srun='while [[ $1 == --* ]]; do shift; done; SLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@"; code=$?\n'
        "wait; exit $code",
    )
    prepared.copy("slurm")
    prepared.run("run_all.sh", "--recipe", "slurm", "--to", "04")
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "2"}
    job |= {"SLURM_SUBMIT_DIR": str(prepared.folder), "SLURM_JOB_ID": str(os.getpid())}
    for name, value in (cluster | job).items():
        monkeypatch.setitem(prepared.environment, name, value)
    line = ("pretrain/slurm.sh", "pretrain/05_pretrain.sh", "--recipe", "slurm", *COMMON, *PRECISION["fp32"])
    # --force, so that the finished twin is not taken over.
    process = prepared.start(*line, "--force")
    work = prepared.output("slurm", ".05_pretrain.work", "")
    wait_for(lambda: (work / "metrics.jsonl").exists(), process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 143, output
    assert (prepared.folder / "scontrol.log").read_text() == f"requeue {os.getpid()}\n"
    assert list(work.glob("checkpoints/checkpoint-*/manifest.json")), output

    output = prepared.run(*line).stdout
    assert "continues from checkpoint" in output and "--node-rank 1" in output
    active = prepared.figures("slurm", "05_pretrain")["active"]
    assert active["parallel"] == "DDP 2" and active["global_batch"] == 8
    assert close(prepared.losses("slurm"), alone("fp32"), "fp32")

    # Node 0 takes over a finished twin without training: node 1 must not wait for it.
    shutil.rmtree(prepared.output("slurm", "05_pretrain", ""))
    output = prepared.run(*line).stdout
    assert "taken from outputs/alone-fp32" in output and "node 0 has the result without training" in output


def test_deepspeed_over_a_hostfile(prepared, alone, tmp_path, monkeypatch):
    """DeepSpeed's launcher starts the ranks of both machines through pdsh."""
    cluster = stubs(
        tmp_path / "bin",
        ssh="exit 0",
        pdsh="while [[ $1 == -* ]]; do [[ $1 == -S ]] || shift; shift; done; unset TOKENIZERS_PARALLELISM; "
        'bash -c "${*//%n/1}" & bash -c "${*//%n/0}"; code=$?; wait; exit $code',
    )
    monkeypatch.setitem(prepared.environment, "PATH", cluster["PATH"])
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=1\nnode2 slots=1\n")
    options = ("--deepspeed", "zero2", "--hostfile", str(hosts), "--master-addr", "127.0.0.1")
    port = ("--master-port", str(30000 + os.getpid() % 10000))
    losses, figures, result = train(prepared, "hostfile", *options, *port, *PRECISION["fp32"])
    assert figures["active"]["parallel"] == "ZeRO-2" and figures["active"]["ranks"] == 2
    assert "--hostfile" in result.stdout
    assert close(losses, alone("fp32"), "fp32")


@pytest.mark.parametrize("way", ["fsdp", "tp"])
def test_sharded_training_continues_where_it_was_stopped(prepared, together, way):
    """Weights and optimizer are sharded; the losses are those without a stop, the model is complete."""
    options, parallel = WAYS[way]
    name = f"stopped-{way}"
    prepared.copy(name)
    prepared.run("run_all.sh", "--recipe", name, "--to", "04")
    line = ("pretrain/05_pretrain.sh", "--recipe", name, *COMMON, *options, *PRECISION["fp32"])
    # --force, so that the finished twin is not taken over.
    process = prepared.start(*line, "--force")
    work = prepared.output(name, ".05_pretrain.work", "")
    wait_for(lambda: (work / "metrics.jsonl").exists(), process)
    (work / "stop").touch()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 143, output
    assert "continues from checkpoint" in prepared.run(*line).stdout
    assert prepared.losses(name) == together(way, "fp32")[0]
    assert prepared.figures(name, "05_pretrain")["active"]["parallel"] == parallel
    with safe_open(prepared.output(name, "05_pretrain", "model.safetensors"), "pt") as weights:
        assert weights.get_slice("model.layers.0.mlp.up_proj.weight").get_shape() == [64, 32]
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118 (no mapping)


STOCK_FSDP = """
import sys
import torch
from recipe.config.optimizers import DEFAULT, OPTIMIZERS
from recipe.config.settings import Settings
from recipe.config.choice import Choice
from recipe.project import Refused
from recipe.training.active_check import ActiveCheck, Asked, expected_parallelism
from transformers import AutoModelForCausalLM, Qwen3Config, Trainer, TrainingArguments

arguments = TrainingArguments(output_dir=sys.argv[1], fsdp=True, use_cpu=True, max_steps=1, report_to=[],
                              save_strategy="no", per_device_train_batch_size=1, disable_tqdm=True)
small = dict(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
model = AutoModelForCausalLM.from_config(Qwen3Config(num_key_value_heads=2, head_dim=8, **small))
settings = Settings(2, 8)
parallel = expected_parallelism(2, None, True, 1)
check = ActiveCheck(Asked(settings, Choice("fp32", "sdpa", False), OPTIMIZERS[DEFAULT], parallel, 2), 16)
samples = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
trainer = Trainer(model, arguments, train_dataset=samples, callbacks=[check])
trainer.settings, check.trainer = settings, trainer
trainer.added, trainer.sequences, trainer.clipped_at = {}, 1, 1.0
try:
    trainer.train()
except Refused as refusal:
    print(f"refused: {refusal}", flush=True)
torch.distributed.barrier()
"""


def test_the_check_finds_that_stock_fsdp_is_ddp_on_cpus(prepared, tmp_path):
    """The Trainer silently ignores `fsdp=True` there."""
    (tmp_path / "stock.py").write_text(STOCK_FSDP)
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [str(tmp_path / "stock.py"), str(tmp_path / "out")],
        env=prepared.environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    refusal = "refused: the training does not use what the settings ask for. "
    refusal += "parallel: asked for FSDP2 2, active is DDP 2"
    assert result.stdout.count(refusal) == 2, result.stdout + result.stderr


@pytest.fixture(scope="module")
def gpt2(prepared):
    folder = prepared.folder / "configs/gpt2"
    shutil.copytree(prepared.folder / "configs/mini", folder)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}
    # Each rank would draw its own dropout.
    dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    (folder / "model.json").write_text(json.dumps({"model_type": "gpt2"} | shape | dropout))
    prepared.run("run_all.sh", "--recipe", "gpt2", "--to", "04")
    return prepared


def test_architecture_without_a_plan_is_refused(gpt2):
    line = ("pretrain/05_pretrain.sh", "--recipe", "gpt2", *COMMON, "--nproc", "2", "--tensor-parallel", "2")
    result = gpt2.run(*line, check=False)
    assert result.returncode == 2
    assert "transformers has no plan for gpt2" in result.stderr


def test_fsdp_gathers_gpt2_layer_by_layer(gpt2):
    """Its layers have other names than in transformers' plan; without our plan the training is refused."""
    line = ("pretrain/05_pretrain.sh", "--recipe", "gpt2", "--force", *COMMON, *PRECISION["fp32"])
    gpt2.run(*line)
    alone = gpt2.losses("gpt2")
    fsdp = (*line, *WAYS["fsdp"][0])
    gpt2.run(*fsdp)
    assert gpt2.figures("gpt2", "05_pretrain")["active"]["parallel"] == "FSDP2 2"
    assert close(gpt2.losses("gpt2"), alone, "fp32")

    module = gpt2.folder / "pretrain/recipe/model/sharding.py"
    text = module.read_text("utf-8")
    assert text.count('"transformer.h.*"') == 1
    try:
        module.write_text(text.replace('"transformer.h.*"', '"transformer.wpe"'), "utf-8")
        result = gpt2.run(*fsdp, check=False)
    finally:
        module.write_text(text, "utf-8")
    assert result.returncode == 1 and "--fsdp would gather all weights at once" in result.stderr
