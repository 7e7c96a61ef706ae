"""Handlers of /v1/tasks: make labelling tasks, be given one, rank it or skip it, and see how far everybody is."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from feedback import labelling
from feedback.chat import begin, complete, unknown_model
from feedback.completions import get
from feedback.labelling import Assignment, Handing, Task
from feedback.opinions import Event, Refused, sha256
from feedback.schemas import ChatRequest, NewTask, Skip, TaskRanking
from feedback.votes import Key, User, check_source, speaker

router = APIRouter(prefix="/v1", tags=["labelling"])
TaskId = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$")]
ROUNDS = 2  # how often answers are asked for again when some come out alike


@router.post("/tasks", status_code=201)
async def post_task(request: Request, asked: NewTask) -> JSONResponse:
    """Make a task, of answers that are there or are asked for now; the same again finds the one that was made."""
    service = request.app.state.service
    if asked.answers and (problem := unknown_model(service, None)) is not None:
        return problem
    prompt, subject = await asyncio.to_thread(prompt_of, service.store, asked, speaker(request, asked.user))
    said = asked.model_dump(mode="json", include={"answers", "temperature", "max_tokens"})
    ids = sorted(asked.completion_ids)
    new = [prompt, said, service.engine.model_hash] if asked.answers else []
    name = sha256(["gold" if asked.ranking else "task", ids, *new])
    async with service.keys.hold(("task", name)):
        known = await asyncio.to_thread(reading, service.store, labelling.named, name)
        if known is not None:
            return JSONResponse(described(known), headers={"Idempotent-Replayed": "true"})
        made = await new_answers(request, asked, prompt, subject) if asked.answers else []
        order = [[asked.completion_ids.index(id) for id in group] for group in asked.ranking or ()]
        operation = partial(
            labelling.make,
            ids=[*asked.completion_ids, *made],
            name=name,
            raters=asked.raters,
            origin="traffic" if asked.of else "asked" if asked.answers else "given",
            expected=order or None,
        )
        task, _ = await service.writer.put(operation)
    return JSONResponse(described(task), 201)


def prompt_of(store: Any, asked: NewTask, speaker: str) -> tuple[list[dict[str, str]], str]:
    """What is asked, and whose words it is. Raises Refused 404 when the answer `of` is not there."""
    if asked.of is None:
        return [message.plain() for message in asked.messages or ()], speaker
    found = reading(store, get, asked.of)
    if found is None or found.status == "erased":
        raise Refused(404, "completion_not_found", f"of: there is no completion {asked.of}")
    return found.request_messages, found.subject


async def new_answers(request: Request, asked: NewTask, prompt: list[dict[str, str]], subject: str) -> list[str]:
    """The ids of new answers to a prompt, no two of them alike; those that are, are asked for again.

    Raises EngineError, and Refused 409 when the model has nothing else to say.
    """
    service = request.app.state.service
    values = {"messages": prompt, "temperature": asked.temperature, "max_tokens": asked.max_tokens, "parent": asked.of}
    try:
        body = ChatRequest.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as problem:  # of an imported answer's prompt, say: nobody has checked it so far
        raise Refused(422, "invalid_request", f"messages: {problem.errors()[0]['msg']}") from problem
    found: dict[str, str] = {}
    for _ in range(ROUNDS):
        missing = asked.answers - len(found)
        drafts = [begin(request, body, subject, None) for _ in range(missing)]
        for completion, _ in await asyncio.gather(*(complete(service, body, draft) for draft in drafts)):
            if completion.response.strip():
                found.setdefault(completion.response, completion.id)
        if len(found) == asked.answers:
            break
    if len(asked.completion_ids) + len(found) < labelling.FEWEST:
        raise Refused(409, "answers_alike", "the model answers this prompt in one way only: there is nothing to rank")
    return list(found.values())


@router.get("/tasks/next")
async def get_next(request: Request, user: User = None) -> JSONResponse:
    """The task that you have now, or a new one, kept for you for a while; null when there is nothing to do."""
    service = request.app.state.service
    settings = service.settings
    handing = Handing(settings.gold_rate, timedelta(minutes=settings.lease_minutes))
    subject = speaker(request, user)
    given = await service.writer.put(partial(labelling.next_task, subject=subject, handing=handing))
    body = {"task": shown(given) if given else None}
    return JSONResponse(body, headers={"Cache-Control": "no-store"})


@router.post("/tasks/{task_id}/ranking", status_code=201)
async def post_ranking(request: Request, task_id: TaskId, said: TaskRanking, key: Key = None) -> JSONResponse:
    """Rank the answers of a task that you were given, by their numbers; said again, it replaces what was said."""
    check_source(request, said.source)
    stated = {
        **said.stated(),
        "idempotency_key": key,
        "request_sha256": sha256(["task", task_id, said.body()]),
    }
    numbers, subject = said.ranking, speaker(request, said.user)
    operation = partial(labelling.rank, task_id=task_id, subject=subject, numbers=numbers, said=stated)
    event, how = await request.app.state.service.writer.put(operation)
    request.app.state.service.metrics.opinions.labels("ranking", how).inc()
    headers = {"Idempotent-Replayed": "true"} if how == "replayed" else None
    return JSONResponse(kept(task_id, numbers, event), 201 if how == "created" else 200, headers=headers)


@router.post("/tasks/{task_id}/skip")
async def post_skip(request: Request, task_id: TaskId, said: Skip) -> JSONResponse:
    """Leave a task to others; you never get it again."""
    subject = speaker(request, said.user)
    operation = partial(labelling.skip, task_id=task_id, subject=subject, reason=said.reason)
    new = await request.app.state.service.writer.put(operation)
    headers = None if new else {"Idempotent-Replayed": "true"}
    return JSONResponse({"id": task_id, "state": "skipped"}, headers=headers)


@router.post("/tasks/{task_id}/gold")
async def post_gold(request: Request, task_id: TaskId, user: User = None) -> JSONResponse:
    """Take your own ranking of this task, which you gave as an expert, as the right one: others are measured by it."""
    subject = speaker(request, user)
    actor = request.state.caller.actor(subject)
    operation = partial(labelling.make_gold, task_id=task_id, subject=subject, actor=actor)
    _, changed = await request.app.state.service.writer.put(operation)
    headers = None if changed else {"Idempotent-Replayed": "true"}
    return JSONResponse({"id": task_id, "gold": True}, headers=headers)


@router.get("/tasks")
async def get_tasks(
    request: Request,
    before: Annotated[str | None, Query(pattern=r"^[0-9a-f]{32}$")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    user: User = None,
) -> JSONResponse:
    """How far you are, and everybody. With the scope admin also the tasks, newest first
    (go on with before=last_id), and how people do on gold.

    How many are left only admins see: the number stands still after a gold task, and so would tell which ones those are.
    """
    admin = "admin" in request.state.caller.scopes
    subject = speaker(request, user)
    body = await asyncio.to_thread(look, request.app.state.service.store, subject, admin, before, limit)
    return JSONResponse(body)


def look(store: Any, subject: str, admin: bool, before: str | None, limit: int) -> dict[str, Any]:
    """The answer to GET /v1/tasks, of one moment."""
    with store.moment() as connection:
        body: dict[str, Any] = {
            "object": "list",
            "yours": labelling.progress(connection, subject),
            "everybody": labelling.progress(connection),
        }
        if not admin:
            return body
        where: Any = sa.true()
        if before is not None:
            row, table = labelling.get(connection, before), labelling.task
            where = (table.c.created_at < row.created_at) | (
                (table.c.created_at == row.created_at) & (table.c.id < row.id)
            )
        found = labelling.tasks(connection, where, limit + 1)
        data = [described(task) for task in found[:limit]]
        last = data[-1]["id"] if data else before
        more = len(found) > limit
        body |= {"tasks": labelling.totals(connection), "raters": on_gold(connection)}
        return {**body, "data": data, "last_id": last, "has_more": more}


def on_gold(connection: sa.Connection) -> list[dict[str, Any]]:
    """How everybody does on gold tasks: `right` of `pairs` pairs, a tie counting half."""
    found: dict[str, dict[str, Any]] = {}
    for subject, _, right, pairs in labelling.gold_results(connection):
        row = found.setdefault(subject, {"subject": subject, "tasks": 0, "right": 0.0, "pairs": 0})
        row["tasks"] += 1
        row["right"] += right
        row["pairs"] += pairs
    return list(found.values())


def reading(store: Any, query: Any, *args: Any) -> Any:
    """Run a query of a connection."""
    with store.read() as connection:
        return query(connection, *args)


def shown(given: Assignment) -> dict[str, Any]:
    """A task as its rater sees it: nothing tells which answers or tasks are known."""
    return {
        "id": given.task_id,
        "messages": given.messages,
        "answers": [{"number": number, "text": text} for number, (_, text) in enumerate(given.answers, 1)],
        "lease_until": given.lease_until.isoformat(),
    }


def kept(task_id: str, numbers: Sequence[Sequence[int]], event: Event) -> dict[str, Any]:
    """A ranking as it was taken, again without the answers' ids."""
    payload = {key: event.payload[key] for key in ("source", "reasons", "comment", "revision", "moderation")}
    return {"id": task_id, "ranking": numbers, **payload, "seq": event.seq}


def described(task: Task) -> dict[str, Any]:
    """A task as those see it who make them."""
    ids = task.answers
    expected = None if task.expected is None else [[ids[place] for place in group] for group in task.expected]
    return {
        "id": task.id,
        "origin": task.origin,
        "gold": task.gold,
        "ranking": expected,
        "completion_ids": ids,
        "raters": task.raters,
        "created_at": task.created_at.isoformat(),
        "closed_at": task.closed_at.isoformat() if task.closed_at else None,
    }
