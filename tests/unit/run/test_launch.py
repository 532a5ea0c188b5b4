"""Which launcher starts a training, with which environment, and which options are refused."""

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from recipe.config.launch import batch_layout, check_experts, check_launch, check_tensor_parallel
from recipe.config.recipe import load_recipe
from recipe.config.staleness import deciding_keys
from recipe.hardware import Gpu
from recipe.project import RECORD, Refused, write_json
from recipe.run import launch_options
from recipe.run.launch import goes_on, main
from recipe.run.launch_options import TRAINING_STAGES, Launch, add_options, launch_of
from recipe.run.processes import child_environment, command, kept_memory
from recipe.run.publication import WANTED


def test_one_process_is_plain_python():
    assert command("run_clm.py", ["plan"], Launch(), None) == [sys.executable, "run_clm.py", "plan"]


def test_several_processes_use_torchrun():
    line = command("run_clm.py", ["plan"], Launch(4), None)
    assert line[1:3] == ["-m", "torch.distributed.run"] and "--standalone" in line
    assert line[line.index("--nproc-per-node") + 1] == "4"
    assert line[-2:] == ["run_clm.py", "plan"]


@pytest.mark.parametrize("deepspeed", [None, Path("zero2.json")])
def test_several_nodes_use_torchrun(deepspeed):
    launch = Launch(4, nodes=2, node_rank=1, master_addr="10.0.0.1", master_port=29500)
    line = command("run_clm.py", ["plan"], launch, deepspeed)
    for option, value in {
        "--nnodes": "2",
        "--node-rank": "1",
        "--master-addr": "10.0.0.1",
        "--master-port": "29500",
        "--nproc-per-node": "4",
    }.items():
        assert line[line.index(option) + 1] == value
    assert line[2] == "torch.distributed.run" and "--standalone" not in line
    assert launch.ranks == 8


def test_deepspeed_has_its_own_launcher():
    zero2 = Path("zero2.json")
    line = command("run_clm.py", ["plan"], Launch(2), zero2)
    assert line[2] == "deepspeed.launcher.runner"
    assert line[line.index("--num_gpus") + 1] == "2"
    # With --num_gpus its launcher ignores CUDA_VISIBLE_DEVICES.
    line = command("run_clm.py", ["plan"], Launch(2), zero2, "1,3,5")
    assert line[line.index("--include") + 1] == "localhost:1,3" and "--num_gpus" not in line
    with pytest.raises(Refused, match="CUDA_VISIBLE_DEVICES: GPU-8f3,GPU-1b2: .* reads numbers only"):
        command("run_clm.py", ["plan"], Launch(2), zero2, "GPU-8f3,GPU-1b2")
    hosts = Launch(4, hostfile=Path("hosts"), hosts={"a": 4, "b": 2}, master_addr="a")
    line = command("run_clm.py", ["plan"], hosts, zero2)
    assert line[line.index("--hostfile") + 1] == "hosts" and "--num_gpus" not in line
    assert line[line.index("--master_addr") + 1] == "a"
    assert hosts.ranks == 6


def options(*words):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return launch_of(parser.parse_args(words))


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("--nnodes", "2", "--node-rank", "2", "--master-addr", "a"), "--node-rank 2"),
        (("--nnodes", "2"), "--master-addr"),
        (("--hostfile", "hosts"), "--deepspeed"),
        (("--hostfile", "missing", "--deepspeed", "zero2"), "no such file"),
    ],
)
def test_contradicting_options_are_refused(words, fault):
    with pytest.raises(Refused, match=fault):
        options(*words)


def test_hostfile(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    path = tmp_path / "hosts"
    path.write_text("# machines\nnode1 slots=4\n\nnode2   slots=2  # the small one\n")
    with pytest.raises(Refused, match="apt-get install pdsh"):
        options("--hostfile", str(path), "--deepspeed", "zero2")
    (tmp_path / "pdsh").write_text("#!/bin/sh\n")
    (tmp_path / "pdsh").chmod(0o755)
    launch = options("--hostfile", str(path), "--deepspeed", "zero2")
    assert launch.hosts == {"node1": 4, "node2": 2} and launch.ranks == 6
    for line in ("node1 slots=four", "node1", "node1 slots=0", "node1 slots=1\nnode1 slots=1"):
        path.write_text(f"node0 slots=1\n{line}\n")
        with pytest.raises(Refused, match=f"hosts:{1 + len(line.splitlines())}: 'node1"):
            options("--hostfile", str(path), "--deepspeed", "zero2")


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("run_sft.py", "--probe"), "12_finetune: error: --probe measures"),
        (
            ("run_dpo.py", "--node-rank", "1", "--probe"),
            "13_preference: error: --probe measures",
        ),
        (
            ("run_clm.py", "--probe", "--dry-run"),
            "05_pretrain: error: --probe measures and --dry-run",
        ),
        (
            ("train.py", "--recipe", "tiny"),
            "recipe.run.launch: error: train.py: expected one of run_clm.py",
        ),
        (("run_clm.py", "--recipe", "nosuch", "--node-rank", "1"), "05_pretrain: error: configs/nosuch: no"),
    ],
)
def test_a_refused_start_ends_with_one_line(monkeypatch, capsys, words, fault):
    monkeypatch.setattr(sys, "argv", ["launch", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2 and capsys.readouterr().err.startswith(fault)


def test_no_more_ranks_than_gpus(monkeypatch):
    """Two ranks on one GPU would only end with an error from NCCL. On a CPU, ranks share the cores."""
    ampere = Gpu("NVIDIA RTX 3090", (8, 6), 2**34, 2**34)
    monkeypatch.setattr(launch_options, "gpus", lambda: [ampere] * 2)
    assert options("--nproc", "2").processes == options().processes == 2
    with pytest.raises(Refused, match="--nproc 3: 2 GPUs are visible"):
        options("--nproc", "3")
    monkeypatch.setattr(launch_options, "gpus", lambda: [])
    assert options("--nproc", "3").processes == 3


def test_all_ranks_compute_as_the_first_gpu_can(monkeypatch):
    ampere, turing = Gpu("NVIDIA RTX 3090", (8, 6), 1, 1), Gpu("NVIDIA RTX 2080", (7, 5), 1, 1)
    monkeypatch.setattr(launch_options, "gpus", lambda: [ampere, turing])
    with pytest.raises(Refused, match=r"RTX 2080 has no bf16 units, but the first GPU, NVIDIA RTX 3090, has"):
        options()
    assert options("--nproc", "1").processes == 1
    for right in ([turing, ampere], [ampere, ampere._replace(capability=(8, 9))]):
        monkeypatch.setattr(launch_options, "gpus", lambda right=right: right)
        assert options().processes == 2


def test_hosts_get_the_environment(tmp_path):
    path = tmp_path / "env"
    environment = child_environment({"OMP_NUM_THREADS": "7", "SECRET": "x"}, 2, path)
    assert environment["DS_ENV_FILE"] == str(path)
    lines = dict(line.split("=", 1) for line in path.read_text().splitlines())
    assert lines["OMP_NUM_THREADS"] == "7" and "SECRET" not in lines


def test_users_environment_wins():
    assert child_environment({"OMP_NUM_THREADS": "7"}, 2)["OMP_NUM_THREADS"] == "7"
    assert (
        int(child_environment({}, 1)["OMP_NUM_THREADS"])
        >= int(child_environment({}, 2)["OMP_NUM_THREADS"])
        >= 1
    )


def test_ranks_share_the_physical_cores(monkeypatch):
    monkeypatch.setattr("recipe.host.threads", lambda: 6)
    shares = [child_environment({}, ranks)["OMP_NUM_THREADS"] for ranks in (1, 2, 4, 8)]
    assert shares == ["6", "3", "1", "1"]


def test_an_older_glibc_gets_a_threshold_that_it_accepts():
    old, new = (int(kept_memory(glibc)["MALLOC_MMAP_THRESHOLD_"]) for glibc in ((2, 34), (2, 35)))
    assert old == 64 * 2**20 / 2 < new  # half of a heap of glibc


def test_a_training_on_a_cpu_keeps_the_memory_of_freed_tensors():
    """Twenty times 64 MB: only the first time is new memory. A page has at least 4 KiB."""
    code = "import resource\nfor _ in range(20): b'x' * 64_000_000\n"
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"
    environment = child_environment(os.environ | {"CUDA_VISIBLE_DEVICES": ""}, 1)
    faults = [
        int(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout)
        for env in (os.environ, environment)
    ]
    assert faults[1] < 64_000_000 / resource.getpagesize() * 2 < faults[0], faults


def test_global_batch_is_one_number():
    assert batch_layout(256, 4, 1) == (4, 64)
    assert batch_layout(256, 4, 8) == (4, 8)
    assert batch_layout(16, 16, 2) == (8, 1)  # a rank takes no more than its share
    for wrong in ((256, 4, 3), (24, 16, 1)):
        with pytest.raises(Refused, match=f"{wrong[0]} sequences do not divide into {wrong[2]} ranks"):
            batch_layout(*wrong)


VALUES = {"global_batch_size": 8, "per_device_train_batch_size": 4, "block_size": 64}


def test_muon_is_refused_only_under_deepspeed():
    def check(**sharding):
        return check_launch(values, "finetune", **{"deepspeed": None, "ranks": 2} | sharding)

    values = VALUES | {"muon_learning_rate": 0.1, "torch_compile": True}
    assert check() is check(fsdp=True) is check(tensor_parallel=2) is None
    with pytest.raises(Refused, match=r"--set finetune\.muon_learning_rate=null, or shard by --fsdp"):
        check(deepspeed="zero2")
    values |= {"embedding_learning_rate": 0.3}
    with pytest.raises(Refused, match="rate=null --set finetune.embedding_learning_rate=null, or shard"):
        check(deepspeed="zero2")
    values = VALUES | {"torch_compile": True}
    assert check(deepspeed="zero2").name == "zero2.json"


def test_impossible_launches_are_refused():
    assert check_launch(VALUES, "pretrain", None, 2) is None
    assert (
        check_launch(VALUES, "pretrain", None, 16, fsdp=True, tensor_parallel=2) is None
    )  # 8 ranks read data
    with pytest.raises(Refused, match="'zero2'"):
        check_launch(VALUES, "pretrain", "zero_2", 2)
    for ranks, sharding, fault in (
        (16, {}, "do not divide into 16 ranks"),
        (1, {"fsdp": True}, "nothing to shard over"),
        (2, {"fsdp": True, "tensor_parallel": 2}, "nothing to shard over"),
        (2, {"tensor_parallel": 3}, "divides the 2 ranks"),
        (2, {"tensor_parallel": 0}, "divides the 2 ranks"),
    ):
        with pytest.raises(Refused, match=fault):
            check_launch(VALUES, "pretrain", None, ranks, **sharding)
    with pytest.raises(Refused, match="--deepspeed shards by itself"):
        check_launch(VALUES, "pretrain", "zero2", 2, fsdp=True)
    check_tensor_parallel({"num_attention_heads": 8, "num_key_value_heads": 2}, 2)
    with pytest.raises(Refused, match="2 key-value heads"):
        check_tensor_parallel({"num_attention_heads": 8, "num_key_value_heads": 2}, 4)


def test_experts_must_divide_over_the_ranks():
    model = {"model_type": "qwen3_moe", "num_experts": 6, "moe_intermediate_size": 96}
    for ranks, fsdp, split in ((3, True, 1), (4, False, 1), (12, True, 4), (1, False, 1)):
        check_experts(model, {}, ranks, fsdp, split)
    with pytest.raises(Refused, match="6 experts do not divide over 4 ranks.* such as 3"):
        check_experts(model, {}, 4, True, 1)
    with pytest.raises(Refused, match="Muon needs it whole. Use --fsdp, or AdamW"):
        check_experts(model, {"muon_learning_rate": 0.02}, 2, False, 2)
    with pytest.raises(Refused, match="moe_intermediate_size 96 does not divide"):
        check_tensor_parallel(model | {"num_key_value_heads": 5}, 5)
    check_experts({"model_type": "qwen3"}, {}, 4, True, 1)


@pytest.mark.parametrize("option", ["--fsdp", "--tensor-parallel"])
def test_adapters_and_preferences_are_not_sharded_by_torch(option):
    sharding = {"fsdp": True} if option == "--fsdp" else {"tensor_parallel": 2}
    for file, values in (("finetune", VALUES | {"lora": {"r": 4}}), ("preference", VALUES)):
        check_launch(values, file, "zero3", 2)
        with pytest.raises(Refused, match=rf"{file}\.json: {option} shards .*--deepspeed zero2 or zero3"):
            check_launch(values, file, None, 2, **sharding)


def test_nf4_is_not_partitioned_by_zero_3():
    values = VALUES | {"lora": {"r": 4, "quantization": "nf4"}}
    assert check_launch(values, "finetune", "zero2", 2).name == "zero2.json"
    with pytest.raises(Refused, match=r"Use --deepspeed zero2, or .*finetune\.lora\.quantization=null"):
        check_launch(values, "finetune", "zero3_offload", 2)


def test_help_names_the_script_that_is_started(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launch.py", "pretrain/run_clm.py", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out.startswith("usage: 05_pretrain.sh ")


def test_other_nodes_go_on_with_what_node_0_goes_on_with(tmp_path):
    """A finished training is made longer, or its redo was interrupted and --force is no longer given."""
    final, work = tmp_path / "05_pretrain", tmp_path / ".05_pretrain.work"
    for folder in (final, work):
        folder.mkdir()
    one_phase = "pretrain.phases=null"  # one that ends at a share of max_steps would be another
    config, training = load_recipe("tiny", [one_phase]), TRAINING_STAGES["run_clm.py"]
    wanted = {"config": {file: deciding_keys(file, config[file]) for file in ("model", "pretrain")}}
    write_json(final / RECORD, {"wanted": wanted | {"inputs": {}}})
    assert not goes_on(final, work, training, config)
    longer = load_recipe("tiny", [one_phase, "pretrain.max_steps=9999"])
    assert goes_on(final, work, training, longer)
    write_json(work / WANTED, wanted | {"inputs": {}})
    assert goes_on(final, work, training, config)
    assert not goes_on(final, work, training, load_recipe("tiny", [one_phase, "pretrain.seed=1"]))
