"""Token arrays on disk: a stream of pretraining text, and sequences (conversations, prompts) laid end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.chat_template import Messages
from models.tokenizer import ROLES, HuggingFaceTokenizer, Tokenizer


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
    def none(cls) -> Sequences:
        """No sequence at all."""
        return cls(np.zeros(0, np.uint16), np.zeros(0, bool), np.zeros(1, np.int64))

    def then(self, more: Sequences, times: int = 1) -> Sequences:
        """These, and after them those of `more`, `times` over."""
        parts = [self, *[more] * times]
        lengths = np.concatenate([np.diff(part.offsets) for part in parts])
        return Sequences(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.learned for part in parts]),
            np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        )

    @classmethod
    def load(cls, path: Path) -> Sequences:
        """Read what save wrote."""
        with np.load(path, allow_pickle=False) as data:
            return cls(data["tokens"], data["learned"], data["offsets"])


def _encode(tokenizer: Tokenizer, rows: Sequence[Messages], longest: int, answering: bool) -> tuple[Sequences, int]:
    """All conversations by the chat template, `longest` tokens at most; how many were longer. Equal, id by id, to
    Tokenizer.encode_chat_with_mask, but each of the tokenizer's threads works."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _encode_by_template(tokenizer, rows, longest, answering)
    words = iter(tokenizer.encode_batch([message["content"] for messages in rows for message in messages]))
    role_ids = {role: tokenizer.special[token] for role, token in ROLES.items()}
    tokens: list[int] = []
    segments: list[int] = []  # lengths of alternating runs: outside the loss, in the loss, outside, …
    lengths: list[int] = []
    dropped = 0
    for messages in rows:
        ids: list[int] = []
        runs: list[int] = []
        for message in messages:
            content = next(words)
            learned = message["role"] == "assistant"
            ids += [role_ids[message["role"]], *content, tokenizer.stop_id]
            runs += [1, len(content) + 1] if learned else [len(content) + 2, 0]
        if answering:
            ids.append(role_ids["assistant"])
            runs += [1, 0]
        if len(ids) > longest:
            dropped += 1
            continue
        tokens += ids
        segments += runs
        lengths.append(len(ids))
    learned_runs = np.tile(np.array([False, True]), len(segments) // 2)
    array = np.array(tokens, dtype=token_dtype(tokenizer.vocab_size))
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    return Sequences(array, np.repeat(learned_runs, segments), offsets), dropped


def _encode_by_template(
    tokenizer: Tokenizer, rows: Sequence[Messages], longest: int, answering: bool
) -> tuple[Sequences, int]:
    """As _encode, conversation by conversation."""
    kept: list[list[tuple[int, bool]]] = []
    for messages in rows:
        if answering:
            pairs = [(id, False) for id in tokenizer.encode_chat(messages)]
        else:
            pairs = tokenizer.encode_chat_with_mask(messages)
        if len(pairs) <= longest:
            kept.append(pairs)
    flat = [pair for pairs in kept for pair in pairs]
    tokens = np.array([id for id, _ in flat], dtype=token_dtype(tokenizer.vocab_size))
    offsets = np.concatenate([[0], np.cumsum([len(pairs) for pairs in kept], dtype=np.int64)]).astype(np.int64)
    return Sequences(tokens, np.array([learned for _, learned in flat], dtype=bool), offsets), len(rows) - len(kept)


def text_stream(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Documents end to end, each after the end-of-text token: [tokens]."""
    ids: list[int] = []
    for document in tokenizer.encode_batch(texts):
        ids.append(tokenizer.end_of_text_id)
        ids += document
    return np.array(ids, dtype=token_dtype(tokenizer.vocab_size))


def conversations(tokenizer: Tokenizer, rows: Sequence[Messages], longest: int) -> tuple[Sequences, int]:
    """Conversations for SFT, and how many were left out for being longer than `longest` tokens (never cut mid-answer)."""
    return _encode(tokenizer, rows, longest, answering=False)


def prompts(tokenizer: Tokenizer, rows: Sequence[Messages], longest: int) -> tuple[Sequences, int]:
    """Prompts up to where the assistant speaks, and how many were left out for being longer than `longest` tokens."""
    return _encode(tokenizer, rows, longest, answering=True)
