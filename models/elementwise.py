"""RMSNorm and SwiGLU with gradients written out: a CPU passes over memory less often, and less is kept for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """torch's, but that a CPU takes the function below; a GPU has a kernel of its own, and the compiler makes one."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] → x / sqrt(mean x² + eps) · weight, in at least fp32 and given in x's type."""
        if x.is_cuda or torch.compiler.is_compiling():
            return super().forward(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        return _RMSNorm.apply(x.to(wide), self.weight.to(wide), self.eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """With s the scale and g the gradient: dx = s·(g·w − x·s²·Σ(g·x·w)/d), dw = Σ over rows of g·x·s."""
        x, weight, scale = ctx.saved_tensors
        (grad,) = grads
        both = (grad * x).reshape(-1, x.shape[-1])
        along = (both @ weight).view_as(scale).mul_(scale.pow(3)).div_(-x.shape[-1])
        for_x = (grad * weight).mul_(scale).addcmul_(x, along) if ctx.needs_input_grad[0] else None
        return for_x, scale.reshape(-1) @ both if ctx.needs_input_grad[1] else None, None


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate)·up (Shazeer 2020) of gate and up side by side: [N, 2F] → [N, F]."""
    if torch.compiler.is_compiling():
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone: silu(gate) is computed again, which costs no more than to write it and read it back."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (gate_up,) = ctx.saved_tensors
        (grad,) = grads
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        for_gate, for_up = out.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=for_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=for_gate)
        return out
