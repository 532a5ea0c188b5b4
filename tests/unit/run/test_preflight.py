"""What a training needs: steps, tokens, disk, time, and the report of every recipe."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from recipe import project
from recipe.project import Refused
from recipe.run import preflight
from recipe.run.fitting import PROFILES, Device
from recipe.run.launch_options import Launch
from recipe.run.memory import shape_of
from shapes import PLAIN, SHIPPED, SMALL, read


def test_system_a_takes_the_hours_its_author_measured():
    """98 hours on an RTX 4090 for one epoch: 551,057 blocks of 1,024 were 5 % of the text."""
    tokens = 551_057 * 1024 * 19
    shape = shape_of(read("mistral-300m", "model"), 50_000)
    device = next(device for device in PROFILES if "RTX 4090" in device.name)
    seconds = tokens * shape.flops_per_token(1024) / (device.flops * preflight.ASSUMED_MFU)
    assert seconds / 3600 == pytest.approx(98, rel=0.1)


def test_steps():
    values = {"block_size": 100, "global_batch_size": 4, "num_train_epochs": 2}
    assert preflight.step_count(values, 1001) == 6  # 11 blocks, twice, in batches of 4
    assert preflight.step_count(values, None) is None
    # 1.1 x 100 blocks are a little more than 110 in floating point.
    assert preflight.step_count(values | {"global_batch_size": 10, "num_train_epochs": 1.1}, 10_000) == 11
    assert preflight.step_count(values | {"max_steps": 7}, None) == 7


def test_tokens_of_an_epoch_follow_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(project, "OUTPUTS", tmp_path)
    dataset = {"sources": {"a": {"weight": 2}, "c": {"weight": 0.5}, "held": {"held_out": True}}}
    assert preflight.training_tokens("mine", dataset) is None
    folder = tmp_path / "mine/04_tokenize"
    folder.mkdir(parents=True)
    counts = {"a": {"tokens": 1000}, "b": {"tokens": 100}, "c": {"tokens": 11}}
    (folder / "stage.json").write_text(json.dumps({"figures": {"sources": {"train": counts}}}))
    assert preflight.training_tokens("mine", dataset) == 2106  # 2105.5, rounded


@pytest.mark.parametrize("file", ["pretrain", "finetune", "preference"])
def test_training_without_room_for_its_checkpoints_is_refused(tmp_path, monkeypatch, file):
    """Three checkpoints of 12 bytes per parameter and the model; for an adapter only the merged model."""
    config = {name: read("mistral-300m", name) for name in ("dataset", "model", "tokenizer", "pretrain")}
    config[file] = config["pretrain"] | {"save_total_limit": 2}
    stage = SimpleNamespace(recipe="mine", config=config, folder=tmp_path, say=print)
    parameters = shape_of(config["model"], 50_000).parameters
    monkeypatch.setattr(project, "OUTPUTS", tmp_path)
    monkeypatch.setattr(project, "free_bytes", lambda folder: (3 * 12 + 4) * parameters - 1)
    with pytest.raises(Refused, match=f"{file}.json: save_total_limit.*needs {40 * parameters:,} bytes"):
        preflight.check_resources(stage, Launch(), file)
    monkeypatch.setattr(project, "free_bytes", lambda folder: 40 * parameters)
    preflight.check_resources(stage, Launch(), file)
    config[file]["lora"] = {"r": 8}
    monkeypatch.setattr(project, "free_bytes", lambda folder: 4 * parameters)
    preflight.check_resources(stage, Launch(), file)
    monkeypatch.setattr(project, "free_bytes", lambda folder: 4 * parameters - 1)
    with pytest.raises(Refused, match=f"needs {4 * parameters:,} bytes"):
        preflight.check_resources(stage, Launch(), file)


def test_a_tuning_of_a_published_model_that_is_no_longer_in_the_cache_starts(tmp_path):
    """Its stage 05 is done, and nothing but this check asks for the published config.json."""
    config = {"dataset": {}, "model": {}, "tokenizer": {}, "finetune": read("tiny", "finetune")}
    config["pretrain"] = {"initial_model": "nobody/nothing"}
    stage = SimpleNamespace(recipe="mine", config=config, folder=tmp_path, say=print)
    preflight.check_resources(stage, Launch(), "finetune")


def test_disk_holds_the_checkpoints_kept_and_one_more():
    shape = shape_of(SMALL, 1000)
    model, checkpoint = 4 * shape.parameters, 12 * shape.parameters

    def disk(values, steps=100, **changes):
        return preflight.training_disk(shape, dataclasses.replace(PLAIN, **changes), values, steps)

    assert disk({"save_steps": 10, "save_total_limit": 2}) == 3 * checkpoint + model
    decay = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 10}}
    for steps in (100, None):  # the checkpoint before the decay stays
        assert disk({"save_steps": 10, "save_total_limit": 2} | decay, steps) == 4 * checkpoint + model
    assert disk({"save_steps": 60, "save_total_limit": 2}) == checkpoint + model
    assert disk({"save_steps": 0.1}) == 10 * checkpoint + model
    assert disk({"save_strategy": "no"}) == model
    assert disk({"save_steps": 10}, None) is None
    assert disk({"save_total_limit": 1}, None) == 2 * checkpoint + model
    # Under ZeRO: 16-bit weights and the optimizer's 32-bit weights, for any number of ranks.
    assert disk({"save_steps": 100}, ranks=8, zero=2) == 14 * shape.parameters + model


def test_data_without_room_is_refused_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "OUTPUTS", tmp_path / "outputs")
    monkeypatch.setattr(preflight, "DATA", tmp_path / "data")
    free = shutil.disk_usage(tmp_path).free
    dataset = {"sources": {"wiki": {"source": "wikipedia"}}, "disk_gigabytes": free / 1e9 + 1}
    with pytest.raises(Refused, match="disk_gigabytes"):
        preflight.require_data_space("a", dataset)
    # What is already there is not needed again: a sparse file of 2 GB.
    (tmp_path / "data/wiki").mkdir(parents=True)
    with (tmp_path / "data/wiki/dump").open("wb") as handle:
        handle.truncate(2 * 10**9)
    preflight.require_data_space("a", dataset)


@pytest.mark.parametrize(("folder", "counts"), [(".02_dataset.work", True), ("02_dataset", False)])
def test_only_unfinished_outputs_count_as_space_that_is_not_needed(tmp_path, monkeypatch, folder, counts):
    """A finished stage stays until its new result is whole; checkpoints have nothing to do with it."""
    monkeypatch.setattr(preflight, "OUTPUTS", tmp_path / "outputs")
    monkeypatch.setattr(preflight, "DATA", tmp_path / "data")
    monkeypatch.setattr("recipe.project.OUTPUTS", tmp_path / "outputs")
    free = shutil.disk_usage(tmp_path).free
    dataset = {"sources": {"wiki": {"source": "wikipedia"}}, "disk_gigabytes": free / 1e9 + 1}
    for name in (folder, "05_pretrain"):
        (tmp_path / "outputs/a" / name).mkdir(parents=True)
        with (tmp_path / "outputs/a" / name / "shard").open("wb") as handle:
            handle.truncate(2 * 10**9)
    with contextlib.nullcontext() if counts else pytest.raises(Refused, match="disk_gigabytes"):
        preflight.require_data_space("a", dataset)


def test_the_report_says_when_the_disk_has_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "OUTPUTS", tmp_path / "outputs")
    monkeypatch.setattr(preflight, "DATA", tmp_path / "data")
    monkeypatch.setattr("recipe.project.OUTPUTS", tmp_path / "outputs")
    free = shutil.disk_usage(tmp_path).free
    fits = {"sources": {"wiki": {}}, "disk_gigabytes": free / 1e9 / 2}
    for dataset, training, verdict in (
        (fits, 10**9, "GB free"),
        (fits | {"disk_gigabytes": free / 1e9 * 2}, None, "GB free: does not fit"),
        (fits, free, "GB free: does not fit"),
    ):
        assert preflight._disk_line("a", dataset, training).endswith(verdict)
    # What is finished needs no more.
    for stage, file in (("04_tokenize", project.RECORD), ("05_pretrain", "model")):
        (tmp_path / "outputs/a" / stage).mkdir(parents=True)
        with (tmp_path / "outputs/a" / stage / file).open("wb") as handle:
            handle.truncate(10**9)
    large = {"sources": {"wiki": {}}, "disk_gigabytes": free / 1e9 * 2}
    assert preflight._disk_line("a", large, free + 5 * 10**8).endswith("GB free")


@pytest.mark.parametrize("recipe", SHIPPED)
def test_recipes_that_download_say_how_much_disk_they_need(recipe):
    dataset = read(recipe, "dataset")
    downloads = any("url" in source for source in dataset["sources"].values())
    assert not downloads or dataset["disk_gigabytes"] >= 1


def test_measured_rate_is_this_recipes_or_the_newest(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "OUTPUTS", tmp_path)
    cpu, gpu = Device("CPU", 64, 0.0, True, "cpu"), Device("A100", 40, 0.0, True)
    assert preflight.measured_rate("a", cpu, 2) is None
    for number, (recipe, hardware, mfu) in enumerate(
        [("a", "CPU", 0.5), ("b", "CPU", 0.25), ("c", "A100", 0.5), ("d", "CPU", None)]
    ):
        folder = tmp_path / recipe / "05_pretrain"
        folder.mkdir(parents=True)
        figures = {"hardware": hardware, "gemm_peak_flops": 1e12, "active": {"ranks": 2}} | (
            {"mfu": mfu} if mfu else {}
        )
        (folder / "stage.json").write_text(json.dumps({"figures": figures}))
        os.utime(folder / "stage.json", (number, number))
    assert preflight.measured_rate("a", cpu, 2) == (1e12, "measured, recipe a")
    assert preflight.measured_rate("new", cpu, 2) == (5e11, "by the speed of recipe b")
    # A trial of a few steps tells little about others.
    trial = {
        "figures": {
            "hardware": "CPU",
            "gemm_peak_flops": 1e12,
            "mfu": 0.1,
            "active": {"ranks": 2},
            "steps": 9,
        }
    }
    (tmp_path / "d/05_pretrain/stage.json").write_text(json.dumps(trial))
    assert preflight.measured_rate("new", cpu, 2) == (5e11, "by the speed of recipe b")
    assert preflight.measured_rate("d", cpu, 2) == (2e11, "measured, recipe d")
    assert preflight.measured_rate("a", dataclasses.replace(gpu, name="H100"), 2) is None
    # A probe counts, too.
    figures = {"hardware": "L4", "gemm_peak_flops": 1e12, "mfu": 0.25, "active": {"ranks": 1}}
    (tmp_path / "b/probe.json").write_text(json.dumps({"figures": figures}))
    l4 = dataclasses.replace(gpu, name="L4")
    assert preflight.measured_rate("a", l4, 1) == (2.5e11, "by the speed of recipe b")
    # Twice the GPUs are twice as fast; ranks on a CPU share its cores.
    assert preflight.measured_rate("a", gpu, 4) == (2e12, "by the speed of recipe c")
    assert preflight.measured_rate("a", cpu, 4) == (1e12, "measured, recipe a")
    # What a checkpointed training computed again was work, too.
    # The last is of an earlier release, which recorded no layers.
    for active, more in (
        ({"activation_checkpointing": 12, "layers": 12}, 4 / 3),
        ({"activation_checkpointing": 6, "layers": 12}, 7 / 6),
        ({"activation_checkpointing": None, "layers": 12}, 1),
        ({"activation_checkpointing": True}, 4 / 3),
    ):
        recorded = figures | {"active": figures["active"] | active}
        (tmp_path / "b/probe.json").write_text(json.dumps({"figures": recorded}))
        rate, _ = preflight.measured_rate("a", l4, 1)
        assert rate == pytest.approx(2.5e11 * more)


def test_checkpointing_takes_a_third_more_time_whoever_asks_for_it():
    config = {name: read("mistral-300m", name) for name in ("dataset", "model", "tokenizer", "pretrain")}

    def hours():
        (line,) = (
            line for line in preflight.report("mistral-300m", config, Launch()) if "80 GB A100" in line
        )
        return float(re.search(r"; ([\d.]+) h ", line)[1])

    plain = hours()
    config["pretrain"]["activation_checkpointing"] = True
    assert hours() == pytest.approx(plain * 4 / 3, abs=0.1)
    config["pretrain"]["activation_checkpointing_kwargs"] = {"every_n_layers": 2}
    assert hours() == pytest.approx(plain * 7 / 6, abs=0.1)


LAUNCHES = [
    Launch(),
    Launch(processes=4),
    Launch(processes=4, deepspeed="zero2_offload"),
    Launch(processes=4, fsdp=True),
    Launch(processes=4, tensor_parallel=2, fsdp=True),
]


@pytest.mark.parametrize("recipe", SHIPPED)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_report_of_every_recipe(recipe, launch):
    config = {name: read(recipe, name) for name in ("dataset", "model", "tokenizer", "pretrain")}
    if config["pretrain"]["global_batch_size"] % (launch.ranks // launch.tensor_parallel):
        with pytest.raises(Refused, match="do not divide"):
            list(preflight.report(recipe, config, launch))
        return
    if launch.deepspeed or launch.fsdp:
        config["pretrain"]["muon_learning_rate"] = None
    lines = list(preflight.report(recipe, config, launch))
    text = "\n".join(lines)
    with_muon = bool(config["pretrain"].get("muon_learning_rate"))
    assert ("--deepspeed does not work with muon: add --set" in text) == with_muon
    vocabulary, _ = preflight.vocabulary_of(recipe, config)
    assert f"{shape_of(config['model'], vocabulary).parameters:,}" in text
    for device in PROFILES:
        position = next(number for number, line in enumerate(lines) if device.name in line)
        verdict = " ".join(lines[position : position + 2])
        assert "tabulated" in verdict or "no change of settings helps" in verdict


def test_vocabulary_of_a_published_tokenizer(tmp_path, monkeypatch):
    """It is known from stage 03 or from model.json, or it is assumed, and the text says which."""
    monkeypatch.setattr(project, "OUTPUTS", tmp_path)
    config = {
        "model": {},
        "pretrain": {},
        "tokenizer": {"kind": "published", "published": "someone/something"},
    }
    size, origin = preflight.vocabulary_of("mine", config)
    assert size == preflight.ASSUMED_VOCABULARY and "assumed" in origin
    config["model"]["vocab_size"] = 44_928
    assert preflight.vocabulary_of("mine", config) == (44_928, " (model.json or the published checkpoint)")
    folder = tmp_path / "mine/03_tokenizer"
    folder.mkdir(parents=True)
    (folder / "stage.json").write_text(json.dumps({"figures": {"vocabulary": {"size": 32_003}}}))
    assert preflight.vocabulary_of("mine", config) == (32_003, " (stage 03)")
    trained = {"model": {}, "tokenizer": {"vocab_size": 7_990, "round_to": 64}}
    assert preflight.vocabulary_of("mine", trained) == (8_000, "")


def test_a_preflight_does_not_import_torch():
    code = (
        "import json, sys\nfrom recipe.run import launch_options, preflight\n"
        "from recipe.project import CONFIGS\n"
        "config = {n: json.loads((CONFIGS / 'tiny' / f'{n}.json').read_text())"
        " for n in ('dataset', 'model', 'tokenizer', 'pretrain')}\n"
        "print('\\n'.join(preflight.report('tiny', config, launch_options.Launch())))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and "parameters   2,490,560" in result.stdout, result.stderr
