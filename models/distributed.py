"""Training in several processes: torchrun starts them, FSDP2 shares weights, gradients and optimizer among them.

Every process draws the same random numbers and takes its own part of each batch, so that a step's loss is that of one
process within rounding, and checkpoints, which hold whole tensors, go from any number of processes to any other. Alone
(ranks.size is 1) nothing here does anything, and FSDP2 and DTensor, which take most of a second, are not imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.compute import ComputeOptions
from models.ranks import Ranks

Module = TypeVar("Module", bound=nn.Module)
Item = TypeVar("Item")


def join(device: str) -> Ranks:
    """Join the processes that torchrun started (its variables RANK and WORLD_SIZE); Ranks(0, 1) without torchrun.

    device "cpu" talks through gloo, "cuda" through NCCL, with the GPU of LOCAL_RANK.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return Ranks(dist.get_rank(), size)


def leave() -> None:
    """The end of join."""
    if _together():
        dist.destroy_process_group()


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def wait() -> None:
    """Until all processes have come here."""
    if _together():
        dist.barrier()


def sum_over_ranks(value: float) -> float:
    """The sum of a number over all processes."""
    if not _together():
        return value
    return sum_tensor(torch.tensor(value, dtype=torch.float64)).item()


def sum_tensor(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place where it stands on the device that they talk through."""
    if _together():
        values = values.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(values)
    return values


def everyone(value: Item) -> list[Item]:
    """What each process gives here, in their order; tensors must be on the CPU. Alone, [value]."""
    if not _together():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def shard(module: nn.Module, layers: Iterable[nn.Module], compute: ComputeOptions, methods: Sequence[str] = ()) -> None:
    """Share the module's weights, which are equal in all processes: each layer is a unit, and what is left another.

    compute: with bf16 the layers' weights travel and work as bf16, gradients are added up in fp32, and what the optimizer
    changes stays fp32. methods: those that work with the weights as forward does. Gradients are averaged over the
    processes: a loss that is a sum over this process's part is to be multiplied by their number.
    """
    if not _together():
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    low = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = low if compute.precision == "bf16" else MixedPrecisionPolicy()
    for layer in layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(module, mp_policy=policy)
    for name in methods:
        register_fsdp_forward_method(module, name)


def whole(module: Module, make: Callable[[], Module]) -> Module:
    """The module with whole weights in evaluation mode, filled into one that `make` makes; alone, the module itself.

    All processes must call it.
    """
    if not _together():
        return module.eval()
    state, blank = gather(module.state_dict()), make()
    blank.load_state_dict(state)
    return blank.eval()


def gather(state: Any) -> Any:
    """A state dict with every shared tensor made whole. All processes must call it."""
    if not _together():
        return state
    from torch.distributed.tensor import DTensor

    if isinstance(state, DTensor):
        return state.full_tensor()
    if isinstance(state, Mapping):
        return {key: gather(value) for key, value in state.items()}
    return state


def gradient_norm(gradients: Sequence[Tensor]) -> float:
    """The joint L2 norm of gradients that may be shared."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(gather(norm))


def load_module(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """load_state_dict of whole tensors into a module that may be shared."""
    own = module.state_dict()
    module.load_state_dict({name: like(tensor, own[name]) for name, tensor in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """load_state_dict of whole tensors into an optimizer whose parameters may be shared."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        index: {name: like(value, parameters[index]) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def like(value: Any, pattern: Tensor) -> Any:
    """A whole tensor shared as `pattern` is, when it has its shape; anything else as it is."""
    if not _together():
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(pattern, DTensor) or not isinstance(value, Tensor) or value.shape != pattern.shape:
        return value
    here = value.to(pattern.to_local().device)
    return distribute_tensor(here, pattern.device_mesh, pattern.placements, src_data_rank=None)
