"""The statistics, against values worked by hand and against scipy."""

from __future__ import annotations

import numpy as np
import pytest

from flows import figures


def test_wilson_is_scipys_interval() -> None:
    stats = pytest.importorskip("scipy.stats")
    for successes, n in [(0, 10), (7, 10), (10, 10), (180, 400), (1, 1)]:
        expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
        found = figures.wilson(successes, n)
        assert found.value == successes / n
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_by_hand() -> None:
    # z = 2, n = 4, all up: centre (1 + .5) / 2 = .75, half = 2 * sqrt(4 / 64) / 2 = .25
    assert figures.wilson(4, 4, z=2.0) == pytest.approx((1.0, 0.5, 1.0))


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (5, 4), (-1, 4)])
def test_wilson_refuses_what_is_no_proportion(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="wilson"):
        figures.wilson(successes, n)


def test_bootstrap_of_a_mean_is_scipys_interval() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(5).normal(3.0, 2.0, 400)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=5000, rng=1).confidence_interval
    found = figures.bootstrap_mean(values, resamples=5000, seed=2)
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_bootstrap_is_seeded_and_slices_do_not_matter_to_its_size() -> None:
    values = np.arange(50.0)
    assert figures.bootstrap_mean(values, seed=1) == figures.bootstrap_mean(values, seed=1)
    assert figures.bootstrap_mean(values, seed=1) != figures.bootstrap_mean(values, seed=2)
    assert figures._resampled_means(np.ones(1500), resamples=3001, seed=0).shape == (3001,)


def test_constant_values_have_an_interval_of_no_width() -> None:
    assert figures.bootstrap_mean([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)


def test_pairing_takes_out_what_prompts_have_in_common() -> None:
    before = np.random.default_rng(0).normal(0, 10, 200)
    assert figures.paired_bootstrap(before + 0.5, before) == pytest.approx((0.5, 0.5, 0.5))


def test_pairs_need_two_of_each() -> None:
    with pytest.raises(ValueError, match="3 values after, 2 before"):
        figures.paired_bootstrap([1, 1, 1], [0, 0])


def test_pooled_interval_covers_the_spread_between_seeds() -> None:
    constant = [(np.full(10, 0.2), np.zeros(10)), (np.full(10, 0.4), np.zeros(10))]
    found = figures.pooled_paired_bootstrap(constant, resamples=4000)
    # each group's mean is certain, so only the draw of two groups of two varies: .2, .3 or .4
    assert found == pytest.approx((0.3, 0.2, 0.4))
    within = figures.pooled_paired_bootstrap([([1, 0, 1, 0], [0, 0, 0, 0])], resamples=4000)
    assert within == pytest.approx((0.5, 0.0, 1.0))


def test_diversity_by_hand() -> None:
    texts = ["yeah", "yeah", "no way", "yeah no"]
    assert figures.distinct_share(texts) == 0.75
    assert figures.most_common(texts) == ("yeah", 0.5)
    assert figures.most_common(["b", "a"]) == ("a", 0.5)
    # yeah | yeah | "no w" "o wa" " way" | yeah "eah " "ah n" "h no": 9 grams, 7 of them distinct
    assert figures.character_distinct(texts) == pytest.approx(7 / 9)
    assert figures.character_distinct(["abc", ""]) == 0.0
    with pytest.raises(ValueError, match="at least one"):
        figures.distinct_share([])


def test_win_rate_counts_a_tie_as_half() -> None:
    found = figures.win_rate([1, 1, 0, 1], [0, 1, 0, 0])
    assert (found["wins"], found["ties"], found["losses"]) == (0.5, 0.5, 0.0)
    assert found["value"] == 0.75
    assert figures.win_rate([0], [1])["value"] == 0.0
