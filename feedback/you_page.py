"""The page of one's own data: what is kept of whoever sits before it, as a file, and its withdrawal."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from feedback import personal
from feedback.downloads import erase
from feedback.opinions import Refused
from feedback.page import person, read_form, render
from feedback.personal import Answer

router = APIRouter(include_in_schema=False)


@router.get("/you")
async def you_page(request: Request) -> Response:
    """What is kept of you."""
    kept = await asyncio.to_thread(look, request.app.state.service.store, person(request))
    gone = request.query_params.get("withdrawn", "")
    withdrawn = int(gone) if gone.isascii() and gone.isdecimal() and len(gone) < 10 else None
    return render(request, "you.html", counts=kept[0], answers=kept[1], withdrawn=withdrawn, newest=personal.NEWEST)


def look(store: Any, subject: str) -> tuple[dict[str, int], list[Answer]]:
    """Counts and the newest answers, of one moment."""
    with store.moment() as connection:
        return personal.counts(connection, subject), personal.latest(connection, subject)


@router.post("/you/withdraw")
async def withdraw(request: Request) -> Response:
    """Erase everything that is kept of whoever sits before the page, and what the page itself keeps in their browser."""
    form = await read_form(request)
    if form.get("sure") != "yes":
        raise Refused(422, "invalid_request", "sure: tick the box that says that you mean it")
    done = await erase(request.app.state.service, person(request))
    number = done.completions + done.opinions if done else 0
    return RedirectResponse(f"/you?withdrawn={number}", 303, headers={"Cache-Control": "no-store"})
