"""The audit log: who did what to what, in the same transaction as the act itself."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from feedback.tables import AuditRow, table_of

table = table_of(AuditRow)


@dataclass(frozen=True)
class Act:
    """One entry. before, after: what the act changed of its target, None where there was or is nothing."""

    id: int
    actor: str
    act: str
    target: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    created_at: datetime


def record(
    connection: sa.Connection,
    actor: str,
    act: str,
    target: str,
    before: dict[str, Any] | None = None,
    after: dict[str, Any] | None = None,
) -> int:
    """Append an entry; it is there exactly when the caller's transaction commits. Returns its number."""
    values = {"actor": actor[:80], "act": act, "target": target, "before": before, "after": after}
    key = connection.execute(sa.insert(table), {**values, "created_at": datetime.now(UTC)}).inserted_primary_key
    assert key is not None
    return int(key[0])


def entries(connection: sa.Connection, after_id: int = 0, limit: int = 100, target: str | None = None) -> list[Act]:
    """The log after number `after_id`, oldest first; of one target if given."""
    query = sa.select(table).where(table.c.id > after_id).order_by(table.c.id).limit(limit)
    if target is not None:
        query = query.where(table.c.target == target)
    return [Act(**row._mapping) for row in connection.execute(query)]


def of_targets(connection: sa.Connection, targets: list[str]) -> list[Act]:
    """What was done to these, oldest first."""
    query = sa.select(table).where(table.c.target.in_(targets)).order_by(table.c.id)
    return [Act(**row._mapping) for row in connection.execute(query)]


def latest(connection: sa.Connection, limit: int, before_id: int = 0, act: str = "") -> list[Act]:
    """The log backwards from below number `before_id` (0: from its end); of one kind of act if given."""
    query = sa.select(table).order_by(table.c.id.desc()).limit(limit)
    if before_id:
        query = query.where(table.c.id < before_id)
    if act:
        query = query.where(table.c.act == act)
    return [Act(**row._mapping) for row in connection.execute(query)]
