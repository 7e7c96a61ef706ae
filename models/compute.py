"""How training computes: the precision of its products, what it keeps for the backward pass, and whether it is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class ComputeOptions:
    """Section `training` of params.yaml, for all training stages.

    precision: bf16 multiplies in bfloat16; weights, optimizer, residuals, softmax and losses stay in fp32.
    activation_checkpointing: keep what enters each layer alone and compute the rest again in the backward pass: less memory,
    a third more work. compile: torch.compile of pretraining's layers, whose shapes never change (those of other stages do).
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be fp32 or bf16, not {self.precision}")

    @property
    def dtype(self) -> torch.dtype:
        """The type of the numbers that are multiplied."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


PLAIN = ComputeOptions()


@contextmanager
def arithmetic(options: ComputeOptions, device: torch.device) -> Iterator[None]:
    """Within it matrix products and attention are in the options' precision."""
    with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
        yield
