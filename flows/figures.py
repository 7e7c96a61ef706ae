"""The statistics of a judgement: pure functions of numbers and texts, with intervals where a sample speaks for more.

Intervals are 95 % unless said. Bootstraps resample whole prompts, as two answers to one prompt are not independent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from models.intervals import Interval, wilson

__all__ = ["Interval", "wilson"]


def bootstrap_mean(values: ArrayLike, *, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """The mean of values [n] with its percentile bootstrap interval. Raises ValueError when empty."""
    numbers = _vector(values)
    return _percentiles(float(numbers.mean()), _resampled_means(numbers, resamples, seed), level)


def paired_bootstrap(
    after: ArrayLike, before: ArrayLike, *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """The mean of after − before over pairs [n], with its bootstrap interval. Raises ValueError when lengths differ."""
    new, old = _vector(after), _vector(before)
    if new.shape != old.shape:
        raise ValueError(f"a paired bootstrap needs pairs: {new.size} values after, {old.size} before")
    return bootstrap_mean(new - old, resamples=resamples, seed=seed, level=level)


def pooled_paired_bootstrap(
    groups: Sequence[tuple[ArrayLike, ArrayLike]], *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """The mean over groups (seeds) of the mean paired difference, with its interval.

    Resamples groups, then pairs within each drawn group, so that both kinds of luck widen the interval.
    """
    if not groups:
        raise ValueError("a pooled bootstrap needs at least one group")
    differences = [_vector(after) - _vector(before) for after, before in groups]
    rng = np.random.default_rng(seed)
    # means[g, r]: resample r of group g; a resample of the pool then draws as many groups as there are
    means = np.stack([_resampled_means(d, resamples, int(rng.integers(2**31))) for d in differences])
    drawn = rng.integers(len(groups), size=(len(groups), resamples))
    pooled = means[drawn, rng.integers(resamples, size=drawn.shape)].mean(axis=0)
    return _percentiles(float(np.mean([d.mean() for d in differences])), pooled, level)


def distinct_share(texts: Sequence[Hashable]) -> float:
    """How many of the texts differ, over how many there are. Raises ValueError when empty."""
    _some(texts)
    return len(set(texts)) / len(texts)


def most_common(texts: Sequence[str]) -> tuple[str, float]:
    """The text that occurs most often (the first in order among equals) and its share of all."""
    _some(texts)
    counts = Counter(texts)
    text = min(counts, key=lambda t: (-counts[t], t))
    return text, counts[text] / len(texts)


def character_distinct(texts: Sequence[str], n: int = 4) -> float:
    """Distinct over all character n-grams of the texts; no gram crosses a text; 0 when there are none."""
    grams = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def win_rate(after: ArrayLike, before: ArrayLike, *, resamples: int = 2000, seed: int = 0) -> dict[str, float]:
    """Wins, ties and losses (shares of the pairs), and the win rate with half a win for a tie, with its interval."""
    difference = _vector(after) - _vector(before)
    wins, losses = difference > 0, difference < 0
    rate = bootstrap_mean(0.5 + 0.5 * wins - 0.5 * losses, resamples=resamples, seed=seed)
    shares = {"wins": wins.mean(), "ties": 1 - wins.mean() - losses.mean(), "losses": losses.mean()}
    return {name: round(float(share), 6) for name, share in shares.items()} | rate.as_dict()


def _vector(values: ArrayLike) -> NDArray[np.float64]:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or numbers.size == 0:
        raise ValueError(f"needs a list of at least one number, got shape {numbers.shape}")
    return numbers


def _some(texts: Sequence[Hashable]) -> None:
    if not texts:
        raise ValueError("needs at least one text")


def _resampled_means(numbers: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Means of `resamples` draws with replacement, in slices that keep the index array small."""
    rng = np.random.default_rng(seed)
    rows = max(1, 2_000_000 // numbers.size)
    slices = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    return np.concatenate([numbers[rng.integers(numbers.size, size=(k, numbers.size))].mean(axis=1) for k in slices])


def _percentiles(value: float, means: NDArray[np.float64], level: float) -> Interval:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))
