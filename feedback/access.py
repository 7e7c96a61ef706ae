"""Who may do what: the scope that each route needs, and the guard before all of them.

A caller is, in this order: the bearer of an API key; the bearer of a feedback token, for the one answer that it names; a
session of the page, with the scopes of the key it signed in with, or a visitor's; somebody on this machine, where no keys
are asked for. docs/decisions/2026-11-24-who-may-do-what.md says why.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from http.cookies import CookieError, SimpleCookie
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import Headers
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from feedback import errors, keys, sessions
from feedback.keys import SCOPES, Key
from feedback.limits import Buckets, address_name, bounded, too_large
from feedback.sessions import Session
from feedback.settings import Settings

log = logging.getLogger("thumbwheel")

OPEN = "open"
# the one place where routes say what they need; what is not listed needs the scope admin, and a test fails
ROUTES: dict[tuple[str, str], str] = {
    ("GET", "/"): "chat",
    ("GET", "/plain"): "chat",
    ("POST", "/plain"): "chat",
    ("POST", "/plain/thumb"): "rate",
    ("GET", "/you"): "rate",
    ("POST", "/you/withdraw"): "rate",
    ("GET", "/moderation"): "moderate",
    ("POST", "/moderation"): "moderate",
    ("GET", "/moderation/audit"): "moderate",
    ("GET", "/dashboard"): "read",
    ("GET", "/assets/{name}"): OPEN,
    ("GET", "/signin"): OPEN,
    ("POST", "/signin"): OPEN,
    ("POST", "/signout"): OPEN,
    ("GET", "/healthz"): OPEN,
    ("GET", "/readyz"): OPEN,
    ("GET", "/openapi.json"): OPEN,
    ("GET", "/metrics"): "read",
    ("GET", "/v1/models"): "chat",
    ("GET", "/v1/models/{name}"): "chat",
    ("POST", "/v1/chat/completions"): "chat",
    ("GET", "/v1/feedback"): "read",
    ("POST", "/v1/feedback"): "rate",
    ("PUT", "/v1/feedback/{completion_id}/thumb"): "rate",
    ("PUT", "/v1/feedback/{completion_id}/edit"): "rate",
    ("PUT", "/v1/feedback/{completion_id}/comment"): "rate",
    ("PUT", "/v1/feedback/{completion_id}/expert"): "label",
    ("GET", "/v1/feedback/{completion_id}/{kind}"): "rate",
    ("DELETE", "/v1/feedback/{completion_id}/{kind}"): "rate",
    ("POST", "/v1/comparisons"): "rate",
    ("GET", "/v1/comparisons"): "rate",
    ("DELETE", "/v1/comparisons"): "rate",
    ("POST", "/v1/rankings"): "rate",
    ("GET", "/v1/rankings"): "rate",
    ("DELETE", "/v1/rankings"): "rate",
    ("GET", "/v1/export"): "read",
    ("GET", "/v1/subjects/me"): "rate",
    ("DELETE", "/v1/subjects/me"): "rate",
    ("GET", "/v1/moderation"): "moderate",
    ("POST", "/v1/moderation/{feedback_id}"): "moderate",
    ("GET", "/v1/audit"): "admin",
    ("GET", "/label"): "label",
    ("POST", "/v1/tasks"): "admin",
    ("GET", "/v1/tasks"): "label",
    ("GET", "/v1/tasks/next"): "label",
    ("POST", "/v1/tasks/{task_id}/ranking"): "label",
    ("POST", "/v1/tasks/{task_id}/skip"): "label",
    ("POST", "/v1/tasks/{task_id}/gold"): "label",
    ("GET", "/v1/dashboard"): "read",
}
# pages, in the order of the navigation, with their names in words/frame.json (page_NAME); nameless ones stand in none
PAGES = {
    "/": "chat",
    "/plain": "",
    "/label": "label",
    "/moderation": "moderation",
    "/moderation/audit": "",
    "/dashboard": "dashboard",
    "/you": "you",
}
OF_ONE_ANSWER = "/v1/feedback/{completion_id}/"  # where a feedback token opens the door
FORMS = (
    "/signin",
    "/signout",
    "/plain",
    "/plain/thumb",
    "/you/withdraw",
    "/moderation",
)  # work without JavaScript; their handlers check the token in the form
SAFE = ("GET", "HEAD", "OPTIONS")
FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip", "via")
TOKEN = "x-thumbwheel-feedback-token"
CSRF = "x-csrf-token"
REMEMBER_SECONDS = 2.0  # for so long a revoked key may still open


@dataclass(frozen=True)
class Caller:
    """Who asks, and what they may do. kind: "key", "token", "session", "local" (this machine, no keys asked for)."""

    kind: str
    scopes: frozenset[str]
    key: Key | None = None
    session: Session | None = None

    def actor(self, subject: str) -> str:
        """How the audit log calls them."""
        return f"key:{self.key.id}" if self.key else f"subject:{subject}"


class Denied(Exception):
    """The answer to a request that goes no further."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status_code)
        self.response = response


def compiled() -> list[tuple[str, re.Pattern[str], str, str]]:
    """ROUTES as (method, pattern, template, scope)."""
    rows = []
    for (method, template), scope in ROUTES.items():
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(template))
        rows.append((method, re.compile(pattern), template, scope))
    return rows


PATTERNS = compiled()


def needed(method: str, path: str) -> tuple[str, str]:
    """The scope that a request needs, and the answer that it is about, if it is one that a feedback token opens."""
    if scope := ROUTES.get((method, path)):
        return scope, ""
    for verb, pattern, template, scope in PATTERNS:
        if verb == method and (found := pattern.fullmatch(path)):
            return scope, found.groupdict().get("completion_id", "") if template.startswith(OF_ONE_ANSWER) else ""
    return "admin", ""


def opens_page(scope: Scope) -> bool:
    """Whether a request is a person's who opens one of the PAGES."""
    return scope["method"] == "GET" and scope["path"] in PAGES


def first_page(caller: Caller) -> str:
    """Where somebody goes who may not open the page that they asked for: to the first that they may, or to sign in."""
    return next((path for path, name in PAGES.items() if name and ROUTES["GET", path] in caller.scopes), "/signin")


class Guard:
    """Before every route: limits, who asks, whether they may, and whether another site's page made them ask."""

    def __init__(self, app: ASGIApp, state: Any, settings: Settings, keys_needed: bool) -> None:
        """state: the application's, with `service` once it has started. keys_needed: on loopback too."""
        self.app, self.state, self.settings = app, state, settings
        self.keys_needed = keys_needed or settings.require_keys or bool(settings.public_names)
        self.by_key = Buckets(settings.key_rate, settings.key_burst)
        self.by_address = Buckets(settings.address_rate, settings.address_burst)
        self.known: dict[str, tuple[float, Key | None]] = {}
        self.noted: dict[int, datetime] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            caller = await self.caller(scope, headers)
            length = headers.get("content-length", "")
            if length.isdecimal() and int(length) > self.settings.body_limit:
                raise Denied(errors.http_error(too_large(self.settings.body_limit)))
        except Denied as denied:
            await denied.response(scope, receive, send)
            return
        except SQLAlchemyError as problem:
            log.error("the database failed: %s", problem)
            response = errors.error(503, "database_unavailable", "the database does not answer; try again")
            await response(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        await self.app(scope, bounded(receive, self.settings.body_limit, self.settings.body_seconds), send)

    async def caller(self, scope: Scope, headers: Headers) -> Caller:
        """Who asks. Raises Denied when they may not."""
        need, answer = needed(scope["method"], scope["path"])
        caller = await self.recognise(scope, headers, answer)
        if scope["method"] not in SAFE and caller.kind in ("session", "local"):
            self.refuse_other_sites(caller, headers, scope["path"])
        if need == OPEN or need in caller.scopes:
            return caller
        if opens_page(scope) and caller.kind == "session":
            raise Denied(RedirectResponse(first_page(caller), 303, headers={"Cache-Control": "no-store"}))
        if caller.kind == "key" or caller.key:
            raise Denied(errors.error(403, "insufficient_scope", f"this key lacks the scope {need!r}"))
        text = f"this needs an API key with the scope {need!r}: send it as 'Authorization: Bearer tw_…'"
        raise Denied(errors.error(401, "invalid_api_key", text, headers={"WWW-Authenticate": "Bearer"}))

    async def recognise(self, scope: Scope, headers: Headers, answer: str) -> Caller:
        """Who asks, counted against their limit. Raises Denied 401 for a key that opens nothing, 429 beyond the limit."""
        address = address_name((scope.get("client") or ("", 0))[0])
        local = not self.keys_needed and not any(name in headers for name in FORWARDED)
        given = headers.get("authorization")
        if given is not None and not (local and not given.startswith(f"Bearer {keys.PREFIX}")):
            return await self.bearer(given, address)
        if not local:
            self.count(self.by_address, address)
        if answer and TOKEN in headers and not local:
            return self.bearer_of_token(headers[TOKEN], answer)
        session = sessions.unpack(self.state.service.identity, cookie(headers))
        if local:
            return Caller("local", frozenset(SCOPES), None, session)
        visitor = frozenset(self.settings.visitor_scopes)
        if session is None:  # a page gives them one
            return Caller("session", visitor if opens_page(scope) else frozenset())
        key = None if session.key_id == sessions.NO_KEY else await self.by_number(session.key_id)
        return Caller("session", key.scopes if key else visitor, key, session)

    async def bearer(self, given: str, address: str) -> Caller:
        """The caller with an Authorization header."""
        scheme, _, secret = given.partition(" ")
        sha256 = keys.digest(secret.strip())
        seen = self.known.get(sha256)
        if seen is None or seen[1] is None:
            self.count(self.by_address, address)  # guesses, and keys not seen lately
        key = await self.look(sha256, lambda connection: keys.find(connection, sha256))
        why = "unknown" if key is None else key.problem(datetime.now(UTC))
        if scheme.lower() != "bearer" or key is None or why:
            text = "Authorization must be 'Bearer tw_…'" if scheme.lower() != "bearer" else f"this API key is {why}"
            raise Denied(errors.error(401, "invalid_api_key", text, headers={"WWW-Authenticate": "Bearer"}))
        self.count(self.by_key, str(key.id))
        self.note(key)
        return Caller("key", key.scopes, key)

    def bearer_of_token(self, token: str, answer: str) -> Caller:
        """The caller with a feedback token: may rate that answer."""
        try:
            self.state.service.identity.verify(token, answer)
        except ValueError as problem:
            raise Denied(errors.error(403, "invalid_feedback_token", str(problem))) from problem
        return Caller("token", frozenset({"rate"}))

    async def by_number(self, key_id: int) -> Key | None:
        """The key that a session signed in with, while it works."""
        key = await self.look(f"#{key_id}", lambda connection: keys.get(connection, key_id))
        if key is None or key.problem(datetime.now(UTC)):
            return None
        self.count(self.by_key, str(key.id))
        self.note(key)
        return key

    async def look(self, name: str, find: Any) -> Key | None:
        """A key from the database, remembered for REMEMBER_SECONDS."""
        now = time.monotonic()
        seen = self.known.get(name)
        if seen is not None and now - seen[0] < REMEMBER_SECONDS:
            return seen[1]

        def read() -> Key | None:
            with self.state.service.store.read() as connection:
                found: Key | None = find(connection)
                return found

        key = await asyncio.to_thread(read)
        if len(self.known) > 10_000:
            self.known.clear()
        self.known[name] = (now, key)
        return key

    def count(self, buckets: Buckets, name: str) -> None:
        """Raises Denied 429 when `name` has asked too much."""
        wait = buckets.take(name)
        if wait:
            seconds = math.ceil(wait)
            text = f"too many requests; try again in {seconds} s"
            raise Denied(errors.error(429, "rate_limit_exceeded", text, headers={"Retry-After": str(seconds)}))

    def note(self, key: Key) -> None:
        """Write down, at most once a minute, that a key is in use; nobody waits for it."""
        now = datetime.now(UTC)
        last = self.noted.get(key.id) or key.last_used_at
        if last is not None and now - last < keys.USED_EVERY:
            return
        self.noted[key.id] = now
        try:
            future = self.state.service.writer.put(partial(keys.used, key_id=key.id, at=now))
        except Exception as problem:  # the answer does not depend on it
            log.warning("the use of key %s was not noted: %s", key.id, problem)
            return
        future.add_done_callback(lambda done: done.cancelled() or done.exception())

    def refuse_other_sites(self, caller: Caller, headers: Headers, path: str) -> None:
        """A browser sends a cookie, and reaches this machine, whichever site's page asks it to. Raises Denied 403 for a
        write that another site's page asks for.

        Browsers say where a request comes from: in Sec-Fetch-Site (over TLS and on loopback), and in Origin. A request
        with a session that says neither must bring the session's token; a program on this machine needs none.
        """
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        if origin is not None and origin in self.settings.cors_origins and caller.session is None:
            return
        if site is not None:
            fine = site in ("same-origin", "none")
        elif origin is not None:
            fine = origin.partition("://")[2] == headers.get("host")
        else:
            fine = caller.session is None or path in FORMS
            if caller.session is not None and not fine:
                fine = sessions.csrf_holds(self.state.service.identity, caller.session, headers.get(CSRF))
        if not fine:
            text = "this request comes from another site's page, or lacks the X-CSRF-Token of its session"
            raise Denied(errors.error(403, "cross_site_request", text))


def cookie(headers: Headers) -> str | None:
    """The session cookie of a request."""
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(sessions.COOKIE)
    except CookieError:
        return None
    return found.value if found is not None else None
