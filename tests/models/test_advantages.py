"""Rewards, advantages and the KL controller against numbers worked out by hand or by another way of computing."""

import math

import numpy as np
import pytest
import torch

from models.advantages import adapt_kl, advantages_and_returns, kl_estimate, token_rewards, whiten

MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_the_score_lands_on_the_last_answer_token_and_the_kl_on_each() -> None:
    logp = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, 9.0, 9.0]])
    ref = torch.tensor([[-1.5, -2.0, -2.0], [-3.0, 5.0, 5.0]])
    rewards = token_rewards(torch.tensor([10.0, 20.0]), logp, ref, MASK, beta=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.0, 10.1], [19.8, 0.0, 0.0]]))


def test_rewards_of_an_answer_sum_to_score_minus_beta_kl() -> None:
    g = torch.Generator().manual_seed(0)
    logp, ref, scores = torch.randn(2, 3, generator=g), torch.randn(2, 3, generator=g), torch.tensor([0.5, -0.25])
    rewards = token_rewards(scores, logp, ref, MASK, beta=0.3)
    kl = ((logp - ref) * MASK).sum(1)
    torch.testing.assert_close(rewards.sum(1), scores - 0.3 * kl)


def test_kl_estimates_by_hand_and_within_bounds() -> None:
    """x = ln 2: k1 = .693, k2 = .240, k3 = 1/2 − 1 + .693; x = −ln 2: k3 = 2 − 1 − .693; x = −90 counts as −20."""
    x = torch.tensor([math.log(2), -math.log(2), 0.0])
    zero = torch.zeros(3)
    torch.testing.assert_close(kl_estimate(x, zero, "k1"), torch.tensor([0.693147, -0.693147, 0.0]))
    torch.testing.assert_close(kl_estimate(x, zero, "k2"), torch.tensor([0.240227, 0.240227, 0.0]))
    torch.testing.assert_close(kl_estimate(x, zero, "k3"), torch.tensor([0.193147, 0.306853, 0.0]))
    far = torch.tensor([-90.0, 90.0])
    assert kl_estimate(far, torch.zeros(2), "k3").tolist() == pytest.approx([math.exp(20) - 21, 19.0])
    assert kl_estimate(far, torch.zeros(2), "k2").tolist() == [200.0, 200.0]
    small = torch.linspace(-1e-3, 1e-3, 2001)
    assert (kl_estimate(small, torch.zeros(2001), "k3") >= 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates_agree_with_the_sum_over_the_vocabulary(estimator: str) -> None:
    """k1 and k3 have the true KL as their mean; k2 has half the mean square."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    mean = (p * kl_estimate(p.log(), q.log(), estimator)).sum().item()
    true = sum(a * math.log(a / b) for a, b in ((0.5, 0.2), (0.3, 0.2), (0.2, 0.6)))
    half_square = sum(a * math.log(a / b) ** 2 / 2 for a, b in ((0.5, 0.2), (0.3, 0.2), (0.2, 0.6)))
    assert mean == pytest.approx(half_square if estimator == "k2" else true, abs=1e-6)


def test_rewards_of_an_answer_sum_to_score_minus_beta_kl_for_each_estimator() -> None:
    logp, ref = [[-1.0, -2.0, -0.5], [-3.0, 8.0, 8.0]], [[-1.5, -1.0, -0.5], [-2.0, 5.0, 1.0]]
    formulas = {"k1": lambda x: x, "k2": lambda x: x * x / 2, "k3": lambda x: math.exp(-x) - 1 + x}
    for estimator, formula in formulas.items():
        got = token_rewards(torch.tensor([4.0, 5.0]), torch.tensor(logp), torch.tensor(ref), MASK, 0.2, estimator)
        kl = [sum(formula(a - b) for a, b in zip(logp[i][:n], ref[i][:n], strict=True)) for i, n in ((0, 3), (1, 1))]
        assert got.sum(1).tolist() == pytest.approx([4.0 - 0.2 * kl[0], 5.0 - 0.2 * kl[1]])


def test_what_stands_in_the_padding_changes_nothing_nor_how_much_there_is() -> None:
    g = torch.Generator().manual_seed(4)
    lengths = [5, 2, 1, 4]
    mask = torch.tensor([[t < n for t in range(5)] for n in lengths])
    wide = torch.tensor([[t < n for t in range(9)] for n in lengths])
    first = {name: torch.randn(4, 5, generator=g) for name in ("logp", "ref", "values")}
    scores = torch.randn(4, generator=g)

    def outcome(x: dict[str, torch.Tensor], mask: torch.Tensor) -> list[torch.Tensor]:
        rewards = token_rewards(scores, x["logp"], x["ref"], mask, 0.3, "k3")
        advantages, returns = advantages_and_returns(rewards, x["values"], mask, 0.9, 0.8)
        return [y[mask] for y in (rewards, advantages, returns, whiten(advantages, mask), whiten(rewards, mask, False))]

    padded = {name: torch.full((4, 9), 1e6).masked_scatter(wide, x[mask]) for name, x in first.items()}
    for a, b in zip(outcome(first, mask), outcome(padded, wide), strict=True):
        torch.testing.assert_close(a, b)


def test_gae_equals_the_sum_of_discounted_errors() -> None:
    """A_t = Σ_l (γλ)^l δ_{t+l}, by loops in float64."""
    rng = np.random.default_rng(0)
    lengths, gamma, lam = [7, 1, 4], 0.93, 0.81
    rewards, values = rng.normal(size=(3, 7)), rng.normal(size=(3, 7))
    mask = torch.tensor([[t < n for t in range(7)] for n in lengths])
    got, returns = advantages_and_returns(torch.tensor(rewards * mask.numpy()), torch.tensor(values), mask, gamma, lam)
    for i, n in enumerate(lengths):
        for t in range(n):
            expected = 0.0
            for later in range(t, n):
                following = values[i, later + 1] if later + 1 < n else 0.0
                expected += (gamma * lam) ** (later - t) * (rewards[i, later] + gamma * following - values[i, later])
            assert got[i, t].item() == pytest.approx(expected)
            assert returns[i, t].item() == pytest.approx(expected + values[i, t])
    assert not got[~mask].any() and not returns[~mask].any()


def test_gae_by_hand() -> None:
    """γ = 0.5, λ = 0.5: δ = [1 + .5·2 − 1, 0 + .5·4 − 2, 3 − 4] = [1, 0, −1]; A₂ = −1, A₁ = −.25, A₀ = .9375."""
    rewards = torch.tensor([[1.0, 0.0, 3.0], [2.0, 0.0, 0.0]])
    values = torch.tensor([[1.0, 2.0, 4.0], [0.5, 7.0, 7.0]])
    advantages, returns = advantages_and_returns(rewards, values, MASK, gamma=0.5, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[0.9375, -0.25, -1.0], [1.5, 0.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[1.9375, 1.75, 3.0], [2.0, 0.0, 0.0]]))


def test_gae_without_discount_is_return_minus_value() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.1, 0.2, 0.3]])
    advantages, _ = advantages_and_returns(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=1.0)
    torch.testing.assert_close(advantages, torch.tensor([[6.0, 5.0, 3.0]]) - values)


def test_whitening_is_masked_and_can_keep_the_mean() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [6.0, 999.0, -999.0]])  # mean 3, variance (4 + 1 + 0 + 9)/4 = 3.5
    centred = whiten(x, MASK)
    torch.testing.assert_close(centred[MASK], torch.tensor([-2.0, -1.0, 0.0, 3.0]) / math.sqrt(3.5))
    kept = whiten(x, MASK, shift_mean=False)
    torch.testing.assert_close(kept[MASK], centred[MASK] + 3.0)
    assert not centred[~MASK].any()


def test_the_kl_controller_in_closed_form() -> None:
    assert adapt_kl(0.1, kl=6.6, target=6.0, episodes=64, horizon=640) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert adapt_kl(0.1, kl=60.0, target=6.0, episodes=64, horizon=640) == pytest.approx(0.1 * 1.02)
    assert adapt_kl(0.1, kl=-5.0, target=6.0, episodes=64, horizon=640) == pytest.approx(0.1 * 0.98)
