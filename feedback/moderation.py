"""Handlers of /v1/moderation and /v1/audit: what waits for a person's judgement, the judgement, and the log of both."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from feedback import audit, opinions
from feedback.opinions import Event, Refused
from feedback.schemas import Text
from feedback.tables import CompletionRow, FeedbackRow, table_of
from feedback.votes import shown, speaker

router = APIRouter(prefix="/v1", tags=["moderation"])
feedback = table_of(FeedbackRow)
completion = table_of(CompletionRow)

State = Literal["pending", "accepted", "quarantined", "rejected"]
After = Annotated[int, Query(ge=0, lt=2**63)]
Limit = Annotated[int, Query(ge=1, le=1000)]
ACT = "feedback.moderate"
SHOWN = ("kind", "value", "ranked", "reasons", "comment", "correction", "source", "channel", "locale", "retracted")


class Judgement(BaseModel):
    """POST /v1/moderation/{feedback_id}. Everything but accepting needs a reason."""

    model_config = ConfigDict(extra="forbid")
    state: State
    reason: Annotated[Text, Field(max_length=1000)] = ""


def waiting(connection: sa.Connection, state: str, after_id: int, limit: int) -> list[dict[str, Any]]:
    """Opinions in a state of moderation after number `after_id`, with what was asked and answered."""
    answer = (completion.c.request_messages, completion.c.response, completion.c.model_hash)
    query = (
        sa.select(feedback, *answer)
        .join(completion, completion.c.id == feedback.c.completion_id)
        .where(feedback.c.moderation == state, feedback.c.id > after_id)
        .order_by(feedback.c.id)
        .limit(limit)
    )
    if state != "accepted":
        query = query.where(sa.text("feedback.moderation <> 'accepted'"))  # what the index holds
    return [entry(row) for row in connection.execute(query)]


def entry(row: sa.Row[Any]) -> dict[str, Any]:
    """One of them, as the API gives it."""
    return {
        "feedback_id": row.id,
        "completion_id": row.completion_id,
        "subject": row.subject,
        **{name: getattr(row, name) for name in SHOWN},
        "other": row.other,
        "trust": row.trust,
        "state": row.moderation,
        "reason": row.moderation_reason,
        "messages": row.request_messages,
        "response": row.response,
        "model_hash": row.model_hash,
        "updated_at": row.updated_at.isoformat(),
    }


def judge(
    connection: sa.Connection, feedback_id: int, judgement: Judgement, actor: str, *, seen: int | None = None
) -> tuple[Event, int]:
    """Set an opinion's state, with its event and the audit's entry, in one transaction; a repetition writes nothing.

    seen: the event that made it what the moderator saw. Returns the newest event, and the number of the audit's entry, 0
    for a repetition. Raises Refused 404, 409 for an erased opinion or one that is not as it was seen, 422 without a reason.
    """
    row = connection.execute(sa.select(feedback).where(feedback.c.id == feedback_id)).first()
    if row is None:
        raise Refused(404, "feedback_not_found", f"there is no opinion {feedback_id}")
    if row.moderation == "erased":
        raise Refused(409, "feedback_erased", f"opinion {feedback_id} was erased on its author's demand")
    check_reason(judgement)
    if {"state": row.moderation, "reason": row.moderation_reason} == judgement.model_dump():
        return opinions.newest_event(connection, feedback_id), 0
    if seen not in (None, row.last_seq):
        raise Refused(409, "feedback_changed", f"opinion {feedback_id} has changed since it was seen: look at it again")
    return set_state(connection, row, judgement, actor)


def check_reason(judgement: Judgement) -> None:
    """Raises Refused 422 when everything but accepting lacks its reason."""
    if judgement.state != "accepted" and not judgement.reason.strip():
        raise Refused(422, "reason_required", "reason: say why; it is shown to those who ask")


def set_state(connection: sa.Connection, row: sa.Row[Any], judgement: Judgement, actor: str) -> tuple[Event, int]:
    """Write a judgement of an opinion's row: the event, and the audit's entry with its number."""
    before = {"state": row.moderation, "reason": row.moderation_reason}
    event = opinions.moderate(connection, row.id, judgement.state, judgement.reason)
    act = audit.record(connection, actor, ACT, f"feedback:{row.id}", before, judgement.model_dump())
    return event, act


@router.get("/moderation")
async def get_waiting(
    request: Request, state: State = "quarantined", after_id: After = 0, limit: Limit = 100
) -> JSONResponse:
    """Opinions in one state, oldest first, with what they are about. Go on after `last_id` while `has_more`."""
    found = await asyncio.to_thread(read, request.app.state.service.store, waiting, state, after_id, limit + 1)
    return page_of(found, limit, after_id, "feedback_id")


@router.post("/moderation/{feedback_id}")
async def post_judgement(
    request: Request, feedback_id: Annotated[int, Path(ge=1, lt=2**63)], judgement: Judgement
) -> JSONResponse:
    """Accept, quarantine or reject an opinion. It is an event of the log, so the next batch and snapshot know."""
    actor = request.state.caller.actor(speaker(request, None))
    operation = partial(judge, feedback_id=feedback_id, judgement=judgement, actor=actor)
    event, act = await request.app.state.service.writer.put(operation)
    headers = None if act else {"Idempotent-Replayed": "true"}
    reason = event.payload["moderation_reason"]
    return JSONResponse({**shown(event), "feedback_id": feedback_id, "reason": reason}, headers=headers)


@router.get("/audit")
async def get_audit(
    request: Request,
    after_id: After = 0,
    limit: Limit = 100,
    target: Annotated[str | None, Query(pattern=r"^[a-z]+:[A-Za-z0-9_-]{1,64}$")] = None,
) -> JSONResponse:
    """Who did what to what (feedback:7, key:3), oldest first."""
    found = await asyncio.to_thread(read, request.app.state.service.store, audit.entries, after_id, limit + 1, target)
    rows = [{**vars(act), "created_at": act.created_at.isoformat()} for act in found]
    return page_of(rows, limit, after_id, "id")


def read(store: Any, query: Any, *args: Any) -> Any:
    """Run a query of a connection."""
    with store.read() as connection:
        return query(connection, *args)


def page_of(rows: list[dict[str, Any]], limit: int, after_id: int, cursor: str) -> JSONResponse:
    """A page of at most `limit` of the rows, and where the next one begins."""
    data = rows[:limit]
    last = data[-1][cursor] if data else after_id
    return JSONResponse({"object": "list", "data": data, "last_id": last, "has_more": len(rows) > limit})
