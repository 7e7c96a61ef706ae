"""The architecture's numbers, under the names of Hugging Face's config.json where it has one name for all families."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class ModelOptions:
    """Section `model` of params.yaml: the decoder to pretrain (the vocabulary's size comes from the tokenizer)."""

    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    intermediate_size: int = 352
    max_position_embeddings: int = 96
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads or (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                "hidden_size must be an even multiple of num_attention_heads (RoPE turns pairs of numbers)"
            )
        self.check()

    def check(self) -> None:
        """Raise ValueError for numbers that no decoder can have."""
        for name in (
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE's frequencies are stretched for a longer context; models/rope.py has the formulas.

    rope_type: linear, dynamic, llama3 or yarn. original_max_position_embeddings: the context before it was stretched
    (llama3, yarn). The other fields belong to the type in the comment behind them.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn: what cos and sin are multiplied by
    truncate: bool = True  # yarn


@dataclass(frozen=True)
class ModelConfig(ModelOptions):
    """A decoder of the Llama kind (RMSNorm, RoPE, SwiGLU, grouped-query attention) with what its families add.

    family: the model_type of config.json that it is written as (models/huggingface.py knows them).
    head_dim: width of an attention head; 0 stands for hidden_size / num_attention_heads.
    qkv_bias, o_bias, mlp_bias: which projections have a bias. qk_norm: RMSNorm over each query and key head (Qwen 3).
    post_norms: RMSNorm behind attention and behind the MLP too, before the residual is added (GLM-4).
    partial_rotary_factor: the share of each head that RoPE turns. interleaved_rope: neighbours form a pair (GLM), not
    the two halves. sliding_layers see only the last sliding_window tokens; unrotated_layers have no RoPE (SmolLM3).
    """

    vocab_size: int = 1280
    family: str = "llama"
    head_dim: int = 0
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    partial_rotary_factor: float = 1.0
    interleaved_rope: bool = False
    rope_scaling: RopeScaling | None = None
    sliding_window: int = 0
    sliding_layers: tuple[int, ...] = ()
    unrotated_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.check()
        if not self.head_dim:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError("hidden_size must be a multiple of num_attention_heads when head_dim is not given")
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.rotary_dim % 2 or self.rotary_dim < 2:
            raise ValueError(
                f"RoPE turns pairs of numbers: head_dim {self.head_dim} × partial_rotary_factor "
                f"{self.partial_rotary_factor} must be an even number"
            )
        if self.sliding_layers and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1, not {self.sliding_window}")

    @property
    def rotary_dim(self) -> int:
        """How many numbers of each head RoPE turns."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def context_length(self) -> int:
        """The longest sequence in tokens."""
        return self.max_position_embeddings

    @property
    def text_window(self) -> int:
        """Tokens of a window of running text where that is measured or mixed in: the context, 512 at most."""
        return min(self.context_length, 512)

    @classmethod
    def from_options(cls, options: ModelOptions, vocab_size: int) -> ModelConfig:
        """The options together with the tokenizer's vocabulary size."""
        return cls(**asdict(options), vocab_size=vocab_size)

    def matrix_weights(self) -> int:
        """Weights of the matrices that a token is multiplied with: those of the layers, and the output layer's."""
        d, q, kv = self.hidden_size, self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        layer = d * (q + 2 * kv) + q * d + 3 * d * self.intermediate_size
        return self.num_hidden_layers * layer + self.vocab_size * d

    def parameter_count(self) -> int:
        """Number of weights, tied ones counted once."""
        d, q, kv = self.hidden_size, self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        vectors = (4 if self.post_norms else 2) * d + 2 * self.head_dim * self.qk_norm
        vectors += (q + 2 * kv) * self.qkv_bias + d * self.o_bias + (2 * self.intermediate_size + d) * self.mlp_bias
        embedding = 0 if self.tie_word_embeddings else self.vocab_size * d
        return self.matrix_weights() + embedding + self.num_hidden_layers * vectors + d

    def training_flops(self, lengths: Sequence[int]) -> float:
        """Floating-point operations of forward and backward for sequences of these lengths.

        A token takes 6 a weight of the matrices, and 12·layers·heads·head_dim·length of attention (Chowdhery et al. 2022,
        appendix B, which counts attention as if it were not causal).
        """
        attention = 12.0 * self.num_hidden_layers * self.num_attention_heads * self.head_dim
        return 6.0 * self.matrix_weights() * sum(lengths) + attention * sum(length * length for length in lengths)
