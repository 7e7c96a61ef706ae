"""Handlers of /v1/chat/completions and /v1/models, in OpenAI's schema. What was answered is committed before it is sent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from feedback import completions, errors, logprobs
from feedback.champion import Defaults
from feedback.completions import Completion
from feedback.engine import Ask, Done, EngineError, Piece, Started
from feedback.logprobs import Token
from feedback.opinions import Refused, sha256
from feedback.schemas import ChatRequest
from feedback.votes import speaker

log = logging.getLogger("thumbwheel")
router = APIRouter(prefix="/v1", tags=["chat"])
Key = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=255)]
NAMES = ("champion", "thumbwheel")


class KeyLocks:
    """One lock for each key in use: two deliveries of one request wait for each other."""

    def __init__(self) -> None:
        self.locks: dict[tuple[str, str], tuple[asyncio.Lock, int]] = {}

    @contextlib.asynccontextmanager
    async def hold(self, key: tuple[str, str]) -> AsyncIterator[None]:
        """Hold a key's lock; it is forgotten when nobody wants it."""
        lock, users = self.locks.get(key, (asyncio.Lock(), 0))
        self.locks[key] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self.locks.pop(key)
            if users > 1:
                self.locks[key] = (lock, users - 1)


def model_name(model_hash: str) -> str:
    """What /v1/models calls a model."""
    return f"thumbwheel-{model_hash[:12]}"


STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer; with `stream`, as server-sent events", "content": {"text/event-stream": {}}}
}


@router.get("/models")
async def models(request: Request) -> JSONResponse:
    """The model that answers, in OpenAI's schema; model_hash, alias and origin are extensions. Empty until one is loaded."""
    service = request.app.state.service
    model_hash = service.engine.model_hash
    if model_hash is None:
        return JSONResponse({"object": "list", "data": []})
    return JSONResponse({"object": "list", "data": [card(service, model_hash)]})


@router.get("/models/{name}")
async def model(request: Request, name: str) -> JSONResponse:
    """The model that answers, under any of its names."""
    service = request.app.state.service
    return unknown_model(service, name) or JSONResponse(card(service, service.engine.model_hash))


def card(service: Any, model_hash: str) -> dict[str, Any]:
    """OpenAI's model object."""
    promotion, _ = service.crown.known[model_hash]
    created = int(promotion.created_at.timestamp())
    alias = (*service.crown.names, "champion")[0]
    extensions = {"model_hash": model_hash, "alias": alias, "origin": service.engine.kind}
    return {"id": model_name(model_hash), "object": "model", "created": created, "owned_by": "thumbwheel", **extensions}


@router.post("/chat/completions", responses=STREAMED)
async def chat(request: Request, body: ChatRequest, key: Key = None) -> Response:
    """Answer a conversation, whole or streamed. With an Idempotency-Key, a repetition gets the stored answer."""
    service = request.app.state.service
    if problem := unknown_model(service, body.model):
        return problem
    if key is not None and body.logprobs:
        text = "logprobs are not kept, so a repetition could not tell them: leave out the Idempotency-Key, or logprobs"
        return errors.error(400, "invalid_request", text, "logprobs")
    subject = speaker(request, body.user)
    draft = begin(request, body, subject, key)
    if key is None:
        answering = answer(service, body, draft)
        return await (answering if body.stream else while_there(request, answering))
    async with service.keys.hold((subject, key)):
        known = await service.writer.put(partial(completions.replay, subject=subject, idempotency_key=key))
        if known is not None:
            return repeat(service, body, draft, known)
        return await answer(service, body, draft)


async def while_there(request: Request, answering: Coroutine[Any, Any, Response]) -> Response:
    """The whole answer, given up when its asker goes away: nobody else would ever read it."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, leaving = asyncio.create_task(answering), asyncio.create_task(gone())
    try:
        await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await answer if answer.done() else Response(status_code=499)
    finally:
        answer.cancel()
        leaving.cancel()


def unknown_model(service: Any, name: str | None) -> JSONResponse | None:
    """An error response when there is no model to answer, or another one is asked for than the one that answers."""
    reigning = service.engine.model_hash
    if reigning is None:
        return errors.error(503, "not_ready", service.crown.problem or "the model is being loaded")
    if name is None or name in (*NAMES, reigning, model_name(reigning), *service.crown.names):
        return None
    text = f"model {name!r} does not answer here; ask for {model_name(reigning)!r} or 'champion'"
    return errors.error(404, "model_not_found", text, "model")


def begin(request: Request, body: ChatRequest, subject: str, key: str | None) -> Completion:
    """The row of an answer, as far as it is known before the model has said anything."""
    service = request.app.state.service
    _, defaults = service.crown.known.get(service.engine.model_hash, (None, Defaults()))
    id = completions.new_id()
    messages = [message.plain() for message in body.messages]
    sampling = {
        "temperature": defaults.temperature if body.temperature is None else body.temperature,
        "top_p": defaults.top_p if body.top_p is None else body.top_p,
        "max_tokens": body.limit() or defaults.max_tokens,
        # 53 bits: what JSON numbers hold everywhere
        "seed": secrets.randbits(53) if body.seed is None else body.seed,
        "stop": body.stops(),
    }
    return Completion(
        id=id,
        subject=subject,
        request_sha256=sha256(body.model_dump(mode="json", exclude_unset=True)),
        request_messages=messages,
        sampling=sampling,
        model_hash="",
        prompt_token_ids=[],
        idempotency_key=key,
        conversation=body.conversation or id,
        turn=sum(message["role"] == "user" for message in messages),
        parent=body.parent,
        locale=request.headers.get("accept-language", "").split(",")[0].split(";")[0].strip()[:16],
    )


def ask_of(body: ChatRequest, draft: Completion, stream: bool) -> Ask:
    """The question to the engine."""
    return Ask(
        id=draft.id, messages=draft.request_messages, stream=stream, logprobs=bool(body.logprobs), **draft.sampling
    )


def origin(service: Any, model_hash: str) -> dict[str, Any]:
    """Where the model that answered comes from, as columns."""
    promotion, _ = service.crown.known[model_hash]
    known = {name: promotion.figures.get(name) for name in ("mlflow_run_id", "data_revision", "code_revision")}
    texts = {name: str(value)[:64] if value else None for name, value in known.items()}
    alias = (*service.crown.names, "champion")[0][:64]
    return {"model_hash": model_hash, "model_alias": alias, "origin": service.engine.kind, **texts}


def ending(done: Done, started: float) -> dict[str, Any]:
    """The columns of a finished answer."""
    return {
        "response": done.text,
        "response_token_ids": done.ids,
        "response_logprobs": done.logprobs,
        "prompt_tokens": done.prompt_tokens or len(done.prompt_ids),
        "completion_tokens": done.completion_tokens or len(done.ids),
        "status": "complete",
        "finish_reason": done.finish_reason,
        "total_ms": (time.perf_counter() - started) * 1000,
        "finished_at": datetime.now(UTC),
    }


async def answer(service: Any, body: ChatRequest, draft: Completion) -> Response:
    """Answer whole, or streamed."""
    await known_parent(service, draft)
    if body.stream:
        return await stream(service, body, draft)
    completion, tokens = await complete(service, body, draft)
    return JSONResponse(whole(completion, tokens), headers=headers(service, completion))


async def complete(service: Any, body: ChatRequest, draft: Completion) -> tuple[Completion, Sequence[Token]]:
    """Ask the engine, and commit the whole answer before anybody sees it."""
    started = time.perf_counter()
    async for message in service.engine.answer(ask_of(body, draft, False)):
        if isinstance(message, Done):
            columns = {**origin(service, message.model_hash), **ending(message, started)}
            completion = replace(draft, prompt_token_ids=message.prompt_ids, **columns)
            await service.writer.put(partial(completions.insert, completion=completion))
            service.metrics.answered(completion)
            return completion, message.tokens
    raise EngineError("engine_stopped", "the engine ended without an answer")


async def known_parent(service: Any, draft: Completion) -> None:
    """Raises Refused 404 when the answer that this one is another try of is not ours."""
    if draft.parent is not None and await asyncio.to_thread(service.store.completion, draft.parent) is None:
        raise Refused(404, "completion_not_found", f"parent: there is no completion {draft.parent}")


def repeat(service: Any, body: ChatRequest, draft: Completion, known: Completion) -> Response:
    """The stored answer again. Raises Refused 422 for another body, 409 when that answer was never finished."""
    if known.request_sha256 != draft.request_sha256:
        raise Refused(
            422, "idempotency_key_reused", "this Idempotency-Key was used for another request; take a new one"
        )
    if known.status != "complete":
        raise Refused(409, "completion_not_finished", f"the answer under this key is {known.status}; take a new key")
    replayed = {**headers(service, known), "Idempotent-Replayed": "true"}
    if not body.stream:
        return JSONResponse(whole(known), headers=replayed)
    lines = [chunk(known, {"role": "assistant", "content": known.response}), *last_chunks(known, body)]
    return StreamingResponse(iter(lines), media_type="text/event-stream", headers=replayed)


def headers(service: Any, completion: Completion) -> dict[str, str]:
    """Which model answered, and the token that lets the asker rate the answer."""
    return {
        "X-Thumbwheel-Model": completion.model_hash,
        "X-Thumbwheel-Feedback-Token": service.identity.token(completion.id, completion.subject),
        "X-Request-Id": completion.id,
        "Cache-Control": "no-store",
    }


def usage(completion: Completion) -> dict[str, int]:
    """Token counts, the stop token included."""
    prompt = completion.prompt_tokens or len(completion.prompt_token_ids)
    response = completion.completion_tokens or len(completion.response_token_ids)
    return {"prompt_tokens": prompt, "completion_tokens": response, "total_tokens": prompt + response}


def frame(completion: Completion, kind: str) -> dict[str, Any]:
    """What whole answers and chunks have in common."""
    return {
        "id": completion.id,
        "object": kind,
        "created": int(completion.created_at.timestamp()),
        "model": model_name(completion.model_hash),
        "system_fingerprint": completion.model_hash,
    }


def whole(completion: Completion, tokens: Sequence[Token] = ()) -> dict[str, Any]:
    """OpenAI's chat.completion; token_ids and prompt_token_ids are extensions."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": completion.response, "refusal": None},
        "logprobs": logprobs.content(tokens),
        "finish_reason": completion.finish_reason,
        "token_ids": completion.response_token_ids,
    }
    body = frame(completion, "chat.completion")
    return {**body, "choices": [choice], "usage": usage(completion), "prompt_token_ids": completion.prompt_token_ids}


def event(data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def chunk(
    completion: Completion,
    delta: dict[str, str],
    finish_reason: str | None = None,
    tokens: Sequence[Token] = (),
    **extra: Any,
) -> str:
    """OpenAI's chat.completion.chunk as an event."""
    told = logprobs.content(tokens)
    choice = {"index": 0, "delta": delta, "logprobs": told, "finish_reason": finish_reason, **extra}
    return event({**frame(completion, "chat.completion.chunk"), "choices": [choice]})


def last_chunks(completion: Completion, body: ChatRequest, tokens: Sequence[Token] = ()) -> list[str]:
    """The end of a streamed answer."""
    lines = [chunk(completion, {}, completion.finish_reason, tokens, token_ids=completion.response_token_ids)]
    if body.stream_options and body.stream_options.include_usage:
        lines.append(event({**frame(completion, "chat.completion.chunk"), "choices": [], "usage": usage(completion)}))
    return [*lines, "data: [DONE]\n\n"]


async def stream(service: Any, body: ChatRequest, draft: Completion) -> Response:
    """Answer as server-sent events. A task of its own asks and writes; the response only passes on what it says."""
    outbox: asyncio.Queue[Completion | str | Exception | None] = asyncio.Queue()
    task = asyncio.create_task(produce(service, body, draft, outbox))
    service.tasks.add(task)
    task.add_done_callback(service.tasks.discard)
    first = await outbox.get()
    if isinstance(first, Exception):
        raise first
    assert isinstance(first, Completion)

    async def passed_on() -> AsyncIterator[str]:
        try:
            yield chunk(first, {"role": "assistant", "content": ""})
            while (line := await outbox.get()) is not None:
                if isinstance(line, Exception):
                    text = line.message if isinstance(line, EngineError) else "the answer could not be saved"
                    yield event({"error": {"message": text, "type": "server_error", "param": None, "code": "aborted"}})
                    return
                assert isinstance(line, str)
                yield line
        finally:
            task.cancel()  # whoever read this is gone, or everything was said

    return StreamingResponse(passed_on(), media_type="text/event-stream", headers=headers(service, first))


async def produce(
    service: Any, body: ChatRequest, draft: Completion, outbox: asyncio.Queue[Completion | str | Exception | None]
) -> None:
    """Ask, and put into `outbox`: the row as it was committed, then events, then None; or the error that ended it."""
    started = time.perf_counter()
    completion, ids, text = draft, list[int](), ""
    columns: dict[str, Any] = {"status": "aborted"}
    try:
        async with contextlib.aclosing(service.engine.answer(ask_of(body, draft, True))) as messages:
            async for message in messages:
                if isinstance(message, Started):
                    columns = origin(service, message.model_hash)
                    first = replace(draft, prompt_token_ids=message.prompt_ids, **columns)
                    await service.writer.put(partial(completions.insert, completion=first))
                    completion, columns = first, {"status": "aborted"}
                    outbox.put_nowait(completion)
                elif isinstance(message, Piece):
                    if not ids:
                        columns["first_token_ms"] = (time.perf_counter() - started) * 1000
                    ids, text = message.ids, text + message.text
                    outbox.put_nowait(chunk(completion, {"content": message.text}, tokens=message.tokens))
                else:
                    columns = {**columns, **ending(message, started)}
                    await finish(service, completion, columns)
                    completion = replace(completion, **columns)
                    service.metrics.answered(completion)
                    for line in last_chunks(completion, body, message.tokens):
                        outbox.put_nowait(line)
                    outbox.put_nowait(None)
    except Exception as error:
        if completion is not draft and columns["status"] != "complete":
            seen = {"status": "error", "error": str(error)[:1000]}
            finish(service, completion, {**columns, **said(text, ids), **seen})
        outbox.put_nowait(error)
    except asyncio.CancelledError:
        if completion is not draft and columns["status"] != "complete":
            finish(service, completion, {**columns, **said(text, ids)})
        raise


def said(text: str, ids: list[int]) -> dict[str, Any]:
    """The columns of an answer that ended early."""
    return {
        "response": text,
        "response_token_ids": ids,
        "completion_tokens": len(ids),
        "finished_at": datetime.now(UTC),
    }


def finish(service: Any, completion: Completion, columns: dict[str, Any]) -> asyncio.Future[None]:
    """Queue the end of a streamed answer for writing; a failure that nobody waits for is logged."""
    operation = partial(completions.finish, completion_id=completion.id, values=columns)
    future: asyncio.Future[None] = service.writer.put(operation)

    def report(done: asyncio.Future[None]) -> None:
        if not done.cancelled() and (error := done.exception()):
            log.error("the end of answer %s was not saved: %s", completion.id, error)

    future.add_done_callback(report)
    return future
