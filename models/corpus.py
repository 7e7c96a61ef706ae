"""Token arrays on disk: a stream of pretraining text, and sequences (conversations, prompts) laid end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.tokenizer import Messages, Tokenizer


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest type that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


@dataclass(frozen=True)
class Sequences:
    """Sequences of token ids laid end to end: tokens [N], learned [N] (in the SFT loss), offsets [count + 1]."""

    tokens: np.ndarray
    learned: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> list[int]:
        """The ids of sequence i."""
        return [int(t) for t in self.tokens[self.offsets[i] : self.offsets[i + 1]]]

    def mask(self, i: int) -> list[bool]:
        """Which ids of sequence i are in the loss."""
        return [bool(m) for m in self.learned[self.offsets[i] : self.offsets[i + 1]]]

    def save(self, path: Path) -> None:
        """Write as .npz, without times: equal content gives equal bytes."""
        with path.open("wb") as file:
            np.savez(file, tokens=self.tokens, learned=self.learned, offsets=self.offsets)

    @classmethod
    def load(cls, path: Path) -> Sequences:
        """Read what save wrote."""
        with np.load(path, allow_pickle=False) as data:
            return cls(data["tokens"], data["learned"], data["offsets"])


def _pack(rows: Sequence[Sequence[tuple[int, bool]]], vocab_size: int) -> Sequences:
    flat = [pair for row in rows for pair in row]
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
    tokens = np.array([t for t, _ in flat], dtype=token_dtype(vocab_size))
    return Sequences(tokens, np.array([m for _, m in flat], dtype=bool), offsets)


def text_stream(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Documents end to end, each after the end-of-text token: [tokens]."""
    ids: list[int] = []
    for document in tokenizer.encode_batch(texts):
        ids.append(tokenizer.end_of_text_id)
        ids += document
    return np.array(ids, dtype=token_dtype(tokenizer.vocab_size))


def conversations(tokenizer: Tokenizer, rows: Sequence[Messages], longest: int) -> tuple[Sequences, int]:
    """Conversations for SFT, and how many were left out for being longer than `longest` tokens (never cut mid-answer)."""
    encoded = [tokenizer.encode_chat_with_mask(messages) for messages in rows]
    kept = [row for row in encoded if len(row) <= longest]
    return _pack(kept, tokenizer.vocab_size), len(encoded) - len(kept)


def prompts(tokenizer: Tokenizer, rows: Sequence[Messages], longest: int) -> tuple[Sequences, int]:
    """Prompts up to where the assistant speaks, and how many were left out for being longer than `longest` tokens."""
    encoded = [[(id, False) for id in tokenizer.encode_chat(messages)] for messages in rows]
    kept = [row for row in encoded if len(row) <= longest]
    return _pack(kept, tokenizer.vocab_size), len(encoded) - len(kept)
