"""PPO with a KL term against the SFT model, as in Ziegler et al. 2019, Stiennon et al. 2020 and InstructGPT.

Notation: B episodes (one answer each), T the longest answer, A answer tokens of all episodes end to end. Per-token
tensors are padded [B, T] beside a mask [B, T] that is True on answer tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.checkpoint import load_model, read_config, save_model
from models.corpus import Sequences
from models.ema import Average
from models.job import Job
from models.lora import Learned, LoraOptions, disabled, save_adapter, what_learns
from models.losses import log_probs
from models.optim import Optimizer, learning_rate
from models.ptx import PtxOptions, add_ptx_gradient, check_ptx
from models.reward import RewardModel, load_reward_model, score
from models.rollout import Answer, flatten, generate
from models.tokenizer import Tokenizer
from models.training import Stateful, Training, stream, torch_generator
from models.transformer import Transformer

KL_ESTIMATORS = ("k1", "k2", "k3")
LARGEST_LOG_RATIO = 20.0  # in k2 and k3: past it one token would drown all others, and soon overflow


@dataclass(frozen=True)
class PPOOptions(PtxOptions):
    """Section `ppo` of params.yaml. Lengths in tokens, KL in nats an answer.

    reward: "score" is the reward model's r as it is; "probability" is its probability of a thumb up, which saturates, so
    that an answer is not chased for being rated ever higher (a bounded reward hinders reward hacking: Fu et al. 2025).
    kl_estimator: k1, k2 or k3 (see kl_estimate) in the reward. dual_clip: no step counts a bad answer more than this many
    times its advantage (Ye et al. 2020; 3 is usual), null for no bound. ema_decay: what is saved is the moving average of
    the policy over its steps (InstructGPT: 0.992), null for the last weights. missing_eos_penalty: the score of an answer
    that did not end by itself, in place of the reward model's; null leaves that.
    """

    iterations: int = 20
    batch_size: int = 96
    minibatches: int = 2
    epochs: int = 2
    max_new_tokens: int = 32
    temperature: float = 1.0
    learning_rate: float = 6e-4
    critic_learning_rate: float = 1e-3
    warmup_steps: int = 4
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    gamma: float = 1.0
    gae_lambda: float = 0.95
    dual_clip: float | None = None
    kl_coefficient: float = 0.06
    kl_estimator: str = "k1"
    kl_target: float | None = None
    kl_horizon: int = 2000
    reward: str = "probability"
    whiten_rewards: bool = False
    missing_eos_penalty: float | None = None
    ema_decay: float | None = None
    clip_norm: float = 1.0
    checkpoint_every: int = 4
    log_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least_one("iterations", "batch_size", "minibatches", "epochs", "max_new_tokens")
        if self.reward not in ("score", "probability"):
            raise ValueError(f"reward must be score or probability, not {self.reward}")
        if self.batch_size % self.minibatches:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of minibatches {self.minibatches}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        for name in ("critic_learning_rate", "clip_range", "value_clip_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, not {getattr(self, name)}")
        self.not_negative("kl_coefficient")
        if self.kl_estimator not in KL_ESTIMATORS:
            raise ValueError(f"kl_estimator must be one of {', '.join(KL_ESTIMATORS)}, not {self.kl_estimator}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be above 1, or null: {self.dual_clip}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be between 0 and 1, or null: {self.ema_decay}")
        if self.kl_target is not None:
            self._check_controller(self.kl_target)

    def _check_controller(self, target: float) -> None:
        if not target > 0:
            raise ValueError(f"kl_target must be above 0 nats an answer, or null: {target}")
        if not self.kl_coefficient > 0:
            raise ValueError("kl_target needs a kl_coefficient above 0 to start from")
        if self.kl_horizon < self.batch_size:
            raise ValueError(
                f"kl_horizon {self.kl_horizon} must be at least batch_size {self.batch_size} episodes: the coefficient "
                "would change by more than a fifth at once"
            )


# -- the formulas ------------------------------------------------------------------------------------------------------


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the True places of mask."""
    return (x * mask).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x − μ)/sqrt(σ² + 1e-8) over the mask; with shift_mean=False the mean is put back, as Ziegler does for rewards."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    out = (x - mean) * (variance + 1e-8).rsqrt()
    return (out if shift_mean else out + mean) * mask


def kl_estimate(logp: Tensor, ref_logp: Tensor, estimator: str) -> Tensor:
    """KL(π‖π_ref) estimated at each sampled token from x = log π − log π_ref (Schulman 2020), any shape.

    k1 = x: unbiased, below 0 as often as a sample is more likely under π_ref; k2 = x²/2: biased, of low variance;
    k3 = e^(−x) − 1 + x: unbiased and never below 0. k2 and k3 take x within ±20.
    """
    x = logp - ref_logp
    if estimator == "k1":
        return x
    x = x.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return 0.5 * x.square() if estimator == "k2" else (torch.expm1(-x) + x).clamp_min(0.0)  # by rounding


def token_rewards(
    scores: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float, estimator: str = "k1"
) -> Tensor:
    """r_t = −β·KL_t of π_old to π_ref, and the score on the last answer token: scores [B], the rest [B, T] → [B, T]."""
    rewards = -beta * kl_estimate(logp, ref_logp, estimator) * mask
    last = mask.long().sum(1) - 1
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """GAE (Schulman et al. 2016): δ_t = r_t + γV_{t+1} − V_t, A_t = δ_t + γλA_{t+1}, V = 0 after the last answer token;
    returns R_t = A_t + V_t, of advantages before whitening. All [B, T]."""
    advantages = torch.zeros_like(rewards)
    later = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(later)
    for t in range(rewards.shape[1] - 1, -1, -1):
        here = mask[:, t].float()
        later = (rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * later) * here
        advantages[:, t] = later
        next_value = values[:, t] * here
    return advantages, (advantages + values) * mask


def policy_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, clip_range: float, dual_clip: float | None = None
) -> tuple[Tensor, dict[str, float]]:
    """Mean of max(−Aρ, −A·clip(ρ, 1 − ε, 1 + ε)) over answer tokens [A], with the statistics people watch.

    dual_clip c: where A < 0, no more than −A·c (Ye et al. 2020), however far ρ has run away.
    """
    log_ratio = logp - old_logp
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    losses = torch.max(-advantages * ratio, -advantages * clipped)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.min(losses, -advantages * dual_clip), losses)
    loss = losses.mean()
    with torch.no_grad():
        stats = {
            "policy/approx_kl": 0.5 * log_ratio.square().mean().item(),
            "policy/clip_fraction": (ratio != clipped).float().mean().item(),
            "policy/ratio_max": ratio.max().item(),
        }
    return loss, stats


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """½·mean of max((V − R)², (clip(V, V_old ± ε) − R)²) over answer tokens [A]."""
    clipped = torch.max(torch.min(values, old_values + clip_range), old_values - clip_range)
    return 0.5 * torch.max((values - returns).square(), (clipped - returns).square()).mean()


def adapt_kl(beta: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """The next β: β·(1 + clip(KL/target − 1, ±0.2)·episodes/horizon), KL the mean nats per answer (Ziegler et al. 2019)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * episodes / horizon)


# -- one iteration -----------------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """B answers with what is known of them before the update; lists are per episode, tensors [B, T] or [B]."""

    prompts: list[list[int]]
    answers: list[Answer]
    mask: Tensor
    logp: Tensor
    ref_logp: Tensor
    values: Tensor
    scores: Tensor
    advantages: Tensor
    returns: Tensor


def pad(flat: Tensor, lengths: Sequence[int]) -> Tensor:
    """[A] values of answers end to end → [B, T], zeros behind."""
    return torch.nn.utils.rnn.pad_sequence(list(flat.split(list(lengths))), batch_first=True)


class Models(NamedTuple):
    """The networks of PPO: the policy and its critic learn, the reference and the reward model do not.

    reference: the model to stay near; None for the policy itself without its LoRA updates.
    """

    policy: Transformer
    critic: RewardModel
    reference: Transformer | None
    reward: RewardModel


@torch.no_grad()
def roll_out(
    models: Models,
    prompts: list[list[int]],
    seeds: list[int],
    options: PPOOptions,
    beta: float,
    stop_id: int | Collection[int],
) -> Rollout:
    """Sample an answer for each prompt and work out rewards, advantages and returns."""
    device = models.policy.embedding.weight.device
    answers = generate(
        models.policy,
        prompts,
        stop_id=stop_id,
        max_new_tokens=options.max_new_tokens,
        seeds=seeds,
        temperature=options.temperature,
        width=len(prompts),
    )
    ids = [answer.ids for answer in answers]
    lengths = [len(a) for a in ids]
    flat = flatten(prompts, ids, device)

    def logp_of(model: Transformer) -> Tensor:
        hidden = model(flat.tokens, flat.layout).index_select(0, flat.rows)
        return pad(log_probs(hidden, model.head_weight, flat.targets, options.temperature), lengths)

    # The old log-probabilities come from the training code, not the sampler: the ratio of the first minibatch is 1.
    logp = logp_of(models.policy)
    if models.reference is None:
        with disabled(models.policy):
            ref_logp = logp_of(models.policy)
    else:
        ref_logp = logp_of(models.reference)
    values = pad(models.critic(flat.tokens, flat.layout).index_select(0, flat.rows), lengths)
    mask = pad(torch.ones(sum(lengths), dtype=torch.bool, device=device), lengths)
    scores = torch.tensor(score(models.reward, prompts, ids), device=device)
    if options.reward == "probability":
        scores = models.reward.probability(scores)
    if options.missing_eos_penalty is not None:
        ended = torch.tensor([a.finish_reason == "stop" for a in answers], device=device)
        scores = torch.where(ended, scores, torch.full_like(scores, options.missing_eos_penalty))
    rewards = token_rewards(scores, logp, ref_logp, mask, beta, options.kl_estimator)
    if options.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = advantages_and_returns(rewards, values, mask, options.gamma, options.gae_lambda)
    return Rollout(prompts, answers, mask, logp, ref_logp, values, scores, whiten(advantages, mask), returns)


class Updater:
    """The optimizers, and the clipped updates of policy and critic on one rollout."""

    def __init__(self, models: Models, options: PPOOptions, tokens: np.ndarray, chats: Sequences) -> None:
        self.models, self.options, self.tokens, self.chats = models, options, tokens, chats
        self.policy_optimizer = Optimizer(models.policy, betas=(0.9, 0.95), eps=1e-5)
        self.critic_optimizer = Optimizer(models.critic, betas=(0.9, 0.95), eps=1e-5)
        self.average = None if options.ema_decay is None else Average(models.policy, options.ema_decay)
        self.skipped = 0

    def update(self, rollout: Rollout, seed: int, iteration: int) -> dict[str, float]:
        """`epochs` passes over the rollout in shuffled minibatches; returns the statistics of the last.

        `skipped` then says how many of the steps were dropped for a gradient that is not finite.
        """
        o = self.options
        self.skipped = 0
        stats: dict[str, float] = {}
        steps = o.epochs * o.minibatches
        size = o.batch_size // o.minibatches
        for epoch in range(o.epochs):
            order = stream(seed, "minibatches", iteration, epoch).permutation(len(rollout.prompts))
            for part in range(o.minibatches):
                chosen = sorted(order[part * size : (part + 1) * size].tolist())
                step = (iteration * o.epochs + epoch) * o.minibatches + part
                stats = self._step(rollout, chosen, step, o.iterations * steps, seed)
        return stats

    def _step(self, rollout: Rollout, chosen: list[int], step: int, steps: int, seed: int) -> dict[str, float]:
        o, m = self.options, self.models
        device = m.policy.embedding.weight.device
        flat = flatten([rollout.prompts[i] for i in chosen], [rollout.answers[i].ids for i in chosen], device)
        rows = torch.tensor(chosen, device=device)
        mask = rollout.mask[rows]

        def take(x: Tensor) -> Tensor:
            return x[rows][mask]

        hidden = m.policy(flat.tokens, flat.layout).index_select(0, flat.rows)
        logp = log_probs(hidden, m.policy.head_weight, flat.targets, o.temperature)
        loss, stats = policy_loss(logp, take(rollout.logp), take(rollout.advantages), o.clip_range, o.dual_clip)
        loss.backward()
        if o.ptx_coefficient:
            draw = stream(seed, "ptx", step)
            stats["policy/ptx_loss"] = add_ptx_gradient(m.policy, self.tokens, self.chats, o, draw)
        rate = learning_rate(step, steps, o.learning_rate, o.warmup_steps, shape="linear")
        norm, taken = self.policy_optimizer.step(rate, o.clip_norm)
        self.skipped += not taken
        if taken and self.average is not None:
            self.average.update()

        values = m.critic(flat.tokens, flat.layout).index_select(0, flat.rows)
        loss_v = value_loss(values, take(rollout.values), take(rollout.returns), o.value_clip_range)
        loss_v.backward()
        rate = learning_rate(step, steps, o.critic_learning_rate, o.warmup_steps, shape="linear")
        _, taken = self.critic_optimizer.step(rate, o.clip_norm)
        self.skipped += not taken
        return stats | {"policy/loss": loss.item(), "policy/gradient_norm": norm, "critic/loss": loss_v.item()}


def statistics(rollout: Rollout, beta: float) -> dict[str, float]:
    """What a rollout tells: reward, KL per answer in nats (k1, and k3 which is never negative), length, ends."""
    log_ratio = (rollout.logp - rollout.ref_logp) * rollout.mask
    k3 = kl_estimate(rollout.logp, rollout.ref_logp, "k3") * rollout.mask
    returns, values = rollout.returns[rollout.mask], rollout.values[rollout.mask]
    variance = returns.var(correction=0)
    texts = {tuple(answer.ids) for answer in rollout.answers}
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
    }


def run(job: Job) -> dict[str, Any]:
    """The stage body: SFT model, reward model, prompts → model/, metrics.json, curves.csv."""
    options = job.options("ppo", PPOOptions)
    base, folder = job.input("artifacts/sft/model"), job.input("artifacts/tokenize")
    rewarder = job.input("artifacts/reward/model")
    tokenizer = Tokenizer.load(base)
    prompts = Sequences.load(folder / "prompts.train.npz")
    tokens = np.load(folder / "pretrain.train.npy", mmap_mode="r")
    chats = Sequences.load(folder / "sft.train.npz")
    if len(prompts) < options.batch_size:
        raise ValueError(
            f"there are {len(prompts)} prompts, fewer than ppo.batch_size {options.batch_size}: add prompts"
        )
    check_ptx("ppo", options, len(tokens), len(chats), read_config(base).text_window)
    lora = job.options("lora", LoraOptions)
    models = Models(
        load_model(base, job.device),
        load_reward_model(rewarder, job.device),
        None if lora.rank else load_model(base, job.device),
        load_reward_model(rewarder, job.device),
    )
    policy = what_learns(models.policy, lora, torch_generator(job.seed, "lora", "policy"))
    what_learns(models.critic.trunk, lora, torch_generator(job.seed, "lora", "critic"))  # its head learns in any case
    updater = Updater(models, options, tokens, chats)
    parts: dict[str, Stateful] = {
        "policy": policy,
        "critic": Learned(models.critic) if lora.rank else models.critic,
        "policy_optimizer": updater.policy_optimizer,
        "critic_optimizer": updater.critic_optimizer,
    }
    if updater.average is not None:
        parts["average"] = updater.average
    training = Training(job, options, options.iterations, parts)
    beta = training.numbers.get("kl_coefficient", options.kl_coefficient)

    for iteration in range(training.first, options.iterations):
        clock = time.perf_counter()
        # 1. prompts, and answers with their rewards and advantages
        draw = stream(job.seed, "prompts", iteration)
        chosen = draw.choice(len(prompts), options.batch_size, replace=False)
        seeds = draw.integers(2**62, size=options.batch_size).tolist()
        rollout = roll_out(models, [prompts[int(i)] for i in chosen], seeds, options, beta, tokenizer.stop_ids)
        row = statistics(rollout, beta)
        rolled = time.perf_counter() - clock
        # 2. the updates
        row |= updater.update(rollout, job.seed, iteration)
        training.skipped += updater.skipped
        # 3. the KL controller
        if options.kl_target is not None:
            beta = adapt_kl(beta, row["objective/kl"], options.kl_target, options.batch_size, options.kl_horizon)
        # 4. records
        done = iteration + 1
        if training.logs(done):
            seconds = time.perf_counter() - clock
            timing = {"episodes_per_second": options.batch_size / seconds, "rollout_share": rolled / seconds}
            training.log(done, row, timing)
        training.numbers = {"kl_coefficient": beta}
        training.checkpoint(done)

    tail = training.rows[-10:]
    metrics = {
        name.replace("/", "_"): math.fsum(row[name] for row in tail) / len(tail)
        for name in ("reward/score", "objective/kl", "answer/tokens", "answer/ended", "answer/distinct")
    }
    metrics |= {
        "kl_coefficient": beta,
        "episodes": options.iterations * options.batch_size,
        "skipped_steps": training.skipped,
    }
    card = "# thumbwheel PPO model\n\nThe SFT model after PPO against a reward model of people's thumbs."
    if updater.average is not None:
        updater.average.apply()
    save_model(models.policy, job.output / "model", tokenizer, card)
    if lora.rank:
        save_adapter(models.policy, job.output / "model" / "adapter", "artifacts/sft/model")
    training.finish(metrics)
    return metrics
