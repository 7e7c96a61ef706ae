"""The labelling page: answers to one prompt, to be put in order by drag, keys or buttons, with the guideline beside them."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import Response
from markupsafe import Markup

from feedback.guideline import guideline
from feedback.opinions import Refused
from feedback.page import render, spoken

router = APIRouter(include_in_schema=False)
SKIP_REASONS = ("cannot_judge", "unsafe", "private", "broken")  # in words/label.json as skip_CODE


@router.get("/label")
async def label_page(request: Request) -> Response:
    """The page; its script asks /v1/tasks/next for what to show."""
    settings = request.app.state.service.settings
    try:
        html = await asyncio.to_thread(guideline, settings.guideline, spoken(request))
    except ValueError as problem:
        raise Refused(503, "guideline_unreadable", str(problem)) from problem
    return render(request, "label.html", guideline=Markup(html), skip_reasons=SKIP_REASONS)  # guideline.py escaped it
