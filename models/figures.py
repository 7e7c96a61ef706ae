"""Figures of a step whose batch comes in parts, in one process or several."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.distributed import sum_tensor


class Figures:
    """Sums of what each part adds to a figure of the whole batch: a part gives its sum divided by the batch's count, so that
    the sum over parts and processes is the batch's mean. Nothing is read from the device before `total`."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, shares: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Add a part's shares (scalars) times weight. All processes must name the same figures."""
        for name, share in shares.items():
            value = share.detach() * weight
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def total(self) -> dict[str, float]:
        """The figures of the whole batch. All processes must call it."""
        names = sorted(self.sums)
        if not names:
            return {}
        return dict(zip(names, sum_tensor(torch.stack([self.sums[n].double() for n in names])).tolist(), strict=True))
