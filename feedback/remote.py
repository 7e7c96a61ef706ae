"""An engine by URL: any server of OpenAI's chat completions (vLLM, llama.cpp, Ollama, …) answers, and we keep what is said of
its answers.

What the model behind an address is, nobody can see from outside. Its `model_hash` is a hash of the address, its name and what
/models says its root is: it tells one server's models apart, and stays the same when somebody changes the weights behind them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from feedback.champion import Defaults
from feedback.engine import Ask, Done, EngineError, Piece, Started
from feedback.logprobs import Token
from feedback.opinions import sha256
from feedback.promotions import Promotion
from feedback.schemas import UNSTORABLE
from feedback.settings import Settings

log = logging.getLogger("thumbwheel")
LOOK_SECONDS, RETRY_SECONDS = 30.0, 2.0
LINE_BYTES = 16 * 1024 * 1024  # of one event: more is no answer but an attack
TOO_LONG = ("context_length_exceeded", "maximum context length", "context size", "too many tokens")


@dataclass
class Heard:
    """What a streamed answer has said so far."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    tokens: list[Token] = field(default_factory=list)  # those not yet handed over

    def take(self, body: dict[str, Any]) -> str:
        """One chunk, or a whole answer; returns its text. Raises EngineError for what is neither."""
        try:
            if body.get("error"):
                raise EngineError("engine_failed", f"the engine says: {message_of(body)}")
            self.prompt_ids = body.get("prompt_token_ids") or self.prompt_ids
            for name in ("prompt_tokens", "completion_tokens"):
                if count := (body.get("usage") or {}).get(name):
                    self.usage[name] = int(count)
            if not body["choices"]:  # the last chunk, with the usage
                return ""
            choice = body["choices"][0]
            said = choice.get("delta") or choice.get("message") or {}
            piece = UNSTORABLE.sub("\ufffd", said.get("content") or "")
            self.text += piece
            self.ids += choice.get("token_ids") or []
            for token in (choice.get("logprobs") or {}).get("content") or []:
                self.logprobs.append(float(token["logprob"]))
                spelled = token.get("bytes")
                said_bytes = token["token"].encode(errors="replace") if spelled is None else bytes(spelled)
                self.tokens.append(Token(said_bytes, self.logprobs[-1]))
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            return piece
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise EngineError("engine_failed", f"the engine's answer is not OpenAI's: {error!r}") from error

    def done(self, ask: Ask, model_hash: str) -> Done:
        """The whole answer. Log-probabilities that do not belong to token ids one by one are left out."""
        if self.finish_reason is None:
            raise EngineError("engine_stopped", "the engine ended before its answer was finished")
        logprobs = self.logprobs if len(self.logprobs) == len(self.ids) else []
        reason = self.finish_reason[:16]
        said = (self.prompt_ids, self.ids, logprobs, self.text, reason)
        return Done(ask.id, model_hash, *said, **self.usage, tokens=self.told(ask))

    def told(self, ask: Ask) -> list[Token]:
        """The tokens that were not handed over yet, where they were asked for."""
        tokens, self.tokens = self.tokens, []
        return tokens if ask.logprobs else []


class RemoteEngine:
    """See feedback.engine.Engine. The server is looked for by RemoteCrown; until it is found there is no model."""

    kind = "remote"

    def __init__(self, settings: Settings, transport: httpx.AsyncBaseTransport | None = None) -> None:
        """Raises ValueError for an address that is none."""
        self.url = (settings.engine_url or "").rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"THUMBWHEEL_ENGINE_URL must begin with http:// or https://, not {self.url!r}")
        self.asked_model = settings.engine_model
        self.model = ""
        self._hash: str | None = None
        self._tells_ids = False
        key = settings.engine_key
        self.client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key.get_secret_value()}"} if key else {},
            timeout=httpx.Timeout(settings.engine_seconds, connect=min(5.0, settings.engine_seconds)),
            limits=httpx.Limits(max_connections=512, max_keepalive_connections=64),
            transport=transport,
        )

    @property
    def model_hash(self) -> str | None:
        """The model that answers new requests, None while the server is not there."""
        return self._hash

    async def load(self, model_hash: str, folder: Path) -> None:
        """A server by URL loads nothing for us."""
        raise EngineError("load_failed", f"the engine is {self.url}: it cannot be given a model")

    async def close(self) -> None:
        """End its connections."""
        await self.client.aclose()

    async def look(self) -> dict[str, Any]:
        """Find the server's model. Raises EngineError when it does not answer or has no such model."""
        try:
            response = await self.client.get(f"{self.url}/models")
            await refuse(response)
            listed = [entry for entry in response.json()["data"] if isinstance(entry["id"], str)]
        except httpx.HTTPError as error:
            self._hash = None
            raise unreachable(error, self.url) from error
        except (ValueError, KeyError, TypeError) as error:
            self._hash = None
            raise EngineError("engine_failed", f"{self.url}/models does not answer as OpenAI's does") from error
        except EngineError:
            self._hash = None
            raise
        found = next((entry for entry in listed if self.asked_model in ("", entry["id"])), None)
        if found is None:
            self._hash = None
            names = ", ".join(entry["id"] for entry in listed[:10]) or "no model"
            raise EngineError(
                "not_ready", f"{self.url} serves {names}; THUMBWHEEL_ENGINE_MODEL is {self.asked_model!r}"
            )
        self.model = found["id"]
        self._tells_ids = found.get("owned_by") == "vllm"  # others refuse a request for them
        self._hash = sha256(["remote", self.url, self.model, found.get("root") or found["id"]])
        return dict(found)

    async def answer(self, ask: Ask) -> AsyncGenerator[Started | Piece | Done, None]:
        """See Engine.answer. Leaving it closes the connection, which ends the answer at the server."""
        model_hash = self._hash
        if model_hash is None:
            raise EngineError("not_ready", "the engine does not answer yet; try again in a moment")
        body, heard = self.request_of(ask), Heard()
        try:
            async with self.client.stream("POST", f"{self.url}/chat/completions", json=body) as response:
                await refuse(response)
                if not ask.stream:
                    heard.take(json.loads(await response.aread()))
                    yield heard.done(ask, model_hash)
                    return
                if not response.headers.get("content-type", "").startswith("text/event-stream"):
                    raise EngineError("engine_failed", "the engine does not stream")
                begun = False
                async with contextlib.aclosing(events(response)) as chunks:
                    async for chunk in chunks:
                        piece = heard.take(chunk)
                        if not begun:
                            begun = True
                            yield Started(ask.id, model_hash, heard.prompt_ids)
                        if piece:
                            yield Piece(ask.id, piece, list(heard.ids), heard.told(ask))
                yield heard.done(ask, model_hash)
        except httpx.HTTPError as error:
            raise unreachable(error, self.url) from error
        except json.JSONDecodeError as error:
            raise EngineError("engine_failed", "the engine's answer is no JSON") from error

    def request_of(self, ask: Ask) -> dict[str, Any]:
        """The body of a request; what only vLLM knows is asked of vLLM alone."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": ask.messages,
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "top_p": ask.top_p,
            "seed": ask.seed,
            "stream": ask.stream,
        }
        if ask.stop:
            body["stop"] = ask.stop
        if ask.logprobs:
            body["logprobs"] = True
        if ask.stream:
            body["stream_options"] = {"include_usage": True}
        return {**body, "logprobs": True, "return_token_ids": True} if self._tells_ids else body


class RemoteCrown:
    """Stands where Crown stands for our decoder: what answers is whatever the server at the URL serves."""

    def __init__(self, engine: RemoteEngine, defaults: Defaults) -> None:
        self.engine, self.defaults = engine, defaults
        self.known: dict[str, tuple[Promotion, Defaults]] = {}
        self.problem = f"{engine.url} has not answered yet"

    @property
    def names(self) -> tuple[str, ...]:
        """What else the model may be asked for by."""
        return (self.engine.model,) if self.engine.model else ()

    async def follow(self) -> None:
        """Run until cancelled."""
        while True:
            try:
                await self.look()
            except Exception as error:
                if str(error) != self.problem:
                    log.error("the engine is not there: %s", error)
                self.problem = str(error)
            await asyncio.sleep(RETRY_SECONDS if self.engine.model_hash is None else LOOK_SECONDS)

    async def look(self) -> None:
        """See whether the server is there, and which model it serves. Raises EngineError."""
        await self.engine.look()
        model_hash = self.engine.model_hash
        if model_hash is None or (model_hash in self.known and not self.problem):
            return
        reason = "answers from a server by URL: the hash is of its address and name, not of its weights"
        stand_in = Promotion(0, "promote", None, model_hash, self.engine.url, {}, reason, datetime.now(UTC))
        self.known.setdefault(model_hash, (stand_in, self.defaults))
        self.problem = ""
        log.warning("answering with %s of %s", self.engine.model, self.engine.url)


async def events(response: httpx.Response) -> AsyncGenerator[dict[str, Any], None]:
    """The JSON of a stream's events, up to [DONE]. Raises EngineError when it ends or breaks off before that.

    Lines end at LF alone: httpx's own lines would also end inside a JSON string that holds U+2028 or U+0085.
    """
    async for line in lines(response.aiter_bytes()):
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        body = json.loads(data)
        if not isinstance(body, dict):
            raise EngineError("engine_failed", "the engine sent an event that is no object")
        yield body
    raise EngineError("engine_stopped", "the engine ended the stream before its answer was finished")


async def lines(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Bytes as lines, without their ends. Raises EngineError for one that does not end."""
    rest = b""
    async for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.rstrip(b"\r")
        if len(rest) > LINE_BYTES:
            raise EngineError("engine_failed", f"the engine sent a line of more than {LINE_BYTES} bytes")
    if rest:
        yield rest.rstrip(b"\r")


async def refuse(response: httpx.Response) -> None:
    """Raises EngineError for an answer that is none, as whoever asked us should read it."""
    if response.is_success:
        return
    try:
        text = message_of(json.loads((await response.aread())[:100_000]))
    except ValueError:
        text = response.reason_phrase
    status = response.status_code
    if status == 429:
        raise EngineError("engine_busy", f"the engine has too many requests: {text}")
    if status in (401, 403, 404):
        raise EngineError(
            "engine_refused", f"the engine refuses us with {status}; see THUMBWHEEL_ENGINE_KEY and _MODEL"
        )
    if status in (400, 413, 422):
        long = any(sign in text.lower() for sign in TOO_LONG)
        raise EngineError("context_length_exceeded" if long else "invalid", f"the engine says: {text}")
    raise EngineError("engine_failed", f"the engine failed with {status}: {text}")


def message_of(body: Any) -> str:
    """The message of an error, in OpenAI's shape or in one of those in use."""
    found = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(found, dict):
        found = " ".join(str(found[name]) for name in ("code", "message", "detail") if found.get(name))
    return UNSTORABLE.sub("\ufffd", str(found))[:500]


def unreachable(error: httpx.HTTPError, url: str) -> EngineError:
    """What a failed connection is to whoever asked."""
    if isinstance(error, httpx.TimeoutException):
        return EngineError("engine_timeout", f"the engine did not answer in time ({type(error).__name__})")
    if isinstance(error, httpx.ConnectError):
        return EngineError("engine_unreachable", f"the engine at {url} cannot be reached")
    return EngineError("engine_stopped", f"the connection to the engine broke ({type(error).__name__})")
