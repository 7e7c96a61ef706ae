"""PPO's clipped losses, token by token (Schulman et al. 2017). A is the number of answer tokens of a minibatch, end to end."""

from __future__ import annotations

import torch
from torch import Tensor


def policy_losses(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, clip_range: float, dual_clip: float | None = None
) -> Tensor:
    """max(−Aρ, −A·clip(ρ, 1 − ε, 1 + ε)) of every answer token, ρ = π/π_old: [A].

    dual_clip c: where A < 0, no more than −A·c (Ye et al. 2020), however far ρ has run away.
    """
    ratio = (logp - old_logp).exp()
    losses = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.min(losses, -advantages * dual_clip), losses)
    return losses


@torch.no_grad()
def ratio_statistics(logp: Tensor, old_logp: Tensor, clip_range: float) -> dict[str, Tensor]:
    """What people watch: ½·Δ² of the log-probabilities and whether ρ is outside the clip range [A], and the largest ρ."""
    log_ratio = logp - old_logp
    ratio = log_ratio.exp()
    return {
        "policy/approx_kl": 0.5 * log_ratio.square(),
        "policy/clip_fraction": (ratio != ratio.clamp(1 - clip_range, 1 + clip_range)).float(),
        "policy/ratio_max": ratio.max(),
    }


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """½·max((V − R)², (clip(V, V_old ± ε) − R)²) of every answer token: [A]."""
    clipped = torch.max(torch.min(values, old_values + clip_range), old_values - clip_range)
    return 0.5 * torch.max((values - returns).square(), (clipped - returns).square())


def rollout_weights(old_logp: Tensor, rollout_logp: Tensor, cap: float) -> Tensor:
    """min(π_old/π_rollout, C) of every sampled token, any shape: what the policy loss is multiplied by when another engine
    or precision sampled than the one that learns (truncated importance sampling, Yao et al. 2025)."""
    return (old_logp - rollout_logp).exp().clamp_max(cap)
