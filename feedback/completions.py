"""Completions: what was asked and what a model answered, in token ids and in text."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from uuid6 import uuid7

from feedback.tables import CompletionRow, table_of

table = table_of(CompletionRow)
# the statements of every request are built once: building costs SQLAlchemy more than running them
INSERT = sa.insert(table)
REPLAY = sa.select(table).where(table.c.subject == sa.bindparam("by"), table.c.idempotency_key == sa.bindparam("key"))


def new_id() -> str:
    """An id that sorts by time."""
    return f"chatcmpl-{uuid7().hex}"


@dataclass(frozen=True)
class Completion:
    """One answer. Token ids are the truth, `response` is their text; logprobs in nats; times in milliseconds and UTC."""

    id: str
    subject: str
    request_sha256: str
    request_messages: list[dict[str, str]]
    sampling: dict[str, Any]
    model_hash: str
    prompt_token_ids: list[int]
    response: str = ""
    response_token_ids: list[int] = field(default_factory=list)
    response_logprobs: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    status: str = "streaming"
    finish_reason: str | None = None
    error: str | None = None
    idempotency_key: str | None = None
    conversation: str = ""
    turn: int = 0
    parent: str | None = None
    model_alias: str = "champion"
    origin: str = "decoder"
    mlflow_run_id: str | None = None
    data_revision: str | None = None
    code_revision: str | None = None
    first_token_ms: float | None = None
    total_ms: float | None = None
    locale: str = ""
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    finished_at: datetime | None = None


def insert(connection: sa.Connection, completion: Completion) -> None:
    """Write a new answer. Raises sqlalchemy.exc.IntegrityError when its id, or its subject's key, is taken.

    Token counts that are 0 are those of the token ids; an engine that tells counts only gives them itself.
    """
    counts = {
        "prompt_tokens": completion.prompt_tokens or len(completion.prompt_token_ids),
        "completion_tokens": completion.completion_tokens or len(completion.response_token_ids),
    }
    connection.execute(INSERT, {**vars(completion), **counts})


def finish(connection: sa.Connection, completion_id: str, values: dict[str, Any]) -> None:
    """Write the end of an answer that was inserted as streaming; `values` are columns of the table.

    An answer that was erased meanwhile stays erased.
    """
    streaming = (table.c.id == completion_id) & (table.c.status == "streaming")
    connection.execute(sa.update(table).where(streaming).values(**values))


def get(connection: sa.Connection, completion_id: str) -> Completion | None:
    """The answer with this id, or None."""
    row = connection.execute(sa.select(table).where(table.c.id == completion_id)).first()
    return Completion(**row._mapping) if row else None


def replay(connection: sa.Connection, subject: str, idempotency_key: str) -> Completion | None:
    """The answer that this subject already got under this key, or None."""
    row = connection.execute(REPLAY, {"by": subject, "key": idempotency_key}).first()
    return Completion(**row._mapping) if row else None
