"""AdamW with a warm-up and a decay, as one object whose state goes into a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from models.distributed import gradient_norm, load_optimizer


def learning_rate(step: int, steps: int, peak: float, warmup: int, floor: float = 0.1, shape: str = "cosine") -> float:
    """Rate of step 0..steps-1: linear warm-up to peak, then cosine or linear decay to floor·peak, or constant."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if shape == "constant":
        return peak
    done = (step - warmup) / max(1, steps - warmup)
    fall = 0.5 * (1 + math.cos(math.pi * done)) if shape == "cosine" else 1 - done
    return peak * (floor + (1 - floor) * fall)


class Optimizer:
    """Fused AdamW over a module; weight decay on matrices only; the gradient's norm is clipped before each step."""

    def __init__(
        self,
        module: nn.Module,
        *,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        parameters = [p for p in module.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.parameters = parameters
        self.inner = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=True)

    def step(self, rate: float, clip: float) -> tuple[float, bool]:
        """One step at the given rate. Returns the gradient's norm before clipping, and whether the step was taken.

        A gradient with NaN or infinity is dropped: the weights stay as they are and the caller counts it.
        """
        norm = clip_norm(self.parameters, clip)
        finite = math.isfinite(norm)
        if finite:
            for group in self.inner.param_groups:
                group["lr"] = rate
            self.inner.step()
        self.inner.zero_grad(set_to_none=True)
        return norm, finite

    def state_dict(self) -> dict[str, Any]:
        """Moments and step counts."""
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of state_dict."""
        load_optimizer(self.inner, state)


def clip_norm(parameters: Iterable[Tensor], limit: float) -> float:
    """Scale gradients in place so that their joint L2 norm is at most limit; returns the norm before that, over all processes."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = gradient_norm(grads)
    if math.isfinite(norm) and norm > limit:
        torch._foreach_mul_(grads, limit / (norm + 1e-6))
    return norm
