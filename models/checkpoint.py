"""Models on disk: Hugging Face folders (config.json, safetensors in one file or in shards, tokenizer, model card)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import huggingface
from models.config import ModelConfig
from models.huggingface import from_huggingface, to_huggingface
from models.tokenizer import Tokenizer
from models.transformer import Transformer

PathLike = str | os.PathLike[str]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_config(folder: PathLike, head: str = "CausalLM") -> ModelConfig:
    """The architecture of a model folder whose class ends in `head`. Raises FileNotFoundError, ValueError."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: not a model folder")
    return huggingface.read_config(json.loads(path.read_text(encoding="utf-8")), head)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises FileNotFoundError when it is absent, ValueError when it is damaged."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: not a model folder, or its weights were not fetched (dvc pull)")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it with `dvc checkout` or make it again") from error


def read_weights(folder: PathLike) -> dict[str, Tensor]:
    """All tensors of a model folder, in one file or in shards. Raises FileNotFoundError, ValueError."""
    folder = Path(folder)
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        if not (folder / WEIGHTS).exists() and (other := sorted(folder.glob("pytorch_model*.bin"))):
            raise ValueError(f"{other[0]}: pickled weights are not read; save the model as safetensors")
        return read_tensors(folder / WEIGHTS)
    where = _weight_map(folder)
    out: dict[str, Tensor] = {}
    for shard in sorted(set(where.values())):
        found = read_tensors(folder / shard)
        lacking = [name for name, file in where.items() if file == shard and name not in found]
        if lacking:
            raise ValueError(f"{folder / shard} lacks {lacking[0]}, which {INDEX} says it holds")
        out |= found
    return out


def _weight_map(folder: Path) -> dict[str, str]:
    """Which shard holds each tensor. Raises ValueError for an index that is no index, or that leaves the folder."""
    path = folder / INDEX
    try:
        where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not where or any(Path(file).name != file for file in where.values()):
            raise ValueError("weight_map must name files of this folder")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no index of shards: {error}") from error
    return dict(where)


def load_model(folder: PathLike, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Transformer:
    """A decoder of any known family, in evaluation mode; the file's bf16, fp16 or fp32 becomes `dtype`.

    Raises FileNotFoundError, ValueError.
    """
    config = read_config(folder)
    return from_huggingface(config, read_weights(folder), dtype, device).eval()


def save_model(
    model: Transformer,
    folder: PathLike,
    tokenizer: Tokenizer,
    card: str = "",
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | None = None,
) -> None:
    """Write a folder that transformers, vLLM and thumbwheel load, as the family that the model is of.

    Equal weights give equal bytes. dtype: of the file; max_shard_size: bytes a shard holds at most (one tensor may be
    larger), None for one file.
    """
    config = huggingface.write_config(model.config, dtype=dtype)
    tensors = {name: tensor.to(dtype) for name, tensor in to_huggingface(model).items()}
    write_folder(Path(folder), config, tensors, tokenizer, card, max_shard_size)


def write_folder(
    folder: Path,
    config: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    card: str,
    max_shard_size: int | None = None,
) -> None:
    """Write a model folder that is whole or absent."""
    generation = tokenizer.generation_config()
    ids: dict[str, object] = {key: value for key, value in generation.items() if key.endswith("_token_id")}
    with new_folder(folder) as draft:
        _write_json(draft / "config.json", {**config, **ids})
        _write_json(draft / "generation_config.json", generation)
        (draft / "README.md").write_text(f"---\nlibrary_name: transformers\n---\n{card}\n", encoding="utf-8")
        tokenizer.save(draft)
        shards = cut(tensors, max_shard_size)
        for number, shard in enumerate(shards, 1):
            write_tensors(draft / _shard_name(number, len(shards)), shard)
        if len(shards) > 1:
            where = {name: _shard_name(number, len(shards)) for number, shard in enumerate(shards, 1) for name in shard}
            size = sum(map(_size, tensors.values()))
            _write_json(draft / INDEX, {"metadata": {"total_size": size}, "weight_map": where})


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` when all is written: that is whole or absent."""
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    yield draft
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file as transformers and PEFT write it, on the disk when this returns."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})
    with path.open("rb") as file:
        os.fsync(file.fileno())


def cut(tensors: Mapping[str, Tensor], limit: int | None) -> list[dict[str, Tensor]]:
    """Tensors in their order, cut where a shard would pass `limit` bytes. Raises ValueError for a limit below 1."""
    if limit is not None and limit < 1:
        raise ValueError(f"max_shard_size must be at least 1 byte, not {limit}")
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if limit is not None and shards[-1] and used + _size(tensor) > limit:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += _size(tensor)
    return shards


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shard_name(number: int, count: int) -> str:
    return WEIGHTS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def model_hash(folder: PathLike) -> str:
    """sha256 (hex) of model.safetensors: the name of a model everywhere. Raises FileNotFoundError, ValueError.

    Of a model in shards it is the sha256 of the shards' digests end to end, in the order of their names.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return _digest(folder / WEIGHTS).hex()
    shards = sorted(set(_weight_map(folder).values()))
    return hashlib.sha256(b"".join(_digest(folder / shard) for shard in shards)).hexdigest()


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
