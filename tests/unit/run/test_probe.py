"""The search by measuring: real trainings of a mini model, and runs that end in every possible way."""

import argparse
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import MINI
from recipe.hardware import Hardware
from recipe.project import ROOT, Refused
from recipe.run import fitting, preflight, probe
from recipe.run.launch_options import Launch, add_options, launch_of
from recipe.run.memory import shape_of
from recipe.run.probe import (
    Way,
    attempt,
    climb,
    comparison,
    finalists,
    launch_words,
    measure,
    micro_batches,
    options_of,
    search,
    table,
    ways_to_train,
)
from recipe.run.processes import child_environment
from recipe.run.publication import hold

PYTHON = [sys.executable, "-c"]
SCRIPT = ROOT / "pretrain/run_clm.py"


def end_of(tmp_path, code, limit=60.0):
    return attempt([*PYTHON, code], tmp_path, child_environment(os.environ, 1), limit)


def test_a_finished_run_returns_its_figures(tmp_path):
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
    code = "import os, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\ntime.sleep(60)"
    row = attempt(torchrun(tmp_path, code), tmp_path, child_environment(os.environ, 2))
    assert row["outcome"] == "killed"


def test_a_crash_gives_its_last_line(tmp_path):
    row = end_of(tmp_path, "raise ValueError('no such layer')")
    assert row == {"outcome": "failed", "reason": "ValueError: no such layer"}
    # The rank's own error is shown, not what torchrun writes about it afterwards.
    code = "print('error: model.json: no such layer'); print('====='); exit(1)"
    assert end_of(tmp_path, code) == {"outcome": "failed", "reason": "model.json: no such layer"}
    # Exit code 0 without figures is no success.
    assert end_of(tmp_path, "print('bye')") == {"outcome": "failed", "reason": "bye"}


def test_options_that_cannot_be_split_are_refused_before_the_search(monkeypatch, tmp_path):
    monkeypatch.setattr(probe, "is_finished", lambda folder: True)
    for number in ("0", "2"):
        monkeypatch.setattr(sys, "argv", ["probe", "--nproc", "1", "--tensor-parallel", number])
        with pytest.raises(Refused, match=f"--tensor-parallel {number}: expected a number that divides"):
            probe.main(SCRIPT)


def test_what_is_not_compiled_has_no_mode_of_torch_compile():
    """With one, TrainingArguments would compile."""
    plain, compiled = (Way(Launch(), 0, compiled).values for compiled in (False, True))
    assert plain["torch_compile_mode"] is plain["torch_compile_backend"] is None
    assert "torch_compile_mode" not in compiled


HANGING = "import os, time\nopen(f'pid{os.environ[\"RANK\"]}', 'w').write(str(os.getpid()))\ntime.sleep(1000)"


def torchrun(folder, code):
    """The command of two ranks that run `code`."""
    (folder / "rank.py").write_text(code)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*line, str(folder / "rank.py")]


def state_of(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2]
    except FileNotFoundError:
        return "gone"


def assert_ranks_are_dead(folder):
    ranks = [int((folder / f"pid{rank}").read_text()) for rank in range(2)]
    assert all(state_of(process) in ("gone", "Z", "X") for process in ranks)


def test_a_hung_run_is_killed_with_all_its_ranks(tmp_path):
    """torchrun gives each rank its own session, which a signal to torchrun's session does not reach."""
    row = attempt(torchrun(tmp_path, HANGING), tmp_path, child_environment(os.environ, 2), 15.0)
    assert row["outcome"] == "too slow"
    assert_ranks_are_dead(tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_probe_ends_with_one_line_and_all_its_ranks(tmp_path, number, code):
    line = torchrun(tmp_path, HANGING)
    code_of_probe = (
        "import os, signal, sys; from pathlib import Path; from recipe.run import launch, probe\n"
        # A shell starts its background jobs with SIGINT ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"run = lambda script: probe.attempt({line!r}, Path({str(tmp_path)!r}), dict(os.environ))\n"
        "probe.main = run; sys.argv = ['launch', 'run_clm.py', '--probe']; launch.main()"
    )
    probing = subprocess.Popen([*PYTHON, code_of_probe], stderr=subprocess.PIPE, text=True)
    while not all((tmp_path / f"pid{rank}").exists() for rank in range(2)):
        assert probing.poll() is None
        time.sleep(0.1)
    probing.send_signal(number)
    said = probing.communicate(timeout=60)[1]
    assert probing.returncode == code and "Traceback" not in said and said.count("05_pretrain: ") == 1
    assert_ranks_are_dead(tmp_path)


def test_the_kernel_would_kill_the_measured_run_first(tmp_path):
    code = "import time; time.sleep(0.5); print(open('/proc/self/oom_score_adj').read())"
    assert end_of(tmp_path, code) == {"outcome": "failed", "reason": "1000"}


def test_micro_batches_divide_the_share():
    assert micro_batches(16, 4) == [1, 2, 4, 8, 16]
    assert micro_batches(24, 4) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert micro_batches(60, 1) == [1, 2, 3, 4, 6, 10, 15, 20, 30, 60]  # 5 and 12 are close to others
    assert micro_batches(60, 12) == [1, 2, 3, 4, 6, 10, 12, 20, 30, 60]
    assert micro_batches(3, 1) == [1, 3]
    # A later phase has blocks four times as long.
    assert micro_batches(48, 8, least=4) == [4, 8, 12, 16, 24, 48]


LLAMA = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}
BATCH = {"block_size": 64, "global_batch_size": 8, "per_device_train_batch_size": 2}


def test_ways_are_those_that_training_accepts():
    one, two = Launch(), Launch(processes=2)
    plain = ways_to_train(BATCH, LLAMA, one, [], False)
    assert plain == [Way(one, checkpointed, False) for checkpointed in (0, 2, 1)]
    assert len(ways_to_train(BATCH, LLAMA, one, [], True)) == 6
    assert ways_to_train(BATCH | {"torch_compile": False}, LLAMA, one, [], True) == plain

    def launches(values=BATCH, model=LLAMA, launch=two):
        rows = ways_to_train(values, model, launch, [], True)
        assert all(
            sum(way.launch == row.launch for way in rows) == 6 for row in rows
        )  # all are compiled, too
        return [row.launch for row in rows[::6]]

    zero = [Launch(processes=2, deepspeed=name) for name in ("zero1", "zero2", "zero3")]
    fsdp, tensor = Launch(processes=2, fsdp=True), Launch(processes=2, tensor_parallel=2)
    assert launches() == [one, two, *zero, fsdp, tensor]
    # Muon works under neither stage of ZeRO, Adafactor under no sharding, and GPT-2 has no plan.
    assert launches(BATCH | {"muon_learning_rate": 0.1}) == [one, two, fsdp, tensor]
    assert launches(BATCH | {"optim": "adafactor"}) == [one, two]
    assert launches(model={"model_type": "gpt2", "n_head": 4}) == [one, two, *zero, fsdp]
    longer = {"phases": [{"until_step": 5}, {"block_size": 128}], "max_steps": 10}
    assert launches(BATCH | longer) == [one, two, *zero, fsdp, tensor]
    # Three experts do not divide over two ranks, and with Muon the ranks cannot share an expert's matrix.
    experts = LLAMA | {"model_type": "qwen3_moe", "num_experts": 3}
    assert launches(model=experts) == [one, two, *zero, tensor]
    assert launches(BATCH | {"muon_learning_rate": 0.1}, experts | {"num_experts": 4}) == [one, two, fsdp]
    # The sharding that the user has chosen is kept.
    assert launches(launch=fsdp) == [fsdp]


def test_other_kernels_of_attention_are_measured_unless_one_is_chosen():
    one = Launch()
    rows = ways_to_train(BATCH, LLAMA, one, ["flex_attention", "sdpa"], True)
    assert rows[6:] == [Way(one, 0, True, "flex_attention"), Way(one, 0, True, "sdpa")]
    chosen = BATCH | {"attn_implementation": "sdpa"}
    assert len(ways_to_train(chosen, LLAMA, one, ["flex_attention"], True)) == 6


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


def row_of(way, **more):
    return {
        "micro_batch": 8,
        "values": {key: value for key, value in way.values.items() if value is not None},
        "ranks": way.launch.ranks,
        "launch": launch_words(way.launch),
        "checkpointing": probe.CHECKPOINTED[way.checkpointed],
        "compiled": "yes" if way.compiled else "no",
        "attention": way.attention or "auto",
    } | more


def test_checkpointing_is_measured_where_the_memory_is_short_without_it(monkeypatch):
    """Compiled, all micro-batches fit here; uncompiled, 8 fit only with checkpointing of every layer."""

    def outcome(script, plan, way, micro):
        fits = way.compiled or way.checkpointed == 1 or micro < 8
        found = {"outcome": "ok", "tokens_per_second": micro} if fits else {"outcome": "out of memory"}
        return row_of(way, peak_memory_bytes=0, flops_per_second=0, **found) | {"micro_batch": micro}

    monkeypatch.setattr(probe, "measure", outcome)
    monkeypatch.setattr(probe, "glance", lambda: Hardware("cpu", "CPU", (0, 0), (2, 13), False, (), True))
    values = {"global_batch_size": 8, "per_device_train_batch_size": 4, "torch_compile": None}
    plan = {"config": MINI | {"pretrain": MINI["pretrain"] | values}}
    rows = search(SCRIPT, plan, Launch())
    assert [(way.compiled, way.checkpointed, way.attention, row["micro_batch"]) for way, row in rows] == [
        *((False, 0, None, micro) for micro in (1, 2, 4, 8)),
        *((True, 0, None, micro) for micro in (1, 2, 4, 8)),
        *((False, 2, None, micro) for micro in (1, 2, 4, 8)),
        *((False, 1, None, micro) for micro in (1, 2, 4, 8)),
        *((True, 0, "sdpa", micro) for micro in (1, 2, 4, 8)),
    ]


def test_table_and_options():
    row = row_of(Way(Launch(processes=2, deepspeed="zero2"), 2, False, "sdpa"))
    assert options_of(row) == (
        "--set pretrain.per_device_train_batch_size=8 "
        '--set pretrain.attn_implementation="sdpa" '
        "--set pretrain.activation_checkpointing=true "
        '--set pretrain.activation_checkpointing_kwargs={"every_n_layers":2} '
        "--set pretrain.torch_compile=false --deepspeed zero2"
    )
    asked = ["pretrain.max_steps=7", 'generation.prompts=["a b", "c"]', "pretrain.run_name=a b"]
    assert options_of(row, asked).startswith(
        r'--set pretrain.max_steps=7 --set generation.prompts=["a\u0020b","c"] '
        r'--set pretrain.run_name="a\u0020b" --set pretrain.per_device_train_batch_size=8'
    )
    speed = {"outcome": "ok", "tokens_per_second": 1234.5, "flops_per_second": 2e11}
    good = row_of(Way(Launch(), 1, True), **speed, peak_memory_bytes=3 * 2**30)
    assert options_of(good).endswith("--set pretrain.torch_compile=true")
    bad = row | {"outcome": "failed", "reason": "a | b"}
    lines = table([bad, good]).splitlines()
    assert lines[2] == "| 8 | yes | yes | auto | one rank | 1,234 | 200 | 3.00 | ok |"
    assert lines[3] == ("| 8 | every second layer | no | sdpa | --deepspeed zero2 |  |  |  | failed: a / b |")


def test_shardings_are_compared_by_their_fastest_rows():
    def row(launch, micro, speed, gib, outcome="ok"):
        way = Way(launch, 0, True)
        figures = {"outcome": outcome, "tokens_per_second": speed, "peak_memory_bytes": gib * 2**30}
        figures |= {"communication": 0.25} if launch.ranks > 1 else {}
        return way, row_of(way, **figures) | {"micro_batch": micro}

    one, two = Launch(), Launch(processes=2)
    shards, zero = Launch(processes=2, fsdp=True), Launch(processes=2, deepspeed="zero2")
    rows = [row(one, 8, 100.0, 4), row(one, 4, 80.0, 5)]
    assert finalists(rows) == []
    rows += [row(two, 8, 190.0, 4), row(two, 4, 170.0, 5), row(shards, 2, 150.0, 2)]
    rows += [row(zero, 8, 9, 9, "killed")]
    assert [(way.launch, micro) for way, micro in finalists(rows)] == [(one, 8), (shards, 2), (two, 8)]
    shown = comparison([rows[0][1], rows[4][1], rows[2][1], rows[5][1]], 64)
    assert "64 sequences a step" in shown
    assert shown.splitlines()[4:] == [
        "| one rank | 1 | 8 | 100 | 1.00 |  | 4.00 |",
        "| --fsdp | 2 | 2 | 150 | 1.50 | 25% | 2.00 |",
        "| DDP | 2 | 8 | 190 | 1.90 | 25% | 4.00 |",
        "| --deepspeed zero2 | 2 | 8 | killed |  |  |  |",
    ]


def test_compared_rows_have_the_global_batch_of_the_training(monkeypatch):
    """By the plans that the ranks get: two micro-batches in the search, all of them in the comparison."""
    plans = []
    monkeypatch.setattr(probe, "write_json", lambda path, plan: plans.append(plan["config"]["pretrain"]))
    monkeypatch.setattr(probe, "attempt", lambda *_: {"outcome": "failed"})
    monkeypatch.setattr(probe.tempfile, "TemporaryDirectory", lambda **_: contextlib.nullcontext("none"))
    plan = {
        "recipe": "x",
        "inputs": {},
        "config": MINI | {"pretrain": MINI["pretrain"] | {"report_to": None}},
    }
    plan["config"]["pretrain"]["global_batch_size"] = 32
    for launch, micro in ((Launch(), 4), (Launch(processes=2), 2)):
        for whole in (False, True):
            measure(SCRIPT, plan, Way(launch, 0, False), micro, whole)
    batches = [(values["per_device_train_batch_size"], values["global_batch_size"]) for values in plans]
    assert batches == [(4, 8), (4, 32), (2, 8), (2, 32)]


def test_launch_words_are_the_options_of_the_launch():
    assert launch_words(Launch(processes=2)) == ""
    both = Launch(processes=4, fsdp=True, tensor_parallel=2)
    assert launch_of(parsed(launch_words(both) + " --nproc 4")) == both
    zero = Launch(processes=2, deepspeed="zero3")
    assert launch_of(parsed(launch_words(zero) + " --nproc 2")) == zero


def parsed(options):
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(options.split())


def plan_of(project, **changes):
    """What `search` gives to `measure`, for the mini recipe with some keys of pretrain.json changed."""
    folder = project.folder / "configs/mini"
    config = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    config["pretrain"] |= changes
    outputs = project.folder / "outputs/mini"
    inputs = {stage: outputs / stage for stage in ("03_tokenizer", "04_tokenize")}
    return {"recipe": "mini", "config": config, "inputs": inputs}


def test_settings_far_beyond_the_memory_are_left_out(prepared):
    """A block of 2**30 tokens of the mini model would keep terabytes."""
    row = measure(Path("none.py"), plan_of(prepared, block_size=2**30), Way(Launch(), 0, False), 4)
    assert row["outcome"] == "not tried" and "GiB are free" in row["reason"]


@pytest.fixture
def measured(prepared, monkeypatch):
    """`prepared`, for measurements in this process: their temporary folders are in its outputs."""
    monkeypatch.setattr(probe, "OUTPUTS", prepared.folder / "outputs")
    return prepared


def test_lack_of_memory_ends_a_row_and_not_the_search(measured, monkeypatch):
    """Real trainings under a limit of memory: one block fits, thousands at once do not."""
    limits = (int(2.5e9), resource.getrlimit(resource.RLIMIT_DATA)[1])
    popen = subprocess.Popen

    def limit():
        resource.setrlimit(resource.RLIMIT_DATA, limits)

    def limited(*arguments, **keywords):
        return popen(*arguments, preexec_fn=limit, **keywords)

    monkeypatch.setattr(probe.subprocess, "Popen", limited)
    monkeypatch.setattr(probe, "HOPELESS", float("inf"))
    plan = plan_of(measured, global_batch_size=2**12)
    way = Way(Launch(), 0, False)
    rows = list(climb([1, 2**12], lambda micro: measure(SCRIPT, plan, way, micro)))
    assert [row["outcome"] for row in rows] == ["ok", "out of memory"]


def test_a_row_is_a_training_with_these_settings(measured, monkeypatch):
    """This holds for every schedule of the recipe: a polynomial that only warms up would divide by 0."""
    schedule = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}}
    schedule |= {"warmup_steps": probe.STEPS, "logging_strategy": "no"}
    plan = plan_of(measured, global_batch_size=8, **schedule)
    folders = []
    attempts = probe.attempt
    monkeypatch.setattr(
        probe, "attempt", lambda line, *rest: folders.append(rest[0]) or attempts(line, *rest)
    )
    row = measure(SCRIPT, plan, Way(Launch(), 1, False), 2)
    assert row["outcome"] == "ok" and row["steps"] == probe.STEPS
    active = row["active"]
    assert (active["micro_batch"], active["accumulation"], active["compiled"]) == (2, 2, False)
    assert [folder.parent for folder in folders] == [measured.folder / "outputs/mini"]
    assert not folders[0].exists()
    assert row["tokens_per_second"] > 0 and 2**27 < row["peak_memory_bytes"] < 2**32


def test_a_row_of_two_ranks_has_the_share_of_their_communication(measured):
    plan = plan_of(measured, global_batch_size=8)
    row = measure(SCRIPT, plan, Way(Launch(processes=2), 0, False), 2, whole_batch=True)
    assert row["outcome"] == "ok" and row["active"]["global_batch"] == 8
    assert 0 < row["communication"] < 1


def test_probe_names_the_fastest_and_stage_05_accepts_it(prepared):
    """`mini` forbids torch.compile, which would take minutes here."""
    small = ("--set", "pretrain.global_batch_size=2")
    folder = prepared.folder / "outputs/mini"
    (folder / f"{probe.TEMPORARY}killed/checkpoints").mkdir(parents=True)
    result = prepared.run("pretrain/05_pretrain.sh", "--recipe", "mini", "--probe", *small)
    assert not list(folder.glob(f"{probe.TEMPORARY}*"))
    lines = (folder / "probe.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines[2 : lines.index("")]]
    # The memory is enough without checkpointing.
    assert {(row[0], row[1], row[3]) for row in rows} == {
        (micro, "no", kernel) for micro in "12" for kernel in ("auto", "sdpa")
    }
    assert all(row[-1] == "ok" for row in rows)
    speeds = [float(row[5].replace(",", "")) for row in rows]
    assert speeds == sorted(speeds, reverse=True)
    figures = json.loads((folder / "probe.json").read_text())["figures"]
    assert {"hardware", "mfu", "gemm_peak_flops", "active"} <= figures.keys()  # read by the preflight
    options = (folder / "probe.options").read_text().split()
    assert f"pretrain.per_device_train_batch_size={rows[0][0]}" in options
    assert f"fastest: {' '.join(options)}" in result.stdout
    accepted = prepared.run("pretrain/05_pretrain.sh", "--recipe", "mini", "--dry-run", *options)
    assert "would run" in accepted.stdout and f"micro-batch {rows[0][0]} " in accepted.stdout
    assert "step         2 x 64 = 128 tokens" in accepted.stdout  # the probe's own --set among the options
    # The stage itself was not touched.
    assert not (folder / "05_pretrain").exists()


def test_a_probe_does_not_measure_next_to_a_stage_of_the_recipe(prepared):
    with hold(prepared.folder / "outputs/mini", "06_evaluate"):
        result = prepared.run("pretrain/05_pretrain.sh", "--recipe", "mini", "--probe", check=False)
    assert (
        result.returncode == 2 and "in use by process" in result.stderr and "(06_evaluate)" in result.stderr
    )


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
    shape = shape_of(record["config"]["model"], 400)
    here, _ = fitting.this_machine(Launch())
    setting = fitting.setting_of(record["config"]["pretrain"], here, Launch())
    assert shape.parameters == record["figures"]["active"]["parameters"]
    files = [folder / "checkpoints/checkpoint-1" / name for name in ("model.safetensors", "optimizer.pt")]
    written = sum(file.stat().st_size for file in files)
    # About 20 kB of names and headers, which only count next to such a small model.
    assert 0 <= written - preflight.checkpoint_bytes(shape, setting) < 40_000
