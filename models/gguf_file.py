"""GGUF, the file of llama.cpp and Ollama: read into a decoder and its tokenizer, and written from them.

Read: architectures llama, qwen2 and qwen3, every type that the package gguf can dequantize, byte-level BPE. Written: the
same, as F32, F16 or Q8_0. The package gguf is the extra `gguf`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.config import ModelConfig, RopeScaling
from models.gguf_tokenizer import read_tokenizer, tokenizer_metadata
from models.huggingface import from_huggingface, to_huggingface
from models.rope import scaled
from models.tokenizer import HuggingFaceTokenizer, Tokenizer
from models.transformer import Transformer

ARCHITECTURES = ("llama", "qwen2", "qwen3")
WRITTEN_AS = {"llama": "llama", "mistral": "llama", "internlm3": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
TYPES = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0"}
NAMES = (  # (Hugging Face's, GGUF's); layers are model.layers.N and blk.N
    ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output"),
    ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"), ("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"),
    ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"),
)  # fmt: skip
ROPE_FACTORS = "rope_freqs.weight"


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF needs the package gguf: pip install 'thumbwheel[gguf]'") from error
    return gguf


def load_gguf(
    path: str | os.PathLike[str], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Transformer, HuggingFaceTokenizer]:
    """The decoder, in evaluation mode, and the tokenizer of a GGUF file. save_model writes both as a Hugging Face folder.

    Raises FileNotFoundError, ImportError without the package gguf, ValueError that names what is not supported.
    """
    gguf, path = _package(), Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is damaged or no GGUF: {error}") from error
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        config = _config(metadata, {name: tensor.shape.tolist()[::-1] for name, tensor in tensors.items()})
        if ROPE_FACTORS in tensors:
            config = _with_llama3(config, np.array(tensors.pop(ROPE_FACTORS).data))
        weights = {}
        for name, tensor in tensors.items():
            theirs = _rename(name, to_gguf=False)
            weights[theirs] = _permuted(theirs, _dequantized(gguf, tensor), config, inverse=True)
        model = from_huggingface(config, weights, dtype, device).eval()
        return model, read_tokenizer(metadata, str(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _config(metadata: dict[str, Any], shapes: dict[str, list[int]]) -> ModelConfig:
    """The architecture from a file's keys and its tensors' shapes."""
    kind = metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(f"general.architecture is {kind!r}; known are {', '.join(ARCHITECTURES)}")

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{kind}.{key}", default)
        if value is None:
            raise ValueError(f"{kind}.{key} is missing")
        if isinstance(value, list):
            raise ValueError(f"{kind}.{key} differs by layer; one value for all layers is supported")
        return value

    for key in ("expert_count", "attention.sliding_window"):
        if metadata.get(f"{kind}.{key}"):
            raise ValueError(f"{kind}.{key} is set, which this decoder does not compute")
    heads, hidden = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", hidden // heads)
    if get("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{kind}.rope.dimension_count is {get('rope.dimension_count')}; whole heads are turned here")
    scaling = None
    rope_type = metadata.get(f"{kind}.rope.scaling.type", "none")
    if rope_type in ("linear", "yarn"):
        factor = get("rope.scaling.factor")
        original = get("rope.scaling.original_context_length", 0)
        attention = 1.0 + 0.1 * float(np.log(factor)) if rope_type == "yarn" else 1.0
        scaling = RopeScaling(rope_type, factor, original, attention_factor=attention)
    elif rope_type != "none":
        raise ValueError(f"{kind}.rope.scaling.type is {rope_type!r}; known are none, linear, yarn")
    if "token_embd.weight" not in shapes:
        raise ValueError("the tensor token_embd.weight is missing")
    return ModelConfig(
        hidden_size=hidden,
        num_hidden_layers=get("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=get("attention.head_count_kv", heads),
        intermediate_size=get("feed_forward_length"),
        max_position_embeddings=get("context_length"),
        rope_theta=float(get("rope.freq_base", 10000.0)),
        rms_norm_eps=_short(get("attention.layer_norm_rms_epsilon")),
        tie_word_embeddings="output.weight" not in shapes,
        vocab_size=shapes["token_embd.weight"][0],
        family=kind,
        head_dim=head_dim,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        o_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_up.bias" in shapes,
        qk_norm=kind == "qwen3",
        rope_scaling=scaling,
    )


def _short(number: float) -> float:
    """The decimal number that an fp32 was written as: 9.99999974e-06 is 1e-05."""
    return float(f"{number:.6g}")


def _with_llama3(config: ModelConfig, factors: np.ndarray) -> ModelConfig:
    """Llama 3's scaling from the file's divisors of each frequency, which leave out how they were made.

    Raises ValueError when the published settings (1, 4, 8192 tokens) do not give them back.
    """
    scaling = RopeScaling("llama3", _short(float(factors.max())), 8192, 1.0, 4.0)
    found = ModelConfig(**{**vars(config), "rope_scaling": scaling})
    if not np.allclose(_factors(found), factors, rtol=1e-3):
        raise ValueError(f"{ROPE_FACTORS} holds factors other than Llama 3.1's")
    return found


def _factors(config: ModelConfig) -> np.ndarray:
    """What Llama 3's scaling divides each frequency by: [D/2]."""
    assert config.rope_scaling is not None
    periods = config.rope_theta ** (torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim)
    return (1.0 / (periods * scaled(periods, config, config.rope_scaling))).numpy()


def _rename(name: str, *, to_gguf: bool) -> str:
    """A tensor's name in the other convention; names that neither knows stay and are refused later."""
    parts = name.split(".")
    if to_gguf:
        table = dict(NAMES)
        if name.startswith("model.layers."):
            return ".".join(["blk", parts[2], table[".".join(parts[3:-1])], parts[-1]])
        return f"{table['.'.join(parts[:-1])]}.{parts[-1]}"
    back = {theirs: ours for ours, theirs in NAMES}
    if parts[0] == "blk" and len(parts) == 4:
        return f"model.layers.{parts[1]}.{back.get(parts[2], parts[2])}.{parts[3]}"
    return f"{back.get(parts[0], parts[0])}.{'.'.join(parts[1:])}"


def _dequantized(gguf: Any, tensor: Any) -> Tensor:
    try:
        return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
    except NotImplementedError as error:
        raise ValueError(
            f"{tensor.name} is stored as {tensor.tensor_type.name}, which gguf cannot dequantize"
        ) from error


def _permuted(name: str, tensor: Tensor, config: ModelConfig, *, inverse: bool) -> Tensor:
    """llama.cpp's llama turns neighbours, Hugging Face's the halves of a head: the rows of q and k change places."""
    if WRITTEN_AS.get(config.family) != "llama" or not name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
        return tensor
    half = config.head_dim // 2
    inner = (half, 2) if inverse else (2, half)
    return tensor.view(-1, *inner, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def save_gguf(
    model: Transformer,
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    weights: str = "f16",
    name: str = "thumbwheel",
) -> None:
    """Write a GGUF that llama.cpp and Ollama run, under a temporary name until it is whole.

    weights: f32, f16 or q8_0 for matrices (rows that are no multiple of 32 long stay f16); vectors are f32.
    Raises ImportError without the package gguf, ValueError for a family or tokenizer that a GGUF of ours cannot hold.
    """
    gguf, path, c = _package(), Path(path), model.config
    if weights not in TYPES:
        raise ValueError(f"weights must be one of {', '.join(TYPES)}, not {weights!r}")
    if c.family not in WRITTEN_AS:
        raise ValueError(f"family {c.family} is not exported to GGUF; these are: {', '.join(WRITTEN_AS)}")
    if c.sliding_layers:
        raise ValueError(
            f"sliding_window {c.sliding_window} is not exported to GGUF: llama.cpp would look at everything"
        )
    kind = WRITTEN_AS[c.family]
    entries = tokenizer_metadata(tokenizer, c.vocab_size)
    tensors = to_huggingface(model)
    draft = path.with_name(path.name + ".draft")
    writer = gguf.GGUFWriter(draft, kind)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type({"f32": 0, "f16": 1, "q8_0": 7}[weights])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.context_length)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_vocab_size(c.vocab_size)
    _add_scaling(gguf, writer, c)
    for add, value in entries.values():
        getattr(writer, add)(value)
    for theirs, tensor in tensors.items():
        data = _permuted(theirs, tensor.detach().float().cpu(), c, inverse=False).contiguous().numpy()
        _add_tensor(gguf, writer, _rename(theirs, to_gguf=True), data, weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)


def _add_scaling(gguf: Any, writer: Any, config: ModelConfig) -> None:
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type == "dynamic":  # dynamic changes nothing within the context
        return
    if scaling.rope_type == "llama3":
        writer.add_tensor(ROPE_FACTORS, _factors(config))
        return
    if scaling.rope_type == "yarn":
        usual = RopeScaling("yarn", scaling.factor, scaling.original_max_position_embeddings)
        usual = RopeScaling(**{**vars(usual), "attention_factor": 1.0 + 0.1 * float(np.log(scaling.factor))})
        if not np.isclose(scaling.attention_factor, usual.attention_factor) or (
            (scaling.beta_fast, scaling.beta_slow, scaling.truncate) != (32.0, 1.0, True)
        ):
            raise ValueError("rope_scaling: yarn with settings other than its paper's is not exported to GGUF")
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.rope_type))
    writer.add_rope_scaling_factor(scaling.factor)


def _add_tensor(gguf: Any, writer: Any, name: str, data: np.ndarray, weights: str) -> None:
    if data.ndim == 1 or weights == "f32":
        writer.add_tensor(name, data.astype(np.float32))
    elif weights == "q8_0" and data.shape[-1] % 32 == 0:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, data.astype(np.float16))
