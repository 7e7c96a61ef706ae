"""What is kept of one person, as the pages show it to that person: a conversation, counts, and the newest answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from feedback.tables import CompletionRow, FeedbackRow, table_of

completion, feedback = table_of(CompletionRow), table_of(FeedbackRow)
NEWEST = 50  # answers on the page of one's own data; the download has all


@dataclass(frozen=True)
class Answer:
    """An answer that the person asked for. opinions: what they think of it, by kind; of comparisons, the newest."""

    id: str
    question: str
    messages: list[dict[str, str]]
    response: str
    turn: int
    model_hash: str
    created_at: Any
    opinions: dict[str, sa.Row[Any]] = field(default_factory=dict)


def conversation(connection: sa.Connection, subject: str, name: str) -> list[Answer]:
    """The person's conversation of that name, in its order; of several tries at one turn, the newest."""
    where = (
        (completion.c.conversation == name) & (completion.c.subject == subject) & (completion.c.status == "complete")
    )
    rows = connection.execute(sa.select(completion).where(where).order_by(completion.c.id))
    newest = {row.turn: row for row in rows}
    return answers(connection, subject, [newest[turn] for turn in sorted(newest)])


def latest(connection: sa.Connection, subject: str) -> list[Answer]:
    """The person's NEWEST answers, the newest first."""
    where = (completion.c.subject == subject) & (completion.c.status != "erased")
    rows = connection.execute(sa.select(completion).where(where).order_by(completion.c.id.desc()).limit(NEWEST))
    return answers(connection, subject, list(rows))


def answers(connection: sa.Connection, subject: str, rows: Sequence[sa.Row[Any]]) -> list[Answer]:
    """Rows with what the person thinks of them."""
    said: dict[str, dict[str, sa.Row[Any]]] = {row.id: {} for row in rows}
    about = feedback.c.completion_id.in_(said) | (feedback.c.other.in_(said) & (feedback.c.other != ""))
    query = sa.select(feedback).where(feedback.c.subject == subject, ~feedback.c.retracted, about)
    for opinion in connection.execute(query.order_by(feedback.c.id)):
        for id in {opinion.completion_id, opinion.other} & said.keys():
            said[id][opinion.kind] = opinion
    return [
        Answer(
            id=row.id,
            question=last_question(row.request_messages),
            messages=row.request_messages,
            response=row.response,
            turn=row.turn,
            model_hash=row.model_hash,
            created_at=row.created_at,
            opinions=said[row.id],
        )
        for row in rows
    ]


def last_question(messages: Iterable[dict[str, str]]) -> str:
    """What the person said last."""
    return next((message["content"] for message in reversed(list(messages)) if message["role"] == "user"), "")


def counts(connection: sa.Connection, subject: str) -> dict[str, int]:
    """How many answers of a person are kept, and how many opinions that stand, by kind."""
    mine = (completion.c.subject == subject) & (completion.c.status != "erased")
    number = connection.execute(sa.select(sa.func.count()).select_from(completion).where(mine)).scalar_one()
    query = (
        sa.select(feedback.c.kind, sa.func.count().label("number"))
        .where(feedback.c.subject == subject, ~feedback.c.retracted)
        .group_by(feedback.c.kind)
        .order_by(feedback.c.kind)
    )
    return {"answers": number} | {row.kind: row.number for row in connection.execute(query)}
