"""The simulated rater, against a real service with a real tiny model."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from feedback.store import Store
from flows import rater, sentiment, settings
from flows.rater import RaterError, RaterOptions
from models.checkpoint import model_hash, save_model
from models.config import ModelConfig
from models.tokenizer import Tokenizer
from models.transformer import Transformer

WORDS = ["I love it", "I hate it", "good day", "bad night", "so what", "do you like that great thing"]
OPTIONS = RaterOptions(prompts=20, samples=2, concurrency=8, max_tokens=8, patience=60.0)


def prompts() -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": f"{word} {i}"}] for word in WORDS for i in range(5)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, str]]:
    """(workspace, address of its chat service, hash of its champion)."""
    root = tmp_path_factory.mktemp("workspace")
    shutil.copy(Path(settings.__file__).parents[1] / "params.yaml", root / "params.yaml")
    curated = root / rater.PROMPTS
    curated.parent.mkdir(parents=True)
    curated.write_text("".join(json.dumps({"id": str(i), "messages": m}) + "\n" for i, m in enumerate(prompts())))
    tokenizer = Tokenizer.train(WORDS * 20, 300)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(16, 1, 2, 2, 32, 64, vocab_size=tokenizer.vocab_size))
    with torch.no_grad():
        model.embedding.weight.mul_(0.1)  # tied to the output: at full size the model says one token for ever
    save_model(model, root / "model", tokenizer)
    hash = model_hash(root / "model")
    url = f"sqlite:///{root / '.thumbwheel' / 'feedback.db'}"
    store = Store(url)
    store.migrate()
    store.promote(model_hash=hash, model_path=str(root / "model"), figures={}, reason="a test", expected_champion=None)
    store.close()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "feedback.service", "--port", str(port), "--database-url", url]
    command += ["--models-root", str(root / ".thumbwheel" / "models"), "--width", "8"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        wait_for(f"http://127.0.0.1:{port}/healthz", process)
        yield root, f"http://127.0.0.1:{port}", hash
    finally:
        process.terminate()
        process.wait(30)


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "the service ended"
        try:
            httpx.get(url, trust_env=False).raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise TimeoutError(url)


def log(root: Path) -> list[Any]:
    store = Store(f"sqlite:///{root / '.thumbwheel' / 'feedback.db'}")
    try:
        return store.events(limit=10_000)
    finally:
        store.close()


def test_a_set_is_rated_once_whatever_happens(place: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    root, url, hash = place
    monkeypatch.setenv("THUMBWHEEL_SERVICE_URL", url)
    monkeypatch.delenv("THUMBWHEEL_DATABASE_URL", raising=False)
    seen: list[dict[str, Any]] = []

    # killed halfway: only the first 12 of 20 prompts were asked
    asked = rater.questions(rater.read_prompts(root / rater.PROMPTS), hash, OPTIONS, settings.load(root).seed)
    assert len(asked) == len({question.key for question in asked}) == 40
    asyncio.run(rater.ask(url, asked[:24], hash, OPTIONS, "en", seen.append))
    assert len(log(root)) == 24

    found = rater.rate(root, hash, OPTIONS, seen.append)
    assert (found["asked"], found["replayed"], found["refused"], found["before"]) == (40, 24, 0, 24)
    assert found["up"] + found["down"] == 40
    assert seen[-1]["step"] == seen[-1]["total"] == 40
    events = log(root)
    assert len(events) == 40
    assert {event.payload["source"] for event in events} == {"simulated"}
    assert sum(event.payload["value"] == 1 for event in events) == found["up"]

    # complete: nobody is asked, the service need not even run
    monkeypatch.setenv("THUMBWHEEL_SERVICE_URL", "http://127.0.0.1:9")
    assert rater.rate(root, hash, OPTIONS) == {
        "asked": 0,
        "up": 0,
        "down": 0,
        "replayed": 0,
        "refused": 0,
        "before": 40,
    }
    assert len(log(root)) == 40


def test_thumbs_are_the_judges_and_answers_are_the_seeds(place: tuple[Path, str, str]) -> None:
    """What stands in the database is what VADER says of the stored answer; the seed makes the answer again."""
    root, url, hash = place
    question = rater.questions(prompts()[:1], hash, RaterOptions(samples=1, max_tokens=7), seed=0)[0]
    tally = asyncio.run(rater.ask(url, [question], hash, RaterOptions(max_tokens=7), "en", lambda event: None))
    last = log(root)[-1].payload
    store = Store(f"sqlite:///{root / '.thumbwheel' / 'feedback.db'}")
    stored = store.completion(last["completion_id"])
    store.close()
    assert stored is not None
    assert stored.sampling["seed"] == question.seed < 2**53
    assert (last["value"] == 1) == sentiment.thumb(stored.response) == (tally.up == 1)
    body = {"messages": question.messages, "seed": question.seed, "max_tokens": 7, "temperature": 1.0}
    again = httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False).json()
    assert again["choices"][0]["token_ids"] == stored.response_token_ids


def test_prompts_that_do_not_fit_are_counted_and_passed_over(place: tuple[Path, str, str]) -> None:
    _, url, hash = place
    long = [{"role": "user", "content": "love " * 200}]
    asked = rater.questions([long], hash, RaterOptions(samples=1), seed=0)
    tally = asyncio.run(rater.ask(url, asked, hash, OPTIONS, "en", lambda event: None))
    assert (tally.refused, tally.up, tally.down) == (1, 0, 0)


def test_another_model_than_the_champion_is_not_waited_for_endlessly(place: tuple[Path, str, str]) -> None:
    _, url, hash = place
    options = RaterOptions(patience=0.5)
    with pytest.raises(RaterError, match=f"serves {hash[:12]}, not {'e' * 12}"):
        asyncio.run(rater.ask(url, [], "e" * 64, options, "en", lambda event: None))


def test_a_service_that_does_not_run_is_named() -> None:
    with pytest.raises(RaterError, match="ConnectError"):
        asyncio.run(rater.ask("http://127.0.0.1:9", [], "a", RaterOptions(patience=0.2), "en", lambda event: None))
    with pytest.raises(RaterError, match="make up"):
        asyncio.run(rater._address(lambda: None, 0.1))


def test_a_busy_service_is_asked_again_and_a_refusal_is_not() -> None:
    calls = 0

    def busy(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise httpx.ReadError("connection lost")
        status = 503 if calls < 4 else 422
        return httpx.Response(status, json={"error": {"message": "used for another request", "code": "x"}})

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.MockTransport(busy), base_url="http://service") as client:
            return await rater._send(client, "PUT", "/thumb", {}, {}, patience=30.0)

    answer = asyncio.run(send())
    assert (answer.status_code, calls) == (422, 4)
    with pytest.raises(RaterError, match="PUT http://service/thumb: 422 used for another request"):
        rater._check(answer)


def test_questions_are_a_function_of_model_prompt_sample_and_settings() -> None:
    make = rater.questions
    one = make(prompts(), "a", OPTIONS, 1)
    assert one == make(list(reversed(prompts())), "a", OPTIONS, 1)
    assert {q.key for q in one}.isdisjoint(q.key for q in make(prompts(), "b", OPTIONS, 1))
    assert {q.key for q in one}.isdisjoint(q.key for q in make(prompts(), "a", RaterOptions(prompts=20), 1))
    more = make(prompts(), "a", RaterOptions(prompts=25, concurrency=2, max_tokens=8), 1)
    assert {q.key for q in one} < {q.key for q in more}  # a larger set keeps what was rated
    chosen = [{json.dumps(q.messages) for q in make(prompts(), "a", OPTIONS, seed)} for seed in (1, 2)]
    assert chosen[0] != chosen[1]


@pytest.mark.parametrize("change", [{"prompts": 0}, {"temperature": 3.0}, {"patience": 0.0}])
def test_impossible_options_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        RaterOptions(**change)
