"""The decoder: RMSNorm, RoPE, SwiGLU and causal attention over sequences laid end to end without padding.

Notation: N tokens of all sequences end to end, B sequences, T the longest, d hidden size, H heads, K key-value heads,
D head width, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.compute import PLAIN, arithmetic
from models.config import ModelConfig
from models.elementwise import RMSNorm, swiglu
from models.layout import Layout, attend
from models.rope import rotate, tables


class Attention(nn.Module):
    """Causal self-attention with H query heads that share K key-value heads."""

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.rotary, self.interleaved = layer not in config.unrotated_layers, config.interleaved_rope
        self.window = config.sliding_window if layer in config.sliding_layers else 0
        outer = self.heads * self.head_dim
        self.qkv = nn.Linear(config.hidden_size, outer + 2 * self.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.o = nn.Linear(outer, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None

    def split(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projections [N, (H + 2K)·D] → normalised and rotated q [N, H, D] and k [N, K, D], v [N, K, D]."""
        qkv = qkv.view(qkv.shape[0], self.heads + 2 * self.kv_heads, self.head_dim)
        qk, v = qkv[:, : self.heads + self.kv_heads], qkv[:, self.heads + self.kv_heads :]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, : self.heads]), self.k_norm(qk[:, self.heads :])), dim=1)
        if self.rotary:
            qk = rotate(qk, cos, sin, self.interleaved).to(qkv.dtype)
        q, k = qk.split([self.heads, self.kv_heads], dim=1)
        return q, k, v

    def split_rows(self, x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As split(qkv(x), …), but only the rows [A] get queries: those of other tokens are zeros, which cost no product."""
        outer = self.heads * self.head_dim
        weights, bias = self.qkv.weight.split([outer, 2 * self.kv_heads * self.head_dim]), self.qkv.bias
        biases = (None, None) if bias is None else bias.split([outer, bias.shape[0] - outer])
        q = F.linear(x.index_select(0, rows), weights[0], biases[0]).view(-1, self.heads, self.head_dim)
        kv = F.linear(x, weights[1], biases[1]).view(-1, 2 * self.kv_heads, self.head_dim)
        k, v = kv.split(self.kv_heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q = rotate(q, cos.index_select(0, rows), sin.index_select(0, rows), self.interleaved).to(v.dtype)
            k = rotate(k, cos, sin, self.interleaved).to(v.dtype)
        return v.new_zeros(x.shape[0], self.heads, self.head_dim).index_copy(0, rows, q), k, v

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, d] → output [N, d] (with rows [A]: [A, d], of those tokens), and the keys and values [N, K, D]."""
        q, k, v = self.split(self.qkv(x), cos, sin) if rows is None else self.split_rows(x, cos, sin, rows)
        y = attend(q, k, v, layout, self.window).flatten(1)
        return self.o(y if rows is None else y.index_select(0, rows)), k, v


class Block(nn.Module):
    """One layer: attention, then SwiGLU, each after RMSNorm (GLM-4: and before another) and added to the residual."""

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

        self.attention_norm = norm()
        self.attention = Attention(config, layer)
        self.mlp_norm = norm()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.attention_post_norm = norm() if config.post_norms else None
        self.mlp_post_norm = norm() if config.post_norms else None

    def mlp(self, x: Tensor) -> Tensor:
        """SwiGLU: x [N, d] → [N, d]."""
        return self.down(swiglu(self.gate_up(self.mlp_norm(x))))

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, d] → [N, d] (with rows [A]: [A, d], of those tokens), keys and values of all."""
        y, k, v = self.attention(self.attention_norm(x), cos, sin, layout, rows)
        x = x if rows is None else x.index_select(0, rows)
        x = x + (y if self.attention_post_norm is None else self.attention_post_norm(y))
        y = self.mlp(x)
        return x + (y if self.mlp_post_norm is None else self.mlp_post_norm(y)), k, v


class Transformer(nn.Module):
    """The decoder without its output layer: token ids → hidden states. `head_weight` is the output layer's [V, d].

    compute: how forward works, plainly unless a training stage says otherwise (section `training` of params.yaml).
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute = PLAIN
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.make_tables()

    def make_tables(self) -> None:
        """Compute RoPE's cos and sin of every position: they are no weights, so no file has them."""
        cos, sin = tables(self.config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def layers(self) -> list[Block]:
        """The blocks, with their type."""
        return cast(list[Block], list(self.blocks))

    @property
    def head_weight(self) -> Tensor:
        """The output layer's weight [V, d]: the embedding itself when tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def initialize(self, generator: torch.Generator) -> Transformer:
        """Random weights: normal(0, 0.02), the residual projections scaled by 1/sqrt(2·layers) (GPT-2)."""
        scale = (2 * self.config.num_hidden_layers) ** -0.5
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() == 1:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                else:
                    shrink = scale if name.endswith(("attention.o.weight", "down.weight")) else 1.0
                    parameter.normal_(0.0, 0.02 * shrink, generator=generator)
        return self

    def forward(self, tokens: Tensor, layout: Layout, rows: Tensor | None = None) -> Tensor:
        """tokens [N] → hidden states [N, d] after the last norm; with rows, indices [A] of the tokens that are read, each at
        most once: [A, d], and the last layer computes no more than those need. In compute.precision. Raises ValueError past
        the context length.
        """
        with arithmetic(self.compute, tokens.device):
            hidden = self._run(tokens, layout, rows)
        return hidden.to(self.compute.dtype) if self.compute.precision == "bf16" else hidden

    def forward_with_cache(
        self, tokens: Tensor, layout: Layout, rows: Tensor | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """As forward, in the weights' own precision, with each layer's keys and values [N, K, D] of all tokens."""
        cache: list[tuple[Tensor, Tensor]] = []
        return self._run(tokens, layout, rows, cache), cache

    def _run(
        self, tokens: Tensor, layout: Layout, rows: Tensor | None, cache: list[tuple[Tensor, Tensor]] | None = None
    ) -> Tensor:
        if layout.longest > self.config.context_length:
            raise ValueError(
                f"a sequence of {layout.longest} tokens exceeds the context of {self.config.context_length}"
            )
        x = self.embedding(tokens)
        if self.compute.precision == "bf16":
            x = x.float()  # FSDP2 may hold the embedding in bf16: the residual stream is fp32
        cos, sin = self.cos[layout.positions].to(x.dtype), self.sin[layout.positions].to(x.dtype)
        again = self.compute.activation_checkpointing and torch.is_grad_enabled() and cache is None
        for i, block in enumerate(self.layers):
            given = (x, cos, sin, layout, rows if i + 1 == len(self.layers) else None)
            if again:
                x, k, v = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                x, k, v = block(*given)
            if cache is not None:
                cache.append((k, v))
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., d] → logits [..., V]. Take few rows: training goes through models.losses by chunks."""
        return F.linear(hidden, self.head_weight)
