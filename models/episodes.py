"""Episodes of PPO: answers that the policy samples, and what policy, reference, critic and reward model say of them.

Several processes sample and read a part each; then all have all episodes, so that whitening, statistics and the KL
controller are of the whole batch. Notation: B episodes (one answer each), T the longest answer; per-token tensors are
padded [B, T] beside a mask [B, T] that is True on answer tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.advantages import advantages_and_returns, kl_estimate, masked_mean, token_rewards, whiten
from models.critic import Critic, ValueHead
from models.distributed import everyone
from models.lora import disabled
from models.losses import log_probs
from models.ppo_options import PPOOptions
from models.ranks import ALONE, Ranks
from models.reward import RewardModel, score
from models.rollout import Answer, flatten, generate
from models.surrogate import rollout_weights
from models.transformer import Transformer


class Models(NamedTuple):
    """The networks of PPO: the policy and its critic learn, the reference and the reward model do not.

    critic: a network of its own, or a head on the policy. reference: the model to stay near; None for the policy itself
    without its LoRA updates.
    """

    policy: Transformer
    critic: Critic | ValueHead
    reference: Transformer | None
    reward: RewardModel


class Rollout(NamedTuple):
    """B episodes with what is known of them before the update; lists are per episode, tensors [B, T] or [B].

    correction: by what advantages were multiplied because another engine or precision had sampled; None for nothing.
    """

    prompts: list[list[int]]
    answers: list[Answer]
    mask: Tensor
    logp: Tensor
    ref_logp: Tensor
    values: Tensor
    scores: Tensor
    advantages: Tensor
    returns: Tensor
    correction: Tensor | None = None


class Reading(NamedTuple):
    """One answer of n tokens: log-probabilities by policy and reference, and values, [3, n]; and the reward model's r."""

    answer: Answer
    tokens: Tensor
    score: float


@torch.no_grad()
def roll_out(
    models: Models,
    prompts: list[list[int]],
    seeds: list[int],
    options: PPOOptions,
    beta: float,
    stop_id: int | Collection[int],
    ranks: Ranks = ALONE,
) -> Rollout:
    """Sample an answer for each prompt and work out rewards, advantages and returns. The policy's weights must be whole."""
    mine = ranks.part(range(len(prompts)))
    answers = generate(
        models.policy,
        [prompts[i] for i in mine],
        stop_id=stop_id,
        max_new_tokens=options.max_new_tokens,
        seeds=[seeds[i] for i in mine],
        temperature=options.temperature,
        width=options.rollout_width or len(mine),
    )
    parts = everyone(read(models, [prompts[i] for i in mine], answers, options))
    readings = [parts[i % ranks.size][i // ranks.size] for i in range(len(prompts))]

    device = models.policy.embedding.weight.device
    logp, ref_logp, values = (pad([r.tokens[k] for r in readings]).to(device) for k in range(3))
    mask = pad([torch.ones(r.tokens.shape[1], dtype=torch.bool) for r in readings]).to(device)
    scores = torch.tensor([r.score for r in readings], device=device)
    if options.reward == "probability":
        scores = models.reward.probability(scores)
    if options.missing_eos_penalty is not None:
        ended = torch.tensor([r.answer.finish_reason == "stop" for r in readings], device=device)
        scores = torch.where(ended, scores, torch.full_like(scores, options.missing_eos_penalty))
    rewards = token_rewards(scores, logp, ref_logp, mask, beta, options.kl_estimator)
    if options.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = advantages_and_returns(rewards, values, mask, options.gamma, options.gae_lambda)
    advantages, correction = whiten(advantages, mask), None
    if options.rollout_correction is not None:
        sampled = pad([torch.tensor(r.answer.logprobs) for r in readings]).to(device)
        correction = rollout_weights(logp, sampled, options.rollout_correction)
        advantages = advantages * correction  # the policy loss is linear in it
    answers = [r.answer for r in readings]
    return Rollout(prompts, answers, mask, logp, ref_logp, values, scores, advantages, returns, correction)


def read(models: Models, prompts: list[list[int]], answers: Sequence[Answer], options: PPOOptions) -> list[Reading]:
    """What the networks say of each answer.

    The old log-probabilities come from the training code, not the sampler: the ratio of the first minibatch is 1.
    """
    ids = [answer.ids for answer in answers]
    flat = flatten(prompts, ids, models.policy.embedding.weight.device)

    def hidden_of(model: Transformer) -> Tensor:
        return model(flat.tokens, flat.layout, flat.rows)

    def logp_of(model: Transformer, hidden: Tensor) -> Tensor:
        return log_probs(hidden, model.head_weight, flat.targets, options.temperature)

    hidden = hidden_of(models.policy)
    logp = logp_of(models.policy, hidden)
    shared = isinstance(models.critic, ValueHead)
    values = models.critic(hidden) if shared else models.critic(flat.tokens, flat.layout, flat.rows)
    if models.reference is None:
        with disabled(models.policy):
            ref_logp = logp_of(models.policy, hidden_of(models.policy))
    else:
        ref_logp = logp_of(models.reference, hidden_of(models.reference))
    scores = score(models.reward, prompts, ids)
    by_answer = torch.stack([logp, ref_logp, values]).cpu().split([len(a) for a in ids], dim=1)
    return [Reading(*each) for each in zip(answers, by_answer, scores, strict=True)]


def pad(rows: Sequence[Tensor]) -> Tensor:
    """B rows of [n] → [B, T], zeros behind."""
    return pad_sequence(list(rows), batch_first=True)


def statistics(rollout: Rollout, beta: float) -> dict[str, float]:
    """What a rollout tells: reward, KL per answer in nats (k1, and k3 which is never negative), length, ends."""
    log_ratio = (rollout.logp - rollout.ref_logp) * rollout.mask
    k3 = kl_estimate(rollout.logp, rollout.ref_logp, "k3") * rollout.mask
    returns, values = rollout.returns[rollout.mask], rollout.values[rollout.mask]
    variance = returns.var(correction=0)
    texts = {tuple(answer.ids) for answer in rollout.answers}
    correction = rollout.correction
    return {
        "reward/score": rollout.scores.mean().item(),
        "reward/score_std": rollout.scores.std(correction=min(1, len(rollout.scores) - 1)).item(),
        "objective/kl": log_ratio.sum(1).mean().item(),
        "objective/kl_k3": k3.sum(1).mean().item(),
        "objective/kl_coefficient": beta,
        "objective/entropy": -masked_mean(rollout.logp, rollout.mask).item(),
        "answer/tokens": rollout.mask.float().sum(1).mean().item(),
        "answer/ended": sum(a.finish_reason == "stop" for a in rollout.answers) / len(rollout.answers),
        "answer/distinct": len(texts) / len(rollout.answers),
        "critic/explained_variance": 1 - ((returns - values).var(correction=0) / variance.clamp_min(1e-8)).item(),
    } | ({} if correction is None else {"rollout/correction": masked_mean(correction, rollout.mask).item()})
