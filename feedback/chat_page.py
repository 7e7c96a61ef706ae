"""The chat page, and the same without JavaScript: forms that ask, rate and take back, through the API's own functions."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import ValidationError

from feedback import personal
from feedback.chat import begin, complete, unknown_model
from feedback.engine import EngineError
from feedback.opinions import Refused
from feedback.page import person, read_form, render, spoken
from feedback.personal import Answer
from feedback.schemas import ChatRequest, Thumb
from feedback.votes import delete_feedback, put

router = APIRouter(include_in_schema=False)
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
# codes of reasons, in words/chat.json as reason_CODE
REASONS = {
    "up": ("correct", "helpful", "complete", "well_written", "safe"),
    "down": ("incorrect", "not_helpful", "off_topic", "badly_written", "too_long", "unsafe", "refused"),
}


@router.get("/")
async def chat_page(request: Request) -> Response:
    """Ask, and say what you think of the answer."""
    return render(request, "chat.html", reasons=REASONS)


@router.get("/plain")
async def plain_page(request: Request) -> Response:
    """One's conversation ?conversation= as forms."""
    name = request.query_params.get("conversation", "")
    return await shown(request, name if NAME.fullmatch(name) else "")


async def shown(request: Request, name: str, status: int = 200, **problem: str) -> Response:
    """A conversation as a page; problem: what went wrong, and the question that got no answer."""
    service = request.app.state.service
    turns: list[Answer] = await asyncio.to_thread(conversation, service.store, person(request), name) if name else []
    tokens = {turn.id: service.identity.token(turn.id, person(request)) for turn in turns}
    values: dict[str, Any] = {"problem": "", "question": "", **problem}
    values |= {"name": name, "turns": turns, "tokens": tokens, "reasons": REASONS}
    return render(request, "plain.html", status, vocabulary="chat", **values)


def conversation(store: Any, subject: str, name: str) -> list[Answer]:
    """The person's conversation of that name."""
    with store.read() as connection:
        return personal.conversation(connection, subject, name)


@router.post("/plain")
async def plain_ask(request: Request) -> Response:
    """Ask, and show the conversation with the answer."""
    form = await read_form(request)
    name = form.get("conversation", "")
    question = (form.get("question", "").strip() or form.get("suggestion", "")).replace("\r\n", "\n")
    if not question:
        return back(name)
    try:
        name = await answered(request, name, question)
    except ValidationError as problem:
        return await shown(request, name, 422, problem=problem.errors()[0]["msg"], question=question)
    except EngineError as problem:
        return await shown(request, name, 503, problem=problem.message, question=question)
    except Refused as problem:
        return await shown(request, name, problem.status, problem=problem.message, question=question)
    return back(name, "newest")


async def answered(request: Request, name: str, question: str) -> str:
    """Answer a question in a conversation, and return the conversation's name. What is too long for the model is forgotten
    from its beginning, as the page's script does."""
    service = request.app.state.service
    past: list[dict[str, str]] = []
    if turns := await asyncio.to_thread(conversation, service.store, person(request), name):
        last = turns[-1]
        past = [*last.messages, {"role": "assistant", "content": last.response}]
    while True:
        messages = [*past, {"role": "user", "content": question}]
        body = ChatRequest.model_validate({"messages": messages, "conversation": name or None})
        if unknown_model(service, None) is not None:
            raise Refused(503, "not_ready", service.crown.problem or "the model is being loaded")
        draft = begin(request, body, person(request), None)
        try:
            return (await complete(service, body, draft))[0].conversation
        except EngineError as problem:
            if problem.code != "context_length_exceeded" or not past:
                raise
            past = past[-(len(past) // 4) * 2 :] if len(past) >= 4 else []


@router.post("/plain/thumb")
async def plain_thumb(request: Request) -> Response:
    """Say what one thinks of an answer, or take it back."""
    form = await read_form(request)
    id, name, value = form.get("completion_id", ""), form.get("conversation", ""), form.get("value", "")
    if not NAME.fullmatch(id) or value not in ("1", "-1", "0"):
        raise Refused(422, "invalid_request", "completion_id and value (1, -1, or 0 to take it back) are needed")
    if value == "0":
        await delete_feedback(request, id, "thumb", form.get("token"))
    else:
        codes = REASONS["up" if value == "1" else "down"]
        said = {
            "value": int(value),
            "reasons": [code for code in codes if f"reason_{code}" in form],
            "comment": form.get("comment", "").replace("\r\n", "\n"),
            "channel": "page",
            "locale": spoken(request),
        }
        try:
            thumb = Thumb.model_validate(said)
        except ValidationError as problem:
            raise Refused(422, "invalid_request", problem.errors()[0]["msg"]) from problem
        await put(request, id, "thumb", thumb, form.get("token"), None)
    return back(name, id)


def back(name: str, anchor: str = "") -> Response:
    """To the conversation, at one of its answers."""
    safe = name if NAME.fullmatch(name) else ""
    url = f"/plain?conversation={safe}" + (f"#{anchor}" if anchor else "")
    return RedirectResponse(url, 303, headers={"Cache-Control": "no-store"})
