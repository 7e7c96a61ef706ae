"""Episodes, steps and whole iterations of PPO against numbers worked out by hand or by another way of computing."""

import copy
import csv
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from small_stages import Killed, make_workspace, run_stage

from models import episodes
from models.advantages import kl_estimate
from models.checkpoint import load_model, model_hash
from models.corpus import Sequences
from models.critic import Critic, ValueHead
from models.ema import Average
from models.episodes import Models, Rollout, pad, roll_out, statistics
from models.layout import dense_layout
from models.ppo import Batch, Updater
from models.ppo_options import PPOOptions
from models.ptx import add_ptx_gradient, check_ptx
from models.reward import RewardModel
from models.rollout import Answer, flatten, sequence_logprobs
from models.tokenizer import Tokenizer
from models.training import stream
from models.transformer import Transformer

MASK = torch.tensor([[True, True, True], [True, False, False]])


@pytest.fixture
def four(model: Transformer) -> Models:
    """Policy, critic, reference and reward model, the reference a copy of the policy."""
    copies = [Transformer(model.config) for _ in range(3)]
    for each in copies:
        each.load_state_dict(model.state_dict())
    heads = [RewardModel(c).initialize(torch.Generator().manual_seed(5)).eval() for c in copies[:2]]
    return Models(model, Critic(heads[0]), copies[2].eval(), heads[1])


PROMPTS = [[7, 8, 9], [30], [40, 41], [50, 51, 52, 53]]


def test_a_fresh_policy_has_no_kl_and_the_first_ratio_is_one(four: Models) -> None:
    options = PPOOptions(batch_size=4, max_new_tokens=10)
    rollout = roll_out(four, PROMPTS, [1, 2, 3, 4], options, beta=0.1, stop_id=2)
    assert statistics(rollout, 0.1)["objective/kl"] == 0.0
    assert statistics(rollout, 0.1)["objective/kl_k3"] == 0.0
    ids = [a.ids for a in rollout.answers]
    flat = flatten(PROMPTS, ids, "cpu")
    logp = torch.log_softmax(four.policy.logits(four.policy(flat.tokens, flat.layout)[flat.rows]), -1)
    again = pad(logp.gather(1, flat.targets[:, None])[:, 0].split([len(i) for i in ids]))
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
        ({"critic": "none"}, "critic must be own or shared, not none"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
        ({"rollout_correction": 0.5}, "rollout_correction must be at least 1"),
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


def gradients_of(models: Models, options: PPOOptions, rollout: Rollout) -> dict[str, torch.Tensor]:
    """What one step on the whole rollout finds, by the optimizers' first moments: a tenth of the gradient."""
    updater = updater_of(models, options)
    updater.update(rollout, 1, 0)
    found = {}
    for name, module, optimizer in (
        ("policy", models.policy, updater.policy_optimizer),
        ("critic", models.critic, updater.critic_optimizer),
    ):
        for key, p in module.named_parameters():
            found[f"{name}.{key}"] = optimizer.inner.state[p]["exp_avg"]
    return found


def copied(models: Models) -> Models:
    return Models(*(copy.deepcopy(m) for m in models))


@pytest.mark.parametrize("critic", ["own", "shared"])
def test_the_gradient_is_the_same_however_a_minibatch_is_cut(four: Models, critic: str) -> None:
    """Answers of 1 to 8 tokens: a mean of the parts' means would differ."""
    options = PPOOptions(
        batch_size=4, minibatches=1, epochs=1, max_new_tokens=8, ptx_coefficient=0, critic=critic, clip_norm=1e9,
        learning_rate=1e-12, critic_learning_rate=1e-12, reward="score",
    )  # fmt: skip
    models = four if critic == "own" else four._replace(critic=random_head(four.policy))
    rollout = roll_out(models, PROMPTS, [1, 2, 3, 4], options, beta=0.1, stop_id=range(2, 80))
    assert len({len(a.ids) for a in rollout.answers}) > 1
    whole = gradients_of(copied(models), options, rollout)
    for size in (1, 3):
        parts = gradients_of(copied(models), replace(options, micro_batch=size), rollout)
        for name, gradient in whole.items():
            torch.testing.assert_close(parts[name], gradient, atol=1e-6, rtol=1e-3, msg=f"{size}: {name}")


def random_head(policy: Transformer) -> ValueHead:
    head = ValueHead(policy)
    with torch.no_grad():
        head.linear.weight.normal_(generator=torch.Generator().manual_seed(3))
    return head


def test_the_step_has_the_gradient_of_the_plain_formula(four: Models) -> None:
    """Policy and critic by logits of everything and autograd, at a temperature, with ratios away from 1."""
    options = PPOOptions(
        batch_size=4, minibatches=1, epochs=1, max_new_tokens=8, ptx_coefficient=0, clip_norm=1e9, temperature=0.7,
        learning_rate=1e-12, critic_learning_rate=1e-12, reward="score",
    )  # fmt: skip
    rollout = roll_out(four, PROMPTS, [1, 2, 3, 4], options, beta=0.1, stop_id=2)
    moved = torch.randn(rollout.logp.shape, generator=torch.Generator().manual_seed(1)) * 0.2
    rollout = rollout._replace(logp=rollout.logp + moved, values=rollout.values + moved)
    found = gradients_of(four, options, rollout)
    total, value = torch.zeros(()), torch.zeros(())
    for i, (prompt, answer) in enumerate(zip(PROMPTS, rollout.answers, strict=True)):
        n, ids = len(answer.ids), torch.tensor([*prompt, *answer.ids])
        rows = slice(len(prompt) - 1, len(ids) - 1)
        hidden = four.policy(ids[:-1], dense_layout(1, len(ids) - 1))[rows]
        logp = torch.log_softmax(four.policy.logits(hidden) / 0.7, -1)[torch.arange(n), ids[len(prompt) :]]
        ratio, a = (logp - rollout.logp[i, :n]).exp(), rollout.advantages[i, :n]
        total = total - torch.minimum(a * ratio, a * ratio.clamp(0.8, 1.2)).sum()
        v = four.critic.head(four.critic.trunk(ids[:-1], dense_layout(1, len(ids) - 1)))[rows, 0]
        old, returns = rollout.values[i, :n], rollout.returns[i, :n]
        near = old + (v - old).clamp(-0.2, 0.2)
        value = value + torch.maximum((v - returns) ** 2, (near - returns) ** 2).sum() / 2
    count = int(rollout.mask.sum())
    four.policy.zero_grad()
    four.critic.zero_grad()
    ((total + value) / count).backward()
    for part, module in (("policy", four.policy), ("critic", four.critic)):
        for name, p in module.named_parameters():
            torch.testing.assert_close(found[f"{part}.{name}"], 0.1 * p.grad, atol=2e-6, rtol=1e-3, msg=name)


def test_a_shared_critic_starts_at_nothing_and_reads_the_policys_states(four: Models) -> None:
    options = PPOOptions(batch_size=4, max_new_tokens=8, critic="shared")
    head = ValueHead(four.policy)
    models = four._replace(critic=head)
    rollout = roll_out(models, PROMPTS, [1, 2, 3, 4], options, beta=0.1, stop_id=2)
    assert not rollout.values.any()
    with torch.no_grad():
        head.linear.weight[0, 5] = 2.0
        head.linear.bias.fill_(0.25)
    rollout = roll_out(models, PROMPTS, [1, 2, 3, 4], options, beta=0.1, stop_id=2)
    for i, (prompt, answer) in enumerate(zip(PROMPTS, rollout.answers, strict=True)):
        ids = torch.tensor([*prompt, *answer.ids])
        hidden = four.policy(ids[:-1], dense_layout(1, len(ids) - 1))[len(prompt) - 1 :]
        torch.testing.assert_close(rollout.values[i][rollout.mask[i]], 2 * hidden[:, 5] + 0.25, atol=1e-5, rtol=1e-5)


def test_a_shared_critics_loss_moves_the_policy_by_its_coefficient(four: Models) -> None:
    """Without advantages the policy's gradient is the value loss's alone, times the coefficient; the head's too."""
    options = PPOOptions(
        batch_size=4, minibatches=1, epochs=1, max_new_tokens=8, ptx_coefficient=0, critic="shared", clip_norm=1e9,
        learning_rate=1e-12, critic_learning_rate=1e-12, value_coefficient=0.3,
    )  # fmt: skip
    models = four._replace(critic=random_head(four.policy))
    rollout = roll_out(models, PROMPTS, [1, 2, 3, 4], options, beta=0.1, stop_id=2)
    rollout = rollout._replace(advantages=torch.zeros_like(rollout.advantages))
    found = gradients_of(models, options, rollout)
    flat = flatten(PROMPTS, [a.ids for a in rollout.answers], "cpu")
    values = models.critic.linear(four.policy(flat.tokens, flat.layout)[flat.rows])[:, 0]
    models.critic.zero_grad()
    four.policy.zero_grad()
    (0.3 * 0.5 * (values - rollout.returns[rollout.mask]).square().mean()).backward()
    for part, module in (("policy", four.policy), ("critic", models.critic)):
        for name, p in module.named_parameters():
            torch.testing.assert_close(found[f"{part}.{name}"], 0.1 * p.grad, atol=1e-6, rtol=1e-3, msg=name)


def test_answers_of_another_sampler_weigh_what_the_trainer_thinks_of_them(
    four: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sampler says it was half as sure of its first token, a tenth as sure of the last: weights 2 and the cap of 3."""
    plain = PPOOptions(batch_size=4, max_new_tokens=6, reward="score")
    sampler = episodes.generate

    def other(*args: object, **kwargs: object) -> list[Answer]:
        made = sampler(*args, **kwargs)
        changes = [[math.log(2), *[0.0] * (len(a.ids) - 2), math.log(10)] for a in made]
        return [
            replace(a, logprobs=[p - c for p, c in zip(a.logprobs, change, strict=True)])
            for a, change in zip(made, changes, strict=True)
        ]

    expected = roll_out(four, PROMPTS, [1, 2, 3, 4], plain, beta=0.1, stop_id=2)
    monkeypatch.setattr(episodes, "generate", other)
    unweighted = roll_out(four, PROMPTS, [1, 2, 3, 4], plain, beta=0.1, stop_id=2)
    torch.testing.assert_close(unweighted.advantages, expected.advantages)
    got = roll_out(four, PROMPTS, [1, 2, 3, 4], replace(plain, rollout_correction=3.0), beta=0.1, stop_id=2)
    torch.testing.assert_close(got.logp, expected.logp)  # the trainer's own, whatever the sampler says
    torch.testing.assert_close(got.returns, expected.returns)
    for i, answer in enumerate(got.answers):
        n = len(answer.ids)
        weights = torch.tensor([2.0, *[1.0] * (n - 2), 3.0])
        torch.testing.assert_close(got.advantages[i, :n], expected.advantages[i, :n] * weights, atol=1e-4, rtol=1e-4)
    lengths = [len(a.ids) for a in got.answers]
    mean = sum(2 + (n - 2) + 3 for n in lengths) / sum(lengths)
    assert statistics(got, 0.1)["rollout/correction"] == pytest.approx(mean, rel=1e-4)


def test_the_largest_batch_is_tried_before_the_first_step(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_workspace(tmp_path, model, tokenizer)
    _, events = run_stage(tmp_path, "ppo", tmp_path / "good", {"ppo": RUN | {"iterations": 1}})
    assert [e["event"] for e in events] == ["estimate", "metrics"]
    assert events[0]["seconds"] >= 0 and events[0]["memory"] > 10**7
    seen = []
    real = Updater.policy_loss

    def too_much(self: Updater, batch: Batch) -> object:
        seen.append(batch)
        if len(seen) == 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return real(self, batch)

    monkeypatch.setattr(Updater, "policy_loss", too_much)
    longest = int(np.diff(Sequences.load(tmp_path / "artifacts/tokenize/prompts.train.npz").offsets).max())
    message = f"ppo: a batch of 3 prompts of {longest} tokens with answers of 6 with a model of .* set ppo.micro_batch"
    with pytest.raises(MemoryError, match=message):
        run_stage(tmp_path, "ppo", tmp_path / "bad", {"ppo": RUN | {"micro_batch": 3}})
    assert len(seen[0].flat.tokens) == 3 * (longest + 5)
    assert not list((tmp_path / "bad/output").iterdir())
