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
    counts, answers = await asyncio.to_thread(look, request.app.state.service.store, person(request))
    withdrawn = "withdrawn" in request.query_params and not any(counts.values())
    return render(request, "you.html", counts=counts, answers=answers, withdrawn=withdrawn, newest=personal.NEWEST)


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
    await erase(request.app.state.service, person(request))
    return RedirectResponse("/you?withdrawn", 303, headers={"Cache-Control": "no-store"})
