"""What moderators look at: opinions by state, with what they are about and what happened to them; judged singly or many."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from feedback import audit, lessons, moderation
from feedback.audit import Act
from feedback.moderation import Judgement
from feedback.opinions import Refused
from feedback.tables import CompletionRow, EventRow, FeedbackRow, table_of

feedback, completion, event_log = table_of(FeedbackRow), table_of(CompletionRow), table_of(EventRow)
WAITING = ("pending", "quarantined")
STATES = ("waiting", "pending", "quarantined", "rejected", "accepted")
PAGE = 20  # cases
LOOK = 50_000  # of accepted opinions, which are most, only so many of the newest are searched
AT_ONCE = 1000  # opinions of one rater that one act judges at most
PART = 25  # so many in one transaction: everybody who writes waits for it
REASONS = 1000  # opinions, the oldest that wait, whose reasons can be chosen


@dataclass(frozen=True)
class Filter:
    """Which opinions. state: one of STATES; kind, source, reason: that one only; rater: that of this opinion only, by its
    number; after: the number of the last one seen; only: this opinion, by its number, whatever its state."""

    state: str = "waiting"
    kind: str = ""
    source: str = ""
    reason: str = ""
    rater: int = 0
    after: int = 0
    only: int = 0


@dataclass(frozen=True)
class Shown:
    """An answer that an opinion is about. place: where it stood in a ranking, or which of two was chosen."""

    response: str
    model_hash: str
    place: str


@dataclass(frozen=True)
class Case:
    """One opinion before a moderator. opinion: its row; history: its events and what moderators did, in order."""

    opinion: sa.Row[Any]
    messages: list[dict[str, str]]
    answers: list[Shown]
    history: list[sa.Row[Any] | Act]


@dataclass(frozen=True)
class Outcome:
    """What a judgement of many did: the first and last number of the audit's entries (0: none), how many opinions, and
    which were left alone because they had changed since they were seen; more: whether others were too many."""

    first: int
    last: int
    judged: int
    changed: tuple[int, ...]
    more: bool = False


def find(connection: sa.Connection, wanted: Filter) -> tuple[list[Case], bool]:
    """A page of cases, and whether there are more: what waits oldest first, what is decided newest first."""
    if wanted.only:
        return cases(
            connection, list(connection.execute(sa.select(feedback).where(feedback.c.id == wanted.only)))
        ), False
    states = WAITING if wanted.state == "waiting" else (wanted.state,)
    rows = [row for state in states for row in connection.execute(query(connection, wanted, state, PAGE + 1))]
    rows.sort(key=lambda row: row.id, reverse=wanted.state not in ("waiting", *WAITING))
    return cases(connection, rows[:PAGE]), len(rows) > PAGE


def query(connection: sa.Connection, wanted: Filter, state: str, limit: int) -> sa.Select[Any]:
    """Opinions in one state that a filter wants."""
    found = sa.select(feedback).where(feedback.c.moderation == state, sa.not_(feedback.c.retracted)).limit(limit)
    for name in ("kind", "source"):
        if value := getattr(wanted, name):
            found = found.where(feedback.c[name] == value)
    if wanted.reason:
        found = found.where(feedback.c.moderation_reason == wanted.reason)
    if wanted.rater:
        found = found.where(feedback.c.subject == rater_of(connection, wanted.rater))
    if state in WAITING:
        found = found.where(feedback.c.id > wanted.after).order_by(feedback.c.id)
    else:
        found = found.order_by(feedback.c.id.desc())
        if wanted.after:
            found = found.where(feedback.c.id < wanted.after)
    if state != "accepted":
        return found.where(sa.text("feedback.moderation <> 'accepted'"))  # what the index holds
    newest = connection.execute(sa.select(sa.func.max(feedback.c.id))).scalar() or 0
    return found.where(feedback.c.id >= (wanted.after or newest + 1) - LOOK)


def rater_of(connection: sa.Connection, feedback_id: int) -> str:
    """Who said an opinion; nobody's name where there is no such opinion."""
    return connection.execute(sa.select(feedback.c.subject).where(feedback.c.id == feedback_id)).scalar() or ""


def cases(connection: sa.Connection, rows: list[sa.Row[Any]]) -> list[Case]:
    """Opinions with their answers and histories."""
    ids = [row.id for row in rows]
    about = {row.id: [row.completion_id, *lessons.others(row.kind, row._asdict())] for row in rows}
    names = {name for several in about.values() for name in several}
    answers = {row.id: row for row in connection.execute(sa.select(completion).where(completion.c.id.in_(names)))}
    history: dict[int, list[sa.Row[Any] | Act]] = defaultdict(list)
    for event in connection.execute(
        sa.select(event_log).where(event_log.c.feedback_id.in_(ids)).order_by(event_log.c.seq)
    ):
        history[event.feedback_id].append(event)
    for act in audit.of_targets(connection, [f"feedback:{id}" for id in ids]):
        history[int(act.target.removeprefix("feedback:"))].append(act)
    return [
        Case(
            row,
            answers[row.completion_id].request_messages,
            [
                Shown(answers[id].response, answers[id].model_hash, place(row, id))
                for id in dict.fromkeys(about[row.id])
            ],
            sorted(history[row.id], key=lambda entry: entry.created_at),
        )
        for row in rows
    ]


def place(row: sa.Row[Any], completion_id: str) -> str:
    """What the opinion says of one of its answers: "better", "worse", "tie" of two; its rank among several; else ""."""
    if row.kind == "comparison":
        won = row.value if completion_id == row.completion_id else -row.value
        return {1: "better", -1: "worse"}.get(won, "tie")
    return next((str(entry["rank"]) for entry in row.ranked if entry["completion_id"] == completion_id), "")


def reasons(connection: sa.Connection) -> list[str]:
    """Reasons of what waits, to choose from: of the oldest REASONS opinions."""
    found: dict[str, None] = {}
    for state in WAITING:
        where = (feedback.c.moderation == state) & sa.text("feedback.moderation <> 'accepted'")
        some = sa.select(feedback.c.moderation_reason).where(where).order_by(feedback.c.id).limit(REASONS)
        found |= dict.fromkeys(connection.execute(some).scalars())
    return sorted(filter(None, found))


def of_rater(connection: sa.Connection, wanted: Filter) -> tuple[dict[int, int], bool]:
    """What the filter wants of its rater, AT_ONCE opinions at most, as `judge` takes it, and whether there are more.

    Raises Refused 422 when the filter names no rater.
    """
    if not wanted.rater:
        raise Refused(422, "rater_required", "rater: name an opinion of the rater")
    states = WAITING if wanted.state == "waiting" else (wanted.state,)
    whole = replace(wanted, after=0)
    rows = [row for state in states for row in connection.execute(query(connection, whole, state, AT_ONCE + 1))]
    return {row.id: row.last_seq for row in rows[:AT_ONCE]}, len(rows) > AT_ONCE


def judge(connection: sa.Connection, seen: dict[int, int], judgement: Judgement, actor: str) -> Outcome:
    """Judge opinions that stand as they were seen (number -> the event they were seen at); the others are left alone.

    Raises Refused 422 without a reason where one is needed.
    """
    moderation.check_reason(judgement)
    acts, changed = [], []
    for feedback_id, seq in sorted(seen.items()):
        try:
            _, act = moderation.judge(connection, feedback_id, judgement, actor, seen=seq)
        except Refused:
            changed.append(feedback_id)
            continue
        if act:
            acts.append(act)
    return outcome(acts, changed)


def acts(connection: sa.Connection, actor: str, first: int, last: int) -> list[Act]:
    """The judgements of an actor among the audit's entries `first` to `last`."""
    found = audit.entries(connection, max(first - 1, 0), min(max(last - first + 1, 0), 2 * AT_ONCE))
    return [act for act in found if act.actor == actor and act.act == moderation.ACT]


def undo(connection: sa.Connection, judged: list[Act], actor: str) -> Outcome:
    """Give opinions the state back that they had before these acts; those that changed since are left alone."""
    done, changed = [], []
    for act in judged:
        feedback_id = int(act.target.removeprefix("feedback:"))
        row = connection.execute(sa.select(feedback).where(feedback.c.id == feedback_id)).first()
        if row is None or {"state": row.moderation, "reason": row.moderation_reason} != act.after or not act.before:
            changed.append(feedback_id)
            continue
        done.append(moderation.set_state(connection, row, Judgement.model_validate(act.before), actor)[1])
    return outcome(done, changed)


def outcome(acts: list[int], changed: list[int]) -> Outcome:
    """What was done, by the numbers of the audit's entries."""
    return Outcome(min(acts, default=0), max(acts, default=0), len(acts), tuple(changed))


def together(parts: list[Outcome], more: bool) -> Outcome:
    """The outcomes of a judgement's parts as one."""
    acts = [number for part in parts for number in (part.first, part.last) if number]
    changed = tuple(id for part in parts for id in part.changed)
    return Outcome(min(acts, default=0), max(acts, default=0), sum(part.judged for part in parts), changed, more)
