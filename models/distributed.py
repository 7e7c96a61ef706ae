"""Training in several processes: torchrun starts them, FSDP2 shares weights, gradients and optimizer among them.

Every process draws the same random numbers and takes its own part of each batch, so that a step's loss is that of one
process within rounding, and checkpoints, which hold whole tensors, go from any number of processes to any other.

torch is imported by the functions that need it: a Job names its Ranks in processes that never train.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Item = TypeVar("Item")
Module = TypeVar("Module", bound="nn.Module")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together: its rank and how many there are. Alone, nothing here does anything."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process reports, saves and evaluates."""
        return self.rank == 0

    def part(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of a batch. Raises ValueError when there are fewer items than processes."""
        if len(items) < self.size:
            raise ValueError(f"a batch of {len(items)} cannot be shared by {self.size} processes: use fewer processes")
        return items[self.rank :: self.size]

    def shard(self, module: nn.Module, layers: Iterable[nn.Module], methods: Iterable[str] = ()) -> None:
        """Share the module's weights, which are equal in all processes: each layer is a unit, and what is left another.

        methods: names of methods, beside forward, that use the weights. Gradients are averaged over the processes: a loss
        that is a sum over this process's part is to be multiplied by `size`.
        """
        if self.size == 1:
            return
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        scalars = {p for p in module.parameters() if p.dim() == 0}  # FSDP2 shares tensors of one dimension and more
        for parameter in scalars:
            parameter.register_hook(self._mean)
        for layer in layers:
            fully_shard(layer)
        fully_shard(module, ignored_params=scalars)
        for name in methods:
            register_fsdp_forward_method(module, name)

    def whole(self, module: Module, blank: Module) -> Module:
        """The module with whole weights in evaluation mode, filled into `blank`; alone, the module itself.

        All processes must call it.
        """
        if self.size == 1:
            return module.eval()
        blank.load_state_dict(gather(module.state_dict()))
        return blank.eval()

    def total(self, value: float) -> float:
        """The sum of a number over all processes."""
        if self.size == 1:
            return value
        import torch

        number = torch.tensor(value, dtype=torch.float64, device=_device())
        torch.distributed.all_reduce(number)
        return number.item()

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.size > 1:
            import torch

            torch.distributed.barrier()

    def _mean(self, gradient: Tensor) -> Tensor:
        import torch

        out = gradient.clone()
        torch.distributed.all_reduce(out)
        return out / self.size


def join(device: str) -> Ranks:
    """Join the processes that torchrun started (its variables RANK and WORLD_SIZE); Ranks(0, 1) without torchrun.

    device "cpu" talks through gloo, "cuda" through NCCL, with the GPU of LOCAL_RANK.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks()
    import torch

    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    return Ranks(torch.distributed.get_rank(), size)


def leave(ranks: Ranks) -> None:
    """The end of join."""
    if ranks.size > 1:
        import torch

        torch.distributed.destroy_process_group()


def _device() -> str:
    import torch

    return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"


def gather(state: Any) -> Any:
    """A state dict with every shared tensor made whole. All processes must call it."""
    from torch.distributed.tensor import DTensor

    if isinstance(state, DTensor):
        return state.full_tensor()
    if isinstance(state, Mapping):
        return {key: gather(value) for key, value in state.items()}
    return state


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
    from torch import Tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(pattern, DTensor) or not isinstance(value, Tensor) or value.shape != pattern.shape:
        return value
    here = value.to(pattern.to_local().device)
    return distribute_tensor(here, pattern.device_mesh, pattern.placements, src_data_rank=None)
