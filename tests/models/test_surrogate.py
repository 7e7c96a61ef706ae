"""PPO's clipped losses against numbers worked out by hand."""

import math

import pytest
import torch

from models.surrogate import policy_losses, ratio_statistics, rollout_weights, value_losses


def test_policy_loss_takes_the_worse_of_both() -> None:
    """ρ = [1.5, 1.5, .5, .5], A = [1, −1, 1, −1], ε = .2 → [−1.2, 1.5, −.5, .8]."""
    logp = torch.tensor([1.5, 1.5, 0.5, 0.5]).log()
    losses = policy_losses(logp, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2)
    assert losses.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8])
    watched = ratio_statistics(logp, torch.zeros(4), 0.2)
    assert watched["policy/clip_fraction"].tolist() == [1, 1, 1, 1]
    assert watched["policy/approx_kl"].tolist() == pytest.approx([0.0822, 0.0822, 0.2402, 0.2402], abs=1e-4)
    assert watched["policy/ratio_max"].item() == pytest.approx(1.5)


def test_dual_clip_bounds_what_a_bad_answer_costs() -> None:
    """ρ = 10: A = −1 costs 10 without it and c = 3 with it; A = 1 is clipped at 1.2 as before; ρ = 2, A = −1 stays 2."""
    logp = torch.tensor([10.0, 10.0, 2.0]).log()
    advantages = torch.tensor([-1.0, 1.0, -1.0])
    assert policy_losses(logp, torch.zeros(3), advantages, 0.2).tolist() == pytest.approx([10, -1.2, 2])
    assert policy_losses(logp, torch.zeros(3), advantages, 0.2, 3.0).tolist() == pytest.approx([3, -1.2, 2])
    logp.requires_grad_()
    policy_losses(logp, torch.zeros(3), advantages, 0.2, 3.0).sum().backward()
    assert logp.grad.tolist() == pytest.approx([0.0, 0.0, 2.0])


def test_value_loss_takes_the_larger_of_both() -> None:
    """V = 2, V_old = 1, ε = .2 → clipped 1.2; R = 2.5: max(.25, 1.69)/2; R = 1: max(1, .04)/2."""
    losses = value_losses(torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0]), torch.tensor([2.5, 1.0]), 0.2)
    assert losses.tolist() == pytest.approx([1.69 / 2, 1.0 / 2])


def test_the_correction_of_a_rollout_by_hand() -> None:
    """π_old/π_rollout = [e^.5, 1, 3] with C = 2 → [1.6487, 1, 2]."""
    old, sampled = torch.tensor([-0.5, -2.0, math.log(0.6)]), torch.tensor([-1.0, -2.0, math.log(0.2)])
    assert rollout_weights(old, sampled, 2.0).tolist() == pytest.approx([1.6487, 1.0, 2.0], abs=1e-4)
