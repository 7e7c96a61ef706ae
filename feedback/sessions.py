"""The page's session: a signed cookie that names a visitor, and the key they signed in with, if any."""

from __future__ import annotations

import hmac
import secrets
import time
from dataclasses import dataclass

from starlette.responses import Response

from feedback.identity import Identity

COOKIE = "thumbwheel_session"
DAYS = 365
NO_KEY = 0


@dataclass(frozen=True)
class Session:
    """Who sits before the page. name: random, known to their cookie only; key_id: NO_KEY, or an API key's number."""

    name: str
    key_id: int = NO_KEY


def fresh(key_id: int = NO_KEY) -> Session:
    """A new visitor."""
    return Session(secrets.token_urlsafe(24), key_id)


def pack(identity: Identity, session: Session, now: float | None = None) -> str:
    """The cookie's value: name.key.expiry.signature."""
    expiry = str(int((time.time() if now is None else now) + DAYS * 86400))
    parts = (session.name, str(session.key_id), expiry)
    return ".".join((*parts, identity.sign("session", *parts)))


def unpack(identity: Identity, value: str | None, now: float | None = None) -> Session | None:
    """The session of a cookie; None when there is none, it is not ours, or too old."""
    parts = (value or "").split(".")
    if len(parts) != 4 or not all(part.isascii() for part in parts):
        return None
    if not hmac.compare_digest(identity.sign("session", *parts[:3]), parts[3]):
        return None
    name, key_id, expiry, _ = parts
    return None if int(expiry) < (time.time() if now is None else now) else Session(name, int(key_id))


def csrf_token(identity: Identity, session: Session) -> str:
    """What a form of the page carries, so that a form of another site cannot be taken for it."""
    return identity.sign("csrf", session.name)[:32]


def csrf_holds(identity: Identity, session: Session, given: str | None) -> bool:
    """Whether a request brought the token of its session."""
    return hmac.compare_digest(csrf_token(identity, session).encode(), (given or "").encode())


def put_cookie(response: Response, identity: Identity, session: Session, secure: bool) -> None:
    """Give the browser its session. secure: the page came over TLS.

    SameSite=Lax, not Strict: who follows a link to the page from elsewhere must arrive as themselves, and not be given a
    new name over their old one. Writes are guarded against other sites separately (access.py).
    """
    value = pack(identity, session)
    response.set_cookie(COOKIE, value, max_age=DAYS * 86400, httponly=True, samesite="lax", secure=secure, path="/")
