"""The sign-in page, where keys are asked for: a form that works without JavaScript and turns an API key into a session."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from feedback import keys, sessions
from feedback.errors import error
from feedback.keys import Key
from feedback.page import POLICY, SAFETY, give_session, language, pages, words

router = APIRouter(include_in_schema=False)
FORM_POLICY = POLICY.replace("form-action 'none'", "form-action 'self'")


def form_page(request: Request, session: sessions.Session, lang: str, failed: bool) -> Response:
    """The form, with the token of its session in it."""
    html = pages.get_template("signin.html").render(
        lang=lang,
        words=words[lang],
        csrf_token=sessions.csrf_token(request.app.state.service.identity, session),
        signed_in=session.key_id != sessions.NO_KEY,
        failed=failed,
    )
    safety = {**SAFETY, "Content-Security-Policy": FORM_POLICY, "Cache-Control": "no-store"}
    return HTMLResponse(html, 401 if failed else 200, headers={**safety, "Vary": "Accept-Language"})


def spoken(request: Request, lang: str | None = None) -> str:
    """The language of the page."""
    return language(lang, request.headers.get("accept-language", ""))


@router.get("/signin")
async def signin_page(request: Request, lang: Annotated[Literal["en", "zh"] | None, Query()] = None) -> Response:
    """Ask for a key."""
    known = request.state.caller.session
    session = known or sessions.fresh()
    response = form_page(request, session, spoken(request, lang), False)
    if known is None:
        give_session(request, response, session)
    return response


async def read_form(request: Request) -> tuple[dict[str, str], Response | None]:
    """The fields of a form, or the answer to one that another site made up."""
    try:
        fields = parse_qs((await request.body()).decode(), max_num_fields=10)
    except ValueError:
        return {}, error(400, "invalid_request", "the form cannot be read")
    form = {name: values[0] for name, values in fields.items()}
    session = request.state.caller.session
    identity = request.app.state.service.identity
    if session is None or not sessions.csrf_holds(identity, session, form.get("csrf_token")):
        return {}, error(403, "cross_site_request", "this form is not of your session: open /signin again")
    return form, None


@router.post("/signin")
async def signin(request: Request) -> Response:
    """Take a key, and give a session with its scopes. The name of the session is a new one: rights never come to a name
    that somebody else may have laid into the browser."""
    form, refusal = await read_form(request)
    if refusal is not None:
        return refusal
    key = await asyncio.to_thread(working_key, request.app.state.service.store, form.get("key", "").strip())
    if key is None:
        return form_page(request, request.state.caller.session, spoken(request), True)
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
    _, refusal = await read_form(request)
    if refusal is not None:
        return refusal
    response = RedirectResponse("/signin", 303, headers={"Cache-Control": "no-store"})
    response.delete_cookie(sessions.COOKIE, path="/")
    return response
