"""Counts by day: how many answers each model gave, and what was said, kept in memory so that a million opinions are quick.

A day is counted once. It is counted anew when an opinion of that day, or on an answer of that day, has changed since (the
log's numbers say which), and today and yesterday are always, because answers of theirs may still be under way.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

import sqlalchemy as sa

from feedback.tables import CompletionRow, EventRow, FeedbackRow, table_of

feedback, completion, event_log = table_of(FeedbackRow), table_of(CompletionRow), table_of(EventRow)
MOST_CHANGES = 20_000  # beyond that, counting all days anew is cheaper than to look which
DAY = timedelta(days=1)
SINCE: sa.BindParameter[Any] = sa.bindparam("since")
UNTIL: sa.BindParameter[Any] = sa.bindparam("until")
SAID = (feedback.c.kind, feedback.c.source, feedback.c.value, feedback.c.moderation, completion.c.model_hash)
OPINIONS = (
    sa.select(*SAID, sa.func.count().label("number"))
    .select_from(feedback.join(completion))
    .where(feedback.c.created_at >= SINCE, feedback.c.created_at < UNTIL, sa.not_(feedback.c.retracted))
    .group_by(*SAID)
)
GIVEN = (completion.c.model_hash, completion.c.status)
ANSWERS = (
    sa.select(*GIVEN, sa.func.count().label("number"))
    .where(completion.c.created_at >= SINCE, completion.c.created_at < UNTIL)
    .group_by(*GIVEN)
)
CHANGED = (
    sa.select(feedback.c.created_at, completion.c.created_at.label("answered_at"))
    .select_from(feedback.join(completion))
    .where(feedback.c.last_seq > sa.bindparam("seen"))
    .limit(MOST_CHANGES)
)


@dataclass(frozen=True)
class Said:
    """So many opinions of one sort that were first said on a day, of which none is retracted or erased."""

    kind: str
    source: str
    value: int
    moderation: str
    model_hash: str
    number: int


@dataclass(frozen=True)
class Given:
    """So many answers of one model in one state."""

    model_hash: str
    status: str
    number: int


@dataclass(frozen=True)
class Day:
    """What was said and answered from one midnight UTC to the next."""

    day: date
    opinions: tuple[Said, ...]
    answers: tuple[Given, ...]


class Daily:
    """The counts of a database. Threads may share it: one counts, the others wait."""

    def __init__(self) -> None:
        self.days: dict[date, Day] = {}
        self.seen = 0
        self.turn = threading.Lock()

    def read(self, connection: sa.Connection, days: Iterable[date]) -> list[Day]:
        """The counts of some days, on a connection that sees one moment (Store.moment)."""
        with self.turn:
            self.forget_what_changed(connection)
            wanted = list(days)
            for day in wanted:
                if day not in self.days:
                    self.days[day] = count(connection, day)
            return [self.days[day] for day in wanted]

    def forget_what_changed(self, connection: sa.Connection) -> None:
        """Drop the days that have to be counted anew."""
        newest = connection.execute(sa.select(sa.func.max(event_log.c.seq))).scalar() or 0
        changed = connection.execute(CHANGED, {"seen": self.seen}).all() if self.days else []
        if len(changed) == MOST_CHANGES:
            self.days.clear()
        today = datetime.now(UTC).date()
        touched = {moment.astimezone(UTC).date() for row in changed for moment in row}
        for day in touched | {today, today - DAY}:
            self.days.pop(day, None)
        self.seen = newest


def count(connection: sa.Connection, day: date) -> Day:
    """The counts of one day."""
    midnight = datetime.combine(day, time(), UTC)
    span: dict[str, Any] = {"since": midnight, "until": midnight + DAY}
    opinions = tuple(Said(**row._mapping) for row in connection.execute(OPINIONS, span))
    return Day(
        day,
        tuple(said for said in opinions if said.moderation != "erased"),
        tuple(Given(**row._mapping) for row in connection.execute(ANSWERS, span)),
    )
