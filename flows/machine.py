"""The machine a run happens on, and what its bits depend on: device, torch, thread count (chosen once)."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import uuid
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from flows.files import write_text

# In a process of its own, fewest threads first: torch's thread pool cannot be made smaller again once it has run.
_MEASURE = """
import sys, time, torch
width, length, batch = 128, 64, 16
query, feed = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
head = torch.nn.Linear(width, 2048)
parameters = [*query.parameters(), *feed.parameters(), *head.parameters()]
tokens, targets = torch.randn(batch, length, width), torch.randint(2048, (batch * length,))
def step():
    heads = (part.view(batch, length, 4, -1).transpose(1, 2) for part in query(tokens).chunk(3, -1))
    mixed = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
    logits = head(tokens + feed(mixed)).view(-1, 2048)
    torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets), parameters)
for threads in sys.argv[1:]:
    torch.set_num_threads(int(threads))
    step()
    best, end = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < end:
        start = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - start)
    print(best)
"""


@dataclass(frozen=True)
class Machine:
    """workspace: a random id of this checkout; device: "cpu" or "cuda"; device_name: model of the CPU or GPU;
    threads: torch's thread count; torch: its version; world_size: number of training processes."""

    workspace: str
    device: str
    device_name: str
    threads: int
    torch: str
    world_size: int = 1

    def bits(self) -> dict[str, str | int]:
        """What changes the last bits of a result, for the fingerprint."""
        return {"device": self.device, "threads": self.threads, "world_size": self.world_size}

    def tags(self) -> dict[str, str]:
        """What a record names of the machine."""
        return {name: str(value) for name, value in asdict(self).items()}


def machine(root: Path, *, threads: int | None = None, device: str = "", world_size: int | None = None) -> Machine:
    """This machine as workspace `root` uses it.

    The thread count is `threads` if given (THUMBWHEEL_THREADS), else the stored one, else measured (a few seconds)
    and stored in .thumbwheel/machine.json. `device`: "cpu" or "cuda"; by default cuda where there is one. `world_size`: how
    many processes train together (THUMBWHEEL_PROCESSES); by default one a GPU, and one on a CPU.
    """
    stored = _stored(root)
    device = device or ("cuda" if _has_cuda() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"THUMBWHEEL_DEVICE is {device!r}; it must be cpu or cuda")
    if threads is None:
        if "threads" not in stored:
            stored = _store(root, threads=fastest_threads())
        threads = int(stored["threads"])
    if world_size is None:
        world_size = _gpus() if device == "cuda" else 1
    return Machine(workspace_id(root), device, device_model(device), threads, version("torch"), world_size)


def workspace_id(root: Path) -> str:
    """A random id of this checkout, made on first use."""
    stored = _stored(root)
    if "workspace" not in stored:
        stored = _store(root, workspace=uuid.uuid4().hex[:12])
    return str(stored["workspace"])


def _has_cuda() -> bool:
    if not Path("/dev/nvidiactl").exists():
        return False  # spares a second of importing torch
    import torch

    return torch.cuda.is_available()


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def device_model(device: str) -> str:
    """The name of the GPU ("cuda") or CPU ("cpu"), as the system tells it."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def physical_cores() -> int:
    """Physical cores that this process may use, at least 1."""
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))


def fastest_threads() -> int:
    """1 or the number of physical cores, whichever does a small training step clearly (10 %) faster.

    Each is measured by its best step within half a second; more threads must win clearly, because on a machine that is
    busy with others they lose far more than they gain on a quiet one.
    """
    cores = physical_cores()
    if cores == 1:
        return 1
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, "1", str(cores)],
        env={**os.environ, "OMP_NUM_THREADS": str(cores), "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        check=True,
    )
    alone, together = map(float, result.stdout.split())
    return cores if together < 0.9 * alone else 1


def use_threads(threads: int) -> None:
    """Compute with so many threads in this process: torch, and numpy's BLAS, which decodes and has threads of its own."""
    import numpy  # noqa: F401 (its BLAS must be loaded to be told)
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(threads)
    threadpool_limits(threads, user_api="blas")


def _stored(root: Path) -> dict[str, str | int]:
    try:
        return json.loads((root / ".thumbwheel" / "machine.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def _store(root: Path, **values: str | int) -> dict[str, str | int]:
    stored = _stored(root) | values
    write_text(root / ".thumbwheel" / "machine.json", json.dumps(stored, indent=2, sort_keys=True) + "\n")
    return stored
