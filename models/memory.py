"""Whether a training step fits into memory, asked before the first step instead of found out at step 900."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rehearsal:
    """What one step on the largest batch took: seconds, and the most memory so far in bytes."""

    seconds: float
    memory: int


def rehearse(module: nn.Module, loss: Callable[[], Tensor], what: str, remedy: str) -> Rehearsal:
    """Forward and backward once on the largest batch that can come, and drop the gradients: the weights stay as they are.

    what: the batch with its sizes; remedy: which setting to change. Raises MemoryError with both, the model's size and what
    memory there is, when it does not fit.
    """
    device = next(module.parameters()).device
    started = time.perf_counter()
    try:
        loss().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:  # CUDA's OutOfMemoryError is one; the CPU's allocator raises a plain one
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        count = sum(p.numel() for p in module.parameters())
        raise MemoryError(
            f"{what} with a model of {count / 1e6:.1f} M parameters does not fit into the {memory_text(device)}: {remedy}"
        ) from error
    finally:
        module.zero_grad(set_to_none=True)
    return Rehearsal(time.perf_counter() - started, peak_memory(device.type))


def smaller(section: str, count: int) -> str:
    """What to do when `count` elements of a section's micro-batch do not fit."""
    if count > 1:
        return f"set {section}.micro_batch below {count} in params.yaml"
    return "not even one fits: shorten what is learned from (tokenize, in params.yaml), or start from a smaller model"


def peak_memory(device: str) -> int:
    """The most memory in bytes that this process has used: on the GPU for "cuda", else resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def memory_text(device: torch.device) -> str:
    """How much memory the device has, in words."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"{total / 1e9:.1f} GB of {torch.cuda.get_device_name(device)} ({free / 1e9:.1f} GB are free)"
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        return f"{limit / 1e9:.1f} GB that this process may use (its limit on address space)"
    return "memory of this machine"
