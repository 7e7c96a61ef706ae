"""Models on disk: Hugging Face folders (config.json, model.safetensors, tokenizer files, model card), read and written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.config import ModelConfig
from models.tokenizer import Tokenizer
from models.transformer import Transformer

PathLike = str | os.PathLike[str]


def to_huggingface(model: Transformer) -> dict[str, Tensor]:
    """The weights under the names of transformers' LlamaForCausalLM: fused projections are split."""
    c = model.config
    d, kv = c.hidden_size, c.num_key_value_heads * c.head_dim
    out = {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": model.norm.weight}
    if model.head is not None:
        out["lm_head.weight"] = model.head.weight
    for i, block in enumerate(model.layers):
        p = f"model.layers.{i}."
        q, k, v = block.attention.qkv.weight.split([d, kv, kv])
        gate, up = block.gate_up.weight.split([c.intermediate_size] * 2)
        out |= {
            p + "self_attn.q_proj.weight": q,
            p + "self_attn.k_proj.weight": k,
            p + "self_attn.v_proj.weight": v,
            p + "self_attn.o_proj.weight": block.attention.o.weight,
            p + "mlp.gate_proj.weight": gate,
            p + "mlp.up_proj.weight": up,
            p + "mlp.down_proj.weight": block.down.weight,
            p + "input_layernorm.weight": block.attention_norm.weight,
            p + "post_attention_layernorm.weight": block.mlp_norm.weight,
        }
    return {name: tensor.detach().contiguous() for name, tensor in out.items()}


def from_huggingface(config: ModelConfig, tensors: dict[str, Tensor]) -> Transformer:
    """The inverse of to_huggingface. Raises ValueError that names a missing, extra or misshapen tensor."""
    model = Transformer(config)
    expected = to_huggingface(model)
    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or extra:
        raise ValueError(
            f"weights do not fit config.json: missing {sorted(missing)[:3]}, not known {sorted(extra)[:3]}"
        )
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            raise ValueError(f"{name} has shape {list(tensors[name].shape)}, config.json asks for {list(tensor.shape)}")
    with torch.no_grad():
        model.embedding.weight.copy_(tensors["model.embed_tokens.weight"])
        model.norm.weight.copy_(tensors["model.norm.weight"])
        if model.head is not None:
            model.head.weight.copy_(tensors["lm_head.weight"])
        for i, block in enumerate(model.layers):
            p = f"model.layers.{i}."
            block.attention.qkv.weight.copy_(torch.cat([tensors[f"{p}self_attn.{x}_proj.weight"] for x in "qkv"]))
            block.attention.o.weight.copy_(tensors[p + "self_attn.o_proj.weight"])
            block.gate_up.weight.copy_(torch.cat([tensors[f"{p}mlp.{x}_proj.weight"] for x in ("gate", "up")]))
            block.down.weight.copy_(tensors[p + "mlp.down_proj.weight"])
            block.attention_norm.weight.copy_(tensors[p + "input_layernorm.weight"])
            block.mlp_norm.weight.copy_(tensors[p + "post_attention_layernorm.weight"])
    return model


def read_config(folder: PathLike, architecture: str = "LlamaForCausalLM") -> ModelConfig:
    """The architecture of a model folder. Raises FileNotFoundError, ValueError."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: not a model folder")
    return ModelConfig.from_huggingface(json.loads(path.read_text(encoding="utf-8")), architecture)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises FileNotFoundError when it is absent, ValueError when it is damaged."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: not a model folder, or its weights were not fetched (dvc pull)")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it with `dvc checkout` or make it again") from error


def load_model(folder: PathLike, device: str = "cpu") -> Transformer:
    """A decoder from a Hugging Face folder, in fp32 and evaluation mode. Raises FileNotFoundError, ValueError."""
    tensors = read_tensors(Path(folder) / "model.safetensors")
    return from_huggingface(read_config(folder), tensors).to(device).eval()


def save_model(model: Transformer, folder: PathLike, tokenizer: Tokenizer, card: str = "") -> None:
    """Write a folder that transformers, vLLM and thumbwheel load. Equal weights give equal bytes."""
    write_folder(Path(folder), model.config.to_huggingface(), to_huggingface(model), tokenizer, card)


def write_folder(
    folder: Path, config: dict[str, object], tensors: dict[str, Tensor], tokenizer: Tokenizer, card: str
) -> None:
    """Write a model folder under a temporary name, then rename it: it is whole or absent."""
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    generation = {
        "bos_token_id": tokenizer.end_of_text_id,
        "eos_token_id": tokenizer.stop_id,
        "pad_token_id": tokenizer.special["<|pad|>"],
        "do_sample": True,
        "temperature": 1.0,
        "max_new_tokens": 48,
    }
    ids = {key: generation[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (draft / "config.json").write_text(json.dumps({**config, **ids}, indent=2) + "\n", encoding="utf-8")
    (draft / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    (draft / "README.md").write_text(f"---\nlibrary_name: transformers\n---\n{card}\n", encoding="utf-8")
    tokenizer.save(draft)
    weights = draft / "model.safetensors"
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, weights, metadata={"format": "pt"})
    with weights.open("rb") as file:
        os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def model_hash(folder: PathLike) -> str:
    """sha256 (hex) of model.safetensors: the name of a model everywhere. Raises FileNotFoundError."""
    with (Path(folder) / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
