"""The sign-in page, where keys are asked for: a form that works without JavaScript and turns an API key into a session."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from feedback import keys, sessions
from feedback.keys import Key
from feedback.page import give_session, read_form, render

router = APIRouter(include_in_schema=False)


@router.get("/signin")
async def signin_page(request: Request) -> Response:
    """Ask for a key."""
    return render(request, "signin.html", failed=False)


@router.post("/signin")
async def signin(request: Request) -> Response:
    """Take a key, and give a session with its scopes. The name of the session is a new one: rights never come to a name
    that somebody else may have laid into the browser."""
    form = await read_form(request)
    key = await asyncio.to_thread(working_key, request.app.state.service.store, form.get("key", "").strip())
    if key is None:
        return render(request, "signin.html", 401, failed=True)
    response = RedirectResponse("/", 303, headers={"Cache-Control": "no-store"})
    give_session(request, response, sessions.fresh(key.id))
    return response


def working_key(store: Any, secret: str) -> Key | None:
    """The key with this secret, if it opens anything."""
    with store.read() as connection:
        key: Key | None = keys.find(connection, keys.digest(secret))
    return key if key is not None and not key.problem(datetime.now(UTC)) else None


@router.post("/signout")
async def signout(request: Request) -> Response:
    """Forget the session."""
    await read_form(request)
    response = RedirectResponse("/signin", 303, headers={"Cache-Control": "no-store"})
    response.delete_cookie(sessions.COOKIE, path="/")
    return response
