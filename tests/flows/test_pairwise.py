"""Pairs in both orders, by hand; length control against a fit of another library."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from flows.pairwise import Orders, figures, length_controlled


def test_only_a_preference_that_survives_the_exchange_is_one() -> None:
    assert Orders("first", "second").points == 1.0
    assert Orders("second", "first").points == 0.0
    for orders in (("first", "first"), ("second", "second"), ("tie", "tie"), ("first", "tie"), ("tie", "first")):
        assert Orders(*orders).points == 0.5  # type: ignore[arg-type]
    assert Orders("first", None).points is None


def test_figures_by_hand() -> None:
    orders = [
        *[Orders("first", "second")] * 3,  # wins
        Orders("second", "first"),  # a loss
        *[Orders("first", "first")] * 2,  # whatever is shown first
        Orders("tie", "tie"),
        Orders(None, "first"),  # a failure
    ]
    found = figures(orders, [5] * 8, [5] * 8, resamples=200, seed=1)
    assert (found["pairs"], found["failures"]) == (8, 1)
    assert (found["wins"], found["ties"], found["losses"]) == (3, 3, 1)
    assert found["win_rate"] == pytest.approx(4.5 / 7, abs=1e-6)
    assert found["decided_win_rate"] == 0.75
    assert found["win_rate_shown_first"] == pytest.approx(5.5 / 7, abs=1e-6)
    assert found["win_rate_shown_second"] == pytest.approx(3.5 / 7, abs=1e-6)
    assert found["position_bias"] == pytest.approx(8 / 12 - 0.5, abs=1e-6)  # 3 + 1 + 4 of 12 verdicts
    assert found["consistent"] == pytest.approx(5 / 7, abs=1e-6)
    assert found["length_controlled_win_rate"] == pytest.approx(4.5 / 7, abs=2e-3)  # equal lengths: nothing to control


def test_without_a_verdict_there_is_no_rate() -> None:
    found = figures([Orders(None, None)], [1], [2], resamples=10, seed=1)
    assert found["failures"] == 1 and math.isnan(found["win_rate"])
    assert math.isnan(found["length_controlled_win_rate_low"])


def test_length_control_is_the_logistic_regression_at_equal_lengths() -> None:
    rng = np.random.default_rng(2)
    delta = rng.normal(10, 20, size=300)
    won = (rng.random(300) < 1 / (1 + np.exp(-(0.4 + 1.5 * np.tanh(delta / delta.std()))))).astype(float)
    won[:20] = 0.5
    z = np.tanh(delta / delta.std())

    def loss(w: np.ndarray) -> float:
        logit = w[0] + w[1] * z
        return float(np.mean(np.logaddexp(0, logit) - won * logit))

    theta = minimize(loss, [0.0, 0.0]).x[0]
    found = length_controlled(won, delta, resamples=300, seed=1)
    assert found.value == pytest.approx(1 / (1 + math.exp(-theta)), abs=2e-3)
    assert found.low < found.value < found.high
    assert found.value < won.mean()  # longer answers won, and these are longer


def test_a_side_that_wins_all_has_a_finite_rate() -> None:
    found = length_controlled([1.0] * 50, list(range(50)), resamples=50, seed=1)
    assert 0.9 < found.low <= found.value <= found.high <= 1
