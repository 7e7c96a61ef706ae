"""Promotions: which model reigns. The rows are a stack, the champion is its top."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from feedback.tables import PromotionRow, table_of

table = table_of(PromotionRow)


class StaleChampion(ValueError):
    """The reigning model is not the one that the candidate was judged against."""


@dataclass(frozen=True)
class Promotion:
    """One row: `model_hash` reigns from `created_at` on; `action` is "promote" or "rollback"."""

    id: int
    action: str
    from_hash: str | None
    model_hash: str
    model_path: str
    figures: dict[str, Any]
    reason: str
    created_at: datetime


def history(connection: sa.Connection) -> list[Promotion]:
    """All rows, oldest first."""
    return [Promotion(**row._mapping) for row in connection.execute(sa.select(table).order_by(table.c.id))]


def reigns(rows: list[Promotion]) -> list[Promotion]:
    """The promotions that were not rolled back, oldest first; the last one is the champion's."""
    stack: list[Promotion] = []
    for row in rows:
        if row.action == "promote":
            stack.append(row)
        else:
            stack.pop()
    return stack


def champion(connection: sa.Connection) -> Promotion | None:
    """The newest row: a rollback's row names the model that reigns again."""
    row = connection.execute(sa.select(table).order_by(table.c.id.desc()).limit(1)).first()
    return Promotion(**row._mapping) if row else None


def promote(
    connection: sa.Connection,
    model_hash: str,
    model_path: str,
    figures: dict[str, Any],
    reason: str,
    expected_champion: str | None,
) -> Promotion:
    """Push a champion; see Store.promote."""
    reigning = champion(connection)
    if reigning and reigning.model_hash == model_hash:
        return reigning
    current = reigning.model_hash if reigning else None
    if current != expected_champion:
        raise StaleChampion(
            f"model {model_hash[:12]} was judged against champion {name(expected_champion)}, but {name(current)} reigns: "
            "judge it again"
        )
    return insert(connection, "promote", current, model_hash, model_path, figures, reason)


def rollback(
    connection: sa.Connection,
    reason: str,
    expected_champion: str | None = None,
    figures: dict[str, Any] | None = None,
) -> Promotion:
    """Take the top of the stack away; see Store.rollback."""
    stack = reigns(history(connection))
    if len(stack) < 2:
        raise ValueError("there is no earlier champion to go back to")
    before, reigning = stack[-2], stack[-1]
    if expected_champion not in (None, reigning.model_hash):
        raise StaleChampion(f"{name(expected_champion)} was to be rolled back, but {name(reigning.model_hash)} reigns")
    known = {key: value for key, value in before.figures.items() if key != "probation"}
    return insert(
        *(connection, "rollback", reigning.model_hash, before.model_hash, before.model_path),
        *({**known, **(figures or {})}, reason),
    )


def insert(
    connection: sa.Connection,
    action: str,
    from_hash: str | None,
    model_hash: str,
    model_path: str,
    figures: dict[str, Any],
    reason: str,
) -> Promotion:
    """Write one row and return it."""
    values: dict[str, Any] = {
        "action": action,
        "from_hash": from_hash,
        "model_hash": model_hash,
        "model_path": str(model_path),
        "figures": figures,
        "reason": reason,
        "created_at": datetime.now(UTC),
    }
    key = connection.execute(sa.insert(table).values(**values)).inserted_primary_key
    assert key is not None
    return Promotion(id=key[0], **values)


def name(model_hash: str | None) -> str:
    """A hash for people."""
    return model_hash[:12] if model_hash else "nobody"
