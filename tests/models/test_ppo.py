"""The formulas of PPO, and whole iterations of it, against numbers worked out by hand or by another way of computing."""

import csv
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from small_stages import Killed, make_workspace, run_stage

from models.checkpoint import load_model, model_hash
from models.corpus import Sequences
from models.ema import Average
from models.layout import dense_layout
from models.ppo import (
    Models,
    PPOOptions,
    Rollout,
    Updater,
    adapt_kl,
    advantages_and_returns,
    kl_estimate,
    pad,
    policy_loss,
    roll_out,
    statistics,
    token_rewards,
    value_loss,
    whiten,
)
from models.ptx import add_ptx_gradient, check_ptx
from models.reward import RewardModel
from models.rollout import Answer, flatten, sequence_logprobs
from models.tokenizer import Tokenizer
from models.training import stream
from models.transformer import Transformer

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


def test_policy_loss_takes_the_worse_of_both() -> None:
    """ρ = [1.5, 1.5, .5, .5], A = [1, −1, 1, −1], ε = .2 → [−1.2, 1.5, −.5, .8], mean .15."""
    logp = torch.tensor([1.5, 1.5, 0.5, 0.5]).log()
    loss, stats = policy_loss(logp, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2)
    assert loss.item() == pytest.approx(0.15)
    assert stats["policy/clip_fraction"] == 1.0


def test_dual_clip_bounds_what_a_bad_answer_costs() -> None:
    """ρ = 10: A = −1 costs 10 without it and c = 3 with it; A = 1 is clipped at 1.2 as before; ρ = 2, A = −1 stays 2."""
    logp = torch.tensor([10.0, 10.0, 2.0]).log()
    advantages = torch.tensor([-1.0, 1.0, -1.0])
    assert policy_loss(logp, torch.zeros(3), advantages, 0.2)[0].item() == pytest.approx((10 - 1.2 + 2) / 3)
    assert policy_loss(logp, torch.zeros(3), advantages, 0.2, 3.0)[0].item() == pytest.approx((3 - 1.2 + 2) / 3)
    logp.requires_grad_()
    policy_loss(logp, torch.zeros(3), advantages, 0.2, 3.0)[0].backward()
    assert logp.grad.tolist() == pytest.approx([0.0, 0.0, 2 / 3])


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


def whole_rollout(logp: torch.Tensor, ref: torch.Tensor, answers: list[Answer]) -> Rollout:
    """A rollout whose policy and reference said this; the padding holds what must not be read."""
    zeros = torch.zeros(2, 3)
    return Rollout([[1], [2]], answers, MASK, logp, ref, zeros, torch.tensor([1.0, 4.0]), zeros, zeros)


def test_statistics_are_of_answer_tokens_and_kl_is_per_answer() -> None:
    """Bugs of others: entropy over the padding; KL per token given to a controller that counts answers; KL cut at 0."""
    logp = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 99.0, 99.0]])
    ref = torch.tensor([[-1.5, -1.0, -2.0], [-3.0, -99.0, -99.0]])
    answers = [Answer([5, 6, 7], [], "length"), Answer([2], [], "stop")]
    row = statistics(whole_rollout(logp, ref, answers), 0.1)
    assert row["objective/entropy"] == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert row["objective/kl"] == pytest.approx(((0.5 - 1 - 1) + (-1)) / 2)
    k3 = [math.exp(-x) - 1 + x for x in (0.5, -1.0, -1.0, -1.0)]
    assert row["objective/kl_k3"] == pytest.approx(sum(k3) / 2, rel=1e-5)
    assert (row["answer/tokens"], row["answer/ended"], row["reward/score"]) == (2.0, 0.5, 2.5)


def test_statistics_of_a_single_answer_are_finite() -> None:
    one = Rollout([[1]], [Answer([2], [], "stop")], *(torch.ones(1, 1, dtype=torch.bool), *[torch.ones(1, 1)] * 3),
                  torch.tensor([1.0]), torch.ones(1, 1), torch.ones(1, 1))  # fmt: skip
    assert all(math.isfinite(value) for value in statistics(one, 0.1).values())


def updater_of(models: Models, options: PPOOptions, context: int = 48) -> Updater:
    """With one window of text and one conversation, so that it is known what is drawn."""
    tokens = np.arange(6, 6 + context + 1, dtype=np.uint16)
    chats = Sequences(np.array([3, 9, 8, 4, 20, 21, 2]), np.array([0, 0, 0, 0, 1, 1, 1], bool), np.array([0, 7]))
    return Updater(models, options, tokens, chats)


def test_the_first_minibatch_has_ratio_one_and_later_ones_are_against_the_policy_that_answered(four: Models) -> None:
    """Bugs of others: dropout while the old log-probabilities are taken; old ones taken again in each epoch."""
    options = PPOOptions(batch_size=4, minibatches=1, epochs=1, max_new_tokens=8, ptx_coefficient=0.0)
    rollout = roll_out(four, PROMPTS, [1, 2, 3, 4], options, beta=0.1, stop_id=2)
    kept = rollout.logp.clone()
    updater = updater_of(four, options)
    first = updater.update(rollout, 1, 0)
    assert first["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert first["policy/approx_kl"] < 1e-10
    assert first["policy/clip_fraction"] == 0
    now = sequence_logprobs(four.policy, PROMPTS, [a.ids for a in rollout.answers])
    moved = [new - old for i, row in enumerate(now) for new, old in zip(row, kept[i].tolist()[: len(row)], strict=True)]
    second = updater.update(rollout, 1, 1)
    assert second["policy/approx_kl"] == pytest.approx(sum(x * x for x in moved) / len(moved) / 2, rel=1e-3)
    assert second["policy/ratio_max"] == pytest.approx(math.exp(max(moved)), rel=1e-4)
    assert torch.equal(rollout.logp, kept)


def test_training_mode_draws_nothing_at_random(model: Transformer) -> None:
    tokens = torch.tensor([5, 6, 7, 8])
    assert torch.equal(model.train()(tokens, dense_layout(1, 4)), model.eval()(tokens, dense_layout(1, 4)))


def test_ids_are_trained_as_they_were_sampled_and_with_their_probability(four: Models, tokenizer: Tokenizer) -> None:
    """Bugs of others: ids → text → ids gives other ids; log-probabilities of another distribution than the sampled."""
    options = PPOOptions(batch_size=4, max_new_tokens=10, temperature=0.7)
    rollout = roll_out(four, PROMPTS, [1, 2, 3, 4], options, beta=0.1, stop_id=2)
    assert any(tokenizer.encode(tokenizer.decode(a.ids, skip_special=False)) != a.ids for a in rollout.answers)
    for i, answer in enumerate(rollout.answers):
        assert rollout.logp[i][rollout.mask[i]].tolist() == pytest.approx(answer.logprobs, abs=1e-5)
        assert int(rollout.mask[i].sum()) == len(answer.ids), "nothing counts after the last token"


def test_the_score_lands_on_the_last_sampled_token_of_ended_and_of_cut_answers(four: Models) -> None:
    """With β = 0 and γ = λ = 1 every return is the score; whitened advantages in it would have mean 0."""
    options = PPOOptions(batch_size=32, max_new_tokens=6, reward="score", gae_lambda=1.0)
    rollout = roll_out(four, PROMPTS * 8, list(range(32)), options, beta=0.0, stop_id=2)
    with torch.no_grad():
        four.policy.embedding.weight[2] *= 3  # so that some answers end
    ended = roll_out(four, PROMPTS * 8, list(range(32)), options, beta=0.0, stop_id=2)
    reasons = {a.finish_reason for r in (rollout, ended) for a in r.answers}
    assert reasons == {"stop", "length"}
    for made in (rollout, ended):
        for i in range(32):
            returns = made.returns[i][made.mask[i]]
            torch.testing.assert_close(returns, made.scores[i].expand(len(returns)), atol=1e-5, rtol=1e-5)


def test_a_policy_that_moved_has_a_positive_kl(four: Models) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in four.policy.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    options = PPOOptions(batch_size=64, max_new_tokens=12)
    rollout = roll_out(four, PROMPTS * 16, list(range(64)), options, beta=0.1, stop_id=2)
    row = statistics(rollout, 0.1)
    assert row["objective/kl"] > 0.05
    assert row["objective/kl_k3"] == pytest.approx(row["objective/kl"], rel=0.5)
    assert (kl_estimate(rollout.logp, rollout.ref_logp, "k3") >= 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_estimator_that_was_asked_for_is_in_the_reward(four: Models, estimator: str) -> None:
    """With γ = λ = 1 the return at the first token is score − β·ΣKL."""
    with torch.no_grad():
        for p in four.policy.parameters():
            p.mul_(1.1)
    options = PPOOptions(batch_size=4, max_new_tokens=8, gae_lambda=1.0, kl_estimator=estimator)
    rollout = roll_out(four, PROMPTS, [1, 2, 3, 4], options, beta=0.5, stop_id=2)
    formula = {"k1": lambda x: x, "k2": lambda x: x * x / 2, "k3": lambda x: math.exp(-x) - 1 + x}[estimator]
    for i, answer in enumerate(rollout.answers):
        x = (rollout.logp[i] - rollout.ref_logp[i]).tolist()[: len(answer.ids)]
        expected = rollout.scores[i].item() - 0.5 * sum(formula(value) for value in x)
        assert rollout.returns[i, 0].item() == pytest.approx(expected, abs=1e-3)


def test_ptx_adds_its_gradient_to_the_same_buffer_times_its_coefficient(four: Models) -> None:
    options = PPOOptions(batch_size=4, ptx_coefficient=0.3, ptx_batch_size=2, ptx_conversations=3)
    updater = updater_of(four, options)
    policy = four.policy
    before = {name: torch.full_like(p, 0.5) for name, p in policy.named_parameters()}
    for name, p in policy.named_parameters():
        p.grad = before[name].clone()
    add_ptx_gradient(four.policy, updater.tokens, updater.chats, updater.options, stream(1, "ptx", 0))
    got = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    window, chat = torch.arange(6, 6 + 49), torch.tensor([3, 9, 8, 4, 20, 21, 2])
    text = torch.nn.functional.cross_entropy(policy.logits(policy(window[:-1], dense_layout(1, 48))), window[1:])
    answer = policy.logits(policy(chat[:-1], dense_layout(1, 6)))[3:]  # 20, 21 and the stop token are learned
    (text + torch.nn.functional.cross_entropy(answer, chat[4:])).backward()
    for name, p in policy.named_parameters():
        torch.testing.assert_close(got[name], before[name] + 0.3 * p.grad, atol=1e-5, rtol=1e-4)


def test_the_moving_average_in_closed_form() -> None:
    """decay .5 from 1 over 3 and 7: 1 → 2 → 4.5; what does not learn is not averaged."""
    layer = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(layer.weight, 1.0)
    layer.bias.requires_grad_(False)
    average = Average(layer, 0.5)
    for value in (3.0, 7.0):
        torch.nn.init.constant_(layer.weight, value)
        average.update()
    other = Average(layer, 0.5)
    other.load_state_dict(average.state_dict())
    other.apply()
    assert layer.weight.item() == 4.5
    assert len(average.means) == 1


def test_a_step_whose_gradient_is_not_finite_is_dropped_and_counted(four: Models) -> None:
    options = PPOOptions(batch_size=4, minibatches=1, epochs=1, max_new_tokens=4, ptx_coefficient=0, ema_decay=0.5)
    rollout = roll_out(four, PROMPTS, [1, 2, 3, 4], options, beta=0.1, stop_id=2)
    updater = updater_of(four, options)
    updater.update(rollout, 1, 0)
    assert updater.skipped == 0
    weights, means = ([p.clone() for p in part] for part in (four.policy.parameters(), updater.average.means))
    updater.update(rollout._replace(advantages=rollout.advantages * math.nan), 1, 1)
    assert updater.skipped == 1, "the policy's step; the critic's is sound"
    assert all(torch.equal(a, b) for a, b in zip(weights, four.policy.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(means, updater.average.means, strict=True))
    assert not torch.equal(means[0], weights[0])


def test_options_that_make_no_sense_are_refused() -> None:
    good = PPOOptions()
    for bad, message in (
        ({"kl_estimator": "k4"}, "kl_estimator must be one of k1, k2, k3, not k4"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1"),
        ({"ema_decay": 1.0}, "ema_decay must be between 0 and 1"),
        ({"gamma": 1.01}, "gamma must be between 0 and 1"),
        ({"clip_range": 0.0}, "clip_range must be above 0"),
        ({"ptx_coefficient": -1.0}, "ptx_coefficient must not be negative"),
        ({"kl_target": 6.0, "kl_horizon": 19}, "kl_horizon 19 must be at least batch_size 96"),
        ({"kl_target": 6.0, "kl_coefficient": 0.0}, "kl_coefficient above 0 to start from"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(good, **bad)


def test_too_little_text_for_ptx_is_told_with_the_remedy() -> None:
    check_ptx("ppo", PPOOptions(), tokens=49, conversations=1, window=48)
    check_ptx("ppo", PPOOptions(ptx_batch_size=0, ptx_conversations=0), tokens=0, conversations=0, window=48)
    with pytest.raises(ValueError, match="windows of 49 tokens of pretraining text, there are 48: set it to 0"):
        check_ptx("ppo", PPOOptions(), tokens=48, conversations=1, window=48)
    with pytest.raises(ValueError, match="SFT conversations, there are none"):
        check_ptx("ppo", PPOOptions(), tokens=99, conversations=0, window=48)


RUN = {"iterations": 5, "batch_size": 8, "max_new_tokens": 6, "checkpoint_every": 2, "ptx_conversations": 4}


def rows_of(output: Path) -> list[dict[str, float]]:
    with (output / "curves.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def test_the_controller_moves_the_coefficient_by_the_kl_per_answer(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Bugs of others: a controller that is never called, or is given the KL per token. And a resumed one goes on."""
    make_workspace(tmp_path, model, tokenizer)
    params = {"ppo": RUN | {"kl_target": 2.0, "kl_horizon": 40, "kl_coefficient": 0.1, "learning_rate": 0.01}}
    whole, _ = run_stage(tmp_path, "ppo", tmp_path / "whole", params)
    rows = rows_of(whole)
    assert rows[0]["objective/kl_coefficient"] == 0.1
    for now, later in pairwise(rows):
        error = max(-0.2, min(0.2, now["objective/kl"] / 2.0 - 1))
        expected = now["objective/kl_coefficient"] * (1 + error * 8 / 40)
        assert later["objective/kl_coefficient"] == pytest.approx(expected, rel=1e-4)
    assert rows[1]["objective/kl_coefficient"] == pytest.approx(0.1 * 0.96, rel=1e-4), "no KL at the start"
    assert any(row["objective/kl"] > 2.0 > row["objective/kl"] / row["answer/tokens"] for row in rows[:-1])
    with pytest.raises(Killed):
        run_stage(tmp_path, "ppo", tmp_path / "again", params, killed_after=3)
    again, _ = run_stage(tmp_path, "ppo", tmp_path / "again", params)
    assert model_hash(again / "model") == model_hash(whole / "model")


def test_what_is_saved_with_ema_is_the_average(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """At a decay of almost 0 that is the last weights, of almost 1 the first; a killed run ends with the same."""
    make_workspace(tmp_path, model, tokenizer)
    last, _ = run_stage(tmp_path, "ppo", tmp_path / "last", {"ppo": RUN})
    low, _ = run_stage(tmp_path, "ppo", tmp_path / "low", {"ppo": RUN | {"ema_decay": 1e-12}})
    assert model_hash(low / "model") == model_hash(last / "model")
    high, _ = run_stage(tmp_path, "ppo", tmp_path / "high", {"ppo": RUN | {"ema_decay": 1 - 1e-7}})
    first, kept = model.embedding.weight, load_model(high / "model").embedding.weight
    moved = (load_model(last / "model").embedding.weight - first).abs().max()
    assert (kept - first).abs().max() < 1e-4 * moved
    params = {"ppo": RUN | {"ema_decay": 0.8}}
    whole, _ = run_stage(tmp_path, "ppo", tmp_path / "whole", params)
    with pytest.raises(Killed):
        run_stage(tmp_path, "ppo", tmp_path / "again", params, killed_after=3)
    again, _ = run_stage(tmp_path, "ppo", tmp_path / "again", params)
    assert model_hash(again / "model") == model_hash(whole / "model") != model_hash(last / "model")
