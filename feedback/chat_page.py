"""The chat page."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from feedback.page import render

router = APIRouter(include_in_schema=False)


@router.get("/")
async def chat_page(request: Request) -> Response:
    """Ask, and say what you think of the answer."""
    return render(request, "chat.html")
