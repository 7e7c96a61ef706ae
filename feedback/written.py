"""What people write themselves, before anything learns from it: their own answers and the questions they asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from feedback.opinions import canonical, sha256

Messages = list[dict[str, str]]


def _as_it_is(messages: Messages) -> Messages:
    return messages


def _nobody(messages: Messages) -> bool:
    return False


@dataclass(frozen=True)
class Rules:
    """What may be learned of that, as the pipeline says (flows.written makes them).

    clean: gives a conversation as it is to be learned; raises ValueError, with the reason, for one that must not be;
    held: whether the prompt is one that figures are taken on, so that nothing may learn from what people wrote to it.
    """

    clean: Callable[[Messages], Messages] = _as_it_is
    held: Callable[[Messages], bool] = _nobody


@dataclass
class Quarantine:
    """What was not let through, with the reason; equal rows are one."""

    rows: set[bytes] = field(default_factory=set)

    def add(self, kind: str, messages: Messages, error: ValueError) -> None:
        """kind: "answer" or "prompt"."""
        self.rows.add(canonical({"kind": kind, "messages": messages, "reason": str(error)}))


def curated(messages: Messages) -> bytes:
    """A line as the stage curate writes them: what a row is named after is its content."""
    return canonical({"id": sha256(messages)[:16], "source": "feedback", "messages": messages})


def conversation(messages: Messages, correction: str) -> Messages:
    """The messages, and a person's own answer to them."""
    return [*messages, {"role": "assistant", "content": correction}]


def pair(lesson: dict[str, Any], chosen: str, chosen_ids: list[int]) -> dict[str, Any] | None:
    """The comparison that an edit says: the person's own answer was preferred to the model's. None where they are one.

    lesson: as feedback.lessons makes it of an edit; chosen: the own answer, as it is to be learned, with its token ids, which
    are made of text in any case: `written` says so.
    """
    if chosen_ids == lesson["response_ids"]:
        return None
    kept: dict[str, Any] = {
        key: lesson[key] for key in ("prompt_ids", "messages", "source", "model_hash", "tokenised") if key in lesson
    }
    return {
        **kept,
        "kind": "comparison",
        "chosen_ids": chosen_ids,
        "chosen": chosen,
        "rejected_ids": lesson["response_ids"],
        "rejected": lesson["response"],
        "rejected_model_hash": lesson["model_hash"],
        "strength": 1.0,
        "written": True,
    }
