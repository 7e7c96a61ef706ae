"""Where opinions went: which batch took one, or why not, and what it said by the end of a batch; rows that were erased too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from feedback.batches import stood
from feedback.lessons import CHUNK
from feedback.tables import BatchItemRow, BatchRow, CompletionRow, EventRow, FeedbackRow, table_of

feedback, completion, event_log = (table_of(row) for row in (FeedbackRow, CompletionRow, EventRow))
batch, item = table_of(BatchRow), table_of(BatchItemRow)


@dataclass(frozen=True)
class Place:
    """An opinion in a batch. accepted, or why not (`reason`; "revised": it was in an earlier one)."""

    batch_id: int
    last_seq: int
    accepted: bool
    reason: str
    consumed_at: datetime | None
    mlflow_run_id: str | None
    snapshot_sha256: str | None


@dataclass(frozen=True)
class Whereabouts:
    """One opinion: what it says now, and its batches, oldest first. messages: what was asked, [] where that was erased."""

    id: int
    completion_id: str
    kind: str
    value: int
    source: str
    moderation: str
    retracted: bool
    said_at: datetime
    model_hash: str
    messages: list[dict[str, str]]
    places: list[Place]
    states: list[tuple[int, bool]]  # (number in the log, whether it stood from there on)

    def stood_at(self, seq: int) -> bool:
        """Whether it stood when the log had come to this number."""
        return next((stood for number, stood in reversed(self.states) if number <= seq), False)


def find(connection: sa.Connection, name: str) -> list[Whereabouts]:
    """The opinions on an answer (its id), or the opinion with a number; [] when there is none."""
    about = feedback.c.completion_id == name
    if name.isdecimal() and len(name) < 19:
        about = sa.or_(about, feedback.c.id == int(name))
    columns = ("id", "completion_id", "kind", "value", "source", "moderation", "retracted")
    query = (
        sa.select(
            *(feedback.c[column] for column in columns),
            feedback.c.created_at.label("said_at"),
            completion.c.model_hash,
            completion.c.request_messages.label("messages"),
        )
        .select_from(feedback.join(completion))
        .where(sa.or_(about, (feedback.c.other == name) & (feedback.c.other != "")))
        .order_by(feedback.c.id)
    )
    return [
        Whereabouts(**row._mapping, places=places(connection, row.id), states=states(connection, row.id))
        for row in connection.execute(query).all()
    ]


def places(connection: sa.Connection, feedback_id: int) -> list[Place]:
    """The batches that an opinion is in, oldest first."""
    names = ("last_seq", "consumed_at", "mlflow_run_id", "snapshot_sha256")
    query = (
        sa.select(item.c.batch_id, item.c.accepted, item.c.reason, *(batch.c[name] for name in names))
        .join(batch, batch.c.id == item.c.batch_id)
        .where(item.c.feedback_id == feedback_id)
        .order_by(item.c.batch_id)
    )
    return [Place(**row._mapping) for row in connection.execute(query)]


def states(connection: sa.Connection, feedback_id: int) -> list[tuple[int, bool]]:
    """The history of an opinion, oldest first. What was erased stood until it was: the log keeps no word, but the fact."""
    query = sa.select(event_log.c.seq, event_log.c.op, event_log.c.payload).where(
        event_log.c.feedback_id == feedback_id
    )
    rows = connection.execute(query.order_by(event_log.c.seq)).all()
    gone = any(row.op == "erase" for row in rows)
    return [(row.seq, row.op != "erase" if gone else stood(row.payload)) for row in rows]


def counts(connection: sa.Connection, batch_ids: Iterable[int]) -> dict[int, dict[str, Any]]:
    """What each of these batches holds: {"accepted", "excluded", "erased", "said": {"thumb +1": 12, "edit": 3, …}}.

    said: the accepted ones by kind and, for thumbs and experts' judgements, by what they say now.
    """
    found: dict[int, dict[str, Any]] = {}
    ids = sorted(set(batch_ids))
    for start in range(0, len(ids), CHUNK):
        part = ids[start : start + CHUNK]
        for row in connection.execute(sa.select(batch).where(batch.c.id.in_(part)).order_by(batch.c.id)):
            totals = {"accepted": row.accepted, "excluded": dict(row.excluded), "erased": row.erased}
            found[row.id] = {**totals, "said": Counter[str]()}
        query = (
            sa.select(
                item.c.batch_id, feedback.c.kind, feedback.c.value, feedback.c.moderation, sa.func.count().label("n")
            )
            .join(feedback, feedback.c.id == item.c.feedback_id)
            .where(item.c.batch_id.in_(part), item.c.accepted)
            .group_by(item.c.batch_id, feedback.c.kind, feedback.c.value, feedback.c.moderation)
        )
        for row in connection.execute(query):
            found[row.batch_id]["said"][word(row.kind, row.value, row.moderation)] += row.n
    return {id: {**values, "said": dict(sorted(values["said"].items()))} for id, values in found.items()}


def word(kind: str, value: int, moderation: str) -> str:
    """What an opinion is counted as."""
    if moderation == "erased":
        return "erased"
    return f"{kind} {value:+d}" if kind in ("thumb", "expert") else kind
