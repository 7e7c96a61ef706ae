"""From scores and log-probabilities to what each answer token was worth: KL, rewards, advantages and returns.

Notation: B answers, T the longest; per-token tensors are padded [B, T] beside a mask [B, T] that is True on answer tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

KL_ESTIMATORS = ("k1", "k2", "k3")
LARGEST_LOG_RATIO = 20.0  # in k2 and k3: past it one token would drown all others, and soon overflow


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


def adapt_kl(beta: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """The next β: β·(1 + clip(KL/target − 1, ±0.2)·episodes/horizon), KL the mean nats per answer (Ziegler et al. 2019)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * episodes / horizon)
