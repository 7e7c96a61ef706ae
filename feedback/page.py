"""What all pages have in common: words in two languages, the navigation, the session, the policy, forms, and their files.

A page is a template that extends base.html, its words in pages/words/NAME.json, a handler that returns render(), and a line
in access.PAGES if it belongs in the navigation. Nothing comes from elsewhere, and no script stands in the HTML.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import FileResponse, HTMLResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from feedback import sessions
from feedback.access import PAGES, ROUTES, Caller
from feedback.opinions import Refused
from feedback.votes import speaker

router = APIRouter(include_in_schema=False)
FOLDER = Path(__file__).parent / "pages"
TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
ASSETS = {path.name: TYPES[path.suffix] for path in FOLDER.iterdir() if path.suffix in TYPES}
SAFETY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers say Origin: null of our own forms
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
LANGUAGES = ("en", "zh")
LANGUAGE_COOKIE = "thumbwheel_language"
YEAR = 365 * 86400
templates = Environment(
    loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


@cache
def words(name: str, lang: str) -> dict[str, str]:
    """The frame's words and those of one page."""
    found: dict[str, str] = {}
    for part in ("frame", name):
        found |= json.loads((FOLDER / "words" / f"{part}.json").read_text(encoding="utf-8"))[lang]
    return found


def language(asked: str | None, kept: str | None, accepted: str) -> str:
    """The page's language: what ?lang= asks for, else what was asked for before, else the first of Accept-Language that
    we speak, else English."""
    for wish in (asked, kept):
        if wish in LANGUAGES:
            return wish
    weighed = []
    for place, part in enumerate(accepted.split(",")):
        name, _, weight = part.strip().partition(";q=")
        try:
            weighed.append((-float(weight or 1), place, name.split("-")[0].lower()))
        except ValueError:
            continue
    return next((name for _, _, name in sorted(weighed) if name in LANGUAGES), "en")


def spoken(request: Request) -> str:
    """The language to answer this request in."""
    asked, kept = request.query_params.get("lang"), request.cookies.get(LANGUAGE_COOKIE)
    return language(asked, kept, request.headers.get("accept-language", ""))


def navigation(request: Request, here: str) -> list[dict[str, Any]]:
    """The pages that this caller may open; here: the name of the one that they are on."""
    scopes = request.state.caller.scopes
    return [
        {"path": path, "name": name, "here": name == here}
        for path, name in PAGES.items()
        if name and ROUTES["GET", path] in scopes
    ]


def render(request: Request, template: str, status: int = 200, *, vocabulary: str = "", **values: Any) -> Response:
    """A page, with its words (of `vocabulary`, else of the template's name), the navigation and the token for its forms.

    Somebody without a session gets one. Values are escaped by the template; what scripts need goes into data attributes.
    """
    caller: Caller = request.state.caller
    lang = spoken(request)
    session = caller.session or sessions.fresh()
    name = vocabulary or template.removesuffix(".html")
    told = words(name, lang)
    other = request.url.include_query_params(lang="en" if lang == "zh" else "zh")
    html = templates.get_template(template).render(
        lang=lang,
        words=told,
        script_words=json.dumps(told),
        navigation=navigation(request, name),
        csrf_token=sessions.csrf_token(request.app.state.service.identity, session),
        may_rate="rate" in caller.scopes,
        signed_in=session.key_id != sessions.NO_KEY,
        other_language=f"?{other.query}",
        **values,
    )
    headers = {**SAFETY, "Cache-Control": "no-store", "Vary": "Accept-Language, Cookie"}
    response = HTMLResponse(html, status, headers=headers)
    if caller.session is None:
        give_session(request, response, session)
    if request.query_params.get("lang") == lang:
        secure = request.url.scheme == "https"
        response.set_cookie(LANGUAGE_COOKIE, lang, max_age=YEAR, httponly=True, samesite="lax", secure=secure)
    return response


def give_session(request: Request, response: Response, session: sessions.Session) -> None:
    """Set the session's cookie; over TLS for TLS only."""
    sessions.put_cookie(response, request.app.state.service.identity, session, request.url.scheme == "https")


def person(request: Request) -> str:
    """The subject of whoever sits before a page; nobody's, while the page has not given them a session."""
    caller: Caller = request.state.caller
    return speaker(request, None) if caller.session or caller.kind == "key" else ""


async def read_form(request: Request) -> dict[str, str]:
    """The fields of a form that a page of this session posts; of a name given twice, the first.

    Raises Refused 400 for what is no form, 403 for one that another site made up; no browser sends a key by itself, so
    who brings one needs no session.
    """
    try:
        fields = parse_qs((await request.body()).decode(), keep_blank_values=True, max_num_fields=100)
    except ValueError as problem:
        raise Refused(400, "invalid_request", "the form cannot be read") from problem
    form = {name: values[0] for name, values in fields.items()}
    session = request.state.caller.session
    identity = request.app.state.service.identity
    if request.state.caller.kind == "key":
        return form
    if session is None or not sessions.csrf_holds(identity, session, form.get("csrf_token")):
        raise Refused(403, "cross_site_request", "this form is not of your session: open the page again")
    return form


@router.get("/assets/{name}")
async def asset(name: str) -> Response:
    """One of the pages' files."""
    if name not in ASSETS:
        raise HTTPException(404, f"there is no file {name}")
    return FileResponse(FOLDER / name, media_type=ASSETS[name], headers={**SAFETY, "Cache-Control": "no-cache"})
