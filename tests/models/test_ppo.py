"""The formulas of PPO against numbers worked out by hand or by another way of computing."""

import math

import pytest
import torch

from models.ppo import (
    Models,
    PPOOptions,
    adapt_kl,
    advantages_and_returns,
    pad,
    policy_loss,
    roll_out,
    statistics,
    token_rewards,
    value_loss,
    whiten,
)
from models.reward import RewardModel
from models.rollout import flatten
from models.transformer import Transformer, dense_layout, packed_layout

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


def test_policy_loss_takes_the_worse_of_both() -> None:
    """ρ = [1.5, 1.5, .5, .5], A = [1, −1, 1, −1], ε = .2 → [−1.2, 1.5, −.5, .8], mean .15."""
    logp = torch.tensor([1.5, 1.5, 0.5, 0.5]).log()
    loss, stats = policy_loss(logp, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2)
    assert loss.item() == pytest.approx(0.15)
    assert stats["policy/clip_fraction"] == 1.0


def test_value_loss_takes_the_larger_of_both() -> None:
    """V = 2, V_old = 1, ε = .2 → clipped 1.2; R = 2.5: max(.25, 1.69)/2; R = 1: max(1, .04)/2."""
    loss = value_loss(torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0]), torch.tensor([2.5, 1.0]), 0.2)
    assert loss.item() == pytest.approx((1.69 + 1.0) / 4)


def test_the_kl_controller_in_closed_form() -> None:
    assert adapt_kl(0.1, kl=6.6, target=6.0, episodes=64, horizon=640) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert adapt_kl(0.1, kl=60.0, target=6.0, episodes=64, horizon=640) == pytest.approx(0.1 * 1.02)
    assert adapt_kl(0.1, kl=-5.0, target=6.0, episodes=64, horizon=640) == pytest.approx(0.1 * 0.98)


@pytest.fixture
def four(model: Transformer) -> Models:
    """Policy, critic, reference and reward model, the reference a copy of the policy."""
    copies = [Transformer(model.config) for _ in range(3)]
    for copy in copies:
        copy.load_state_dict(model.state_dict())
    heads = [RewardModel(c).initialize(torch.Generator().manual_seed(5)).eval() for c in copies[:2]]
    return Models(model, heads[0], copies[2].eval(), heads[1])


PROMPTS = [[7, 8, 9], [30], [40, 41], [50, 51, 52, 53]]


def test_a_fresh_policy_has_no_kl_and_the_first_ratio_is_one(four: Models) -> None:
    options = PPOOptions(batch_size=4, max_new_tokens=10)
    rollout = roll_out(four, PROMPTS, [1, 2, 3, 4], options, beta=0.1, stop_id=2)
    assert statistics(rollout, 0.1)["objective/kl"] == 0.0
    assert statistics(rollout, 0.1)["objective/kl_k3"] == 0.0
    ids = [a.ids for a in rollout.answers]
    flat = flatten(PROMPTS, ids, "cpu")
    logp = torch.log_softmax(four.policy.logits(four.policy(flat.tokens, flat.layout)[flat.rows]), -1)
    again = pad(logp.gather(1, flat.targets[:, None])[:, 0], [len(i) for i in ids])
    torch.testing.assert_close(again[rollout.mask], rollout.logp[rollout.mask], atol=1e-5, rtol=0)
    advantages = rollout.advantages[rollout.mask]
    assert advantages.mean().item() == pytest.approx(0, abs=1e-5)
    assert advantages.var(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_an_answer_that_did_not_end_gets_the_penalty_instead_of_its_score(four: Models) -> None:
    options = PPOOptions(batch_size=4, max_new_tokens=3, missing_eos_penalty=-7.0)
    rollout = roll_out(four, PROMPTS, [1, 2, 3, 4], options, beta=0.0, stop_id=2)
    cut = [a.finish_reason == "length" for a in rollout.answers]
    assert any(cut)
    assert all((s == -7.0) == c for s, c in zip(rollout.scores.tolist(), cut, strict=True))


def test_values_and_scores_read_the_same_head_at_different_tokens(four: Models) -> None:
    """The value of a state is read before its token; the score at the last token itself."""
    options = PPOOptions(batch_size=4, max_new_tokens=6, reward="score")
    rollout = roll_out(four, PROMPTS, [1, 2, 3, 4], options, beta=0.0, stop_id=2)
    for i, (prompt, answer) in enumerate(zip(PROMPTS, rollout.answers, strict=True)):
        whole = torch.tensor([*prompt, *answer.ids])
        read = four.reward(whole, dense_layout(1, len(whole)))
        assert read[-1].item() == pytest.approx(rollout.scores[i].item(), abs=1e-5)
        values = rollout.values[i][rollout.mask[i]]
        torch.testing.assert_close(values, read[len(prompt) - 1 : -1], atol=1e-5, rtol=1e-5)


def test_gradient_of_a_batch_equals_that_of_its_parts(model: Transformer) -> None:
    from models.sft import Batch, sft_loss

    rows = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]

    def batch(sequences: list[list[int]]) -> Batch:
        tokens = torch.tensor([t for s in sequences for t in s[:-1]])
        layout = packed_layout([len(s) - 1 for s in sequences])
        targets = torch.tensor([t for s in sequences for t in s[1:]])
        return Batch(tokens, layout, torch.arange(len(tokens)), targets)

    sft_loss(model, batch(rows), 6).backward()
    whole = model.embedding.weight.grad.clone()
    model.zero_grad()
    for row in rows:
        sft_loss(model, batch([row]), 6).backward()  # the count of the whole step, not each part's own
    torch.testing.assert_close(model.embedding.weight.grad, whole, atol=1e-6, rtol=1e-4)
