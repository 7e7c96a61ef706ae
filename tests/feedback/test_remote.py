"""An engine by URL: the service before a small server of OpenAI's chat completions, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from feedback.engine import EngineError
from feedback.remote import RemoteEngine
from feedback.service import create_app
from feedback.settings import Settings
from feedback.store import Store

ANSWER = ["Hel", "lo\u2028", "\u0085 你", "好"]  # two characters that some call the end of a line


@contextlib.contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Run an application on a free port; its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def upstream(owner: str = "vllm") -> FastAPI:
    """A server of OpenAI's chat completions that does what the last message names. state: seen requests, cancelled ones."""
    app = FastAPI()
    app.state.seen, app.state.cancelled = [], threading.Event()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        names = ("small", "large")
        return {"object": "list", "data": [{"id": f"org/{n}", "object": "model", "owned_by": owner} for n in names]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.json()
        app.state.seen.append((dict(request.headers), body))
        wish = body["messages"][-1]["content"]
        if wish.isdecimal():
            text = "maximum context length is 8" if wish == "413" else "no"
            return JSONResponse({"error": {"message": text, "code": None}}, int(wish))
        if wish == "junk":
            return PlainTextResponse("<html>")
        if not body["stream"]:
            if wish == "slow":
                await wait_or_note(request)
            return JSONResponse(whole(body))
        return StreamingResponse(said(request, body, wish), media_type="text/event-stream")

    async def wait_or_note(request: Request) -> None:
        for _ in range(500):
            if await request.is_disconnected():
                app.state.cancelled.set()
            await asyncio.sleep(0.02)

    async def said(request: Request, body: dict[str, Any], wish: str) -> AsyncIterator[str]:
        try:
            for place, text in enumerate(ANSWER):
                chunk: dict[str, Any] = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
                if body.get("return_token_ids"):
                    chunk["choices"][0]["token_ids"] = [place]
                    chunk["choices"][0]["logprobs"] = {"content": [{"token": text, "logprob": -0.5}]}
                    chunk["prompt_token_ids"] = [7, 8] if place == 0 else None
                yield f": a comment\r\ndata: {json.dumps(chunk, ensure_ascii=False)}\r\n\r\n"
                if wish == "break":
                    raise ConnectionAbortedError
                if wish == "end":
                    return
                if wish == "complain":
                    yield 'data: {"error": {"message": "out of memory"}}\n\n'
                if wish == "slow":
                    await asyncio.sleep(5)
            yield 'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\n'
            yield 'data: {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 4}}\n\ndata: [DONE]\n\n'
        except asyncio.CancelledError:
            app.state.cancelled.set()
            raise

    return app


def whole(body: dict[str, Any]) -> dict[str, Any]:
    """A whole answer; with token ids when they are asked for."""
    text = "".join(ANSWER)
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 2, "completion_tokens": 4}
    if not body.get("return_token_ids"):
        return {"choices": [choice], "usage": usage}
    choice["token_ids"] = [0, 1, 2, 3]
    choice["logprobs"] = {"content": [{"token": t, "logprob": -0.5} for t in ANSWER]}
    return {"choices": [choice], "prompt_token_ids": [7, 8], "usage": usage}


class Chain:
    """Our service before an upstream, and a client of ours."""

    def __init__(self, folder: Path, upstream: FastAPI, upstream_url: str, **values: Any) -> None:
        self.upstream, self.url = upstream, f"{upstream_url}/v1"
        self.database_url = f"sqlite:///{folder}/feedback.db"
        self.settings = Settings(engine_url=self.url, **values)
        self.app = create_app(
            self.database_url, folder / "models", RemoteEngine(self.settings), secret=b"x" * 32, settings=self.settings
        )

    @contextlib.contextmanager
    def started(self) -> Iterator[httpx.Client]:
        """Serve; the client."""
        self.store = Store(self.database_url)
        with served(self.app) as url, httpx.Client(base_url=url, timeout=30) as client:
            while client.get("/readyz").status_code != 200:
                time.sleep(0.02)
            yield client
        self.store.close()


@pytest.fixture
def chain(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """(chain, client); the test may parametrise the upstream's owner and settings."""
    owner, values = getattr(request, "param", ("vllm", {}))
    app = upstream(owner)
    with served(app) as url:
        chain = Chain(tmp_path, app, url, **values)
        with chain.started() as client:
            yield chain, client


def ask(client: httpx.Client, text: str, **body: Any) -> httpx.Response:
    """POST /v1/chat/completions."""
    return client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": text}], **body})


def wait_for(store: Store, id: str, status: str) -> Any:
    """The row, once it has that status."""
    for _ in range(300):
        row = store.completion(id)
        if row is not None and row.status == status:
            return row
        time.sleep(0.02)
    raise AssertionError(f"{id} is {row and row.status}, not {status}")


def test_whole_and_streamed_answers_are_kept_with_ids_and_logprobs(chain: Any) -> None:
    chain, client = chain
    listed = client.get("/v1/models").json()["data"][0]
    body = ask(client, "hi", seed=5, max_tokens=9, stop=["x"]).json()
    assert body["choices"][0]["message"]["content"] == "".join(ANSWER)
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}
    streamed = ask(client, "hi", stream=True)
    lines = [json.loads(line[6:]) for line in streamed.text.split("\n\n") if line and line != "data: [DONE]"]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in lines) == "".join(ANSWER)
    for id in (body["id"], streamed.headers["X-Request-Id"]):
        row = wait_for(chain.store, id, "complete")
        assert row.model_alias == listed["alias"] == "org/small"
        assert (row.origin, row.prompt_token_ids, row.response_token_ids) == ("remote", [7, 8], [0, 1, 2, 3])
        assert row.response_logprobs == [-0.5] * 4 and row.model_hash == listed["model_hash"]
        assert (row.prompt_tokens, row.completion_tokens, row.finish_reason) == (2, 4, "stop")
    sent = chain.upstream.state.seen[0][1]
    wanted = {"model": "org/small", "seed": 5, "max_tokens": 9, "stop": ["x"], "temperature": 1.0, "logprobs": True}
    assert wanted.items() <= sent.items()
    put = client.put(f"/v1/feedback/{body['id']}/thumb", json={"value": 1})
    assert put.status_code == 201
    assert ask(client, "hi", model="org/small").status_code == 200
    assert ask(client, "hi", model="org/large").status_code == 404


@pytest.mark.parametrize("chain", [("somebody", {"engine_model": "org/large", "engine_key": "s3cret"})], indirect=True)
def test_a_server_that_tells_no_ids_is_not_asked_for_them(chain: Any) -> None:
    chain, client = chain
    body = ask(client, "hi").json()
    row = chain.store.completion(body["id"])
    assert (row.prompt_token_ids, row.response_token_ids, row.response_logprobs) == ([], [], [])
    assert (row.prompt_tokens, row.completion_tokens) == (2, 4) == tuple(list(body["usage"].values())[:2])
    headers, sent = chain.upstream.state.seen[0]
    assert headers["authorization"] == "Bearer s3cret" and sent["model"] == "org/large"
    assert not {"logprobs", "return_token_ids"} & set(sent)
    assert sent["max_tokens"] == 1024
    assert "s3cret" not in repr(chain.settings)


@pytest.mark.parametrize("chain", [("vllm", {"engine_seconds": 0.5})], indirect=True)
def test_failures_are_said_in_openais_shape_and_break_nothing(chain: Any) -> None:
    chain, client = chain
    for wish, status, code in (
        ("429", 503, "engine_busy"),
        ("500", 502, "engine_failed"),
        ("503", 502, "engine_failed"),
        ("401", 502, "engine_refused"),
        ("400", 400, "invalid"),
        ("413", 400, "context_length_exceeded"),
        ("junk", 502, "engine_failed"),
        ("slow", 504, "engine_timeout"),
    ):
        for stream in (False, True):
            if stream and wish == "slow":
                continue  # says something first: see below
            response = ask(client, wish, stream=stream)
            assert (response.status_code, response.json()["error"]["code"]) == (status, code), (wish, stream)
    for wish in ("break", "end", "complain", "slow"):
        response = ask(client, wish, stream=True)
        assert response.status_code == 200 and '"error"' in response.text and "[DONE]" not in response.text
        row = wait_for(chain.store, response.headers["X-Request-Id"], "error")
        assert row.response == ANSWER[0] and row.error
    assert ask(client, "hi").status_code == 200


def test_who_leaves_ends_the_answer_at_the_server_too(chain: Any) -> None:
    chain, client = chain
    with pytest.raises(httpx.ReadTimeout):
        client.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": "slow"}]}, timeout=httpx.Timeout(0.3)
        )
    assert chain.upstream.state.cancelled.wait(5)
    chain.upstream.state.cancelled.clear()
    body = {"messages": [{"role": "user", "content": "slow"}], "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        id = response.headers["X-Request-Id"]
    assert chain.upstream.state.cancelled.wait(5)
    assert wait_for(chain.store, id, "aborted").response in ("", ANSWER[0])


def test_a_server_that_comes_later_is_found_and_one_that_goes_is_missed(tmp_path: Path) -> None:
    app = upstream()
    with served(app) as url:
        pass
    settings = Settings(engine_url=f"{url}/v1")

    async def looks() -> None:
        engine = RemoteEngine(settings)
        with pytest.raises(EngineError, match="cannot be reached"):
            await engine.look()
        assert engine.model_hash is None
        wrong = RemoteEngine(Settings(engine_url=f"{late}/v1", engine_model="org/none"))
        with pytest.raises(EngineError, match="serves org/small, org/large"):
            await wrong.look()
        found = RemoteEngine(Settings(engine_url=f"{late}/v1/"))
        await found.look()
        other = RemoteEngine(Settings(engine_url=f"{late}/v1", engine_model="org/large"))
        await other.look()
        assert found.model_hash != other.model_hash and len(found.model_hash or "") == 64
        for each in (engine, wrong, found, other):
            await each.close()

    with served(app) as late:
        asyncio.run(looks())
    with pytest.raises(ValueError, match="must begin with http"):
        RemoteEngine(Settings(engine_url="localhost:8000"))
