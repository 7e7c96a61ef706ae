"""The simulated rater: a client of the chat service like any other, that asks training prompts and gives thumbs.

Every answer is keyed by (model, prompt, sample): asking again replays the stored answer, and the same thumb on it changes
nothing. So a rater that was killed is simply started again. Its opinions are always labelled `source = simulated`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import sentiment

if TYPE_CHECKING:
    import httpx

Emit = Callable[[dict[str, Any]], None]
Messages = Sequence[Mapping[str, str]]
SOURCE = "simulated"
USER = "simulated-rater"
KEY = "THUMBWHEEL_API_KEY"
PROMPTS = "artifacts/curate/prompts.train.jsonl"
REPORT_SECONDS = 0.5
MOST_PAUSE = 5.0


class RaterError(RuntimeError):
    """The service does not answer as it should. The message says what it said and what to do."""


@dataclass(frozen=True)
class RaterOptions:
    """Section `rater` of params.yaml.

    prompts: at most so many training prompts; samples: answers each; concurrency: requests under way at once; patience:
    seconds to wait for the service to start, to load the model, or to come back.
    """

    enabled: bool = True
    prompts: int = 2150
    samples: int = 2
    concurrency: int = 64
    temperature: float = 1.0
    max_tokens: int = 32
    patience: float = 120.0

    def __post_init__(self) -> None:
        for name in ("prompts", "samples", "concurrency", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, it is {getattr(self, name)}")
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must be 0 to 2, it is {self.temperature}")
        if self.patience <= 0:
            raise ValueError(f"patience must be above 0 seconds, it is {self.patience}")


@dataclass(frozen=True)
class Question:
    """One answer to ask for. key: the same for the same model, prompt, sample and sampling settings."""

    messages: Messages
    key: str

    @property
    def seed(self) -> int:
        """The seed of its random stream: 52 bits of the key."""
        return int(self.key[:13], 16)


@dataclass
class Tally:
    """What came of the questions."""

    up: int = 0
    down: int = 0
    replayed: int = 0
    refused: int = 0  # prompts that the model's context cannot hold

    @property
    def done(self) -> int:
        """Questions that are settled."""
        return self.up + self.down + self.refused


def rate(root: Path, model_hash: str, options: RaterOptions, emit: Emit = lambda event: None) -> dict[str, int]:
    """Have model `model_hash` answer the training prompts over HTTP, and rate each answer.

    A set that is complete already is not asked again. Returns {"asked", "up", "down", "replayed", "refused", "before"}.
    Raises RaterError when the service does not run, does not serve that model, or refuses.
    """
    from feedback.store import Store
    from flows import settings
    from flows.environment import environment

    where, params = environment(root), settings.load(root)
    asked = questions(read_prompts(where.root / PROMPTS), model_hash, options, params.seed)
    store = Store(where.feedback_url())
    try:
        before = store.count_opinions(model_hash=model_hash, source=SOURCE)
    finally:
        store.close()
    if before >= len(asked):
        return {"asked": 0, "up": 0, "down": 0, "replayed": 0, "refused": 0, "before": before}
    url = asyncio.run(_address(where.chat_url, options.patience))
    tally = asyncio.run(ask(url, asked, model_hash, options, params.data.language, emit))
    counts = {name: getattr(tally, name) for name in ("up", "down", "replayed", "refused")}
    return {"asked": len(asked), **counts, "before": before}


def read_prompts(path: Path) -> list[Messages]:
    """The conversations of a curated prompts file. Raises FileNotFoundError."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run stage curate first")
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["messages"] for line in file]


def questions(prompts: Sequence[Messages], model_hash: str, options: RaterOptions, seed: int) -> list[Question]:
    """The questions of a set: `options.prompts` of the prompts, chosen by `seed`, `options.samples` each."""
    chosen = sorted(prompts, key=lambda messages: digest([seed, messages]))[: options.prompts]
    how = [options.temperature, options.max_tokens]
    return [
        Question(messages, digest([model_hash, messages, sample, *how]))
        for messages in chosen
        for sample in range(options.samples)
    ]


def digest(value: Any) -> str:
    """sha256 (hex) of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


async def ask(
    url: str, asked: Sequence[Question], model_hash: str, options: RaterOptions, language: str, emit: Emit
) -> Tally:
    """Put every question to the service at `url`, `options.concurrency` at a time, and rate the answers."""
    tally, waiting, told = Tally(), iter(asked), 0.0

    async def worker() -> None:
        nonlocal told
        async with _connection(url, trust) as client:
            for question in waiting:
                await _one(client, question, model_hash, options, language, tally)
                if time.monotonic() - told > REPORT_SECONDS or tally.done == len(asked):
                    told = time.monotonic()
                    share = tally.up / max(1, tally.up + tally.down)
                    metrics = {"opinions": float(tally.up + tally.down), "thumbs_up_share": share}
                    emit({"event": "metrics", "step": tally.done, "total": len(asked), "metrics": metrics})

    trust = ssl.create_default_context()
    async with _connection(url, trust) as client:
        await _serves(client, model_hash, options.patience)
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(options.concurrency, len(asked))):
                group.create_task(worker())
    except* RaterError as errors:
        raise errors.exceptions[0] from None
    return tally


async def _one(
    client: httpx.AsyncClient, question: Question, model_hash: str, options: RaterOptions, language: str, tally: Tally
) -> None:
    body = {
        "model": model_hash,
        "messages": question.messages,
        "temperature": options.temperature,
        "max_tokens": options.max_tokens,
        "seed": question.seed,
        "user": USER,
    }
    headers = {"Idempotency-Key": question.key}
    answer = await _send(client, "POST", "/v1/chat/completions", body, headers, options.patience)
    if answer.status_code == 400 and _code(answer) == "context_length_exceeded":
        tally.refused += 1
        return
    _check(answer)
    content = answer.json()
    if content["system_fingerprint"] != model_hash:
        raise RaterError(
            f"model {content['system_fingerprint'][:12]} answered, {model_hash[:12]} was asked: "
            "the champion changed meanwhile; run the flow again"
        )
    up = sentiment.thumb(content["choices"][0]["message"]["content"], language)
    thumb = {"value": 1 if up else -1, "source": SOURCE, "user": USER, "channel": "rater"}
    _check(await _send(client, "PUT", f"/v1/feedback/{content['id']}/thumb", thumb, {}, options.patience))
    tally.replayed += answer.headers.get("Idempotent-Replayed") == "true"
    if up:
        tally.up += 1
    else:
        tally.down += 1


# ---------------------------------------------------------------- the service


def _connection(url: str, trust: ssl.SSLContext) -> httpx.AsyncClient:
    """A client with one connection: a worker's own, because httpx's pool looks through all of its connections at every
    request, which took most of the rater's time."""
    import httpx

    limits = httpx.Limits(max_connections=1, max_keepalive_connections=1)
    # trust_env=False: a proxy of the environment has no business with a loopback address
    key = os.environ.get(KEY)  # where the service asks for one: scopes chat and rate
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(base_url=url, verify=trust, limits=limits, headers=headers, timeout=60.0, trust_env=False)


async def _address(look: Callable[[], str | None], patience: float) -> str:
    end = time.monotonic() + patience
    while (url := look()) is None:
        if time.monotonic() > end:
            raise RaterError("the chat service does not run: start it with `make up`, or set THUMBWHEEL_SERVICE_URL")
        await asyncio.sleep(0.2)
    return url


async def _serves(client: httpx.AsyncClient, model_hash: str, patience: float) -> None:
    """Wait until the service answers with the model: it follows the promotion table with some delay."""
    end = time.monotonic() + patience
    while True:
        answer = await _send(client, "GET", "/v1/models", None, {}, patience)
        _check(answer)
        names = [model.get("model_hash") for model in answer.json()["data"]]
        if model_hash in names:
            return
        if time.monotonic() > end:
            serves = ", ".join(str(name)[:12] for name in names) or "no model"
            raise RaterError(
                f"{client.base_url} serves {serves}, not {model_hash[:12]}, after {patience:.0f} s: does it use the "
                "database of this workspace (THUMBWHEEL_DATABASE_URL)?"
            )
        await asyncio.sleep(0.2)


async def _send(
    client: httpx.AsyncClient, method: str, path: str, body: Any, headers: Mapping[str, str], patience: float
) -> httpx.Response:
    """One request, repeated while the service is busy or away: all of ours may be sent twice."""
    import httpx

    end, pause = time.monotonic() + patience, 0.05
    while True:
        problem: str
        try:
            answer = await client.request(method, path, json=body, headers=headers)
            if answer.status_code not in (429, 502, 503, 504):
                return answer
            problem = f"{answer.status_code} {_message(answer)}"
        except httpx.TransportError as error:
            problem = f"{type(error).__name__} {error}".strip()
        if time.monotonic() + pause > end:
            raise RaterError(f"{method} {client.base_url}{path}: {problem}, for {patience:.0f} s: is the service well?")
        await asyncio.sleep(pause)
        pause = min(2 * pause, MOST_PAUSE)


def _check(answer: httpx.Response) -> None:
    if not answer.is_success:
        raise RaterError(f"{answer.request.method} {answer.request.url}: {answer.status_code} {_message(answer)}")


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]


def _code(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return ""
