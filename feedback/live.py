"""What people say of models that answer them: thumbs on a model's answers, one by one, in the order in which they came."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa

from feedback.tables import CompletionRow, FeedbackRow, table_of

feedback = table_of(FeedbackRow)
completion = table_of(CompletionRow)


def thumbs(
    connection: sa.Connection,
    model_hash: str,
    sources: Sequence[str],
    *,
    since: datetime | None = None,
    before: datetime | None = None,
    per_person: int | None = None,
    limit: int = 20_000,
) -> list[bool]:
    """Thumbs that stand on answers of one model (true: up), oldest first.

    Only accepted ones that were not taken back, from `sources`. since: the answer was written then or later; before: the
    thumb is older. per_person: of one subject at most so many, the first ones. limit: at most so many are read, with
    `since` the oldest, else the newest.
    """
    query = (
        sa.select(feedback.c.value, feedback.c.subject)
        .join(completion, completion.c.id == feedback.c.completion_id)
        .where(
            completion.c.model_hash == model_hash,
            feedback.c.kind == "thumb",
            feedback.c.value != 0,
            feedback.c.retracted.is_(False),
            feedback.c.moderation == "accepted",
            feedback.c.source.in_(list(sources)),
        )
        .order_by(feedback.c.id.desc() if since is None else feedback.c.id)
        .limit(limit)
    )
    if since is not None:
        query = query.where(completion.c.created_at >= since)
    if before is not None:
        query = query.where(feedback.c.created_at < before)
    said: Counter[str] = Counter()
    found: list[bool] = []
    rows = connection.execute(query).all()
    for value, subject in rows if since is not None else reversed(rows):
        said[subject] += 1
        if per_person is None or said[subject] <= per_person:
            found.append(value > 0)
    return found
