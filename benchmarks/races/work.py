"""What both sides of a race are given: model shapes, how much of everything, and the arithmetic that it takes at least.

Runs in every peer's environment: the standard library alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STOP_PROBABILITY = 0.03  # of the stop token at every step, where answers may end early
PROMPT, NEW = 32, 64  # generation: tokens of a prompt, and new tokens at most
GENERATION_PROMPTS, WIDTH = 256, 64
PPO_BATCH, PPO_NEW, PPO_EPOCHS, PPO_MINIBATCHES = 64, 48, 4, 4
PPO_RATE, KL = 1e-7, 0.05  # so small a rate that answers keep their lengths
PRETRAIN_BATCH = 8  # windows of the whole context a step
SFT_BATCH = 8  # conversations a step
PACKED_BATCH = 24  # conversations a step beside 8 packed rows of 256 tokens: about as many tokens
REWARD_BATCH = 8  # pairs a step


@dataclass(frozen=True)
class Shape:
    """A Llama-style decoder with tied embeddings."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int = 4096
    context: int = 256

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' matrices: each is one multiply-add a token."""
        d, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        return self.layers * (2 * d * d + 2 * d * kv + 3 * d * self.ffn)

    @property
    def weights(self) -> int:
        """Weights of all matrices; the embedding once, as the output layer."""
        return self.layer_weights + self.vocabulary * self.hidden

    def forward(self, lengths: Sequence[float], head_rows: float) -> float:
        """Floating-point operations of a forward pass over sequences, without padding, the output layer on head_rows
        tokens: 2 a weight and token, and causal attention's 2·d·length² a layer."""
        attention = sum(2 * self.layers * self.hidden * n * n for n in lengths)
        return 2 * self.layer_weights * sum(lengths) + attention + 2 * self.vocabulary * self.hidden * head_rows

    def huggingface(self) -> dict[str, Any]:
        """Keyword arguments of transformers' LlamaConfig."""
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.ffn,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
        }


SHAPES = {
    "1m": Shape(128, 4, 4, 2, 384),
    "10m": Shape(384, 6, 6, 2, 1024),
    "135m": Shape(576, 30, 9, 3, 1536, vocabulary=49152),
}


@dataclass(frozen=True)
class Amounts:
    """How much one run measures, after how much warm-up: steps of training, prompts one at a time, PPO iterations."""

    warmup: int
    steps: int
    prompts: int
    iterations: int


AMOUNTS = {"1m": Amounts(4, 16, 8, 2), "10m": Amounts(2, 6, 4, 1), "135m": Amounts(0, 0, 1, 0)}


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
