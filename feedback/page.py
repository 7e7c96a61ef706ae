"""The chat page: one template, one stylesheet, one script, nothing from elsewhere; in English and in Chinese."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from feedback import sessions
from feedback.access import Caller

router = APIRouter(include_in_schema=False)
PAGES = Path(__file__).parent / "pages"
ASSETS = {"chat.css": "text/css", "chat.js": "text/javascript", "icon.svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SAFETY = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
LANGUAGES = ("en", "zh")
pages = Environment(loader=FileSystemLoader(PAGES), autoescape=True, undefined=StrictUndefined)
words: dict[str, dict[str, str]] = json.loads((PAGES / "words.json").read_text(encoding="utf-8"))


def language(asked: str | None, accepted: str) -> str:
    """The page's language: what ?lang= asks for, else the first of Accept-Language that we speak, else English."""
    if asked in LANGUAGES:
        return asked
    weighed = []
    for place, part in enumerate(accepted.split(",")):
        name, _, weight = part.strip().partition(";q=")
        try:
            weighed.append((-float(weight or 1), place, name.split("-")[0].lower()))
        except ValueError:
            continue
    return next((name for _, _, name in sorted(weighed) if name in LANGUAGES), "en")


@router.get("/")
async def page(request: Request, lang: Annotated[Literal["en", "zh"] | None, Query()] = None) -> Response:
    """The page; gives a new visitor a session. Who may not chat here is sent to sign in."""
    caller: Caller = request.state.caller
    newcomer = caller.kind == "session" and caller.session is None
    may = request.app.state.service.settings.visitor_scopes if newcomer else caller.scopes
    if "chat" not in may:
        return RedirectResponse("/signin", 303, headers={"Cache-Control": "no-store"})
    spoken = language(lang, request.headers.get("accept-language", ""))
    html = pages.get_template("chat.html").render(
        lang=spoken, words=words[spoken], script_words=json.dumps(words[spoken])
    )
    response = HTMLResponse(html, headers={**SAFETY, "Cache-Control": "no-store", "Vary": "Accept-Language"})
    if caller.session is None:
        give_session(request, response, sessions.fresh())
    return response


def give_session(request: Request, response: Response, session: sessions.Session) -> None:
    """Set the session's cookie; over TLS for TLS only."""
    sessions.put_cookie(response, request.app.state.service.identity, session, request.url.scheme == "https")


@router.get("/assets/{name}")
async def asset(name: str) -> Response:
    """One of the page's files."""
    if name not in ASSETS:
        raise HTTPException(404, f"there is no file {name}")
    return FileResponse(PAGES / name, media_type=ASSETS[name], headers={**SAFETY, "Cache-Control": "no-cache"})
