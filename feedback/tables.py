"""The tables: what was answered, what people said of it, what a model learned from, and which model reigns.

One schema for SQLite (embedded) and PostgreSQL (production); `migrations/` makes it, a test compares the two.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

SOURCES = ("human_user", "human_expert", "simulated", "llm_judge")
KINDS = ("thumb", "comparison", "ranking", "edit", "comment", "implicit", "expert")
# erased: what its author had deleted; the row stays, without its words, so that counts and numbers stay true
MODERATION = ("pending", "accepted", "quarantined", "rejected", "erased")
STATUSES = ("streaming", "complete", "aborted", "error", "erased")
ORIGINS = ("decoder", "remote", "import")
OPERATIONS = ("create", "revise", "retract", "moderate", "erase")
TASK_ORIGINS = ("given", "asked", "traffic")  # answers given, or asked for: to a prompt given, or to one of people's
ASSIGNMENTS = ("open", "ranked", "skipped")


class UtcTime(TypeDecorator[datetime]):
    """A moment, in UTC, aware on both databases (SQLite keeps no zone). Refuses naive datetimes with ValueError."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Python to database."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"a time without a zone was given: {value.isoformat()}; use datetime.now(UTC)")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Database to Python."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# SQLite counts only in a column of type INTEGER
Sequence = BigInteger().with_variant(Integer, "sqlite")


def one_of(column: str, values: tuple[str, ...]) -> str:
    """SQL that holds `column` to `values`."""
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


class Table(DeclarativeBase):
    """Base of all tables; names of constraints follow one rule, so that migrations can drop them by name."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def table_of(row: type[Table]) -> sa.Table:
    """The table behind a class, for statements on many rows at once."""
    return cast(sa.Table, row.__table__)


class CompletionRow(Table):
    """One answer of one model. Written before its first byte leaves, so that a vote never races it."""

    __tablename__ = "completion"
    __table_args__ = (
        UniqueConstraint("subject", "idempotency_key"),
        CheckConstraint(one_of("status", STATUSES), name="status"),
        CheckConstraint("turn >= 0", name="turn"),
        CheckConstraint(one_of("origin", ORIGINS), name="origin"),
        CheckConstraint("prompt_tokens >= 0 AND completion_tokens >= 0", name="tokens"),
        Index(None, "model_hash"),
        Index(None, "conversation"),
        Index(None, "parent"),
        # what the dashboard counts, without reading the answers themselves
        Index("ix_completion_served", "created_at", "status", "model_hash", "first_token_ms", "total_ms"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)  # chatcmpl- and a uuid7
    conversation: Mapped[str] = mapped_column(String(64))
    turn: Mapped[int] = mapped_column(Integer)
    parent: Mapped[str | None] = mapped_column(ForeignKey("completion.id", ondelete="SET NULL"))
    subject: Mapped[str] = mapped_column(String(64))
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    request_sha256: Mapped[str] = mapped_column(String(64))
    request_messages: Mapped[list[dict[str, str]]] = mapped_column(JSON)
    sampling: Mapped[dict[str, Any]] = mapped_column(JSON)
    response: Mapped[str] = mapped_column(Text)
    prompt_token_ids: Mapped[list[int]] = mapped_column(JSON)
    response_token_ids: Mapped[list[int]] = mapped_column(JSON)  # with the stop token where it was sampled
    response_logprobs: Mapped[list[float]] = mapped_column(JSON)  # nats, under the model that answered
    prompt_tokens: Mapped[int] = mapped_column(Integer)
    completion_tokens: Mapped[int] = mapped_column(Integer)
    status: Mapped[str] = mapped_column(String(16))
    finish_reason: Mapped[str | None] = mapped_column(String(16))
    error: Mapped[str | None] = mapped_column(Text)
    model_hash: Mapped[str] = mapped_column(String(64))
    model_alias: Mapped[str] = mapped_column(String(64))
    origin: Mapped[str] = mapped_column(String(16), server_default="decoder")  # whose token ids: our decoder's or not
    mlflow_run_id: Mapped[str | None] = mapped_column(String(64))
    data_revision: Mapped[str | None] = mapped_column(String(64))
    code_revision: Mapped[str | None] = mapped_column(String(64))
    first_token_ms: Mapped[float | None] = mapped_column(Float)
    total_ms: Mapped[float | None] = mapped_column(Float)
    locale: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime] = mapped_column(UtcTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcTime)


class FeedbackRow(Table):
    """The current state of one opinion. `other` is empty, never NULL: NULLs differ, and three deliveries made three rows."""

    __tablename__ = "feedback"
    __table_args__ = (
        UniqueConstraint("completion_id", "subject", "kind", "other"),
        CheckConstraint(one_of("kind", KINDS), name="kind"),
        CheckConstraint("value IN (-1, 0, 1)", name="value"),
        CheckConstraint(one_of("source", SOURCES), name="source"),
        CheckConstraint(one_of("moderation", MODERATION), name="moderation"),
        CheckConstraint("revision >= 1", name="revision"),
        CheckConstraint("trust >= 0 AND trust <= 1", name="trust"),
        CheckConstraint("strength > 0", name="strength"),
        CheckConstraint("position >= 0", name="position"),
        CheckConstraint("(kind IN ('comparison', 'ranking')) = (other <> '')", name="other"),
        CheckConstraint("other <> completion_id", name="itself"),
        CheckConstraint("kind <> 'edit' OR correction <> '' OR moderation = 'erased'", name="edit"),
        Index(None, "last_seq"),
        Index(None, "created_at"),
        Index(None, "subject"),
        Index("ix_feedback_other", "other", sqlite_where=text("other <> ''"), postgresql_where=text("other <> ''")),
        Index(  # what waits for a moderator
            "ix_feedback_moderation",
            "moderation",
            "id",
            sqlite_where=text("moderation <> 'accepted'"),
            postgresql_where=text("moderation <> 'accepted'"),
        ),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    completion_id: Mapped[str] = mapped_column(ForeignKey("completion.id", ondelete="CASCADE"))
    subject: Mapped[str] = mapped_column(String(64))  # HMAC of the user
    kind: Mapped[str] = mapped_column(String(16))
    # comparison: the other answer; ranking: a hash of the answers' ids; else empty
    other: Mapped[str] = mapped_column(String(64), default="")
    value: Mapped[int] = mapped_column(Integer)  # comparison: 1 when completion_id's answer is the better one
    strength: Mapped[float] = mapped_column(Float)  # of a comparison: 2 counts for twice the margin
    ranked: Mapped[list[Any]] = mapped_column(JSON)  # ranking: [{"completion_id", "rank", "position"}], best first
    position: Mapped[int | None] = mapped_column(Integer)  # at which place completion_id's answer was shown, from 0
    reasons: Mapped[list[str]] = mapped_column(JSON)  # codes, never translated text
    comment: Mapped[str] = mapped_column(Text)
    correction: Mapped[str] = mapped_column(Text)
    source: Mapped[str] = mapped_column(String(16))
    channel: Mapped[str] = mapped_column(String(16))
    locale: Mapped[str] = mapped_column(String(16))
    revision: Mapped[int] = mapped_column(Integer)
    retracted: Mapped[bool] = mapped_column(Boolean)
    trust: Mapped[float] = mapped_column(Float)
    moderation: Mapped[str] = mapped_column(String(16))
    moderation_reason: Mapped[str] = mapped_column(Text)
    last_seq: Mapped[int] = mapped_column(BigInteger)  # the event that made this state
    client_time: Mapped[datetime | None] = mapped_column(UtcTime)
    created_at: Mapped[datetime] = mapped_column(UtcTime)
    updated_at: Mapped[datetime] = mapped_column(UtcTime)


class EventRow(Table):
    """The append-only log: each change of an opinion, with the whole state after it, in the transaction that made it."""

    __tablename__ = "feedback_event"
    __table_args__ = (
        UniqueConstraint("subject", "idempotency_key"),
        CheckConstraint(one_of("op", OPERATIONS), name="op"),
        Index(None, "feedback_id", "seq"),
        {"sqlite_autoincrement": True},  # a number is never used again, not even after an erasure
    )

    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    feedback_id: Mapped[int] = mapped_column(ForeignKey("feedback.id", ondelete="CASCADE"))
    subject: Mapped[str] = mapped_column(String(64))
    op: Mapped[str] = mapped_column(String(16))
    payload: Mapped[dict[str, Any]] = mapped_column(JSON)
    payload_sha256: Mapped[str] = mapped_column(String(64))
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    request_sha256: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(UtcTime)


class BatchRow(Table):
    """A closed range of the event log, handed to training once."""

    __tablename__ = "training_batch"
    __table_args__ = (
        UniqueConstraint("first_seq"),
        UniqueConstraint("last_seq"),
        CheckConstraint("first_seq <= last_seq", name="range"),
        CheckConstraint("accepted >= 0", name="accepted"),
        CheckConstraint("erased >= 0 AND erased <= accepted", name="erased"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    first_seq: Mapped[int] = mapped_column(BigInteger)
    last_seq: Mapped[int] = mapped_column(BigInteger)
    accepted: Mapped[int] = mapped_column(Integer)
    excluded: Mapped[dict[str, int]] = mapped_column(JSON)  # reason -> opinions
    erased: Mapped[int] = mapped_column(Integer)  # of the accepted ones: those whose author had them deleted since
    sha256: Mapped[str] = mapped_column(String(64))  # of what it changes in what is learned, as it was opened
    snapshot_sha256: Mapped[str | None] = mapped_column(String(64))  # of the files that the run below learned from
    opened_at: Mapped[datetime] = mapped_column(UtcTime)
    consumed_at: Mapped[datetime | None] = mapped_column(UtcTime)
    mlflow_run_id: Mapped[str | None] = mapped_column(String(64))


class BatchItemRow(Table):
    """What became of one opinion in one batch. An opinion is accepted once, ever: the index on accepted items says so."""

    __tablename__ = "training_batch_item"
    __table_args__ = (
        CheckConstraint("accepted = (reason = '')", name="reason"),
        Index(
            "uq_training_batch_item_accepted",
            "feedback_id",
            unique=True,
            sqlite_where=text("accepted"),
            postgresql_where=text("accepted"),
        ),
        Index(None, "feedback_id"),
    )

    batch_id: Mapped[int] = mapped_column(ForeignKey("training_batch.id", ondelete="CASCADE"), primary_key=True)
    feedback_id: Mapped[int] = mapped_column(ForeignKey("feedback.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger)  # the event whose state was judged
    accepted: Mapped[bool] = mapped_column(Boolean)
    reason: Mapped[str] = mapped_column(String(32))  # empty when accepted


class PromotionRow(Table):
    """Which model reigned when, and why. The rows are a stack: `promote` pushes a model, `rollback` takes the top away."""

    __tablename__ = "promotion"
    __table_args__ = (
        CheckConstraint(one_of("action", ("promote", "rollback")), name="action"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    action: Mapped[str] = mapped_column(String(16))
    from_hash: Mapped[str | None] = mapped_column(String(64))
    model_hash: Mapped[str] = mapped_column(String(64))
    model_path: Mapped[str] = mapped_column(Text)
    figures: Mapped[dict[str, Any]] = mapped_column(JSON)
    reason: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcTime)


class ErasureRow(Table):
    """A person's data was deleted. Says how much and which models had learned from it, and nothing of who it was."""

    __tablename__ = "erasure"
    __table_args__ = (
        CheckConstraint("completions >= 0 AND opinions >= 0", name="counts"),
        Index(
            "ix_erasure_open",
            "id",
            sqlite_where=text("flagged_at IS NULL"),
            postgresql_where=text("flagged_at IS NULL"),
        ),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    completions: Mapped[int] = mapped_column(Integer)
    opinions: Mapped[int] = mapped_column(Integer)
    batches: Mapped[list[int]] = mapped_column(JSON)  # that had accepted one of the opinions
    mlflow_runs: Mapped[list[str]] = mapped_column(JSON)  # that learned from those batches
    erased_at: Mapped[datetime] = mapped_column(UtcTime)
    flagged_at: Mapped[datetime | None] = mapped_column(
        UtcTime
    )  # when the runs and the files of snapshots were seen to


class KeyRow(Table):
    """One API key. The secret itself is not here: only its hash, so that a stolen database opens no door."""

    __tablename__ = "api_key"
    __table_args__ = (
        UniqueConstraint("secret_sha256"),
        CheckConstraint("name <> ''", name="name"),
        CheckConstraint("expires_at IS NULL OR expires_at > created_at", name="expiry"),
        {"sqlite_autoincrement": True},  # the audit names keys by number, so a number is never used again
    )

    id: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    name: Mapped[str] = mapped_column(String(64))
    secret_sha256: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[list[str]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcTime)
    expires_at: Mapped[datetime | None] = mapped_column(UtcTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcTime)
    last_used_at: Mapped[datetime | None] = mapped_column(UtcTime)  # to the minute


class AuditRow(Table):
    """Who did what to what, written in the transaction that did it. Nothing here is ever changed or deleted."""

    __tablename__ = "audit"
    __table_args__ = (Index(None, "target", "id"), {"sqlite_autoincrement": True})

    id: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=True)
    actor: Mapped[str] = mapped_column(String(80))  # key:<id>, subject:<name in the tables>, command:<system user>
    act: Mapped[str] = mapped_column(String(32))
    target: Mapped[str] = mapped_column(String(96))  # key:<id>, feedback:<id>
    before: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    after: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    created_at: Mapped[datetime] = mapped_column(UtcTime)


class TaskRow(Table):
    """A prompt whose answers people are asked to rank. What was asked stands with the answers, not here."""

    __tablename__ = "labelling_task"
    __table_args__ = (
        UniqueConstraint("name"),
        CheckConstraint(one_of("origin", TASK_ORIGINS), name="origin"),
        CheckConstraint("raters >= 1", name="raters"),
        CheckConstraint("gold = (expected IS NOT NULL)", name="gold"),
        Index(
            "ix_labelling_task_open",
            "created_at",
            "id",
            sqlite_where=text("closed_at IS NULL"),
            postgresql_where=text("closed_at IS NULL"),
        ),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True)  # random: it must not tell when or why it was made
    name: Mapped[str] = mapped_column(String(64))  # a hash of what it asks for, so that making it again adds nothing
    origin: Mapped[str] = mapped_column(String(16))
    gold: Mapped[bool] = mapped_column(
        Boolean
    )  # the right order is known; such a task is for everybody, and never done
    expected: Mapped[list[list[int]] | None] = mapped_column(JSON(none_as_null=True))  # places, best first, in groups
    gold_by: Mapped[str | None] = mapped_column(String(64))  # the expert whose ranking is the right one, if one's is
    raters: Mapped[int] = mapped_column(Integer)  # how many different people are to rank it
    created_at: Mapped[datetime] = mapped_column(UtcTime)
    closed_at: Mapped[datetime | None] = mapped_column(UtcTime)


class TaskAnswerRow(Table):
    """One of the answers of a task. place: from 0, as they were given when it was made; never shown."""

    __tablename__ = "labelling_answer"
    __table_args__ = (
        UniqueConstraint("task_id", "completion_id"),
        CheckConstraint("place >= 0 AND place < 9", name="place"),
        Index(None, "completion_id"),
    )

    task_id: Mapped[str] = mapped_column(ForeignKey("labelling_task.id", ondelete="CASCADE"), primary_key=True)
    place: Mapped[int] = mapped_column(Integer, primary_key=True)
    completion_id: Mapped[str] = mapped_column(ForeignKey("completion.id", ondelete="CASCADE"))


class AssignmentRow(Table):
    """A task in somebody's hands, or what became of it there. One a person and task, so nobody gets a task twice."""

    __tablename__ = "labelling_assignment"
    __table_args__ = (
        CheckConstraint(one_of("state", ASSIGNMENTS), name="state"),
        CheckConstraint("(state = 'ranked') = (feedback_id IS NOT NULL)", name="ranked"),
        CheckConstraint("(state = 'open') = (finished_at IS NULL)", name="finished"),
        Index(None, "subject", "state"),
        Index(None, "feedback_id"),
    )

    task_id: Mapped[str] = mapped_column(ForeignKey("labelling_task.id", ondelete="CASCADE"), primary_key=True)
    subject: Mapped[str] = mapped_column(String(64), primary_key=True)
    state: Mapped[str] = mapped_column(String(16))
    shown: Mapped[list[int]] = mapped_column(JSON)  # the answers' places, in the order in which this person sees them
    given_at: Mapped[datetime] = mapped_column(UtcTime)
    lease_until: Mapped[datetime] = mapped_column(UtcTime)  # from then on others may get it, while it is open
    finished_at: Mapped[datetime | None] = mapped_column(UtcTime)
    reason: Mapped[str] = mapped_column(Text)  # why it was skipped
    feedback_id: Mapped[int | None] = mapped_column(ForeignKey("feedback.id", ondelete="CASCADE"))
