"""A base model by folder: `model.base` in params.yaml names it, and training starts from it instead of from random weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path

from models.config import ModelOptions

READ = ("config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json", "chat_template.jinja")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True)
class BaseOptions:
    """Keys model.base and model.base_hash of params.yaml.

    base: folder of a model in Hugging Face's format, from the workspace's root or absolute; "" pretrains a decoder.
    base_hash: what stood in it, written by thumbwheel, so that a changed base is noticed.
    """

    base: str = ""
    base_hash: str = ""


@dataclass(frozen=True)
class ModelSection(BaseOptions, ModelOptions):
    """Section `model` of params.yaml: the decoder to pretrain, or a base to start from instead."""

    def shape(self) -> ModelOptions:
        """The decoder to pretrain."""
        return ModelOptions(**{f.name: getattr(self, f.name) for f in fields(ModelOptions)})


def base_hash(folder: Path) -> str:
    """sha256 (16 hex digits) over names and content of what is read of a base. Raises FileNotFoundError."""
    files = sorted({path for pattern in (*READ, *WEIGHTS) for path in folder.glob(pattern)})
    for needed in ("config.json", "tokenizer.json", "*.safetensors"):
        if not any(path.match(needed) for path in files):
            raise FileNotFoundError(
                f"params.yaml: model.base: {folder} holds no {needed}; a model in Hugging Face's format has config.json, "
                "tokenizer.json and *.safetensors"
            )
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(f"{path.name}\0".encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


def open_base(root: Path, options: BaseOptions) -> Path:
    """The base's folder, checked. Raises FileNotFoundError, and ValueError when another model stands there now."""
    folder = root / options.base
    if (found := base_hash(folder)) != options.base_hash:
        raise ValueError(
            f"params.yaml: model.base_hash is {options.base_hash or 'empty'}, but {options.base} is {found}: "
            "`thumbwheel config --write` takes what stands there now"
        )
    return folder
