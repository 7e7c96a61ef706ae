"""What a training run costs on a GPU: model FLOP/s utilisation (MFU), peak memory, power and energy."""

from __future__ import annotations

import ctypes
import time

import torch

# dense bf16 products by the makers' data sheets in FLOP/s; the first name that is part of torch's name of the device counts
PEAK_FLOPS = (
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)
NVML = "libnvidia-ml.so.1"


def peak_flops(name: str) -> float | None:
    """What a GPU of torch's name `name` reaches at most in bf16, in FLOP/s; None for one that is not known here."""
    return next((peak for part, peak in PEAK_FLOPS if part in name), None)


class EnergyCounter:
    """The driver's count of the energy that a GPU has used, read through NVML.

    uuid: of the GPU, as torch gives it, with or without "GPU-". library: NVML's file. Raises OSError where the library, the
    GPU or its counter (Volta and later have one) is not there.
    """

    def __init__(self, uuid: str, library: str = NVML) -> None:
        self.nvml = ctypes.CDLL(library)
        self.device = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        self._call("nvmlDeviceGetHandleByUUID", name.encode(), ctypes.byref(self.device))
        self.joules()

    def joules(self) -> float:
        """Energy used since the driver was loaded."""
        millijoules = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self.device, ctypes.byref(millijoules))
        return millijoules.value / 1000

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self.nvml, name)(*arguments)
        if code:
            raise OSError(f"{name} of {NVML} answers {code}")


class GpuMeter:
    """Figures of the GPU between two readings; of a CPU there are none.

    Without NVML's energy counter the power and energy are left out. No GPU was at hand when this was written: the counter
    was tried against a library of the same calls, the rest never.
    """

    def __init__(self, device: str | torch.device) -> None:
        self.on = torch.device(device).type == "cuda"
        self.energy: EnergyCounter | None = None
        if not self.on:
            return
        properties = torch.cuda.get_device_properties(device)
        self.peak = peak_flops(properties.name)
        try:
            self.energy = EnergyCounter(str(properties.uuid))
        except OSError:
            self.energy = None
        self.before = self.start = self._joules()
        self.clock = time.perf_counter()

    def _joules(self) -> float:
        return self.energy.joules() if self.energy is not None else 0.0

    def read(self, flops: float) -> dict[str, float]:
        """Since the last reading, in which `flops` operations were done that the model needs: gpu/mfu (share of the peak),
        gpu/watts; gpu/memory_gb, the most so far; gpu/joules since this process began."""
        if not self.on:
            return {}
        torch.cuda.synchronize()
        now, joules = time.perf_counter(), self._joules()
        seconds = now - self.clock
        figures = {"gpu/memory_gb": torch.cuda.max_memory_allocated() / 1e9}
        if self.peak is not None:
            figures["gpu/mfu"] = flops / seconds / self.peak
        if self.energy is not None:
            figures |= {"gpu/watts": (joules - self.before) / seconds, "gpu/joules": joules - self.start}
        self.clock, self.before = now, joules
        return figures
