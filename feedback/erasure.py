"""Erasure: a person's words leave the tables, rows without words stay, so that counts and sequence numbers stay true.

Erased are the answers that the person asked for, whoever rated them, and the opinions that the person gave. Their rows lose
every word and token, and their name; the log gets an event for each opinion, so that whoever follows it erases too. The audit
gets an entry that names the person by a hash of a hash (`tombstone`), so that an import does not bring them back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from feedback import audit, labelling, opinions
from feedback.tables import (
    AssignmentRow,
    AuditRow,
    BatchItemRow,
    BatchRow,
    CompletionRow,
    ErasureRow,
    EventRow,
    FeedbackRow,
    table_of,
)

completion, feedback, event_log = (table_of(row) for row in (CompletionRow, FeedbackRow, EventRow))
batch, item, erasure = (table_of(row) for row in (BatchRow, BatchItemRow, ErasureRow))
CHUNK = 500  # ids in one statement
ACT = "subject.erase"
PERSON = "the person"  # who erased, where it was they themselves

NO_WORDS: dict[str, Any] = {
    "value": 0,
    "ranked": [],
    "position": None,
    "reasons": [],
    "comment": "",
    "correction": "",
    "locale": "",
    "retracted": True,
    "moderation": "erased",
    "moderation_reason": "",
}
NO_ANSWER: dict[str, Any] = {
    "status": "erased",
    "conversation": completion.c.id,
    "idempotency_key": None,
    "request_sha256": "",
    "request_messages": [],
    "sampling": {},
    "response": "",
    "prompt_token_ids": [],
    "response_token_ids": [],
    "response_logprobs": [],
    "error": None,
    "locale": "",
}


@dataclass(frozen=True)
class Erasure:
    """What was erased; batches: that had accepted one of the opinions; mlflow_runs: that had learned from those."""

    id: int
    completions: int
    opinions: int
    batches: list[int]
    mlflow_runs: list[str]
    erased_at: datetime
    flagged_at: datetime | None


def erase(connection: sa.Connection, subject: str, actor: str = PERSON) -> Erasure | None:
    """Erase a person, under the store's write lock; None when there was nothing of theirs.

    actor: who does it, for the audit. Somebody else's act is noted even where there was nothing, so that no import brings that
    person in later. On SQLite the bytes are gone from the file after Store.scrub.
    """
    asked = list(connection.execute(sa.select(completion.c.id).where(completion.c.subject == subject)).scalars())
    rows = opinions_about(connection, asked, subject)
    if not asked and not rows and not labelling.touched(connection, subject):
        if actor != PERSON and not erased_before(connection, [subject]):
            audit.record(connection, actor, ACT, tombstone(subject), after={"completions": 0, "opinions": 0})
        return None
    batches = tombstone_batches(connection, [row.id for row in rows])
    values: dict[str, Any] = {
        "completions": len(asked),
        "opinions": len(rows),
        "batches": batches,
        "mlflow_runs": runs_since(connection, batches),
        "erased_at": datetime.now(UTC),
        "flagged_at": None,
    }
    made = connection.execute(sa.insert(erasure), values).inserted_primary_key
    assert made is not None
    nobody = f"erased-{made[0]}"
    counts = {"erasure": made[0], "completions": len(asked), "opinions": len(rows)}
    audit.record(connection, actor, ACT, tombstone(subject), after=counts)
    for ids in chunks(asked):
        connection.execute(sa.update(completion).where(completion.c.id.in_(ids)).values(subject=nobody, **NO_ANSWER))
        labelling.close_about(connection, ids)
    labelling.forget(connection, subject, nobody)
    for row in rows:
        erase_opinion(connection, row, nobody if row.subject == subject else row.subject, values["erased_at"])
    return Erasure(id=made[0], **values)


def tombstone(subject: str) -> str:
    """How the audit calls somebody who was erased. It joins with nothing that stands in the tables, and only who has the
    secret key and the name can make it anew."""
    return "subject:" + opinions.sha256(["erased", subject])[:32]


def erased_before(connection: sa.Connection, subjects: Iterable[str]) -> set[str]:
    """Which of these subjects were erased once."""
    names = {tombstone(subject): subject for subject in subjects}
    acts, found = table_of(AuditRow), set[str]()
    for targets in chunks(sorted(names)):
        query = sa.select(acts.c.target).where(acts.c.target.in_(targets), acts.c.act == ACT)
        found.update(names[target] for target in connection.execute(query).scalars())
    return found


def opinions_about(connection: sa.Connection, asked: list[str], subject: str) -> list[sa.Row[Any]]:
    """The opinions that the person gave, and all on the answers with the ids `asked`; erased ones are not erased again."""
    found = {row.id: row for row in connection.execute(sa.select(feedback).where(feedback.c.subject == subject))}
    for ids in chunks(asked):
        about = feedback.c.completion_id.in_(ids) | (feedback.c.other.in_(ids) & (feedback.c.other != ""))
        found.update({row.id: row for row in connection.execute(sa.select(feedback).where(about))})
    if asked:  # a ranking names all but one of its answers in a list, which no index knows
        mine = set(asked)
        for row in connection.execute(sa.select(feedback).where(feedback.c.kind == "ranking")):
            if not mine.isdisjoint(place["completion_id"] for place in row.ranked):
                found[row.id] = row
    return [found[id] for id in sorted(found) if found[id].moderation != "erased"]


def erase_opinion(connection: sa.Connection, row: sa.Row[Any], subject: str, now: datetime) -> None:
    """Take the words out of an opinion and out of everything that the log says of it, and log that."""
    state = {**row._mapping, **NO_WORDS, "subject": subject}
    for event in connection.execute(sa.select(event_log).where(event_log.c.feedback_id == row.id)).all():
        payload = {"strength": row.strength, **event.payload, **NO_WORDS}
        change: dict[str, Any] = {"subject": subject, "payload": payload, "payload_sha256": opinions.sha256(payload)}
        if subject != row.subject:
            change.update(idempotency_key=None, request_sha256=None)
        connection.execute(sa.update(event_log).where(event_log.c.seq == event.seq).values(**change))
    connection.execute(
        sa.update(feedback)
        .where(feedback.c.id == row.id)
        .values(subject=subject, client_time=None, revision=row.revision + 1, updated_at=now, **NO_WORDS)
    )
    opinions.log(connection, row.id, "erase", {**state, "revision": row.revision + 1}, now, None)


def tombstone_batches(connection: sa.Connection, opinion_ids: list[int]) -> list[int]:
    """Note in each batch how many of the opinions that it accepted are gone; returns those batches, oldest first."""
    counts: Counter[int] = Counter()
    for ids in chunks(opinion_ids):
        query = sa.select(item.c.batch_id).where(item.c.feedback_id.in_(ids), item.c.accepted)
        counts.update(connection.execute(query).scalars())
    for batch_id, number in counts.items():
        connection.execute(sa.update(batch).where(batch.c.id == batch_id).values(erased=batch.c.erased + number))
    return sorted(counts)


def runs_since(connection: sa.Connection, batches: list[int]) -> list[str]:
    """The MLflow runs that learned from the first of these batches or from a later one: each learns from all so far."""
    if not batches:
        return []
    query = sa.select(batch.c.mlflow_run_id).where(batch.c.id >= batches[0], batch.c.mlflow_run_id.is_not(None))
    return sorted(set(connection.execute(query).scalars()))


def unflagged(connection: sa.Connection) -> list[Erasure]:
    """Erasures whose runs and snapshots nobody has seen to yet, oldest first."""
    query = sa.select(erasure).where(erasure.c.flagged_at.is_(None)).order_by(erasure.c.id)
    return [Erasure(**row._asdict()) for row in connection.execute(query)]


def flagged(connection: sa.Connection, erasure_id: int) -> None:
    """Note that an erasure's runs are flagged and its snapshots deleted."""
    change = sa.update(erasure).where(erasure.c.id == erasure_id, erasure.c.flagged_at.is_(None))
    connection.execute(change.values(flagged_at=datetime.now(UTC)))


def chunks(ids: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """At most CHUNK ids at a time."""
    for start in range(0, len(ids), CHUNK):
        yield ids[start : start + CHUNK]


def own(connection: sa.Connection, subject: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Everything of a person: ("completions", row), then "feedback", "events" and "assignments", as plain values."""
    tables = {
        "completions": completion,
        "feedback": feedback,
        "events": event_log,
        "assignments": table_of(AssignmentRow),
    }
    for name, table in tables.items():
        query = sa.select(table).where(table.c.subject == subject).order_by(*table.primary_key.columns)
        for row in connection.execute(query, execution_options={"yield_per": CHUNK}):
            values = row._asdict()
            yield name, {k: v.isoformat() if isinstance(v, datetime) else v for k, v in values.items()}
