"""The sequential test: its closed form against integration, its error rates by simulation."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from scipy.integrate import quad

from flows import sequential
from flows.sequential import evidence


@pytest.mark.parametrize(("against", "for_it"), [(0, 0), (1, 0), (0, 1), (5, 2), (20, 20), (30, 4)])
def test_the_closed_form_is_the_mean_likelihood_ratio(against: int, for_it: int) -> None:
    integral, _ = quad(lambda t: (2 * t) ** against * (2 * (1 - t)) ** for_it, 0.5, 1)
    assert sequential.worse(against, for_it) == pytest.approx(2 * integral, rel=1e-9)


def test_only_pairs_that_differ_count_and_the_longer_list_waits() -> None:
    found = evidence([True, False, False, True], [True, True, False, False, True, True])
    assert (found.pairs, found.against, found.for_it) == (4, 1, 1)
    assert found.value == sequential.worse(1, 1)
    assert evidence([], [True]).value == 1.0


def test_much_evidence_does_not_overflow() -> None:
    assert sequential.worse(5000, 0) == pytest.approx(1e300)
    assert sequential.worse(0, 5000) < 1e-3


def crossed(
    new_rate: float, old_rate: float, alpha: float, *, thumbs: int = 200, runs: int = 1500
) -> tuple[float, float]:
    """(share of runs that ever reach 1/alpha when one looks after every thumb, their median number of thumbs by then)."""
    worse = cache(sequential.worse)
    rng = np.random.default_rng(5)
    new, old = rng.random((runs, thumbs)) < new_rate, rng.random((runs, thumbs)) < old_rate
    against, for_it = np.cumsum(old & ~new, axis=1), np.cumsum(new & ~old, axis=1)
    when = []
    for row in range(runs):
        for k in range(thumbs):
            if worse(int(against[row, k]), int(for_it[row, k])) >= 1 / alpha:
                when.append(k + 1)
                break
    return len(when) / runs, float(np.median(when)) if when else float("nan")


@pytest.mark.parametrize(("new", "old"), [(0.5, 0.5), (0.9, 0.9), (0.65, 0.6)])
def test_who_looks_after_every_thumb_is_alarmed_falsely_no_more_often_than_alpha(new: float, old: float) -> None:
    alpha = 0.05
    rate, _ = crossed(new, old, alpha)
    assert rate <= alpha  # 1,500 runs: the bound is on the probability; what it is, is far enough below


def test_a_much_worse_model_is_found_out_soon() -> None:
    rate, thumbs = crossed(0.4, 0.7, 0.01)
    assert rate > 0.95
    assert thumbs < 90
    rate, _ = crossed(0.5, 0.7, 0.01)
    assert rate > 0.6
