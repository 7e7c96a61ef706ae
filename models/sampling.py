"""Sampling on a CPU: the inverse of the cumulative distribution in two levels, and the top-k and top-p filters.

Each row has a number of its own in [0, 1). Sums over blocks of the vocabulary say in which block it falls, and only that
block is summed token by token: two light passes over the vocabulary instead of a cumulative sum in double precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

BLOCK = 128  # tokens summed together: about the square root of usual vocabularies
GAP = 16  # numbers between rows: a power of two from row to row would share cache lines, which slows the product

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Sampling:
    """How a request is sampled: top_k 0 and top_p 1 switch those filters off, temperature 0 takes the likeliest token.

    numbers: in [0, 1), one for each token that the answer may have.
    """

    temperature: float
    top_k: int
    top_p: float
    numbers: Doubles

    @property
    def filtered(self) -> bool:
        """Whether some tokens may be ruled out."""
        return self.top_k > 0 or self.top_p < 1


class Settings:
    """How each of `width` rows is sampled, and how many tokens it has got."""

    def __init__(self, width: int, longest: int) -> None:
        """longest: tokens that an answer has at most."""
        self.temperature = np.ones(width, dtype=np.float32)
        self.top_k = np.zeros(width, dtype=np.int64)
        self.top_p = np.ones(width)
        self.numbers = np.zeros((width, longest))
        self.made = np.zeros(width, dtype=np.int64)
        self.live = np.zeros(width, dtype=bool)

    def begin(self, row: int, sampling: Sampling) -> None:
        """A request enters the row."""
        self.temperature[row], self.top_k[row], self.top_p[row] = sampling.temperature, sampling.top_k, sampling.top_p
        self.numbers[row, : len(sampling.numbers)] = sampling.numbers
        self.made[row], self.live[row] = 0, True

    def end(self, row: int) -> None:
        """The row idles: what is drawn for it means nothing."""
        self.temperature[row], self.top_k[row], self.top_p[row] = 1, 0, 1
        self.made[row], self.live[row] = 0, False

    def move(self, source: int, target: int) -> None:
        """A request changes its row."""
        for values in (self.temperature, self.top_k, self.top_p, self.numbers, self.made, self.live):
            values[target] = values[source]
        self.end(source)


class Sampler:
    """Buffers for the distributions of up to `rows` rows over the vocabulary."""

    def __init__(self, rows: int, vocabulary: int) -> None:
        self.blocks = -(-vocabulary // BLOCK)
        self._weights = np.zeros((rows, self.blocks * BLOCK + GAP), dtype=np.float32)[:, :-GAP]
        self._sums = np.zeros((rows, self.blocks), dtype=np.float32)
        self._blocks = self._weights.reshape(rows, self.blocks, BLOCK)
        self._logits = self._weights[:, :vocabulary]  # what lies behind the vocabulary stays 0

    def logits(self, rows: int) -> Floats:
        """[rows, V], to be filled with logits divided by the temperature before `draw`."""
        return self._logits[:rows]

    def draw(self, settings: Settings, rows: slice | Ints) -> tuple[Ints, Doubles]:
        """Sample the filled rows, whose settings are those at `rows` of all: ids [rows] and log-probabilities [rows].

        Temperature 0 takes the likeliest token, with log-probability 0: that distribution has one token.
        """
        temperature, numbers = settings.temperature[rows], settings.numbers[rows]
        count = len(temperature)
        every = np.arange(count)
        weights = self._logits[:count]
        greedy = temperature == 0
        best = weights.argmax(1) if greedy.any() else None
        weights -= weights.max(1, keepdims=True)
        np.exp(weights, out=weights)
        top_k, top_p = settings.top_k[rows], settings.top_p[rows]
        for row in np.flatnonzero((top_k > 0) | (top_p < 1)):
            keep_top(weights[row], int(top_k[row]), float(top_p[row]))
        ids, chosen, total = self._invert(numbers[every, settings.made[rows]], every)
        logprobs = np.log(chosen / total)
        if best is not None:
            ids, logprobs = np.where(greedy, best, ids), np.where(greedy, 0.0, logprobs)
        settings.made[rows] += settings.live[rows]
        return ids, logprobs

    def _invert(self, numbers: Doubles, every: Ints) -> tuple[Ints, Doubles, Doubles]:
        """The token where the cumulative weight passes number · total: ids, their weights and the totals, [rows] each."""
        count = len(every)
        blocks = self._blocks[:count]
        # numpy's sum takes four times as long
        torch.sum(torch.from_numpy(blocks), 2, out=torch.from_numpy(self._sums[:count]))
        edges = np.cumsum(self._sums[:count], axis=1, dtype=np.float64)
        total = edges[:, -1]
        target = np.minimum(numbers * total, np.nextafter(total, 0))
        block = (edges <= target[:, None]).sum(1)
        rest = target - np.where(block > 0, edges[every, block - 1], 0.0)
        within = blocks[every, block]
        at = (np.cumsum(within, axis=1, dtype=np.float64) <= rest[:, None]).sum(1)
        if (at == BLOCK).any():  # the block's sum was rounded up: its last token that can be drawn
            at = np.minimum(at, BLOCK - 1 - (within[:, ::-1] > 0).argmax(1))
        return block * BLOCK + at, within[every, at].astype(np.float64), total


def keep_top(weights: Floats, top_k: int, top_p: float) -> None:
    """Zero, in place, what the filters take from a row of unnormalised probabilities [V].

    The top_k likeliest stay, of those the smallest set that holds top_p of their probability (Holtzman et al. 2020); of
    equally likely tokens those with the lower ids.
    """
    ordered = np.sort(weights)[::-1]
    if top_k:
        ordered = ordered[:top_k]
    keep = len(ordered)
    if top_p < 1:
        cumulative = np.cumsum(ordered, dtype=np.float64)
        keep = 1 + int((cumulative[:-1] < top_p * cumulative[-1]).sum())
    least = ordered[keep - 1]
    ties = np.flatnonzero(weights == least)[keep - int((weights > least).sum()) :]
    weights[weights < least] = 0
    weights[ties] = 0
