"""An exponential moving average of weights, which is saved in place of the last ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.distributed import like


class Average:
    """θ̄ ← decay·θ̄ + (1 − decay)·θ after every step, from θ̄ = the weights at the start; only of what learns."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        self.means: list[Tensor] = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        torch._foreach_lerp_(self.means, self.parameters, 1 - self.decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Write the average into the module: done once, when training has ended."""
        for parameter, mean in zip(self.parameters, self.means, strict=True):
            parameter.copy_(mean)

    def state_dict(self) -> dict[str, Any]:
        """The averages by their place among the module's parameters."""
        return {str(i): mean for i, mean in enumerate(self.means)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of state_dict, of whole tensors."""
        for i, mean in enumerate(self.means):
            mean.copy_(like(state[str(i)], mean))
