"""An estimate with the ends of its interval."""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

Z95 = statistics.NormalDist().inv_cdf(0.975)


class Interval(NamedTuple):
    """An estimate with the ends of its interval."""

    value: float
    low: float
    high: float

    def as_dict(self, digits: int = 6) -> dict[str, float]:
        """The three numbers, rounded so that reports of equal runs are equal bytes."""
        return {name: round(number, digits) for name, number in self._asdict().items()}


def wilson(successes: int, n: int, z: float = Z95) -> Interval:
    """A proportion with Wilson's score interval (Wilson 1927). Raises ValueError when impossible."""
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"wilson({successes}, {n}): needs 0 <= successes <= n and n > 0")
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))
