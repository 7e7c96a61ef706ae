"""Handlers of /v1/feedback, comparisons and rankings: say something, look at it, take it back, and read the log."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Path, Query, Request
from fastapi.responses import JSONResponse

from feedback import opinions
from feedback.access import Caller
from feedback.comparisons import compared, ranked
from feedback.opinions import Event, Refused, Vote
from feedback.schemas import Comment, Comparison, Edit, Expert, Id, Opinion, Ranking, Said, Thumb

router = APIRouter(prefix="/v1", tags=["feedback"])
CompletionId = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Kind = Literal["thumb", "edit", "comment", "expert"]
Two = Annotated[list[Id], Query(alias="completion_id", min_length=2, max_length=2)]
Several = Annotated[list[Id], Query(alias="completion_id", min_length=2, max_length=9)]
Token = Annotated[str | None, Header(alias="X-Thumbwheel-Feedback-Token", max_length=512)]
Tokens = Annotated[str | None, Header(alias="X-Thumbwheel-Feedback-Token", max_length=4096)]
Key = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=255)]
SAID_BEFORE: dict[int | str, dict[str, Any]] = {200: {"description": "Revised, or said before (Idempotent-Replayed)"}}
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


def speaker_of_several(request: Request, user: str | None, ids: list[str], tokens: str | None) -> str:
    """As speaker, for what is said of several answers: a visitor sends the tokens of all of them, separated by commas."""
    if tokens is not None:
        found = {named(request, ids, token.strip()) for token in tokens.split(",")}
        if {id for id, _ in found} != set(ids) or len({subject for _, subject in found}) > 1:
            raise Refused(403, "invalid_feedback_token", "send one token for each of the answers, all of one person's")
        return found.pop()[1]
    caller: Caller = request.state.caller
    if caller.kind == "session" and caller.key is None and request.method != "GET":
        text = "send the X-Thumbwheel-Feedback-Token of each answer, separated by commas"
        raise Refused(403, "feedback_token_required", text)
    return speaker(request, user)


def named(request: Request, ids: list[str], token: str) -> tuple[str, str]:
    """Which of the answers a token is for, and whom it names. Raises Refused 403 when it is for none of them."""
    problem = "there is no token"
    for id in ids:
        try:
            return id, request.app.state.service.identity.verify(token, id)
        except ValueError as error:
            problem = str(error)
    raise Refused(403, "invalid_feedback_token", problem)


def check_source(request: Request, source: str) -> None:
    """Who says to be an expert needs the scope label. Raises Refused 403."""
    if source == "human_expert" and "label" not in request.state.caller.scopes:
        raise Refused(403, "insufficient_scope", "source: only a key with the scope 'label' speaks for experts")


def shown(event: Event) -> dict[str, Any]:
    """An opinion as the API gives it, from its newest event."""
    keys = ("completion_id", "kind", "value", "source", "reasons", "comment", "revision", "retracted", "moderation")
    body = {key: event.payload[key] for key in (*keys, *SPECIAL.get(event.payload["kind"], ()))}
    return {**body, "seq": event.seq, "updated_at": event.created_at.isoformat()}


# what opinions of one kind have that others do not
SPECIAL = {
    "edit": ("correction",),
    "expert": ("correction",),
    "comparison": ("other", "position", "strength"),
    "ranking": ("other", "ranked"),
}


async def write(request: Request, vote: Vote) -> JSONResponse:
    """Commit a vote: 201 created, 200 revised or said before."""
    event, how = await request.app.state.service.writer.put(partial(opinions.vote, vote=vote))
    request.app.state.service.metrics.opinions.labels(event.payload["kind"], how).inc()
    headers = {"Idempotent-Replayed": "true"} if how == "replayed" else None
    return JSONResponse(shown(event), 201 if how == "created" else 200, headers=headers)


async def put(
    request: Request, completion_id: str, kind: Kind, said: Said, token: str | None, key: str | None
) -> JSONResponse:
    """Say something of one answer."""
    check_source(request, said.source)
    # a thumb's name is left out, as it was before there were other kinds: keys of then are still known
    named = [completion_id] if kind == "thumb" else [completion_id, kind]
    vote = Vote(
        completion_id=completion_id,
        kind=kind,
        subject=speaker(request, said.user, completion_id, token),
        **said.stated(),
        idempotency_key=key,
        request_sha256=opinions.sha256(["put", *named, said.body()]),
    )
    return await write(request, vote)


@router.put("/feedback/{completion_id}/thumb", status_code=201, responses=SAID_BEFORE)
async def put_thumb(
    request: Request, completion_id: CompletionId, said: Thumb, token: Token = None, key: Key = None
) -> JSONResponse:
    """Say what you think of an answer: 1, -1, or 0 for neither. Saying it again changes nothing."""
    return await put(request, completion_id, "thumb", said, token, key)


@router.put("/feedback/{completion_id}/edit", status_code=201, responses=SAID_BEFORE)
async def put_edit(
    request: Request, completion_id: CompletionId, said: Edit, token: Token = None, key: Key = None
) -> JSONResponse:
    """Write a better answer of your own."""
    return await put(request, completion_id, "edit", said, token, key)


@router.put("/feedback/{completion_id}/comment", status_code=201, responses=SAID_BEFORE)
async def put_comment(
    request: Request, completion_id: CompletionId, said: Comment, token: Token = None, key: Key = None
) -> JSONResponse:
    """Say something about an answer in words."""
    return await put(request, completion_id, "comment", said, token, key)


@router.put("/feedback/{completion_id}/expert", status_code=201, responses=SAID_BEFORE)
async def put_expert(
    request: Request, completion_id: CompletionId, said: Expert, token: Token = None, key: Key = None
) -> JSONResponse:
    """Judge an answer as somebody who knows the subject."""
    return await put(request, completion_id, "expert", said, token, key)


@router.post("/feedback", status_code=201, responses=SAID_BEFORE)
async def post_feedback(request: Request, said: Opinion, token: Token = None, key: Key = None) -> JSONResponse:
    """The same as the PUT of its kind, with everything in the body. An Idempotency-Key guards against late repetitions."""
    check_source(request, said.source)
    vote = Vote(
        subject=speaker(request, said.user, said.completion_id, token),
        **said.stated(),
        idempotency_key=key,
        request_sha256=opinions.sha256(["post", said.body()]),
    )
    return await write(request, vote)


@router.delete("/feedback/{completion_id}/{kind}")
async def delete_feedback(
    request: Request,
    completion_id: CompletionId,
    kind: Kind,
    token: Token = None,
    key: Key = None,
    user: User = None,
) -> JSONResponse:
    """Take it back."""
    named = [completion_id] if kind == "thumb" else [completion_id, kind]
    vote = Vote(
        completion_id=completion_id,
        kind=kind,
        subject=speaker(request, user, completion_id, token),
        retracted=True,
        idempotency_key=key,
        request_sha256=opinions.sha256(["delete", *named]),
    )
    return await write(request, vote)


@router.get("/feedback/{completion_id}/{kind}")
async def get_feedback(
    request: Request, completion_id: CompletionId, kind: Kind, token: Token = None, user: User = None
) -> JSONResponse:
    """What you said of an answer; `retracted` is true when you took it back."""
    subject = speaker(request, user, completion_id, token)
    return await look(request, subject, {"completion_id": completion_id, "kind": kind})


async def look(request: Request, subject: str, name: dict[str, Any]) -> JSONResponse:
    """The newest event of the opinion with this natural key."""
    event = await asyncio.to_thread(newest, request.app.state.service.store, subject, name)
    return JSONResponse(shown(event))


def newest(store: Any, subject: str, name: dict[str, Any]) -> Event:
    """The newest event of an opinion. Raises Refused 404 when there is none."""
    completion_id, kind = name["completion_id"], name["kind"]
    with store.read() as connection:
        row = opinions.find(connection, completion_id, subject, kind, name.get("other", ""))
        if row is None:
            raise Refused(404, "feedback_not_found", f"there is no {kind} of yours on {completion_id}")
        return opinions.newest_event(connection, row.id)


async def post_several(
    request: Request, said: Comparison | Ranking, tokens: str | None, key: str | None
) -> JSONResponse:
    """Say something of several answers."""
    check_source(request, said.source)
    vote = Vote(
        subject=speaker_of_several(request, said.user, said.completion_ids, tokens),
        **said.stated(),
        idempotency_key=key,
        request_sha256=opinions.sha256([type(said).__name__.lower(), said.body()]),
    )
    return await write(request, vote)


async def delete_several(request: Request, name: dict[str, Any], subject: str, key: str | None) -> JSONResponse:
    """Take back what was said of several answers; `name` is what compared() or ranked() make of their ids."""
    vote = Vote(
        **name,
        subject=subject,
        retracted=True,
        idempotency_key=key,
        request_sha256=opinions.sha256(["delete", name["kind"], name["completion_id"], name["other"]]),
    )
    return await write(request, vote)


@router.post("/comparisons", status_code=201, responses=SAID_BEFORE)
async def post_comparison(request: Request, said: Comparison, tokens: Tokens = None, key: Key = None) -> JSONResponse:
    """Say which of two answers to the same prompt is better; said again of the same two, it replaces what was said."""
    return await post_several(request, said, tokens, key)


@router.get("/comparisons")
async def get_comparison(request: Request, ids: Two, user: User = None) -> JSONResponse:
    """What you said of two answers, named in any order."""
    return await look(request, speaker(request, user), compared(two(ids)))


@router.delete("/comparisons")
async def delete_comparison(
    request: Request, ids: Two, tokens: Tokens = None, key: Key = None, user: User = None
) -> JSONResponse:
    """Take it back."""
    return await delete_several(request, compared(two(ids)), speaker_of_several(request, user, ids, tokens), key)


@router.post("/rankings", status_code=201, responses=SAID_BEFORE)
async def post_ranking(request: Request, said: Ranking, tokens: Tokens = None, key: Key = None) -> JSONResponse:
    """Rank two to nine answers to the same prompt; said again of the same answers, it replaces what was said."""
    return await post_several(request, said, tokens, key)


@router.get("/rankings")
async def get_ranking(request: Request, ids: Several, user: User = None) -> JSONResponse:
    """How you ranked these answers, named in any order."""
    return await look(request, speaker(request, user), ranked(ids))


@router.delete("/rankings")
async def delete_ranking(
    request: Request, ids: Several, tokens: Tokens = None, key: Key = None, user: User = None
) -> JSONResponse:
    """Take it back."""
    return await delete_several(request, ranked(ids), speaker_of_several(request, user, ids, tokens), key)


def two(ids: list[str]) -> list[str]:
    """Raises Refused 422 for one answer named twice."""
    if ids[0] == ids[1]:
        raise Refused(422, "invalid_request", "completion_id: an answer cannot be compared with itself")
    return ids


@router.get("/feedback")
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
