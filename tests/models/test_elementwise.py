"""RMSNorm and SwiGLU: values and gradients are those that finite differences give in float64, and torch's own."""

from __future__ import annotations

import pytest
import torch

from models.elementwise import RMSNorm, swiglu


def test_gradients_are_those_of_finite_differences() -> None:
    g = torch.Generator().manual_seed(1)
    norm = RMSNorm(6, eps=1e-5).double()
    x = torch.randn(3, 2, 6, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, generator=g, dtype=torch.float64, requires_grad=True)

    def of(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(of, (x, weight))
    assert torch.autograd.gradcheck(swiglu, (torch.randn(5, 8, generator=g, dtype=torch.float64, requires_grad=True),))


@pytest.mark.parametrize("shape", [(7, 16), (7, 3, 16)])
def test_values_are_torchs(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 3
    norm = RMSNorm(16, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, 16))
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (16,), norm.weight, 1e-5))
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(x), torch.nn.functional.silu(gate) * up)
    low = norm(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), norm(x.bfloat16().float()), atol=1e-6, rtol=2**-8)
