"""Training batches: closed ranges of the event log, and which opinion went into which one, or why not."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from feedback.opinions import canonical
from feedback.tables import BatchItemRow, BatchRow, CompletionRow, EventRow, FeedbackRow, table_of

batch = table_of(BatchRow)
item = table_of(BatchItemRow)
feedback = table_of(FeedbackRow)
completion = table_of(CompletionRow)
event_log = table_of(EventRow)

# an opinion of an earlier batch that changed: its new state replaces the old one, it is not counted again
REVISED = "revised"


@dataclass(frozen=True)
class Pending:
    """Opinions that the next batch would accept; oldest_at: when the oldest of them was first said (UTC), None if none."""

    count: int
    oldest_at: datetime | None


@dataclass(frozen=True)
class Batch:
    """The events first_seq to last_seq, and how many opinions in them were accepted and left out, by reason.

    erased: how many of the accepted ones had to be deleted since; snapshot_sha256: of the files that the run learned from.
    """

    id: int
    first_seq: int
    last_seq: int
    accepted: int
    excluded: dict[str, int]
    erased: int
    sha256: str
    snapshot_sha256: str | None
    opened_at: datetime
    consumed_at: datetime | None
    mlflow_run_id: str | None


@dataclass(frozen=True)
class Opinion:
    """What training reads: token ids as they were sampled (never text tokenised again), and what was said of them."""

    feedback_id: int
    batch_id: int
    seq: int
    completion_id: str
    subject: str
    kind: str
    value: int
    source: str
    model_hash: str
    prompt_ids: list[int]
    response_ids: list[int]
    messages: list[dict[str, str]]
    response: str

    def content(self) -> dict[str, Any]:
        """What is said of what, without ids and times: equal opinions have equal content."""
        return content(self)


def content(row: Any) -> dict[str, Any]:
    """The learnable content of an Opinion, or of a row with the same names."""
    keys = ("kind", "prompt_ids", "response_ids", "messages", "response", "value", "source", "model_hash")
    return {key: getattr(row, key) for key in keys}


# columns of an opinion that the completion gives
ANSWER = (
    completion.c.model_hash,
    completion.c.prompt_token_ids.label("prompt_ids"),
    completion.c.response_token_ids.label("response_ids"),
    completion.c.request_messages.label("messages"),
    completion.c.response,
)


def closed_up_to(connection: sa.Connection) -> int:
    """The last number of the log that stands in a batch; 0 before the first batch."""
    return int(connection.execute(sa.select(sa.func.coalesce(sa.func.max(batch.c.last_seq), 0))).scalar_one())


def stands() -> sa.ColumnElement[bool]:
    """SQL: the opinion is one to learn from. `verdict` says the same in Python, with the reason."""
    return sa.and_(
        sa.not_(feedback.c.retracted),
        feedback.c.moderation == "accepted",
        feedback.c.value != 0,
        completion.c.status == "complete",
    )


def verdict(row: Any, accepted_before: bool) -> str:
    """Why an opinion is left out of a batch, or "" when it is accepted."""
    if accepted_before:
        return REVISED
    if row.retracted:
        return "retracted"
    if row.moderation != "accepted":
        return str(row.moderation)
    if row.value == 0:
        return "neutral"
    return "" if row.status == "complete" else "unfinished"


def waiting(connection: sa.Connection) -> sa.ColumnElement[bool]:
    """SQL: the next batch would accept this opinion."""
    accepted = sa.exists().where(item.c.feedback_id == feedback.c.id, item.c.accepted)
    return sa.and_(stands(), feedback.c.last_seq > closed_up_to(connection), sa.not_(accepted))


def count(connection: sa.Connection, *, model_hash: str | None, source: str | None, pending_only: bool) -> int:
    """See Store.count_opinions."""
    query = sa.select(sa.func.count()).select_from(feedback.join(completion))
    query = query.where(waiting(connection) if pending_only else stands())
    if model_hash is not None:
        query = query.where(completion.c.model_hash == model_hash)
    if source is not None:
        query = query.where(feedback.c.source == source)
    return int(connection.execute(query).scalar_one())


def pending(connection: sa.Connection) -> Pending:
    """See Store.pending."""
    query = sa.select(sa.func.count(), sa.func.min(feedback.c.created_at)).select_from(feedback.join(completion))
    number, oldest = connection.execute(query.where(waiting(connection))).one()
    return Pending(number, oldest)


def open_batch(connection: sa.Connection, minimum: int) -> Batch | None:
    """Close the open range of the log, under the store's write lock; see Store.open_batch.

    Under that lock nobody writes, so the current rows are exactly the states at the end of the range.
    """
    first = closed_up_to(connection) + 1
    last = connection.execute(sa.select(sa.func.max(event_log.c.seq))).scalar()
    if last is None or last < first:
        return None
    rows = changed_opinions(connection, first)
    before = set(
        connection.execute(
            sa.select(item.c.feedback_id)
            .join(feedback, feedback.c.id == item.c.feedback_id)
            .where(item.c.accepted, feedback.c.last_seq >= first)
        ).scalars()
    )
    reasons = {row.id: verdict(row, row.id in before) for row in rows}
    counts = Counter(reasons.values())
    if counts[""] < minimum:
        return None
    values = {
        "first_seq": first,
        "last_seq": last,
        "accepted": counts.pop("", 0),
        "excluded": dict(sorted(counts.items())),
        "erased": 0,
        "snapshot_sha256": None,
        "sha256": digest(rows, reasons),
        "opened_at": datetime.now(UTC),
        "consumed_at": None,
        "mlflow_run_id": None,
    }
    key = connection.execute(sa.insert(batch).values(**values)).inserted_primary_key
    assert key is not None
    items = [
        {
            "batch_id": key[0],
            "feedback_id": r.id,
            "seq": r.last_seq,
            "accepted": not reasons[r.id],
            "reason": reasons[r.id],
        }
        for r in rows
    ]
    connection.execute(sa.insert(item), items)
    return Batch(id=key[0], **values)


def changed_opinions(connection: sa.Connection, first: int) -> list[sa.Row[Any]]:
    """Opinions whose newest event is `first` or later, with what they are about."""
    columns = [feedback.c[k] for k in ("id", "last_seq", "kind", "value", "source", "retracted", "moderation")]
    query = sa.select(*columns, completion.c.status, *ANSWER).select_from(feedback.join(completion))
    return list(connection.execute(query.where(feedback.c.last_seq >= first).order_by(feedback.c.id)))


def digest(rows: list[sa.Row[Any]], reasons: dict[int, str]) -> str:
    """sha256 over what a batch changes in what is learned: the content of accepted and revised opinions, in one order."""
    lines = []
    for row in rows:
        reason = reasons[row.id]
        if reason == REVISED:
            lines.append(canonical([REVISED, verdict(row, False), content(row)]))
        elif not reason:
            lines.append(canonical(["accepted", "", content(row)]))
    return hashlib.sha256(b"\n".join(sorted(lines))).hexdigest()


def listed(connection: sa.Connection, *, only_open: bool) -> list[Batch]:
    """Batches, oldest first."""
    query = sa.select(batch).order_by(batch.c.id)
    if only_open:
        query = query.where(batch.c.consumed_at.is_(None))
    return [Batch(**row._mapping) for row in connection.execute(query)]


def consume(connection: sa.Connection, batch_id: int, mlflow_run_id: str | None) -> Batch:
    """See Store.consume_batch."""
    values = {"consumed_at": datetime.now(UTC), "mlflow_run_id": mlflow_run_id}
    connection.execute(sa.update(batch).where(batch.c.id == batch_id, batch.c.consumed_at.is_(None)).values(**values))
    row = connection.execute(sa.select(batch).where(batch.c.id == batch_id)).first()
    if row is None:
        raise KeyError(f"there is no batch {batch_id}")
    return Batch(**row._mapping)


def manifest(connection: sa.Connection) -> dict[str, Any]:
    """See Store.manifest."""
    keys = ("id", "first_seq", "last_seq", "accepted", "sha256")
    return {"batches": [{key: getattr(b, key) for key in keys} for b in listed(connection, only_open=False)]}


def check_manifest(connection: sa.Connection, entries: list[dict[str, Any]]) -> None:
    """Raises ValueError when a batch of the manifest is not in this database, or differs from it."""
    known = {entry["id"]: entry for entry in manifest(connection)["batches"]}
    for entry in entries:
        if known.get(entry["id"]) != entry:
            state = "differs from" if entry["id"] in known else "is not in"
            raise ValueError(
                f"feedback.manifest.json: batch {entry['id']} {state} the feedback database; "
                "point THUMBWHEEL_DATABASE_URL at the database it was made from, or write the manifest again"
            )


def opinions(connection: sa.Connection, manifest: dict[str, Any]) -> Iterator[Opinion]:
    """See Store.opinions. The states come from the log, so people may go on voting meanwhile."""
    entries = list(manifest["batches"])
    check_manifest(connection, entries)
    if not entries:
        return
    last = max(entry["last_seq"] for entry in entries)
    newest = (
        sa.select(event_log.c.feedback_id, sa.func.max(event_log.c.seq).label("seq"))
        .where(event_log.c.seq <= last)
        .group_by(event_log.c.feedback_id)
        .subquery()
    )
    query = (
        sa.select(
            item.c.feedback_id,
            item.c.batch_id,
            event_log.c.seq,
            feedback.c.completion_id,
            feedback.c.subject,
            feedback.c.kind,
            event_log.c.payload,
            *ANSWER,
        )
        .select_from(item)
        .join(newest, newest.c.feedback_id == item.c.feedback_id)
        .join(event_log, event_log.c.seq == newest.c.seq)
        .join(feedback, feedback.c.id == item.c.feedback_id)
        .join(completion, completion.c.id == feedback.c.completion_id)
        .where(item.c.accepted, item.c.batch_id.in_([entry["id"] for entry in entries]))
        .order_by(item.c.feedback_id)
    )
    for row in connection.execute(query):
        fields = dict(row._mapping)
        state = fields.pop("payload")
        if state["retracted"] or state["moderation"] != "accepted" or state["value"] == 0:
            continue
        yield Opinion(value=state["value"], source=state["source"], **fields)
