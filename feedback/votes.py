"""Handlers of /v1/feedback: give a thumb, look at it, take it back, and read the log."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request
from fastapi.responses import JSONResponse

from feedback import opinions
from feedback.access import Caller
from feedback.opinions import Event, Refused, Vote
from feedback.schemas import Thumb

router = APIRouter(prefix="/v1/feedback", tags=["feedback"])
CompletionId = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Token = Annotated[str | None, Header(alias="X-Thumbwheel-Feedback-Token", max_length=512)]
Key = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=255)]
User = Annotated[str | None, Query(max_length=255)]


def speaker(request: Request, user: str | None, completion_id: str = "", token: str | None = None) -> str:
    """The subject of a request: whom the token names, else `user` of the API key's name, else the page's session, else,
    on this machine, `user` or "loopback".

    Keys of one name speak for the same people, so that a key can be replaced by another; people of keys with different
    names are never the same. Raises Refused 403 when a token is given that is not valid for this answer, or when a
    visitor writes without the token of the answer.
    """
    identity = request.app.state.service.identity
    if token is not None:
        try:
            return str(identity.verify(token, completion_id))
        except ValueError as error:
            raise Refused(403, "invalid_feedback_token", str(error)) from error
    caller: Caller = request.state.caller
    if caller.kind == "session" and caller.key is None and completion_id and request.method != "GET":
        raise Refused(403, "feedback_token_required", "send the X-Thumbwheel-Feedback-Token that came with the answer")
    if caller.kind == "key" and caller.key:
        return str(identity.subject("key", caller.key.name, user or ""))
    if caller.session:
        return str(identity.subject("cookie", caller.session.name))
    return str(identity.subject("user", user or "loopback"))


def shown(event: Event) -> dict[str, Any]:
    """An opinion as the API gives it, from its newest event."""
    keys = ("completion_id", "kind", "value", "source", "reasons", "comment", "revision", "retracted", "moderation")
    body = {key: event.payload[key] for key in keys}
    return {**body, "seq": event.seq, "updated_at": event.created_at.isoformat()}


async def write(request: Request, vote: Vote) -> JSONResponse:
    """Commit a vote: 201 created, 200 revised or said before."""
    event, how = await request.app.state.service.writer.put(partial(opinions.vote, vote=vote))
    headers = {"Idempotent-Replayed": "true"} if how == "replayed" else None
    return JSONResponse(shown(event), 201 if how == "created" else 200, headers=headers)


@router.put("/{completion_id}/thumb", status_code=201)
async def put_thumb(
    request: Request, completion_id: CompletionId, thumb: Thumb, token: Token = None, key: Key = None
) -> JSONResponse:
    """Say what you think of an answer: 1, -1, or 0 for neither. Saying it again changes nothing.

    Who says to be an expert needs the scope label.
    """
    if thumb.source == "human_expert" and "label" not in request.state.caller.scopes:
        raise Refused(403, "insufficient_scope", "source: only a key with the scope 'label' speaks for experts")
    body = thumb.model_dump()
    vote = Vote(
        completion_id=completion_id,
        subject=speaker(request, thumb.user, completion_id, token),
        **{name: value for name, value in body.items() if name != "user"},
        idempotency_key=key,
        request_sha256=opinions.sha256(["put", completion_id, body]),
    )
    return await write(request, vote)


@router.delete("/{completion_id}/thumb")
async def delete_thumb(
    request: Request, completion_id: CompletionId, token: Token = None, key: Key = None, user: User = None
) -> JSONResponse:
    """Take it back."""
    vote = Vote(
        completion_id=completion_id,
        subject=speaker(request, user, completion_id, token),
        retracted=True,
        idempotency_key=key,
        request_sha256=opinions.sha256(["delete", completion_id]),
    )
    return await write(request, vote)


@router.get("/{completion_id}/thumb")
async def get_thumb(
    request: Request, completion_id: CompletionId, token: Token = None, user: User = None
) -> JSONResponse:
    """What you said of an answer; `retracted` is true when you took it back."""
    subject = speaker(request, user, completion_id, token)
    event = await asyncio.to_thread(newest, request.app.state.service.store, completion_id, subject)
    return JSONResponse(shown(event))


def newest(store: Any, completion_id: str, subject: str) -> Event:
    """The newest event of a thumb. Raises Refused 404 when there is none."""
    with store.read() as connection:
        row = opinions.find(connection, completion_id, subject, "thumb")
        if row is None:
            raise Refused(404, "feedback_not_found", f"there is no thumb of yours on {completion_id}")
        return opinions.newest_event(connection, row.id)


@router.get("")
async def get_log(
    request: Request,
    after_seq: Annotated[int, Query(ge=0, lt=2**63)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> JSONResponse:
    """The log of all opinions after a number, in order. Nothing committed later gets a number below `last_seq`."""
    events = await asyncio.to_thread(request.app.state.service.store.events, after_seq, limit + 1)
    data = [
        {**shown(event), "feedback_id": event.feedback_id, "subject": event.subject, "op": event.op}
        for event in events[:limit]
    ]
    last = data[-1]["seq"] if data else after_seq
    return JSONResponse({"object": "list", "data": data, "last_seq": last, "has_more": len(events) > limit})
