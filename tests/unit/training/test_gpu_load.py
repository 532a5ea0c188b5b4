"""Utilisation and power of a GPU, from an NVML that is a fake."""

import sys
from types import SimpleNamespace

import pytest
import torch
from recipe.training import callbacks, gpu_load
from recipe.training.gpu_load import open_gpu
from transformers import TrainerState

CUDA = torch.device("cuda", 0)


class NVMLError(Exception):
    """As pynvml's."""


@pytest.fixture
def nvml(monkeypatch):
    """A GPU that has used 5 J a second for kernels that ran 87 % of the time."""
    clock = SimpleNamespace(seconds=100.0)
    fake = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-1234": "handle"}[uuid],
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=87),
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 5000 * clock.seconds,  # millijoules
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    monkeypatch.setattr(gpu_load.time, "perf_counter", lambda: clock.seconds)
    return fake, clock


def test_power_is_the_mean_since_the_last_log(nvml):
    _, clock = nvml
    load = open_gpu(CUDA)
    clock.seconds += 20
    assert load.read() == (87.0, pytest.approx(5.0))


def test_what_nvml_tells_is_logged_for_each_rank(nvml):
    _, clock = nvml
    state = TrainerState(max_steps=9)
    meter = callbacks.Meter(100, lambda step: 1.0, 1.0, None)
    meter.load = open_gpu(CUDA)
    meter._restart(state)
    state.global_step, clock.seconds = 4, clock.seconds + 2
    logs = {"loss": 1.0}
    meter.complete(logs, state, torch.device("cpu"))
    assert logs["rank0/gpu_percent"] == 87 and logs["rank0/watts"] == 5
    meter.load, state.global_step = None, 8
    clock.seconds += 2
    logs = {"loss": 1.0}
    meter.complete(logs, state, torch.device("cpu"))
    assert "rank0/memory_gib" in logs and "rank0/watts" not in logs


def test_without_nvml_nothing_is_logged(nvml, monkeypatch, capsys):
    fake, _ = nvml
    assert open_gpu(torch.device("cpu")) is None

    def refuse():
        raise NVMLError("driver not loaded")

    fake.nvmlDeviceGetUtilizationRates = lambda handle: refuse()  # at the start, not at the first log
    assert open_gpu(CUDA) is None and "driver not loaded" in capsys.readouterr().out
    fake.nvmlInit = refuse
    assert open_gpu(CUDA) is None and "driver not loaded" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert open_gpu(CUDA) is None
