"""config.json and tensor names of the model families, as transformers writes them, from and to ours.

A family is the `model_type` of config.json. SmolLM2 is a Llama; Qwen 2.5 is a Qwen2; GLM-4's first release is a glm, the
releases from 0414 on are glm4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models.config import ModelConfig, RopeScaling
from models.transformer import Transformer


@dataclass(frozen=True)
class Family:
    """One model_type: the prefix of its class names in transformers, and what its config.json means when a key is absent."""

    prefix: str
    defaults: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral", {"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3", {"head_dim": 128}),
    "smollm3": Family("SmolLM3", {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2e6}),
    "internlm3": Family("InternLM3", {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5}),
    "glm": Family("Glm", {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-7}),
    "glm4": Family("Glm4", {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-7}),
}
GLM = ("glm", "glm4")
REQUIRED = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings", "vocab_size",
)  # fmt: skip
COMMON = {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
PARAMETERS = {  # what each rope_type needs beside factor
    "linear": (),
    "dynamic": (),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_position_embeddings",),
}


def read_config(config: dict[str, Any], head: str = "CausalLM") -> ModelConfig:
    """The content of a config.json as a ModelConfig. head: the task in the class's name (CausalLM, SequenceClassification).

    Raises ValueError that names the field for an unknown architecture or anything that this decoder would compute wrongly.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"config.json: model_type is {family!r}; known are {', '.join(FAMILIES)}")
    names = config.get("architectures") or [FAMILIES[family].prefix + "For" + head]
    known = {FAMILIES[family].prefix + "For" + head}
    if family == "internlm3":
        known.add("LlamaFor" + head)  # transformers' class for it
    if len(names) != 1 or names[0] not in known:
        raise ValueError(f"config.json: architectures is {names}; {' or '.join(sorted(known))} is what this needs")
    missing = [name for name in REQUIRED if config.get(name) is None]
    if missing:
        raise ValueError(f"config.json: {missing[0]} is missing")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"config.json: hidden_act is {config['hidden_act']!r}; silu is supported")
    if config.get("quantization_config"):
        raise ValueError(
            "config.json: quantization_config is set; give the folder with the weights in bf16, fp16 or fp32"
        )

    values = {**COMMON, "num_key_value_heads": config["num_attention_heads"], **FAMILIES[family].defaults}
    values |= {key: value for key, value in config.items() if value is not None}
    if family != "mistral":
        values["sliding_window"] = values.get("sliding_window", 4096) if config.get("use_sliding_window") else 0
    elif "sliding_window" in config:
        values["sliding_window"] = config["sliding_window"] or 0
    if "head_dim" in config and config["head_dim"] is None:
        values["head_dim"] = 0
    theta, partial, scaling = _rope(config, values)
    if family not in GLM and partial != 1.0:
        raise ValueError(f"config.json: partial_rotary_factor is {partial}; {family} turns whole heads")
    layers = config["num_hidden_layers"]
    return ModelConfig(
        **{name: config[name] for name in REQUIRED},
        num_key_value_heads=values["num_key_value_heads"],
        rope_theta=theta,
        rms_norm_eps=values["rms_norm_eps"],
        tie_word_embeddings=values["tie_word_embeddings"],
        family=family,
        head_dim=values.get("head_dim", 0),
        **_biases(family, values),
        qk_norm=family == "qwen3",
        post_norms=family == "glm4",
        partial_rotary_factor=partial,
        interleaved_rope=family in GLM,
        rope_scaling=scaling,
        unrotated_layers=_unrotated(family, config, layers),
        **_sliding(family, values, layers),
    )


def _biases(family: str, values: dict[str, Any]) -> dict[str, Any]:
    attention, mlp = bool(values.get("attention_bias", family in GLM)), bool(values.get("mlp_bias", False))
    if family == "internlm3":
        attention, rest = bool(values.get("qkv_bias", attention)), bool(values.get("bias", mlp))
        return {"qkv_bias": attention, "o_bias": rest, "mlp_bias": rest}
    if family == "mistral":
        return {}
    if family == "qwen2":
        return {"qkv_bias": True}
    if family in GLM:
        return {"qkv_bias": attention}
    return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": mlp and family != "qwen3"}


def _sliding(family: str, values: dict[str, Any], layers: int) -> dict[str, Any]:
    """Which layers see a window only: all of Mistral's, those named by layer_types, or those from max_window_layers on."""
    window = values.get("sliding_window", 0)
    types = values.get("layer_types")
    if types is not None:
        unknown = set(types) - {"full_attention", "sliding_attention"}
        if unknown or len(types) != layers:
            raise ValueError(
                f"config.json: layer_types must name full_attention or sliding_attention for {layers} layers"
            )
        chosen = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
        if chosen and not window:
            raise ValueError(
                "config.json: layer_types names sliding_attention, but sliding_window is not set or not used"
            )
    elif family == "mistral":
        chosen = tuple(range(layers))
    elif family in ("qwen2", "qwen3"):
        chosen = tuple(range(values.get("max_window_layers", 28), layers))
    elif family == "smollm3":
        chosen = _unrotated(family, values, layers)
    else:
        chosen = ()
    return {"sliding_window": window, "sliding_layers": chosen} if window and chosen else {}


def _unrotated(family: str, config: dict[str, Any], layers: int) -> tuple[int, ...]:
    """SmolLM3: no_rope_layers has 1 where there IS RoPE; without the list every fourth layer has none."""
    if family != "smollm3":
        return ()
    rotated = config.get("no_rope_layers")
    if rotated is None:
        every = config.get("no_rope_layer_interval", 4)
        rotated = [(i + 1) % every != 0 for i in range(layers)]
    return tuple(i for i in range(layers) if not rotated[i])


def _rope(config: dict[str, Any], values: dict[str, Any]) -> tuple[float, float, RopeScaling | None]:
    """θ, the share of a head that is turned, and the scaling: from rope_parameters (transformers 5) or the older keys."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError("config.json: rope_parameters differs by layer; one setting for all layers is supported")
    theta = float(rope.get("rope_theta") or values["rope_theta"])
    default = 0.5 if config["model_type"] in GLM else 1.0
    partial = float(rope.get("partial_rotary_factor") or values.get("partial_rotary_factor") or default)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, partial, None
    if kind not in PARAMETERS:
        raise ValueError(f"config.json: rope_type is {kind!r}; known are default, {', '.join(PARAMETERS)}")
    if kind in ("llama3", "yarn"):
        rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    for name in ("factor", *PARAMETERS[kind]):
        if rope.get(name) is None:
            raise ValueError(f"config.json: rope_type {kind} needs {name}")
    given = {name: rope[name] for name in ("factor", *PARAMETERS[kind])}
    if kind == "yarn":
        given |= {
            "beta_fast": rope.get("beta_fast") or 32.0,
            "beta_slow": rope.get("beta_slow") or 1.0,
            "attention_factor": rope.get("attention_factor") or _yarn_attention(rope),
            "truncate": rope.get("truncate", True),
        }
    return theta, partial, RopeScaling(kind, **given)


def _yarn_attention(rope: dict[str, Any]) -> float:
    """What YaRN multiplies cos and sin by: 0.1·ln(factor) + 1 (Peng et al. 2023), a quotient of two with DeepSeek's mscale."""

    def temperature(scale: float) -> float:
        return 1.0 if rope["factor"] <= 1 else 0.1 * scale * math.log(rope["factor"]) + 1.0

    first, second = rope.get("mscale"), rope.get("mscale_all_dim")
    return temperature(first) / temperature(second) if first and second else temperature(1.0)


def write_config(config: ModelConfig, head: str = "CausalLM", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The content of config.json that transformers and vLLM read. Raises ValueError for what the family cannot say."""
    c, family = config, config.family
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}; known are {', '.join(FAMILIES)}")
    out: dict[str, Any] = {
        "architectures": [("Llama" if family == "internlm3" else FAMILIES[family].prefix) + "For" + head],
        "model_type": family,
        **{name: getattr(c, name) for name in REQUIRED[:-1]},
        "num_key_value_heads": c.num_key_value_heads,
        "rope_theta": c.rope_theta,
        "rms_norm_eps": c.rms_norm_eps,
        "tie_word_embeddings": c.tie_word_embeddings,
        "vocab_size": c.vocab_size,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "attention_bias": c.qkv_bias,
        "mlp_bias": c.mlp_bias,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if family in ("mistral", "qwen2"):
        del out["attention_bias"], out["mlp_bias"]
    if family == "internlm3":
        out |= {"qkv_bias": c.qkv_bias, "bias": c.mlp_bias}
    if family in GLM:
        out["partial_rotary_factor"] = c.partial_rotary_factor
    if family == "mistral":
        out["sliding_window"] = c.sliding_window or None
    elif family in ("qwen2", "qwen3", "smollm3"):
        sliding = set(c.sliding_layers)
        kinds = ["sliding_attention" if i in sliding else "full_attention" for i in range(c.num_hidden_layers)]
        out |= {"use_sliding_window": bool(sliding), "sliding_window": c.sliding_window or None, "layer_types": kinds}
    if family in ("qwen2", "qwen3"):
        out["max_window_layers"] = min(c.sliding_layers, default=c.num_hidden_layers)
    if family == "smollm3":
        out["no_rope_layers"] = [int(i not in c.unrotated_layers) for i in range(c.num_hidden_layers)]
    if c.rope_scaling is not None:
        out["rope_scaling"] = _rope_scaling(c.rope_scaling)
    _refuse_loss(config, out | {"architectures": [FAMILIES[family].prefix + "For" + head]}, head)
    return out


def _rope_scaling(scaling: RopeScaling) -> dict[str, Any]:
    names = ["rope_type", "factor", *PARAMETERS[scaling.rope_type]]
    if scaling.rope_type == "yarn":
        names += ["beta_fast", "beta_slow", "attention_factor", "truncate"]
    return {name: getattr(scaling, name) for name in names}


def _refuse_loss(config: ModelConfig, written: dict[str, Any], head: str) -> None:
    """Raise ValueError that names a field of ModelConfig which a config.json of its family cannot express."""
    again = read_config(written, head)
    for name in config.__dataclass_fields__:
        if getattr(again, name) != getattr(config, name):
            raise ValueError(
                f"a config.json of family {config.family} cannot say {name} = {getattr(config, name)!r}; "
                f"it would be read as {getattr(again, name)!r}"
            )


def tensor_names(config: ModelConfig) -> dict[str, list[tuple[str, int]]]:
    """Our parameters' names, each with the tensors of the folder that are stacked in it: (name, rows)."""
    c = config
    d, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    out = {
        "embedding.weight": [("model.embed_tokens.weight", c.vocab_size)],
        "norm.weight": [("model.norm.weight", d)],
    }
    if not c.tie_word_embeddings:
        out["head.weight"] = [("lm_head.weight", c.vocab_size)]
    for i in range(c.num_hidden_layers):
        ours, p = f"blocks.{i}.", f"model.layers.{i}."
        qkv = [(p + "self_attn.q_proj", q), (p + "self_attn.k_proj", kv), (p + "self_attn.v_proj", kv)]
        gate_up = [(p + "mlp.gate_proj", c.intermediate_size), (p + "mlp.up_proj", c.intermediate_size)]
        if c.family in GLM:
            gate_up = [(p + "mlp.gate_up_proj", 2 * c.intermediate_size)]
        projections = {
            "attention.qkv": (qkv, c.qkv_bias),
            "attention.o": ([(p + "self_attn.o_proj", d)], c.o_bias),
            "gate_up": (gate_up, c.mlp_bias),
            "down": ([(p + "mlp.down_proj", d)], c.mlp_bias),
        }
        for name, (parts, bias) in projections.items():
            for kind in ("weight", "bias") if bias else ("weight",):
                out[f"{ours}{name}.{kind}"] = [(f"{part}.{kind}", rows) for part, rows in parts]
        norms = {"attention_norm": ("input_layernorm", d), "mlp_norm": ("post_attention_layernorm", d)}
        if c.qk_norm:
            norms |= {
                "attention.q_norm": ("self_attn.q_norm", c.head_dim),
                "attention.k_norm": ("self_attn.k_norm", c.head_dim),
            }
        if c.post_norms:
            norms |= {
                "attention_post_norm": ("post_self_attn_layernorm", d),
                "mlp_post_norm": ("post_mlp_layernorm", d),
            }
        out |= {f"{ours}{name}.weight": [(f"{p}{theirs}.weight", rows)] for name, (theirs, rows) in norms.items()}
    return out


def to_huggingface(model: Transformer) -> dict[str, Tensor]:
    """The weights under the names of the family's class in transformers: fused projections are split."""
    parameters = dict(model.named_parameters())
    out: dict[str, Tensor] = {}
    for ours, parts in tensor_names(model.config).items():
        pieces = parameters[ours].detach().split([rows for _, rows in parts])
        out |= {name: piece.contiguous() for (name, _), piece in zip(parts, pieces, strict=True)}
    return out


def from_huggingface(
    config: ModelConfig, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Transformer:
    """The inverse of to_huggingface, in the given dtype. Raises ValueError that names a missing, extra or misshapen tensor."""
    with torch.device("meta"):
        model = Transformer(config)
    parameters = dict(model.named_parameters())
    names = tensor_names(config)
    given = {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}  # old folders have it
    twin = given.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    if twin is not None and not torch.equal(twin, given.get("model.embed_tokens.weight", torch.empty(0))):
        raise ValueError("lm_head.weight differs from model.embed_tokens.weight, but config.json ties them")
    expected = {name: (rows, *parameters[ours].shape[1:]) for ours, parts in names.items() for name, rows in parts}
    missing, extra = expected.keys() - given.keys(), given.keys() - expected.keys()
    if missing or extra:
        raise ValueError(
            f"weights do not fit config.json: missing {sorted(missing)[:3]}, not known {sorted(extra)[:3]}"
        )
    for name, shape in expected.items():
        if given[name].shape != shape:
            raise ValueError(f"{name} has shape {list(given[name].shape)}, config.json asks for {list(shape)}")
        if not given[name].is_floating_point():
            raise ValueError(f"{name} is stored as {given[name].dtype}; bf16, fp16 and fp32 are read")
    state = {}
    for ours, parts in names.items():
        pieces = [given[name].to(device, dtype) for name, _ in parts]
        state[ours] = torch.cat(pieces) if len(pieces) > 1 else pieces[0].clone()
    model.load_state_dict(state, assign=True)
    model.make_tables()
    return model.to(device)
