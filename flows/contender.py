"""Who is judged, and on what: model folders that take part, and the prompts that all of them answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from models.checkpoint import load_model, model_hash
from models.tokenizer import Tokenizer
from models.transformer import Transformer


@dataclass(frozen=True)
class Prompt:
    """A prompt of the report's bucket and the random stream that all models answer it with."""

    id: str
    messages: list[dict[str, str]]
    seed: int

    @property
    def text(self) -> str:
        """What the user said last."""
        return self.messages[-1]["content"]


class Contender:
    """A model folder that takes part: weights, tokenizer and hash, each loaded once."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder, self.device = folder, device
        self.hash = model_hash(folder)

    @cached_property
    def model(self) -> Transformer:
        """The decoder, in evaluation mode."""
        return load_model(self.folder, self.device)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The folder's own tokenizer."""
        return Tokenizer.load(self.folder)

    def speaks_as(self, other: Contender) -> bool:
        """Whether both have the same tokens, so that their probabilities can be compared token by token."""
        return (self.folder / "tokenizer.json").read_bytes() == (other.folder / "tokenizer.json").read_bytes()


def read_prompts(path: Path, seed: int) -> list[Prompt]:
    """The prompts of the report's bucket, in the order of their ids (which are hashes: a shuffle that never changes)."""
    with path.open(encoding="utf-8") as file:
        rows = sorted((json.loads(line) for line in file), key=lambda row: row["id"])
    return [Prompt(row["id"], row["messages"], stream_seed(seed, row["id"])) for row in rows]


def stream_seed(seed: int, name: str) -> int:
    """A number for one prompt's random stream."""
    return int(hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()[:8], 16)


def fitting(prompts: list[Prompt], contenders: Sequence[Contender], max_new_tokens: int) -> list[Prompt]:
    """The prompts that leave every contender room for a whole answer, so that all answer the same ones."""
    tongues = {(c.folder / "tokenizer.json").read_bytes(): c.tokenizer for c in contenders}
    room = min(c.model.config.context_length for c in contenders) - max_new_tokens
    return [p for p in prompts if all(len(t.encode_chat(p.messages)) <= room for t in tongues.values())]
