"""The architecture's numbers, under the names of Hugging Face's config.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        for name in ("num_hidden_layers", "intermediate_size", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class ModelConfig(ModelOptions):
    """A Llama-style decoder (RMSNorm, RoPE, SwiGLU, grouped-query attention)."""

    vocab_size: int = 1280

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def context_length(self) -> int:
        """The longest sequence in tokens."""
        return self.max_position_embeddings

    @classmethod
    def from_options(cls, options: ModelOptions, vocab_size: int) -> ModelConfig:
        """The options together with the tokenizer's vocabulary size."""
        return cls(**asdict(options), vocab_size=vocab_size)

    @classmethod
    def from_huggingface(cls, config: dict[str, Any], architecture: str = "LlamaForCausalLM") -> ModelConfig:
        """From the content of a config.json. Raises ValueError for another architecture than the one asked for."""
        architectures = config.get("architectures") or ["none"]
        if architectures != [architecture]:
            raise ValueError(f"config.json: architecture is {architectures[0]}; {architecture} is what this needs")
        rope = config.get("rope_parameters") or {}
        unsupported = [
            key for key in ("rope_scaling", "attention_bias", "mlp_bias") if config.get(key) not in (None, False)
        ]
        if unsupported or rope.get("rope_type", "default") != "default":
            raise ValueError(f"config.json: {', '.join(unsupported) or 'rope_type'} is set; plain Llama is supported")
        if config.get("head_dim") not in (None, config["hidden_size"] // config["num_attention_heads"]):
            raise ValueError("config.json: head_dim other than hidden_size / num_attention_heads is not supported")
        names = cls.__dataclass_fields__
        values = {key: value for key, value in config.items() if key in names}
        values.setdefault("num_key_value_heads", config["num_attention_heads"])
        if "rope_theta" in rope:
            values["rope_theta"] = rope["rope_theta"]
        return cls(**values)

    def to_huggingface(self) -> dict[str, Any]:
        """The content of config.json that transformers' LlamaForCausalLM reads."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **asdict(self),
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "dtype": "float32",
        }

    def parameter_count(self) -> int:
        """Number of weights, tied ones counted once."""
        d, kv = self.hidden_size, self.num_key_value_heads * self.head_dim
        layer = d * (d + 2 * kv) + d * d + 3 * d * self.intermediate_size + 2 * d
        return self.vocab_size * d * (1 if self.tie_word_embeddings else 2) + self.num_hidden_layers * layer + d
