"""A model from one format to another: Hugging Face folders (any dtype, in shards or not) and GGUF files."""

from __future__ import annotations

from pathlib import Path

import torch

from models.checkpoint import load_model, save_model
from models.gguf_file import TYPES, load_gguf, save_gguf
from models.tokenizer import Tokenizer

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def convert(source: Path, target: Path, dtype: str = "", max_shard_size: int | None = None) -> None:
    """Read `source`, a folder or a *.gguf, and write `target`, likewise; it must not exist yet.

    dtype: f32, f16, or for a folder bf16, for a GGUF q8_0; without one a folder gets f32 and a GGUF f16.
    max_shard_size: bytes of a folder's shard. Raises FileExistsError, FileNotFoundError, ImportError, ValueError.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists: name a new one")
    known = TYPES if target.suffix == ".gguf" else DTYPES
    if dtype and dtype not in known:
        raise ValueError(f"{target.name} can hold {', '.join(known)}, not {dtype!r}")
    if max_shard_size is not None and target.suffix == ".gguf":
        raise ValueError(f"{target.name} is one file: max_shard_size belongs to folders")
    packed = source.suffix == ".gguf"
    model, tokenizer = load_gguf(source) if packed else (load_model(source), Tokenizer.load(source))
    if target.suffix == ".gguf":
        save_gguf(model, target, tokenizer, weights=dtype or "f16", name=source.resolve().stem)
        return
    card = f"# {target.name}\n\nConverted from {source.name} by thumbwheel."
    save_model(model, target, tokenizer, card, dtype=DTYPES[dtype or "f32"], max_shard_size=max_shard_size)
