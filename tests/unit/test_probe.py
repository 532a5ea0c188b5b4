"""The search by measuring: real trainings of a mini model, and attempts that end in every way there is."""

import json
import os
import sys
from pathlib import Path

import pytest
from recipe import preflight, probe
from recipe.launch import child_environment
from recipe.probe import attempt, climb, combinations, micro_batches, options_of, table

PYTHON = [sys.executable, "-c"]


def end_of(tmp_path, code, limit=60.0):
    return attempt([*PYTHON, code], tmp_path, child_environment(os.environ, 1), limit)


def test_a_finished_attempt_brings_its_figures(tmp_path):
    row = end_of(tmp_path, "open('result.json', 'w').write('{\"tokens_per_second\": 5}')")
    assert row == {"outcome": "ok", "tokens_per_second": 5}


def test_real_lack_of_memory_is_recognised(tmp_path):
    """PyTorch asks for more than this machine could ever give."""
    row = end_of(tmp_path, "import torch; torch.empty(2**60, dtype=torch.int8)")
    assert row == {"outcome": "out of memory"}


def test_the_kernels_kill_is_survived(tmp_path):
    row = end_of(tmp_path, "import os; os.kill(os.getpid(), 9)")
    assert row["outcome"] == "killed" and "memory" in row["reason"]


def test_a_killed_rank_is_recognised_behind_its_launcher(tmp_path):
    """torchrun itself ends with 1 when the kernel kills one of its ranks."""
    (tmp_path / "rank.py").write_text(
        "import os, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\ntime.sleep(60)"
    )
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    row = attempt([*line, str(tmp_path / "rank.py")], tmp_path, child_environment(os.environ, 2))
    assert row["outcome"] == "killed"


def test_a_crash_gives_its_last_line(tmp_path):
    row = end_of(tmp_path, "raise ValueError('no such layer')")
    assert row == {"outcome": "failed", "reason": "ValueError: no such layer"}
    # exit 0 without figures is no success
    assert end_of(tmp_path, "print('bye')") == {"outcome": "failed", "reason": "bye"}


def test_a_hung_attempt_ends_with_all_its_processes(tmp_path):
    code = "import subprocess\nchild = subprocess.Popen(['sleep', '1000'])\n"
    code += "open('pid', 'w').write(str(child.pid)); child.wait()"
    row = end_of(tmp_path, code, limit=3.0)
    assert row["outcome"] == "too slow"
    process = int((tmp_path / "pid").read_text())
    try:
        state = Path(f"/proc/{process}/stat").read_text().split()[2]
    except FileNotFoundError:
        state = "gone"
    assert state in ("gone", "Z", "X")


def test_the_attempt_is_what_the_kernel_would_kill_first(tmp_path):
    code = "import time; time.sleep(0.5); print(open('/proc/self/oom_score_adj').read())"
    assert end_of(tmp_path, code) == {"outcome": "failed", "reason": "1000"}


def test_micro_batches_divide_the_share():
    assert micro_batches(16) == [1, 2, 4, 8, 16]
    assert micro_batches(24) == [1, 2, 4, 8, 24]
    assert micro_batches(3) == [1, 3]


def test_combinations_are_those_that_training_accepts():
    plain = list(combinations({}, 1))
    assert {(c, z) for z, c, _ in plain} == {(False, None), (True, None)}
    assert not any(compiled for _, _, compiled in combinations({"torch_compile": False}, 1))
    shared = list(combinations({}, 2))
    assert {z for z, _, _ in shared} == {None, "zero1", "zero2", "zero3"}
    assert not any(compiled for z, _, compiled in shared if z)  # refused by check_launch
    assert {z for z, _, _ in combinations({"muon_learning_rate": 0.1}, 2)} == {None}


@pytest.mark.parametrize(
    ("speeds", "measured"),
    [
        ({1: 10, 2: 18, 4: 30, 8: 31}, [1, 2, 4, 8]),
        ({1: 10, 2: 9.8, 4: 30, 8: 20}, [1, 2, 4, 8]),
        ({1: 10, 2: 9.0, 4: 30, 8: 20}, [1, 2]),
        ({1: 10, 2: None, 4: 30, 8: 20}, [1, 2]),
        ({1: None, 2: 10, 4: 30, 8: 20}, [1]),
    ],
)
def test_the_climb_ends_at_a_failure_or_a_loss(speeds, measured):
    def measure(micro):
        speed = speeds[micro]
        figures = {"outcome": "ok", "tokens_per_second": speed} if speed else {"outcome": "out of memory"}
        return {"micro_batch": micro} | figures

    assert [row["micro_batch"] for row in climb([1, 2, 4, 8], measure)] == measured


def test_table_and_options():
    row = {"micro_batch": 8, "checkpointing": True, "compiled": False, "deepspeed": "zero2"}
    assert options_of(row) == (
        "--set pretrain.per_device_train_batch_size=8 --set pretrain.gradient_checkpointing=true "
        "--deepspeed zero2"
    )
    good = row | {"deepspeed": None, "compiled": True, "outcome": "ok", "tokens_per_second": 1234.5}
    good |= {"flops_per_second": 2e11, "peak_memory_bytes": 3 * 2**30}
    bad = row | {"outcome": "failed", "reason": "a | b"}
    lines = table([bad, good]).splitlines()
    assert lines[2] == "| 8 | yes | yes |  | 1,234 | 200 | 3.00 | ok |"
    assert lines[3] == "| 8 | yes | no | zero2 |  |  |  | failed: a / b |"


@pytest.fixture(scope="module")
def prepared(make_project):
    project = make_project()
    project.run("run_all.sh", "--recipe", "mini", "--to", "04")
    return project


def test_hopeless_settings_are_not_tried(prepared):
    """A block of 2**20 tokens of the mini model would keep terabytes."""
    config = {
        name: json.loads((prepared.folder / f"configs/mini/{name}.json").read_text())
        for name in ("model", "tokenizer", "pretrain")
    }
    config["pretrain"] |= {"block_size": 2**30, "torch_compile": False}
    row = probe.measure("none.py", {"config": config, "ranks": 1}, None, False, False, 4)
    assert row["outcome"] == "not tried" and "GiB are free" in row["reason"]


def test_probe_measures_real_trainings(prepared):
    """`mini` forbids torch.compile, which would take minutes here."""
    config = prepared.folder / "configs/mini/pretrain.json"
    kept = config.read_text()
    prepared.edit("mini", "pretrain", global_batch_size=2)
    result = prepared.run("pretrain/05_pretrain.sh", "--recipe", "mini", "--probe")
    config.write_text(kept)
    found = json.loads((prepared.folder / "outputs/mini/probe.json").read_text())
    assert found["rows"] and all(row["outcome"] == "ok" for row in found["rows"])
    assert {row["checkpointing"] for row in found["rows"]} == {False, True}
    assert {row["micro_batch"] for row in found["rows"]} == {1, 2}
    for row in found["rows"]:
        assert row["active"]["micro_batch"] == row["micro_batch"] and row["steps"] == probe.STEPS
        assert row["tokens_per_second"] > 0 and 2**27 < row["peak_memory_bytes"] < 2**32
    assert found["best"]["tokens_per_second"] == max(row["tokens_per_second"] for row in found["rows"])
    assert f"fastest: {found['options']}" in result.stdout and found["options"].startswith("--set pretrain.")
    # What it names is accepted by the stage; the stage itself was not touched.
    accepted = prepared.run(
        "pretrain/05_pretrain.sh", "--recipe", "mini", "--dry-run", *found["options"].split()
    )
    assert "would run" in accepted.stdout and "parameters" in accepted.stdout
    assert not (prepared.folder / "outputs/mini/05_pretrain").exists()


def test_probe_needs_the_tokens(prepared):
    prepared.add_recipe("bare", {})
    for file in (prepared.folder / "configs/mini").glob("*.json"):
        (prepared.folder / "configs/bare" / file.name).write_text(file.read_text())
    result = prepared.run("pretrain/05_pretrain.sh", "--recipe", "bare", "--probe", check=False)
    assert result.returncode == 2 and "--to 04" in result.stderr


def test_training_is_refused_without_room_for_its_checkpoints(prepared):
    options = ("--set", "pretrain.max_steps=100000000", "--set", "pretrain.save_steps=1")
    options += ("--set", "pretrain.save_total_limit=null", "--force")
    result = prepared.run("pretrain/05_pretrain.sh", "--recipe", "mini", *options, check=False)
    assert result.returncode == 2 and "checkpoints" in result.stderr and "free" in result.stderr


def test_computed_disk_is_what_a_training_writes(prepared):
    """A checkpoint's weights and optimizer, Muon's half among it, by the formula and on the disk."""
    short = ("--set", "pretrain.max_steps=2", "--set", "pretrain.save_steps=1")
    prepared.run("pretrain/05_pretrain.sh", "--recipe", "mini", *short)
    folder = prepared.folder / "outputs/mini/05_pretrain"
    record = json.loads((folder / "stage.json").read_text())
    assert record["figures"]["steps"] == 2 and record["figures"]["peak_memory_bytes"] > 2**27
    shape = preflight.shape_of(record["config"]["model"], 400)
    here, _ = preflight.this_machine()
    setting = preflight.setting_of(record["config"]["pretrain"], here, 1, None)
    assert shape.parameters == record["figures"]["active"]["parameters"]
    files = [folder / "checkpoints/checkpoint-1" / name for name in ("model.safetensors", "optimizer.pt")]
    written = sum(file.stat().st_size for file in files)
    # 20 kB of names and headers weigh something only beside so small a model.
    assert 0 <= written - preflight.checkpoint_bytes(shape, setting) < 40_000
