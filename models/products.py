"""Matrix products of the CPU decoder: x [h, in] · weightᵀ + bias in fp32, bf16 or int8, whatever the model's own type."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from models.sampling import GAP, Floats

Precision = Literal["fp32", "bf16", "int8"]
ROWS = 256  # of a weight quantised at a time: they stay in the cache meanwhile


class Product(Protocol):
    """A linear layer as the decoder takes it; shape is [in, out]."""

    shape: tuple[int, int]

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        """weight [out, in], bias [out]; rows: how many are computed at most."""

    def __call__(self, x: Floats, out: Floats | None = None) -> Floats:
        """x [h, in] → [h, out], written to `out` where given."""


class SingleProduct:
    """In fp32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        """Several rows times [in, out] run faster; for one row a copy costs more than it gives."""
        turned = numpy_of(weight).T
        self.shape = turned.shape
        self.weight = turned if rows == 1 else apart(turned)
        self.bias = None if bias is None else numpy_of(bias)

    def __call__(self, x: Floats, out: Floats | None = None) -> Floats:
        """See Product."""
        y = np.matmul(x, self.weight, out=out)
        if self.bias is not None:
            y += self.bias
        return y


class HalfProduct:
    """Inputs and weights rounded to bf16, summed in fp32, the result rounded to bf16."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        """Half of fp32's memory beside the model."""
        self.shape = (weight.shape[1], weight.shape[0])
        self.weight = weight.detach().bfloat16().t()
        self.bias = None if bias is None else numpy_of(bias)

    def __call__(self, x: Floats, out: Floats | None = None) -> Floats:
        """See Product."""
        y = np.empty((len(x), self.shape[1]), dtype=np.float32) if out is None else out
        torch.from_numpy(y).copy_(torch.mm(torch.from_numpy(x).bfloat16(), self.weight))
        if self.bias is not None:
            y += self.bias
        return y


class ByteProduct:
    """Both sides as 8-bit integers, a scale for each row of the input and each row of the weight: the sums are exact."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        """A quarter of fp32's memory beside the model."""
        weight = weight.detach()
        self.shape = (weight.shape[1], weight.shape[0])
        quantised = torch.empty(weight.shape, dtype=torch.int8)
        scale = torch.empty(weight.shape[0], 1)
        for part, bytes_of, scales in zip(weight.split(ROWS), quantised.split(ROWS), scale.split(ROWS), strict=True):
            numbers = part.float()
            scales.copy_(numbers.abs().amax(1, keepdim=True).clamp_min_(1e-30) / 127)
            bytes_of.copy_((numbers / scales).round_())
        self.weight = quantised.t()
        self.scale: Floats = scale[:, 0].numpy()
        self.bias = None if bias is None else numpy_of(bias)

    def __call__(self, x: Floats, out: Floats | None = None) -> Floats:
        """See Product."""
        scale = np.abs(x).max(1, keepdims=True)
        np.maximum(scale, 1e-30, out=scale)
        scale /= 127
        numbers = x / scale
        np.rint(numbers, out=numbers)
        sums = torch._int_mm(torch.from_numpy(numbers.astype(np.int8)), self.weight).numpy()
        y: Floats = np.multiply(sums, scale, out=out, dtype=np.float32, casting="same_kind")
        y *= self.scale
        if self.bias is not None:
            y += self.bias
        return y


PRODUCTS: dict[Precision, type[Product]] = {"fp32": SingleProduct, "bf16": HalfProduct, "int8": ByteProduct}


def apart(weight: Floats) -> Floats:
    """A copy [in, out] whose rows lie a little further apart: a power of two between them would share cache lines."""
    room: Floats = np.empty((weight.shape[0], weight.shape[1] + GAP), dtype=np.float32)[:, : weight.shape[1]]
    room[...] = weight
    return room


def numpy_of(tensor: Tensor) -> Floats:
    """A weight as fp32, without a copy where it is that already."""
    array: Floats = tensor.detach().float().numpy()
    return array
