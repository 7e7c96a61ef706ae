"""The dashboard's figures: what was said a day, how the model versions stand, how far people agree, what became of batches.

Days are UTC's: people of all zones say something, and a day must be the same one for all who look.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from feedback import agreement, batches, promotions
from feedback.agreement import Alpha
from feedback.batches import Batch
from feedback.daily import Daily, Day
from feedback.promotions import Promotion
from feedback.tables import CompletionRow, FeedbackRow, table_of
from models.intervals import Interval, wilson

if TYPE_CHECKING:
    from feedback.store import Store

feedback, completion = table_of(FeedbackRow), table_of(CompletionRow)
DAYS = (7, 30, 90)
SOURCES = {
    "people": ("human_user", "human_expert"),
    "simulated": ("simulated",),
    "all": ("human_user", "human_expert", "simulated", "llm_judge"),
}
# what a chart tells apart, from the bottom up
SORTS = ("up", "down", "compared", "written", "other")
SORT_OF = {"comparison": "compared", "ranking": "compared", "edit": "written", "comment": "written"}
RATER_DAYS = 7  # raters are told apart over so many days at most
LATENCIES = 10_000  # answers, the newest, that percentiles are of
MOST = 10_000  # what waits is counted up to here
NEWEST_BATCHES = 20
AGREE_SECONDS = 60  # agreement takes seconds to resample, so for so long it stays as it is


@dataclass(frozen=True)
class Thumbs:
    """Thumbs that stand (accepted, not taken back, not 0), and the share of up with Wilson's 95 % interval."""

    up: int
    down: int

    @property
    def share(self) -> Interval | None:
        """None where nobody said anything."""
        return wilson(self.up, self.up + self.down) if self.up + self.down else None


@dataclass(frozen=True)
class DayFigures:
    """One day: opinions by sort (SORTS), thumbs that stand, answers, and how many of these were errors."""

    day: date
    opinions: dict[str, int]
    thumbs: Thumbs
    answers: int
    errors: int
    promoted: tuple[str, ...]  # models that became champion on this day


@dataclass(frozen=True)
class Reign:
    """From when until when a model was champion (None: it is), how it got there, and how it went."""

    since: datetime
    until: datetime | None
    action: str  # promote; rollback: it came back because the one after it was taken away
    reason: str
    figures: dict[str, Any]
    lost_by: str | None  # promote, rollback
    lost_because: str


@dataclass(frozen=True)
class Version:
    """A model beside its thumbs, in the days that are shown. first, last: days on which it answered among them."""

    model_hash: str
    first: date | None
    last: date | None
    answers: int
    errors: int
    thumbs: Thumbs
    reigns: tuple[Reign, ...]

    @property
    def champion(self) -> bool:
        """Whether it reigns."""
        return any(reign.until is None for reign in self.reigns)


@dataclass(frozen=True)
class Waiting:
    """What waits: for the next batch, since when; for a moderator. Counts stop at MOST + 1, which means more."""

    for_batch: int
    oldest: datetime | None
    pending: int
    quarantined: int
    open_batches: int
    oldest_open: datetime | None


@dataclass(frozen=True)
class Latency:
    """Milliseconds of the newest whole answers, by nearest rank; None where there is none."""

    answers: int
    first_token: tuple[float, float] | None  # median, 95th percentile
    total: tuple[float, float] | None


@dataclass(frozen=True)
class View:
    """Everything on the page. at: the moment that it is of."""

    at: datetime
    days: int
    source: str
    daily: list[DayFigures]
    thumbs: Thumbs
    opinions: int
    answers: int
    errors: int
    raters: int
    rater_days: int
    versions: list[Version]
    batches: list[Batch]
    waiting: Waiting
    latency: Latency
    agreement: dict[str, Alpha]


@dataclass
class Dashboard:
    """Looks at a store; keeps what makes the next look quick."""

    store: Store
    daily: Daily = field(default_factory=Daily)
    turn: threading.Lock = field(default_factory=threading.Lock)
    agreed: tuple[datetime, int, dict[str, Alpha]] | None = None  # when, and at which event of the log

    def view(self, days: int, source: str) -> View:
        """The figures of the last `days` days, today included, of opinions of `source` (a key of SOURCES)."""
        now = datetime.now(UTC)
        span = [now.date() - timedelta(days=back) for back in reversed(range(days))]
        with self.store.moment() as connection:
            counted = self.daily.read(connection, span)
            history = promotions.history(connection)
            rater_days = min(days, RATER_DAYS)
            shown = [figures(day, source, history) for day in counted]
            return View(
                at=now,
                days=days,
                source=source,
                daily=shown,
                thumbs=thumbs(counted, source),
                opinions=sum(sum(day.opinions.values()) for day in shown),
                answers=sum(day.answers for day in shown),
                errors=sum(day.errors for day in shown),
                raters=raters(connection, span[-rater_days], source),
                rater_days=rater_days,
                versions=versions(counted, source, history),
                batches=newest_batches(connection),
                waiting=waiting(connection),
                latency=latency(connection, span[0]),
                agreement=self.agreement(connection, now),
            )

    def agreement(self, connection: sa.Connection, now: datetime) -> dict[str, Alpha]:
        """How far people agree; of an earlier look while that is at most AGREE_SECONDS old, or nothing was said since."""
        with self.turn:
            newest, kept = self.daily.seen, self.agreed
            if kept is None or (kept[1] != newest and (now - kept[0]).total_seconds() > AGREE_SECONDS):
                kept = self.agreed = (now, newest, agreement.measure(connection))
            return kept[2]


def sort(kind: str, value: int) -> str:
    """Which of SORTS an opinion is."""
    if kind == "thumb" and value:
        return "up" if value > 0 else "down"
    return SORT_OF.get(kind, "other")


def figures(day: Day, source: str, history: list[Promotion]) -> DayFigures:
    """What the page says of a day."""
    numbers = Counter(dict.fromkeys(SORTS, 0))
    for said in day.opinions:
        if said.source in SOURCES[source]:
            numbers[sort(said.kind, said.value)] += said.number
    answers, errors = served(day)
    crowned = tuple(row.model_hash for row in history if row.created_at.date() == day.day)
    return DayFigures(day.day, dict(numbers), thumbs([day], source), answers, errors, crowned)


def served(day: Day, model_hash: str | None = None) -> tuple[int, int]:
    """Answers of a day, of one model if given, and how many of them ended in an error."""
    about = [given for given in day.answers if model_hash in (None, given.model_hash)]
    return sum(given.number for given in about), sum(given.number for given in about if given.status == "error")


def thumbs(days: Iterable[Day], source: str, model_hash: str | None = None) -> Thumbs:
    """Thumbs that stand, of one model if given."""
    numbers: Counter[int] = Counter()
    for day in days:
        for said in day.opinions:
            if (
                said.kind == "thumb"
                and said.moderation == "accepted"
                and said.source in SOURCES[source]
                and model_hash in (None, said.model_hash)
            ):
                numbers[said.value] += said.number
    return Thumbs(numbers[1], numbers[-1])


def versions(days: list[Day], source: str, history: list[Promotion]) -> list[Version]:
    """Models that reign, or that answered or were judged in these days; the newest first."""
    first: dict[str, date] = {}
    last: dict[str, date] = {}
    known = dict.fromkeys(said.model_hash for day in days for said in day.opinions)
    for day in days:
        for given in day.answers:
            first.setdefault(given.model_hash, day.day)
            last[given.model_hash] = day.day
    ruled = reigns(history)
    current = [name for name, all in ruled.items() if any(reign.until is None for reign in all)]
    names = dict.fromkeys([*first, *known, *current])
    rows = []
    for name in names:
        each = [served(day, name) for day in days]
        total = [sum(column) for column in zip(*each, strict=True)]
        judged = thumbs(days, source, name)
        rows.append(
            Version(name, first.get(name), last.get(name), total[0], total[1], judged, tuple(ruled.get(name, ())))
        )
    crowned = {row.model_hash: row.id for row in history}
    return sorted(
        rows, key=lambda row: (row.champion, crowned.get(row.model_hash, 0), row.last or date.min), reverse=True
    )


def reigns(history: list[Promotion]) -> dict[str, list[Reign]]:
    """model -> its times as champion, oldest first."""
    found: dict[str, list[Reign]] = {}
    for place, row in enumerate(history, 1):
        after = history[place] if place < len(history) else None
        lost = (None, None, "") if after is None else (after.created_at, after.action, after.reason)
        reign = Reign(row.created_at, lost[0], row.action, row.reason, row.figures, lost[1], lost[2])
        found.setdefault(row.model_hash, []).append(reign)
    return found


def raters(connection: sa.Connection, since: date, source: str) -> int:
    """How many people (or programs) said something since a midnight."""
    midnight = datetime(since.year, since.month, since.day, tzinfo=UTC)
    query = sa.select(sa.func.count(feedback.c.subject.distinct())).where(
        feedback.c.created_at >= midnight, feedback.c.source.in_(SOURCES[source]), sa.not_(feedback.c.retracted)
    )
    return int(connection.execute(query).scalar_one())


def newest_batches(connection: sa.Connection) -> list[Batch]:
    """The newest NEWEST_BATCHES batches, the newest first."""
    query = sa.select(batches.batch).order_by(batches.batch.c.id.desc()).limit(NEWEST_BATCHES)
    return [Batch(**row._asdict()) for row in connection.execute(query)]


def waiting(connection: sa.Connection) -> Waiting:
    """What waits for training and for moderators."""
    held = (
        sa.select(feedback.c.created_at)
        .select_from(feedback.join(completion))
        .where(batches.waiting(connection))
        .order_by(feedback.c.last_seq)
        .limit(MOST + 1)
        .subquery()
    )
    number, oldest = connection.execute(sa.select(sa.func.count(), sa.func.min(held.c.created_at))).one()
    state = {name: up_to_most(connection, name) for name in ("pending", "quarantined")}
    batch = batches.batch.c
    unused = sa.select(sa.func.count(), sa.func.min(batch.opened_at)).where(batch.consumed_at.is_(None))
    left, since = connection.execute(unused).one()
    return Waiting(number, oldest, state["pending"], state["quarantined"], left, since)


def up_to_most(connection: sa.Connection, state: str) -> int:
    """Opinions in a state of moderation that is not accepted, MOST + 1 for more than MOST."""
    query = sa.select(feedback.c.id).where(
        feedback.c.moderation == state, sa.text("feedback.moderation <> 'accepted'"), sa.not_(feedback.c.retracted)
    )
    return int(
        connection.execute(sa.select(sa.func.count()).select_from(query.limit(MOST + 1).subquery())).scalar_one()
    )


def latency(connection: sa.Connection, since: date) -> Latency:
    """Percentiles of the newest LATENCIES whole answers since a midnight."""
    midnight = datetime(since.year, since.month, since.day, tzinfo=UTC)
    query = (
        sa.select(completion.c.first_token_ms, completion.c.total_ms)
        .where(completion.c.created_at >= midnight, completion.c.status == "complete")
        .order_by(completion.c.created_at.desc())
        .limit(LATENCIES)
    )
    rows = connection.execute(query).all()
    return Latency(len(rows), middle([row.first_token_ms for row in rows]), middle([row.total_ms for row in rows]))


def middle(values: list[float | None]) -> tuple[float, float] | None:
    """Median and 95th percentile by nearest rank, of what is known."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    return known[math.ceil(0.5 * len(known)) - 1], known[math.ceil(0.95 * len(known)) - 1]
