"""Opinions: one row per (answer, subject, kind, other), and the log of everything that happened to it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from feedback.tables import CompletionRow, EventRow, FeedbackRow, table_of

feedback = table_of(FeedbackRow)
event_log = table_of(EventRow)
completion = table_of(CompletionRow)

# the statements of every vote are built once: building costs SQLAlchemy more than running them
STATUS = sa.select(completion.c.status).where(completion.c.id == sa.bindparam("id"))
ANSWERS = sa.select(completion.c.id, completion.c.status, completion.c.request_messages).where(
    completion.c.id.in_(sa.bindparam("ids", expanding=True))
)
FIND = sa.select(feedback).where(
    *(feedback.c[name] == sa.bindparam(name) for name in ("completion_id", "subject", "kind", "other"))
)
INSERT, APPEND = sa.insert(feedback), sa.insert(event_log)
POINT = sa.update(feedback).where(feedback.c.id == sa.bindparam("of")).values(last_seq=sa.bindparam("to"))

# what a vote may set; the rest of the row is ours
STATED = ("value", "reasons", "comment", "correction", "source", "channel", "locale", "position", "ranked", "strength")


class Refused(Exception):
    """The request cannot be carried out, and nothing was written. `status` is the HTTP status that says so."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass(frozen=True)
class Vote:
    """What somebody said of an answer, or of several to one prompt; made by hand, or by feedback.comparisons.

    value: -1, 0 or 1; other, ranked, strength, position: as in FeedbackRow; retracted: they took it back.
    """

    completion_id: str
    subject: str
    kind: str = "thumb"
    value: int = 0
    other: str = ""
    reasons: list[str] = field(default_factory=list)
    comment: str = ""
    correction: str = ""
    source: str = "human_user"
    channel: str = "api"
    locale: str = ""
    position: int | None = None
    ranked: list[Any] = field(default_factory=list)
    strength: float = 1.0
    client_time: datetime | None = None
    retracted: bool = False
    idempotency_key: str | None = None
    request_sha256: str | None = None

    def answers(self) -> list[str]:
        """The ids of all answers that it is about."""
        if self.kind == "comparison":
            return [self.completion_id, self.other]
        return [place["completion_id"] for place in self.ranked] or [self.completion_id]


@dataclass(frozen=True)
class Event:
    """One entry of the log: `payload` is the opinion's whole state after `op`."""

    seq: int
    feedback_id: int
    subject: str
    op: str
    payload: dict[str, Any]
    created_at: datetime


def canonical(value: Any) -> bytes:
    """JSON with one spelling: keys sorted, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def sha256(value: Any) -> str:
    """Hex digest of the canonical JSON of `value`."""
    return hashlib.sha256(canonical(value)).hexdigest()


def vote(connection: sa.Connection, vote: Vote) -> tuple[Event, str]:
    """Create, revise or retract an opinion, under the store's write lock. Returns its newest event, and what was done:
    "created", "revised", or "replayed" (the same was already said, or the same key delivered twice: nothing written).

    Raises Refused 404 when there is no such answer (or nothing to retract), 409 while an answer is not finished, 422
    when the key was used for another request, or answers that are compared are not to the same prompt.
    """
    if vote.idempotency_key and (known := replay(connection, vote)):
        return known, "replayed"
    if not vote.retracted:
        check_answers(connection, vote)
    row = find(connection, vote.completion_id, vote.subject, vote.kind, vote.other)
    now = datetime.now(UTC)
    if row is None:
        if vote.retracted:
            raise Refused(404, "feedback_not_found", f"there is no {vote.kind} of yours on {vote.completion_id}")
        return create(connection, vote, now), "created"
    change: dict[str, Any] = {"retracted": True} if vote.retracted else {**stated(vote), "retracted": False}
    if all(getattr(row, key) == value for key, value in change.items()):
        return newest_event(connection, row.id), "replayed"
    if vote.client_time is not None:
        change["client_time"] = vote.client_time
    return revise(connection, row, "retract" if vote.retracted else "revise", change, now, vote), "revised"


def check_answers(connection: sa.Connection, vote: Vote) -> None:
    """Raises Refused when an answer is not there or not finished, or several are not to the same prompt.

    One answer may have been aborted: people may well say something of what they saw. Answers that are compared must be whole.
    """
    ids = vote.answers()
    if len(ids) == 1:
        check_status(ids[0], connection.execute(STATUS, {"id": ids[0]}).scalar(), ("complete", "aborted"))
        return
    found = {row.id: row for row in connection.execute(ANSWERS, {"ids": ids})}
    for id in ids:
        check_status(id, found[id].status if id in found else None, ("complete",))
    if any(row.request_messages != found[ids[0]].request_messages for row in found.values()):
        text = "the answers are to different prompts; only answers to the same messages can be compared"
        raise Refused(422, "prompts_differ", text)


def check_status(completion_id: str, status: str | None, ready: tuple[str, ...]) -> None:
    """Raises Refused 404 when there is no such answer (any more), 409 when its status is not among `ready`."""
    if status in (None, "erased"):
        raise Refused(404, "completion_not_found", f"there is no completion {completion_id}")
    if status not in ready:
        raise Refused(409, "completion_not_finished", f"completion {completion_id} is {status}; rate it when done")


def stated(vote: Vote) -> dict[str, Any]:
    """The columns that a vote sets."""
    return {key: getattr(vote, key) for key in STATED}


def find(connection: sa.Connection, completion_id: str, subject: str, kind: str, other: str = "") -> sa.Row[Any] | None:
    """The row of one opinion, by its natural key."""
    key = {"completion_id": completion_id, "subject": subject, "kind": kind, "other": other}
    return connection.execute(FIND, key).first()


def replay(connection: sa.Connection, vote: Vote) -> Event | None:
    """The event that this subject's key already made, or None. Raises Refused 422 if it came with another request."""
    where = (event_log.c.subject == vote.subject) & (event_log.c.idempotency_key == vote.idempotency_key)
    row = connection.execute(sa.select(event_log).where(where)).first()
    if row is None:
        return None
    if row.request_sha256 != vote.request_sha256:
        raise Refused(
            422, "idempotency_key_reused", "this Idempotency-Key was used for another request; take a new one"
        )
    return as_event(row)


def create(connection: sa.Connection, vote: Vote, now: datetime) -> Event:
    """Write a new opinion and its first event."""
    values = {
        "completion_id": vote.completion_id,
        "subject": vote.subject,
        "kind": vote.kind,
        "other": vote.other,
        **stated(vote),
        "revision": 1,
        "retracted": False,
        "trust": 1.0,
        "moderation": "accepted",
        "moderation_reason": "",
        "last_seq": 0,
        "client_time": vote.client_time,
        "created_at": now,
        "updated_at": now,
    }
    key = connection.execute(INSERT, values).inserted_primary_key
    assert key is not None
    return log(connection, key[0], "create", values, now, vote)


def revise(
    connection: sa.Connection, row: sa.Row[Any], op: str, change: dict[str, Any], now: datetime, vote: Vote | None
) -> Event:
    """Write a new state of an opinion, and the event that says so."""
    change = {**change, "revision": row.revision + 1, "updated_at": now}
    connection.execute(sa.update(feedback).where(feedback.c.id == row.id).values(**change))
    return log(connection, row.id, op, {**row._mapping, **change}, now, vote)


def moderate(connection: sa.Connection, feedback_id: int, state: str, reason: str) -> Event:
    """Set an opinion's moderation, as an event of the log. Raises KeyError when there is no such opinion."""
    row = connection.execute(sa.select(feedback).where(feedback.c.id == feedback_id)).first()
    if row is None:
        raise KeyError(f"there is no opinion {feedback_id}")
    change = {"moderation": state, "moderation_reason": reason}
    return revise(connection, row, "moderate", change, datetime.now(UTC), None)


def log(
    connection: sa.Connection, feedback_id: int, op: str, state: dict[str, Any], now: datetime, vote: Vote | None
) -> Event:
    """Append the state to the log, and note its number on the opinion."""
    keys = ("completion_id", "kind", "other", *STATED, "retracted", "moderation", "moderation_reason", "trust")
    payload = {key: state[key] for key in (*keys, "revision")}
    values = {
        "feedback_id": feedback_id,
        "subject": state["subject"],
        "op": op,
        "payload": payload,
        "payload_sha256": sha256(payload),
        "idempotency_key": vote.idempotency_key if vote else None,
        "request_sha256": vote.request_sha256 if vote else None,
        "created_at": now,
    }
    key = connection.execute(APPEND, values).inserted_primary_key
    assert key is not None
    connection.execute(POINT, {"of": feedback_id, "to": key[0]})
    return Event(key[0], feedback_id, state["subject"], op, payload, now)


def newest_event(connection: sa.Connection, feedback_id: int) -> Event:
    """The event that made an opinion what it is now."""
    where = event_log.c.feedback_id == feedback_id
    return as_event(
        connection.execute(sa.select(event_log).where(where).order_by(event_log.c.seq.desc()).limit(1)).one()
    )


def events(connection: sa.Connection, after_seq: int, limit: int) -> list[Event]:
    """The log after `after_seq`, in order, at most `limit` entries."""
    query = sa.select(event_log).where(event_log.c.seq > after_seq).order_by(event_log.c.seq).limit(limit)
    return [as_event(row) for row in connection.execute(query)]


def as_event(row: sa.Row[Any]) -> Event:
    """A row of the log."""
    return Event(row.seq, row.feedback_id, row.subject, row.op, row.payload, row.created_at)
