"""Training batches: closed ranges of the event log, and which opinion went into which one, or why not."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from feedback import lessons, trust
from feedback.lessons import Answer
from feedback.opinions import STATED, canonical
from feedback.tables import BatchItemRow, BatchRow, CompletionRow, EventRow, FeedbackRow, table_of
from feedback.trust_options import TrustOptions

batch = table_of(BatchRow)
item = table_of(BatchItemRow)
feedback = table_of(FeedbackRow)
completion = table_of(CompletionRow)
event_log = table_of(EventRow)

# an opinion of an earlier batch that changed: its new state replaces the old one, it is not counted again
REVISED = "revised"
# more than one rater may bring into a batch: left out, and out of later ones too unless it changes
CAPPED = "capped"


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
    """What was said, and what it teaches: `lesson` as feedback.lessons makes it, `trainable` whether its token ids serve."""

    feedback_id: int
    batch_id: int
    seq: int
    completion_id: str
    subject: str
    kind: str
    value: int
    source: str
    messages: list[dict[str, str]]
    lesson: dict[str, Any]
    trainable: bool


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


def pending(connection: sa.Connection, limits: TrustOptions) -> Pending:
    """See Store.pending."""
    who = sa.case((feedback.c.source.in_(trust.TESTED), feedback.c.subject), else_=None).label("who")
    query = sa.select(who, sa.func.count(), sa.func.min(feedback.c.created_at)).select_from(feedback.join(completion))
    counts, oldest = {}, []
    for subject, number, first in connection.execute(query.where(waiting(connection)).group_by(who)):
        counts[subject] = number
        oldest.append(first)
    free = counts.pop(None, 0)
    most = trust.most_per_rater(counts, free, limits)
    return Pending(free + sum(min(number, most) for number in counts.values()), min(oldest, default=None))


def open_batch(connection: sa.Connection, minimum: int, limits: TrustOptions) -> Batch | None:
    """Close the open range of the log, under the store's write lock; see Store.open_batch.

    Under that lock nobody writes, so the current rows are exactly the states at the end of the range.
    """
    trust.review(connection, limits)
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
    reasons |= dict.fromkeys(over_the_cap(rows, reasons, limits), CAPPED)
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
        "sha256": digest(rows, reasons, known_answers(connection, rows)),
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


def over_the_cap(rows: list[sa.Row[Any]], reasons: dict[int, str], limits: TrustOptions) -> list[int]:
    """The ids of accepted opinions that are more than their rater may bring into a batch: those said last."""
    accepted = [row for row in rows if not reasons[row.id]]
    counts = Counter(row.subject for row in accepted if row.source in trust.TESTED)
    most = trust.most_per_rater(counts, len(accepted) - counts.total(), limits)
    over, brought = [], Counter[str]()
    for row in sorted(accepted, key=lambda row: row.last_seq):
        if row.source in trust.TESTED:
            brought[row.subject] += 1
            if brought[row.subject] > most:
                over.append(row.id)
    return over


def changed_opinions(connection: sa.Connection, first: int) -> list[sa.Row[Any]]:
    """Opinions whose newest event is `first` or later, with the answer that they are about."""
    names = ("id", "completion_id", "subject", "last_seq", "kind", "other", *STATED, "retracted", "moderation")
    query = sa.select(*(feedback.c[name] for name in names), completion.c.status, *lessons.COLUMNS)
    query = query.select_from(feedback.join(completion)).where(feedback.c.last_seq >= first)
    return list(connection.execute(query.order_by(feedback.c.id)))


def known_answers(connection: sa.Connection, rows: Iterable[sa.Row[Any]]) -> dict[str, Answer]:
    """The answers that comparisons and rankings among `rows` are about."""
    return lessons.answers(connection, (id for row in rows for id in lessons.others(row.kind, row._asdict())))


def digest(rows: list[sa.Row[Any]], reasons: dict[int, str], known: dict[str, Answer]) -> str:
    """sha256 over what a batch changes in what is learned: the lessons of accepted and revised opinions, in one order."""
    lines = []
    for row in rows:
        reason = reasons[row.id]
        if reason in ("", REVISED):
            lesson = lessons.lesson(row.kind, row._asdict(), lessons.answer_of(row), known)
            state = ["accepted", ""] if not reason else [REVISED, verdict(row, False)]
            lines.append(canonical([*state, lesson]))
    return hashlib.sha256(b"\n".join(sorted(lines))).hexdigest()


def listed(connection: sa.Connection, *, only_open: bool) -> list[Batch]:
    """Batches, oldest first."""
    query = sa.select(batch).order_by(batch.c.id)
    if only_open:
        query = query.where(batch.c.consumed_at.is_(None))
    return [Batch(**row._asdict()) for row in connection.execute(query)]


def consume(
    connection: sa.Connection, batch_id: int, mlflow_run_id: str | None, snapshot_sha256: str | None = None
) -> Batch:
    """See Store.consume_batch."""
    values = {
        "consumed_at": datetime.now(UTC),
        "mlflow_run_id": mlflow_run_id,
        "snapshot_sha256": snapshot_sha256,
    }
    connection.execute(sa.update(batch).where(batch.c.id == batch_id, batch.c.consumed_at.is_(None)).values(**values))
    row = connection.execute(sa.select(batch).where(batch.c.id == batch_id)).first()
    if row is None:
        raise KeyError(f"there is no batch {batch_id}")
    return Batch(**row._asdict())


def manifest(connection: sa.Connection) -> dict[str, Any]:
    """See Store.manifest."""
    return {"batches": [entry(b) for b in listed(connection, only_open=False)]}


def written_manifest(connection: sa.Connection) -> dict[str, Any]:
    """See Store.written_manifest."""
    changed = item.c.accepted | (item.c.reason == REVISED)
    about = sa.select(item.c.batch_id).join(feedback, feedback.c.id == item.c.feedback_id)
    ids = set(connection.execute(about.where(feedback.c.kind == "edit", changed).distinct()).scalars())
    return {"batches": [entry(b) for b in listed(connection, only_open=False) if b.id in ids]}


def entry(batch: Batch) -> dict[str, Any]:
    """A batch in the manifest. An erasure changes it, so that snapshots are made again without what was erased."""
    keys = ("id", "first_seq", "last_seq", "accepted", "sha256")
    erased = {"erased": batch.erased} if batch.erased else {}
    return {key: getattr(batch, key) for key in keys} | erased


def check_manifest(connection: sa.Connection, entries: list[dict[str, Any]]) -> None:
    """Raises ValueError when a batch of the manifest is not in this database, or differs from it."""
    known = {entry["id"]: entry for entry in manifest(connection)["batches"]}
    for entry in entries:
        if known.get(entry["id"]) != entry:
            if {**known.get(entry["id"], {}), "erased": 0} == {**entry, "erased": 0}:
                raise ValueError(
                    f"the manifest: opinions of batch {entry['id']} were erased on demand since it was written; what was "
                    "learned from them cannot be made again. The next run of align (or, for feedback.manifest.json, retrain) "
                    "writes it anew"
                )
            state = "differs from" if entry["id"] in known else "is not in"
            raise ValueError(
                f"the manifest: batch {entry['id']} {state} the feedback database; "
                "point THUMBWHEEL_DATABASE_URL at the database it was made from, or write the manifest again"
            )


def opinions(
    connection: sa.Connection, manifest: dict[str, Any], retell: Callable[[Answer], Answer]
) -> Iterator[Opinion]:
    """See Store.opinions. The states come from the log, so people may go on voting meanwhile."""
    entries = list(manifest["batches"])
    check_manifest(connection, entries)
    if not entries:
        return
    for rows in connection.execute(newest_states(entries)).partitions(lessons.CHUNK):
        standing = [row for row in rows if stood(row.payload)]
        known = lessons.answers(connection, (id for row in standing for id in lessons.others(row.kind, row.payload)))
        for row in standing:
            yield taught(row, known, retell)


def stood(state: dict[str, Any]) -> bool:
    """Whether an opinion stood when the log noted this state of it."""
    return not state["retracted"] and state["moderation"] == "accepted" and state["value"] != 0


def taught(row: sa.Row[Any], known: dict[str, Answer], retell: Callable[[Answer], Answer]) -> Opinion:
    """The opinion of a row of newest_states, with what it teaches."""
    answer, state = retell(lessons.answer_of(row)), {"strength": 1.0, **row.payload}
    told = {id: retell(known[id]) for id in lessons.others(row.kind, state)}
    lesson = lessons.lesson(row.kind, state, answer, told)
    about = [answer, *told.values()]
    if any(each.tokenised for each in about):
        lesson["tokenised"] = True
    names = ("feedback_id", "batch_id", "seq", "completion_id", "subject", "kind", "messages")
    return Opinion(
        value=state["value"],
        source=state["source"],
        lesson=lesson,
        trainable=lessons.trainable(lesson, about),
        **{name: getattr(row, name) for name in names},
    )


def newest_states(entries: list[dict[str, Any]]) -> sa.Select[Any]:
    """What the batches of a manifest accepted, each opinion with its newest event up to the manifest's end."""
    newest = (
        sa.select(event_log.c.feedback_id, sa.func.max(event_log.c.seq).label("seq"))
        .where(event_log.c.seq <= max(entry["last_seq"] for entry in entries))
        .group_by(event_log.c.feedback_id)
        .subquery()
    )
    opinion = (feedback.c.completion_id, feedback.c.subject, feedback.c.kind)
    return (
        sa.select(item.c.feedback_id, item.c.batch_id, event_log.c.seq, *opinion, event_log.c.payload, *lessons.COLUMNS)
        .select_from(item)
        .join(newest, newest.c.feedback_id == item.c.feedback_id)
        .join(event_log, event_log.c.seq == newest.c.seq)
        .join(feedback, feedback.c.id == item.c.feedback_id)
        .join(completion, completion.c.id == feedback.c.completion_id)
        .where(item.c.accepted, item.c.batch_id.in_([entry["id"] for entry in entries]))
        .order_by(item.c.feedback_id)
    )
