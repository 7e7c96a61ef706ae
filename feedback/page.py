"""The chat page: one template, one stylesheet, one script, nothing from elsewhere; in English and in Chinese."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined

router = APIRouter(include_in_schema=False)
PAGES = Path(__file__).parent / "pages"
COOKIE = "thumbwheel_subject"
YEAR = 365 * 86400
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
    """The page; gives a new visitor a random name that only their cookie knows."""
    spoken = language(lang, request.headers.get("accept-language", ""))
    html = pages.get_template("chat.html").render(
        lang=spoken, words=words[spoken], script_words=json.dumps(words[spoken])
    )
    response = HTMLResponse(html, headers={**SAFETY, "Cache-Control": "no-store", "Vary": "Accept-Language"})
    if not request.cookies.get(COOKIE):
        name = secrets.token_urlsafe(24)
        response.set_cookie(COOKIE, name, max_age=YEAR, httponly=True, samesite="strict", path="/")
    return response


@router.get("/assets/{name}")
async def asset(name: str) -> Response:
    """One of the page's files."""
    if name not in ASSETS:
        raise HTTPException(404, f"there is no file {name}")
    return FileResponse(PAGES / name, media_type=ASSETS[name], headers={**SAFETY, "Cache-Control": "no-cache"})
