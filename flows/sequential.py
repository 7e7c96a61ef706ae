"""A test that may be looked at after every thumb: has the new model's rate of thumbs up fallen below the old one's?

Thumbs are paired in a fixed order, and only pairs whose two thumbs differ count (Wald, Sequential Analysis, 1947,
chapter 6: double dichotomies). When the new model is no worse, such a pair speaks against it with a probability of at
most 1/2, whatever the two rates are. The evidence is the likelihood of the pairs under a worse new model, averaged over
how much worse it may be (Robbins, 1970), over their likelihood at 1/2. If the new model is no worse, its expectation
never exceeds 1, so that with probability 1 - α it stays below 1/α for ever (Ville's inequality), however often one looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import comb


@dataclass(frozen=True)
class Evidence:
    """What the pairs say. against, for_it: pairs in which only the old, only the new model's thumb is up."""

    pairs: int
    against: int
    for_it: int
    value: float  # 1/α and more: the new model is worse, at a false alarm rate of α


def evidence(new: Sequence[bool], old: Sequence[bool]) -> Evidence:
    """Evidence that `new` (in the order of arrival) comes from a lower rate than `old` (in an order chosen beforehand)."""
    pairs = list(zip(new, old, strict=False))
    against = sum(before and not after for after, before in pairs)
    for_it = sum(after and not before for after, before in pairs)
    return Evidence(len(pairs), against, for_it, worse(against, for_it))


def worse(against: int, for_it: int) -> float:
    """The evidence of so many pairs that differ: the mean of (2θ)^against · (2(1-θ))^for_it over θ from 1/2 to 1.

    In closed form, Σ_{j ≤ a} C(n+1, j) / ((n+1) C(n, a)) with n = a + f, so nothing overflows or is rounded on the way.
    """
    n = against + for_it
    term, total = 1, 0
    for j in range(against + 1):
        total += term
        term = term * (n + 1 - j) // (j + 1)
    found = Fraction(total, (n + 1) * comb(n, against))
    return float(min(found, Fraction(10**300)))
