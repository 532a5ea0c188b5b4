"""Whether a training fits into a device, and what to change if it does not."""

import json
import math
import os

import pytest
from recipe.config.choice import choose
from recipe.config.launch import check_launch
from recipe.config.recipe import load_recipe
from recipe.hardware import Hardware
from recipe.run import fitting, preflight
from recipe.run.fitting import PROFILES, Device, fit, setting_of
from recipe.run.launch_options import Launch
from recipe.run.memory import memory, shape_of
from shapes import SHIPPED, read

# Their global batches do not divide into 8 ranks.
UNEVEN = ("mistral-39m", "mistral-300m-v2", "gpt2-small")


def apply(options, recipe):
    """pretrain.json after the options printed for a user, and the DeepSpeed file that they name."""
    words = " ".join(options).split()
    given = list(zip(words[::2], words[1::2], strict=True))
    config = load_recipe(recipe, [value for option, value in given if option == "--set"])
    return config["pretrain"], dict(given).get("--deepspeed")


@pytest.mark.parametrize("recipe", [recipe for recipe in SHIPPED if not recipe.endswith("qlora")])
@pytest.mark.parametrize("ranks", [1, 8])
def test_suggested_options_are_accepted_and_fit(recipe, ranks):
    """The options as a user would paste them: the project accepts them, and by its formula they fit."""
    values, shape = read(recipe, "pretrain"), shape_of(read(recipe, "model"), 50_000)
    if recipe in UNEVEN and ranks == 8:
        pytest.skip("its global batch does not divide by 8 ranks")
    launch, helped = Launch(processes=ranks), 0
    for device in PROFILES:
        setting, limit = setting_of(values, device, launch), device.gigabytes * fitting.GIB * 0.94
        found = fit(shape, values, setting, limit)
        if found is None:
            continue
        changed, options = found
        assert bool(options) == (memory(shape, setting)["peak"] > limit)
        pasted, deepspeed = apply(options, recipe)
        check_launch(pasted, "pretrain", deepspeed, ranks)
        again = setting_of(pasted, device, Launch(processes=ranks, deepspeed=deepspeed))
        assert again == changed and memory(shape, again)["peak"] <= limit
        assert again.micro_batch * again.accumulation * ranks == values["global_batch_size"]
        helped += bool(options)
    assert helped or recipe in ("tiny", "small", "colab-t4", "gpt2-small", "mistral-39m")


def test_large_models_need_zero_or_offloading():
    values = read("mistral-2b", "pretrain")
    shape = shape_of(read("mistral-2b", "model"), 32_000)
    gpu = next(device for device in PROFILES if "RTX 4090" in device.name)

    def way(ranks, gibibytes):
        return fit(shape, values, setting_of(values, gpu, Launch(processes=ranks)), gibibytes * fitting.GIB)

    alone, options = way(1, 22)
    assert alone.offload_optimizer and "--deepspeed zero2_offload" in options
    shared, options = way(8, 22)
    assert shared.zero and not shared.offload_optimizer
    assert way(8, 4)[0].offload_parameters
    assert way(1, 40)[0].zero == 0
    assert way(1, 1) is None
    # On a CPU the host's memory is the same one.
    assert (
        fit(
            shape,
            values,
            setting_of(values, Device("CPU", 22, 0.0, True, "cpu"), Launch()),
            22 * fitting.GIB,
        )
        is None
    )


def test_what_cannot_compile_is_computed_without():
    values = read("mistral-300m", "pretrain")
    shape = shape_of(read("mistral-300m", "model"), 32_000)
    peaks = [
        memory(shape, setting_of(values, Device("A100", 80, 0.0, True, compiler=compiler), Launch()))["peak"]
        for compiler in (True, False)
    ]
    assert peaks[1] > 1.2 * peaks[0]
    plain = setting_of(values | {"torch_compile": False}, PROFILES[3], Launch())
    assert memory(shape, plain)["peak"] == peaks[1]


def test_a_t4_computes_in_fp16():
    values = read("mistral-300m", "pretrain")
    t4 = next(device for device in PROFILES if "T4" in device.name)
    assert setting_of(values, t4, Launch()).precision == "fp16"
    assert setting_of(values, PROFILES[3], Launch()).precision == "bf16"
    assert setting_of(values | {"bf16": False}, PROFILES[3], Launch()).precision == "fp32"


def test_this_machine_is_found_and_shared_by_its_ranks():
    device, free = fitting.this_machine(Launch())
    assert isinstance(device, Device) and 0 < free <= (device.gigabytes + 1) * fitting.GIB
    if device.kind == "cpu":
        assert fitting.this_machine(Launch(processes=4))[1] == pytest.approx(free / 4, rel=0.2)


def test_the_gpu_is_the_one_that_is_visible(tmp_path, monkeypatch):
    """nvidia-smi lists all GPUs, also invisible ones, and no memory for a GPU that shares the CPU's."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\necho GPU-a, NVIDIA A100, 8.0, 40960, 30720\necho GPU-b, Tesla T4, 7.5, 15360, 10240\n"
        "echo GPU-c, NVIDIA GB10, 12.1, [N/A], [N/A]\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    a100 = Device("NVIDIA A100", 40, 0.0, True), 30 * fitting.GIB
    assert fitting.this_machine(Launch(processes=2)) == a100
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert fitting.this_machine(Launch()) == (Device("Tesla T4", 15, 0.0, False), 10 * fitting.GIB)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert fitting.this_machine(Launch())[0].name == "NVIDIA GB10"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1,MIG-2")
    part, free = fitting.this_machine(Launch())
    assert part.name == "NVIDIA A100 MIG" and free == math.inf  # not known
    values, shape = read("tiny", "pretrain"), shape_of(read("tiny", "model"), 8000)
    (line,) = preflight._device_lines(part, free, values, shape, Launch(), 1e9, None, "")
    assert "fits" not in line and "a part of a GPU (MIG) has is not known" in line
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert fitting.this_machine(Launch())[0].kind == "cpu"


@pytest.mark.parametrize("device", [*PROFILES[2:4], Device("CPU", 8, 0.0, True, "cpu")])
@pytest.mark.parametrize("values", [{}, {"bf16": False}, {"fp16": False}, {"bf16": False, "fp16": False}])
def test_the_precision_is_the_one_that_a_training_chooses(device, values):
    seen = Hardware(device.kind, device.name, (8, 0), (2, 13), device.bf16, (), True)
    setting = setting_of(read("tiny", "pretrain") | values, device, Launch())
    assert setting.precision == choose(seen, values).precision


def test_null_in_a_deepspeed_file_offloads_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "CONFIGS", tmp_path)
    zero = {"stage": 2, "offload_optimizer": None, "offload_param": None}
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed/mine.json").write_text(json.dumps({"zero_optimization": zero}))
    fields = fitting.zero_of("mine")
    assert not fields["offload_optimizer"] and not fields["offload_parameters"]


def test_a_suggested_micro_batch_holds_the_longest_block():
    """A sample is as long as the longest block of all phases, and the option counts those of the file."""
    values = read("tiny", "pretrain")
    values |= {"phases": [{"until_step": 10}, {"block_size": 4 * values["block_size"]}]}
    setting = setting_of(values, PROFILES[0], Launch())
    for changed, options in fitting.ways_out(values, setting):
        for option in (word for word in options if "per_device_train_batch_size" in word):
            assert int(option.rsplit("=", 1)[1]) == 4 * changed.micro_batch < 8
    assert setting.micro_batch == 2
