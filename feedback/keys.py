"""API keys: made, found by their secret, listed, revoked. What a key may do is its scopes, and nothing follows from one
scope to another."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from feedback import audit
from feedback.tables import KeyRow, table_of

SCOPES = ("chat", "rate", "label", "moderate", "read", "admin")
PREFIX = "tw_"  # by which scanners for leaked secrets, and people, know what it is
SECRET_BYTES = 32
USED_EVERY = timedelta(minutes=1)

table = table_of(KeyRow)
FIND = sa.select(table).where(table.c.secret_sha256 == sa.bindparam("sha256"))


@dataclass(frozen=True)
class Key:
    """One key, without its secret."""

    id: int
    name: str
    scopes: frozenset[str]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None

    def problem(self, now: datetime) -> str:
        """Why it opens nothing any more, or ""."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else ""


def digest(secret: str) -> str:
    """How a secret stands in the table. One pass of SHA-256 is enough: a secret has 256 random bits, so nobody can try
    them all, however quick the hash; the slow hashes for passwords make up for passwords that people choose."""
    return hashlib.sha256(secret.encode()).hexdigest()


def create(
    connection: sa.Connection, name: str, scopes: list[str], actor: str, days: float | None = None
) -> tuple[Key, str]:
    """Make a key that ends after `days` (None: never); returns it and its secret, which cannot be had again.

    Raises ValueError for an empty or long name, no scope or one that does not exist, or a time that is not ahead.
    """
    name = name.strip()
    if not 1 <= len(name) <= 64 or not name.isprintable():
        raise ValueError("the name of a key has 1 to 64 printable characters")
    if wrong := sorted(set(scopes) - set(SCOPES)):
        raise ValueError(f"there is no scope {', '.join(wrong)}; the scopes are {', '.join(SCOPES)}")
    if not scopes:
        raise ValueError(f"a key without a scope opens nothing; give it some of {', '.join(SCOPES)}")
    if days is not None and not 0 < days <= 36_500:
        raise ValueError(f"a key lasts more than 0 and at most 36500 days, not {days:g}")
    now, secret = datetime.now(UTC), PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    values: dict[str, Any] = {
        "name": name,
        "secret_sha256": digest(secret),
        "scopes": [scope for scope in SCOPES if scope in scopes],
        "created_at": now,
        "expires_at": None if days is None else now + timedelta(days=days),
        "revoked_at": None,
        "last_used_at": None,
    }
    made = connection.execute(sa.insert(table), values).inserted_primary_key
    assert made is not None
    expires = values["expires_at"].isoformat() if values["expires_at"] else None
    after = {"name": name, "scopes": values["scopes"], "expires_at": expires}
    audit.record(connection, actor, "key.create", f"key:{made[0]}", None, after)
    found = get(connection, made[0])
    assert found is not None
    return found, secret


def get(connection: sa.Connection, key_id: int) -> Key | None:
    """The key with this number, or None."""
    row = connection.execute(sa.select(table).where(table.c.id == key_id)).first()
    return as_key(row) if row else None


def find(connection: sa.Connection, sha256: str) -> Key | None:
    """The key whose secret has this digest, working or not, or None."""
    row = connection.execute(FIND, {"sha256": sha256}).first()
    return as_key(row) if row else None


def listed(connection: sa.Connection) -> list[Key]:
    """All keys, oldest first."""
    return [as_key(row) for row in connection.execute(sa.select(table).order_by(table.c.id))]


def any_works(connection: sa.Connection) -> bool:
    """Whether at least one key opens something."""
    now = datetime.now(UTC)
    return any(not key.problem(now) for key in listed(connection))


def revoke(connection: sa.Connection, key_id: int, actor: str) -> Key:
    """End a key; a repetition keeps the first time. Raises KeyError when there is no such key."""
    key = get(connection, key_id)
    if key is None:
        raise KeyError(f"there is no key {key_id}")
    if key.revoked_at is not None:
        return key
    now = datetime.now(UTC)
    connection.execute(sa.update(table).where(table.c.id == key_id).values(revoked_at=now))
    audit.record(
        connection, actor, "key.revoke", f"key:{key_id}", {"revoked_at": None}, {"revoked_at": now.isoformat()}
    )
    found = get(connection, key_id)
    assert found is not None
    return found


def used(connection: sa.Connection, key_id: int, at: datetime) -> None:
    """Note that a key was used; a later time stays."""
    older = sa.or_(table.c.last_used_at.is_(None), table.c.last_used_at < at)
    connection.execute(sa.update(table).where(table.c.id == key_id, older).values(last_used_at=at))


def as_key(row: sa.Row[Any]) -> Key:
    """A row of the table."""
    fields = dict(row._mapping)
    del fields["secret_sha256"]
    return Key(**{**fields, "scopes": frozenset(fields["scopes"])})
