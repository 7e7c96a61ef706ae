"""Labelling: answers to one prompt are handed to people to rank, several people each, with known ones mixed in.

A task is a prompt's answers. Who asks gets one of them on a lease: it is theirs for some minutes, and then free again; once
ranked or skipped it never comes back to them. A gold task is one whose right order is known: it goes to everybody, and shows
how well somebody ranks (gold_results). Nothing that a rater is given tells a gold task from another: not its id, not its
answers' names (numbers, in the order in which this rater sees them), not the count of what is left, which nobody is told.

All functions that write are called under the store's write lock, so of two people who ask at once one is served first.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import combinations
from typing import Any, NamedTuple

import sqlalchemy as sa

from feedback import audit, opinions
from feedback.comparisons import ranked
from feedback.opinions import Event, Refused, Vote
from feedback.tables import AssignmentRow, CompletionRow, FeedbackRow, TaskAnswerRow, TaskRow, table_of

task, answer, assignment = (table_of(row) for row in (TaskRow, TaskAnswerRow, AssignmentRow))
completion, feedback = table_of(CompletionRow), table_of(FeedbackRow)
FEWEST, MOST = 2, 9  # answers of a task
COIN = random.SystemRandom()


@dataclass(frozen=True)
class Task:
    """answers: completion ids; expected: indices of them, best first, equal ones in a group, where that is known."""

    id: str
    origin: str
    gold: bool
    expected: list[list[int]] | None
    raters: int
    created_at: datetime
    closed_at: datetime | None
    answers: list[str]


@dataclass(frozen=True)
class Assignment:
    """A task in one person's hands. answers: (completion id, text) in the order in which they see them."""

    task_id: str
    state: str
    messages: list[dict[str, str]]
    answers: list[tuple[str, str]]
    lease_until: datetime

    def ids(self) -> list[str]:
        """The completion ids, as shown."""
        return [id for id, _ in self.answers]


@dataclass(frozen=True)
class Handing:
    """How tasks are handed out. gold_rate: the share of gold ones; at 1, nothing else. lease: how long a task is kept."""

    gold_rate: float = 0.1
    lease: timedelta = timedelta(minutes=30)


class GoldResult(NamedTuple):
    """How somebody ranked a gold task: of `pairs` pairs whose order is known, `concordant` were in it; a tie counts half."""

    subject: str
    task_id: str
    concordant: float
    pairs: int


# making


def make(
    connection: sa.Connection,
    ids: Sequence[str],
    *,
    name: str = "",
    raters: int = 1,
    origin: str = "given",
    expected: Sequence[Sequence[int]] | None = None,
) -> tuple[Task, bool]:
    """A task of these answers, and whether it is new: one of the same name (without one: of the same answers) is found.

    expected: the right order, which makes it gold; indices of `ids`. Raises Refused 404, 409, 422 for answers that cannot
    be ranked together, ValueError when `expected` does not hold each once, or says that all are equal.
    """
    name = name or opinions.sha256(["task", sorted(ids)])
    if (known := named(connection, name)) is not None:
        return known, False
    if not FEWEST <= len(ids) <= MOST or len(set(ids)) < len(ids):
        raise Refused(422, "invalid_request", f"a task has {FEWEST} to {MOST} different answers")
    if expected is not None:
        check_order(expected, len(ids))
    opinions.check_answers(connection, Vote(subject="", **ranked(ids, [ids])))
    values: dict[str, Any] = {
        "id": secrets.token_hex(16),
        "origin": origin,
        "gold": expected is not None,
        "expected": None if expected is None else [sorted(group) for group in expected],
        "raters": raters,
        "created_at": datetime.now(UTC),
        "closed_at": None,
    }
    connection.execute(sa.insert(task), {**values, "name": name, "gold_by": None})
    rows = [{"task_id": values["id"], "place": place, "completion_id": id} for place, id in enumerate(ids)]
    connection.execute(sa.insert(answer), rows)
    return Task(**values, answers=list(ids)), True


def check_order(expected: Sequence[Sequence[int]], number: int) -> None:
    """Raises ValueError when the groups do not hold each of 0 … number - 1 once, or there is only one."""
    if sorted(place for group in expected for place in group) != list(range(number)) or not all(expected):
        raise ValueError("ranking: its groups must hold each of the answers once")
    if len(expected) < 2:
        raise ValueError("ranking: all answers are equal, so it would tell nothing of who ranks them")


def named(connection: sa.Connection, name: str) -> Task | None:
    """The task of that name."""
    found = tasks(connection, task.c.name == name)
    return found[0] if found else None


def get(connection: sa.Connection, task_id: str) -> Task:
    """One task. Raises Refused 404."""
    found = tasks(connection, task.c.id == task_id)
    if not found:
        raise Refused(404, "task_not_found", f"there is no task {task_id}")
    return found[0]


def tasks(connection: sa.Connection, where: Any, limit: int = 1) -> list[Task]:
    """The newest tasks that match."""
    columns = [column for column in task.c if column.name not in ("name", "gold_by")]
    query = sa.select(*columns).where(where).order_by(task.c.created_at.desc(), task.c.id.desc()).limit(limit)
    rows = connection.execute(query).all()
    ids: dict[str, list[str]] = {row.id: [] for row in rows}
    for part in connection.execute(sa.select(answer).where(answer.c.task_id.in_(ids)).order_by(answer.c.place)):
        ids[part.task_id].append(part.completion_id)
    return [Task(**row._mapping, answers=ids[row.id]) for row in rows]


# handing out


def next_task(
    connection: sa.Connection, subject: str, handing: Handing, coin: random.Random = COIN
) -> Assignment | None:
    """The task that this person has now: the one in their hands, else a new one; None when there is nothing for them.

    When all that is not gold is done there is nothing, even where gold is left: else the last ones would be known as gold.
    """
    now = datetime.now(UTC)
    mine = (assignment.c.subject == subject) & (assignment.c.state == "open") & task.c.closed_at.is_(None)
    joined = sa.select(assignment.c.task_id).join(task, task.c.id == assignment.c.task_id)
    chosen = connection.execute(joined.where(mine, assignment.c.lease_until > now)).scalar()
    if chosen is None:
        chosen = connection.execute(free(subject, now)).scalar()
        if handing.gold_rate >= 1:
            chosen = connection.execute(free_gold(subject)).scalar()
        elif chosen is not None and coin.random() < handing.gold_rate:
            chosen = connection.execute(free_gold(subject)).scalar() or chosen
    if chosen is None:
        return None
    give(connection, chosen, subject, now, now + handing.lease, coin)
    return held(connection, chosen, subject)


def done_by(subject: str) -> sa.Exists:
    """Whether this person has ranked or skipped the task."""
    mine = (assignment.c.task_id == task.c.id) & (assignment.c.subject == subject) & (assignment.c.state != "open")
    return sa.exists().where(mine)


def free(subject: str, now: datetime) -> sa.Select[tuple[str]]:
    """The oldest task that is not gold and that more people are needed for than have ranked it or hold it now."""
    live = (assignment.c.state == "ranked") | ((assignment.c.state == "open") & (assignment.c.lease_until > now))
    others = (assignment.c.task_id == task.c.id) & (assignment.c.subject != subject) & live
    taken = sa.select(sa.func.count()).select_from(assignment).where(others).scalar_subquery()
    query = sa.select(task.c.id).where(task.c.closed_at.is_(None), ~task.c.gold, ~done_by(subject))
    return query.where(taken < task.c.raters).order_by(task.c.created_at, task.c.id).limit(1)


def free_gold(subject: str) -> sa.Select[tuple[str]]:
    """Any gold task that this person has not had."""
    query = sa.select(task.c.id).where(task.c.closed_at.is_(None), task.c.gold, ~done_by(subject))
    return query.order_by(sa.func.random()).limit(1)


def give(
    connection: sa.Connection, task_id: str, subject: str, now: datetime, until: datetime, coin: random.Random
) -> None:
    """Put a task into somebody's hands, its answers in an order of their own; what they had before keeps its order."""
    mine = (assignment.c.task_id == task_id) & (assignment.c.subject == subject)
    if connection.execute(sa.update(assignment).where(mine).values(lease_until=until)).rowcount:
        return
    number = sa.select(sa.func.count()).select_from(answer).where(answer.c.task_id == task_id)
    places = list(range(connection.execute(number).scalar_one()))
    coin.shuffle(places)
    values = {"task_id": task_id, "subject": subject, "state": "open", "shown": places, "given_at": now}
    connection.execute(sa.insert(assignment), {**values, "lease_until": until, "reason": ""})


def held(connection: sa.Connection, task_id: str, subject: str) -> Assignment:
    """What this person was given. Raises Refused 404 when they were not."""
    mine = (assignment.c.task_id == task_id) & (assignment.c.subject == subject)
    row = connection.execute(sa.select(assignment).where(mine)).first()
    if row is None:
        raise Refused(404, "task_not_found", f"there is no task {task_id} of yours; GET /v1/tasks/next gives you one")
    query = (
        sa.select(completion.c.id, completion.c.response, completion.c.request_messages)
        .join(answer, answer.c.completion_id == completion.c.id)
        .where(answer.c.task_id == task_id)
        .order_by(answer.c.place)
    )
    rows = connection.execute(query).all()
    texts = [(rows[place].id, rows[place].response) for place in row.shown]
    return Assignment(task_id, row.state, rows[0].request_messages, texts, row.lease_until)


# what becomes of them


def rank(
    connection: sa.Connection, task_id: str, subject: str, numbers: Sequence[Sequence[int]], said: dict[str, Any]
) -> tuple[Event, str]:
    """Take a ranking; numbers: of the answers as they were shown, from 1, in groups, best first. said: further fields of
    the Vote. Returns what opinions.vote returns: it is an opinion like any other.

    A lease that has run out is no reason to lose an opinion. Raises Refused 404 without such an assignment, 409 when it was
    skipped, 422 when the groups do not hold each number once.
    """
    given = held(connection, task_id, subject)
    if given.state == "skipped":
        raise Refused(409, "task_skipped", "you have skipped this task")
    ids = given.ids()
    if sorted(number for group in numbers for number in group) != list(range(1, len(ids) + 1)):
        text = f"ranking: its groups must hold each of the answers' numbers, 1 to {len(ids)}, once"
        raise Refused(422, "invalid_request", text)
    groups = [[ids[number - 1] for number in group] for group in numbers]
    event, how = opinions.vote(connection, Vote(subject=subject, **said, **ranked(ids, groups)))
    if given.state == "open":
        end(connection, task_id, subject, state="ranked", feedback_id=event.feedback_id)
        close(connection, task_id)
    return event, how


def skip(connection: sa.Connection, task_id: str, subject: str, reason: str) -> bool:
    """Put a task back for others, and never get it again; whether that is new. Raises Refused 404, 409 when it is ranked."""
    given = held(connection, task_id, subject)
    if given.state == "ranked":
        raise Refused(409, "task_ranked", "you have ranked this task already")
    if given.state == "open":
        end(connection, task_id, subject, state="skipped", reason=reason)
    return given.state == "open"


def end(connection: sa.Connection, task_id: str, subject: str, **values: Any) -> None:
    """Write what became of an assignment."""
    mine = (assignment.c.task_id == task_id) & (assignment.c.subject == subject)
    connection.execute(sa.update(assignment).where(mine).values(finished_at=datetime.now(UTC), **values))


def close(connection: sa.Connection, task_id: str) -> None:
    """Close a task that enough people have ranked; gold is never done."""
    there = (assignment.c.task_id == task_id) & (assignment.c.state == "ranked")
    enough = sa.select(sa.func.count()).select_from(assignment).where(there).scalar_subquery()
    done = (task.c.id == task_id) & ~task.c.gold & (task.c.raters <= enough)
    connection.execute(sa.update(task).where(done).values(closed_at=datetime.now(UTC)))


# gold


def make_gold(connection: sa.Connection, task_id: str, subject: str, actor: str) -> tuple[Task, bool]:
    """Take this person's own ranking of a task, said as an expert, as the right order; whether that changed anything.

    Raises Refused 404 when they were not given it, 409 without such a ranking, 422 when it has all answers equal.
    """
    held(connection, task_id, subject)
    found = get(connection, task_id)
    mine = (assignment.c.task_id == task_id) & (assignment.c.subject == subject)
    query = sa.select(feedback).join(assignment, assignment.c.feedback_id == feedback.c.id).where(mine)
    row = connection.execute(query).first()
    if row is None or row.retracted or row.source != "human_expert":
        raise Refused(409, "no_expert_ranking", "rank the task first, with source human_expert")
    ranks = {place["completion_id"]: place["rank"] for place in row.ranked}
    groups: dict[int, list[int]] = {}
    for place, id in enumerate(found.answers):
        groups.setdefault(ranks[id], []).append(place)
    expected = [groups[number] for number in sorted(groups)]
    try:
        check_order(expected, len(found.answers))
    except ValueError as problem:
        raise Refused(422, "invalid_request", str(problem)) from problem
    if found.expected == expected:
        return found, False
    change = {"gold": True, "expected": expected, "gold_by": subject, "closed_at": None}
    connection.execute(sa.update(task).where(task.c.id == task_id).values(**change))
    before, after = {"expected": found.expected}, {"expected": expected}
    audit.record(connection, actor, "task.gold", f"task:{task_id}", before, after)
    return get(connection, task_id), True


def gold_results(connection: sa.Connection) -> list[GoldResult]:
    """How everybody ranked the gold tasks, by subject and task; without whoever's ranking is the right order, and without
    rankings taken back or erased."""
    query = (
        sa.select(assignment.c.subject, task.c.id, task.c.expected, feedback.c.ranked)
        .join(assignment, assignment.c.task_id == task.c.id)
        .join(feedback, feedback.c.id == assignment.c.feedback_id)
        .where(task.c.gold, ~feedback.c.retracted, feedback.c.moderation != "erased")
        .where(sa.func.coalesce(task.c.gold_by, "") != assignment.c.subject)
        .order_by(assignment.c.subject, task.c.id)
    )
    rows = connection.execute(query).all()
    known: dict[str, list[str]] = {row.id: [] for row in rows}
    gold = sa.select(answer).join(task, task.c.id == answer.c.task_id).where(task.c.gold)
    for part in connection.execute(gold.order_by(answer.c.place)):
        known.setdefault(part.task_id, []).append(part.completion_id)
    return [GoldResult(row.subject, row.id, *agreement(row.expected, row.ranked, known[row.id])) for row in rows]


def agreement(expected: list[list[int]], places: list[dict[str, Any]], ids: list[str]) -> tuple[float, int]:
    """(pairs in the right order, pairs whose order is known); a pair that was said to be equal counts half."""
    ranks = {place["completion_id"]: place["rank"] for place in places}
    right, pairs = 0.0, 0
    for better, worse in combinations(expected, 2):
        for one in better:
            for other in worse:
                difference = ranks[ids[other]] - ranks[ids[one]]
                right += 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0
                pairs += 1
    return right, pairs


# what is known of all


def progress(connection: sa.Connection, subject: str | None = None) -> dict[str, int]:
    """How many tasks were ranked and how many skipped, by one person or by everybody."""
    query = sa.select(assignment.c.state, sa.func.count().label("number")).group_by(assignment.c.state)
    if subject is not None:
        query = query.where(assignment.c.subject == subject)
    counts = {row.state: row.number for row in connection.execute(query)}
    return {state: counts.get(state, 0) for state in ("ranked", "skipped")}


def totals(connection: sa.Connection) -> dict[str, int]:
    """How many tasks there are: open, closed (enough people ranked it, or an answer is gone), gold."""
    kind = sa.case((task.c.gold, "gold"), (task.c.closed_at.is_(None), "open"), else_="closed").label("kind")
    query = sa.select(kind, sa.func.count().label("number")).group_by(kind)
    counts = {row.kind: row.number for row in connection.execute(query)}
    return {name: counts.get(name, 0) for name in ("open", "closed", "gold")}


# erasure


def touched(connection: sa.Connection, subject: str) -> bool:
    """Whether anything here is of this person."""
    return (
        connection.execute(sa.select(assignment.c.task_id).where(assignment.c.subject == subject)).first() is not None
    )


def close_about(connection: sa.Connection, ids: Sequence[str]) -> None:
    """After an erasure: no task hands out these answers any more."""
    about = sa.select(answer.c.task_id).where(answer.c.completion_id.in_(ids))
    gone = task.c.id.in_(about) & task.c.closed_at.is_(None)
    connection.execute(sa.update(task).where(gone).values(closed_at=datetime.now(UTC)))


def forget(connection: sa.Connection, subject: str, nobody: str) -> None:
    """Take a person's name and words away; what became of their tasks stays."""
    theirs = sa.update(assignment).where(assignment.c.subject == subject)
    connection.execute(theirs.values(subject=nobody, reason=""))
    connection.execute(sa.update(task).where(task.c.gold_by == subject).values(gold_by=nobody))
