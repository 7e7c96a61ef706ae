"""Rotary position embeddings (Su et al. 2021) with the ways in which model families stretch them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.config import ModelConfig, RopeScaling


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn the first R numbers of each head: x [N, heads, D], cos and sin [N, 1, R/2], R ≤ D.

    The pairs are the halves' numbers i and i + R/2 (Hugging Face's Llama), or the neighbours 2i and 2i + 1 when interleaved.
    """
    turned = 2 * cos.shape[-1]
    if turned < x.shape[-1]:
        return torch.cat((rotate(x[..., :turned], cos, sin, interleaved), x[..., turned:]), dim=-1)
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of every position of the context: [context, 1, R/2] each, fp32."""
    half = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
    scaling = config.rope_scaling
    frequencies = config.rope_theta**-half if scaling is None else scaled(config.rope_theta**half, config, scaling)
    angles = torch.outer(torch.arange(config.context_length, dtype=torch.float32), frequencies)
    by = 1.0 if scaling is None else scaling.attention_factor
    return (angles.cos() * by)[:, None], (angles.sin() * by)[:, None]


def scaled(periods: Tensor, config: ModelConfig, scaling: RopeScaling) -> Tensor:
    """The frequencies under a scaling: periods [R/2] are θ^(2i/R), the result is 1/θ^(2i/R) stretched.

    dynamic (NTK by length) begins to differ from plain RoPE past max_position_embeddings, and our context ends there.
    """
    if scaling.rope_type == "linear":
        return 1.0 / periods / scaling.factor
    if scaling.rope_type == "llama3":
        return _llama3(1.0 / periods, scaling)
    if scaling.rope_type == "yarn":
        return _yarn(periods, config, scaling)
    return 1.0 / periods


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: long waves are stretched by the factor, short ones stay, those between get a mixture."""
    waves = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / waves
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def _yarn(periods: Tensor, config: ModelConfig, scaling: RopeScaling) -> Tensor:
    """YaRN (Peng et al. 2023): dimensions that turn often stay, those that turn seldom are stretched, with a ramp between."""
    width = config.rotary_dim

    def dimension(turns: float) -> float:
        """The dimension that makes so many turns over the original context."""
        length = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return width * math.log(length) / (2 * math.log(config.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    stretch = ramp.clamp(0, 1)
    return stretch / (scaling.factor * periods) + (1 - stretch) / periods
