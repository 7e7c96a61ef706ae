"""What a GPU run costs: arithmetic by hand, and NVML's calls against a library that answers them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from models.config import ModelConfig
from models.gpu import EnergyCounter, GpuMeter, peak_flops

SOURCE = """
#include <string.h>
static unsigned long long used = 5000;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
  *device = (void *)7;
  return strcmp(uuid, "GPU-abc") ? 6 : 0;
}
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) {
  *millijoules = used += 1500;
  return device == (void *)7 ? 0 : 2;
}
"""


@pytest.fixture(scope="module")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library with the three calls of NVML that are used: the energy grows by 1.5 J a reading."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to build a stand-in for NVML")
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(SOURCE, encoding="utf-8")
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(folder / "nvml.c")], check=True)
    return str(library)


def test_energy_is_read_in_joules(nvml: str) -> None:
    counter = EnergyCounter("abc", nvml)
    first = counter.joules()
    assert counter.joules() - first == pytest.approx(1.5)


def test_a_gpu_that_nvml_does_not_know_is_an_error(nvml: str) -> None:
    with pytest.raises(OSError, match=r"nvmlDeviceGetHandleByUUID of libnvidia-ml\.so\.1 answers 6"):
        EnergyCounter("GPU-xyz", nvml)


def test_a_machine_without_nvml_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        EnergyCounter("abc", str(tmp_path / "libnvidia-ml.so.1"))


def test_on_a_cpu_nothing_is_reported() -> None:
    assert GpuMeter("cpu").read(1e12) == {}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Tesla T4", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_operations_of_a_token_by_hand() -> None:
    """GPT-2 small's sizes in a decoder of this kind."""
    config = ModelConfig(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        intermediate_size=2048,
        max_position_embeddings=1024,
        vocab_size=50304,
        tie_word_embeddings=False,
    )
    layer = 768 * (768 + 2 * 256) + 768 * 768 + 3 * 768 * 2048
    assert config.matrix_weights() == 12 * layer + 50304 * 768
    token = 6 * (12 * layer + 50304 * 768) + 12 * 12 * 768 * 1024
    assert config.training_flops([1024]) == 1024 * token
    assert config.training_flops([1, 1024]) == 1024 * token + 6 * (12 * layer + 50304 * 768) + 12 * 12 * 768
    assert config.parameter_count() == config.matrix_weights() + 50304 * 768 + 12 * 2 * 768 + 768


def test_a_gpu_reports_memory_and_utilisation() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    meter = GpuMeter("cuda")
    torch.ones(1000, device="cuda")
    assert meter.read(1e9)["gpu/memory_gb"] > 0
