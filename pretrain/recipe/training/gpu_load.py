"""Utilisation and power of this rank's GPU, by NVML, the library behind nvidia-smi."""

from __future__ import annotations

import time
from typing import Any

import torch


class GpuLoad:
    """Reads one GPU. nvml: the module pynvml, initialised. handle: its GPU."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.nvml, self.handle = nvml, handle
        self.restart()

    def restart(self) -> None:
        """Begin a new span of time for the mean power."""
        self.begun, self.joules = time.perf_counter(), self._joules()

    def read(self) -> tuple[float, float]:
        """(percent of the last moment in which a kernel ran, mean watts since `restart`)."""
        percent = self.nvml.nvmlDeviceGetUtilizationRates(self.handle).gpu
        return float(percent), (self._joules() - self.joules) / (time.perf_counter() - self.begun)

    def _joules(self) -> float:
        return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1000


def open_gpu(device: torch.device) -> GpuLoad | None:
    """The reader of a rank's GPU; None without a GPU, without nvidia-ml-py, or if NVML refuses."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        # By its UUID, because NVML also counts the GPUs that CUDA_VISIBLE_DEVICES hides.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetUtilizationRates(handle)  # refused, it would end the training at its first log
        return GpuLoad(pynvml, handle)
    except pynvml.NVMLError as error:
        print(f"note: utilisation and power of the GPU are not logged: NVML: {error}", flush=True)
        return None
