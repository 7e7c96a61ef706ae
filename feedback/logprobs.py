"""Log-probabilities as OpenAI's clients read them: each token of an answer with its bytes and its logarithm in nats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Token:
    """A token of an answer's text; a character may be spread over the bytes of several."""

    bytes: bytes
    logprob: float


def alphabet() -> dict[str, int]:
    """How byte-level tokenizers spell bytes: those that print as themselves, the others from U+0100 on (GPT-2's table)."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


ALPHABET = alphabet()


def bytes_of(spelled: str | None, text: str) -> bytes:
    """A token's bytes, from how a byte-level vocabulary spells it; those of its text where another kind spells it."""
    if spelled is None or any(sign not in ALPHABET for sign in spelled):
        return text.encode()
    return bytes(ALPHABET[sign] for sign in spelled)


def content(tokens: Sequence[Token]) -> dict[str, Any] | None:
    """OpenAI's `logprobs` of a choice; None where there is no token."""
    if not tokens:
        return None
    entries = [
        {
            "token": token.bytes.decode(errors="replace"),
            "logprob": token.logprob,
            "bytes": list(token.bytes),
            "top_logprobs": [],
        }
        for token in tokens
    ]
    return {"content": entries, "refusal": None}
