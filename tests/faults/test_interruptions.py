"""Kills, signals, two runs at once, changed files: nothing is lost, no incomplete file is read."""

import os
import signal
from pathlib import Path

import pytest
from conftest import wait_for

SLOW_STEPS = (
    "--set",
    "pretrain.max_steps=60",
    "--set",
    "pretrain.save_steps=10",
    "--set",
    "pretrain.eval_steps=60",
)


def copy_recipe(project, name):
    project.copy(name)
    project.run("run_all.sh", "--recipe", name, "--to", "04")


def steps_done(project, name):
    path = project.folder / f"outputs/{name}/.05_pretrain.work/metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def curve(project, name):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in project.log(name) if "loss" in row]


@pytest.fixture(scope="module")
def straight(prepared):
    """The curve and the weights of a training without interruption."""
    copy_recipe(prepared, "straight")
    prepared.run("pretrain/05_pretrain.sh", "--recipe", "straight", *SLOW_STEPS)
    assert len(curve(prepared, "straight")) == 60
    return curve(prepared, "straight"), prepared.digest("straight", "05_pretrain")


def checkpoints(project):
    """Checkpoint folders of the unfinished training, the newest first."""
    folder = project.folder / "outputs/mini/.05_pretrain.work/checkpoints"
    return sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))


def test_terminated_training_continues_bit_identically(make_project, straight):
    # A project of its own: next to `straight`, the finished stage would be taken from there.
    project = make_project()
    project.run("run_all.sh", "--recipe", "mini", "--to", "04")
    run = project.start("pretrain/05_pretrain.sh", "--recipe", "mini", *SLOW_STEPS)
    wait_for(lambda: steps_done(project, "mini") >= 13)
    run.send_signal(signal.SIGTERM)
    output = run.communicate(timeout=120)[0]
    assert run.returncode == 143, output
    assert not project.output("mini", "05_pretrain").exists()
    newest = checkpoints(project)[0]
    assert int(newest.name.split("-")[1]) % 10, "expected the checkpoint of the signal, not a periodic one"
    result = project.run("pretrain/05_pretrain.sh", "--recipe", "mini", *SLOW_STEPS)
    assert f"continues from {newest.name}" in result.stdout
    assert (curve(project, "mini"), project.digest("mini", "05_pretrain")) == straight


def test_killed_training_with_a_damaged_checkpoint_continues_bit_identically(make_project, straight):
    project = make_project()
    project.run("run_all.sh", "--recipe", "mini", "--to", "04")
    run = project.start("pretrain/05_pretrain.sh", "--recipe", "mini", *SLOW_STEPS)
    wait_for(lambda: steps_done(project, "mini") >= 22)
    for child in children(run.pid):
        os.kill(child, signal.SIGKILL)
    run.kill()
    run.communicate()
    newest = checkpoints(project)[0]
    path = newest / "optimizer.pt"
    # Without the file, the kill came while the checkpoint was saved, which is damage enough.
    if path.exists():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    result = project.run("pretrain/05_pretrain.sh", "--recipe", "mini", *SLOW_STEPS)
    assert f"warning: {newest.name} is not used" in result.stdout
    assert "continues from checkpoint-" in result.stdout
    assert (curve(project, "mini"), project.digest("mini", "05_pretrain")) == straight


def children(pid):
    """Descendants of a process, the deepest first."""
    found = []
    for task in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [*children(int(task)), int(task)]
    return found


def test_changed_settings_do_not_overwrite_checkpoints(prepared):
    project = prepared
    copy_recipe(project, "changed")
    project.edit("changed", "pretrain", seed=7)
    run = project.start("pretrain/05_pretrain.sh", "--recipe", "changed", *SLOW_STEPS)
    wait_for(
        lambda: list(project.folder.glob("outputs/changed/.05_pretrain.work/checkpoints/*/manifest.json"))
    )
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=120)
    assert run.returncode == 130
    result = project.run(
        "pretrain/05_pretrain.sh", "--recipe", "changed", "--set", "pretrain.max_steps=61", check=False
    )
    assert result.returncode == 2
    assert "unfinished run" in result.stderr and "max_steps: 60 -> 61" in result.stderr
    assert list(project.folder.glob("outputs/changed/.05_pretrain.work/checkpoints/*/manifest.json"))


def test_second_run_on_the_same_folder_is_refused(prepared):
    project = prepared
    copy_recipe(project, "busy")
    project.edit("busy", "pretrain", seed=8)
    run = project.start("pretrain/05_pretrain.sh", "--recipe", "busy", *SLOW_STEPS)
    wait_for(lambda: steps_done(project, "busy") >= 1)
    result = project.run("pretrain/02_dataset.py", "--recipe", "busy", check=False)
    assert result.returncode == 2
    assert "is in use by process" in result.stderr and "05_pretrain" in result.stderr
    run.kill()
    run.communicate()
    # The training ends with its parent, and the lock is released.
    wait_for(
        lambda: project.run("pretrain/02_dataset.py", "--recipe", "busy", check=False).returncode == 0, 60
    )


def test_output_of_a_killed_stage_is_not_read(make_project):
    project = make_project()
    project.run("pretrain/01_download.py", "--recipe", "mini")
    work = project.folder / "outputs/mini/.02_dataset.work"
    work.mkdir(parents=True)
    (work / "train-text.parquet").write_bytes(b"half")
    result = project.run("pretrain/03_tokenizer.py", "--recipe", "mini", check=False)
    assert result.returncode == 2
    assert "02_dataset has not been run" in result.stderr and "--to 03" in result.stderr
    project.run("pretrain/02_dataset.py", "--recipe", "mini")
    assert not work.exists()


def test_changed_text_makes_the_run_stale(make_project):
    project = make_project()
    project.run("run_all.sh", "--recipe", "mini", "--to", "02")
    with (project.folder / "text/a.txt").open("a") as handle:
        handle.write("\n\n新しい文書です。\n")
    result = project.run("run_all.sh", "--recipe", "mini", "--to", "02", check=False)
    assert result.returncode == 2
    assert "facts.text" in result.stderr
    project.run("run_all.sh", "--recipe", "mini", "--to", "02", "--force")
    assert project.figures("mini", "02_dataset")["text"]["documents"]["in"] == 1201


def test_stage_that_fails_stops_the_chain(make_project):
    project = make_project()
    (project.folder / "other.jsonl").write_bytes(b'{"text": "x"}\n{"text": "\xff"}\n')
    result = project.run("run_all.sh", "--recipe", "mini", check=False)
    assert result.returncode == 1
    assert "other.jsonl:2: bad UTF-8" in result.stderr
    assert "03_tokenizer" not in result.stdout
    assert not project.output("mini", "02_dataset").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recipe", "mimi"], "'mini'"),
        (["--recip", "mini"], "unknown option --recip"),
        (["--from", "five"], "number of a stage"),
        (["--recipe", "mini", "--from", "8"], "no stage 08"),
        (["--recipe", "mini", "--from", "6", "--to", "5"], "no stage between"),
        (["--recipe", "mini", "--set", "pretrain.max_step=3"], "'max_steps'"),
        (["--recipe", "mini", "--set"], "--set needs a value"),
        (["--set", "--dry-run"], "--set needs a value"),
    ],
)
def test_wrong_options_are_refused(prepared, options, words):
    result = prepared.run("run_all.sh", *options, check=False)
    assert result.returncode == 2
    assert words in result.stderr


def test_unknown_deepspeed_file_and_muon_under_zero_are_refused(prepared):
    copy_recipe(prepared, "zero")
    result = prepared.run("pretrain/05_pretrain.sh", "--recipe", "zero", "--deepspeed", "zero9", check=False)
    assert result.returncode == 2 and "zero1" in result.stderr
    result = prepared.run("run_all.sh", "--recipe", "zero", "--deepspeed", "zero2", check=False)
    assert result.returncode == 2 and "pretrain.muon_learning_rate=null" in result.stderr


def test_run_all_passes_a_signal_on_and_waits_for_its_stage(make_project):
    project = make_project()
    project.run("run_all.sh", "--recipe", "mini", "--to", "04")
    run = project.start("run_all.sh", "--recipe", "mini", "--to", "05", *SLOW_STEPS)
    wait_for(lambda: steps_done(project, "mini") >= 3)
    run.send_signal(signal.SIGINT)
    output = run.communicate(timeout=60)[0]
    assert run.returncode == 130, output
    # One signal is one request: a second one would have been counted.
    assert output.count("stopping: the training saves a checkpoint") == 1
    # When it has ended, the training has saved a checkpoint and released the folder.
    assert checkpoints(project)
    assert project.run("pretrain/02_dataset.py", "--recipe", "mini", check=False).returncode == 0
    assert not project.output("mini", "05_pretrain").exists()


def test_changed_pairs_make_tuning_stale(make_project):
    project = make_project()
    project.run("run_all.sh", "--recipe", "mini", "--to", "02")
    project.run("fine-tuning/11_dataset.py", "--recipe", "mini")
    path = project.folder / "pairs.json"
    path.write_text(path.read_text().replace("0番", "00番"), "utf-8")
    result = project.run("fine-tuning/11_dataset.py", "--recipe", "mini", check=False)
    assert result.returncode == 2 and "pairs.json" in result.stderr


def test_a_training_that_ends_in_nan_publishes_nothing(prepared):
    """Weights grow 10,000-fold a step and overflow in step 5; fewer steps are left than may be skipped."""
    copy_recipe(prepared, "nan")
    values = {"learning_rate": 100, "weight_decay": 100, "muon_learning_rate": "null", "spikes": "null"}
    values |= {"max_steps": 7, "save_steps": 7}
    changes = [part for key, value in values.items() for part in ("--set", f"pretrain.{key}={value}")]
    result = prepared.run("pretrain/05_pretrain.sh", "--recipe", "nan", *changes, check=False)
    assert result.returncode == 1, result.stdout
    assert "is skipped: a loss of nan" in result.stdout and "error: " in result.stderr
    assert not prepared.output("nan", "05_pretrain").exists()
    work = prepared.folder / "outputs/nan/.05_pretrain.work"
    assert not list(work.glob("*.safetensors")) and not list(work.glob("checkpoints/checkpoint-*"))


def test_training_with_only_damaged_checkpoints_is_refused_until_it_is_forced(prepared):
    project = prepared
    copy_recipe(project, "damaged")
    line = ("pretrain/05_pretrain.sh", "--recipe", "damaged", "--set", "pretrain.seed=9", *SLOW_STEPS)
    run = project.start(*line)
    wait_for(lambda: steps_done(project, "damaged") >= 12)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=120)
    work = project.folder / "outputs/damaged/.05_pretrain.work/checkpoints"
    damaged = sorted(path.name for path in work.iterdir())
    assert len(damaged) == 2
    for name in damaged:
        (work / name / "rng_state.pth").write_bytes(b"")
    result = project.run(*line, check=False)
    assert result.returncode == 2, result.stdout
    assert all(f"{name}: rng_state.pth is damaged" in result.stderr for name in damaged)
    project.run(*line, "--force")
    steps = [step for step, _, _ in curve(project, "damaged")]
    assert steps == list(range(1, 61))
