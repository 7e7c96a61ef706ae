"""The service through OpenAI's own Python client: what that client's users rely on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from feedback.logprobs import Token, bytes_of, content

HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[OpenAI]:
    """OpenAI's client of a service with a real tiny model."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="none needed here", max_retries=0) as client:
        yield client


def ask(client: OpenAI, **changes: Any) -> Any:
    return client.chat.completions.create(**{"model": "champion", "messages": HELLO, "seed": 3, **changes})


def test_a_whole_answer(client: OpenAI) -> None:
    answer = ask(client, max_tokens=9, user="ann", temperature=0.7, top_p=0.9, n=1, metadata={"a": "b"})
    choice = answer.choices[0]
    assert answer.object == "chat.completion" and choice.message.role == "assistant" and choice.message.content
    assert answer.usage.completion_tokens <= 9 and answer.usage.prompt_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert choice.finish_reason in ("stop", "length") and choice.logprobs is None
    assert ask(client, max_completion_tokens=1).usage.completion_tokens == 1
    parts: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    assert ask(client, messages=parts).choices[0].message.content is not None


def test_the_seed_decides_and_temperature_0_needs_none(client: OpenAI) -> None:
    said = [ask(client, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]
    greedy = [ask(client, seed=seed, temperature=0).choices[0].message.content for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def test_a_stream_says_the_same_and_ends_with_its_usage(client: OpenAI) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    text = whole.choices[0].message.content
    with client.chat.completions.stream(model="champion", messages=HELLO, seed=3, stop=text[4:6]) as stream:
        final = stream.get_final_completion()  # raises for an answer that was cut off, so a stop string ends it
    assert final.choices[0].message.content == text[: text.index(text[4:6])]


def test_stop_strings_end_it_whole_and_streamed(client: OpenAI) -> None:
    text = ask(client).choices[0].message.content
    stop = text[4:6]
    for stops in (stop, ["no such string", stop]):
        stopped = ask(client, stop=stops).choices[0]
        assert (stopped.message.content, stopped.finish_reason) == (text[: text.index(stop)], "stop")
        streamed = "".join(c.choices[0].delta.content or "" for c in ask(client, stop=stops, stream=True))
        assert streamed == text[: text.index(stop)]


def test_logprobs_of_the_chosen_tokens(client: OpenAI, server: Any) -> None:
    answer = ask(client, logprobs=True)
    told = answer.choices[0].logprobs.content
    row = server.store.completion(answer.id)
    assert b"".join(bytes(token.bytes) for token in told).decode(errors="replace").removeprefix(" ") == row.response
    assert [token.logprob for token in told] == row.response_logprobs[: len(told)]
    assert len(told) == len(row.response_token_ids) - (answer.choices[0].finish_reason == "stop")
    assert all(token.logprob <= 0 and token.top_logprobs == [] for token in told)
    assert math.exp(sum(row.response_logprobs)) <= 1
    chunks = ask(client, logprobs=True, stream=True)
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert streamed == told
    for refused in ({"logprobs": True, "top_logprobs": 5}, {"top_logprobs": 1}):
        with pytest.raises(openai.BadRequestError) as error:
            ask(client, **refused)
        assert error.value.param == "top_logprobs" and "only the log-probability of the chosen" in error.value.message
    with pytest.raises(openai.BadRequestError, match="leave out the Idempotency-Key"):
        ask(client, logprobs=True, extra_headers={"Idempotency-Key": "with logprobs"})


def test_the_bytes_of_a_token_may_be_a_part_of_a_character() -> None:
    assert bytes_of("Ġhello", " hello") == b" hello"
    assert bytes_of("ä½", "\ufffd") == "你".encode()[:2] and bytes_of("ł", "\ufffd") == "你".encode()[2:]
    assert bytes_of("▁word", "word") == b"word" and bytes_of(None, "x") == b"x"
    told = content([Token("你".encode()[:2], -0.5)])
    assert told is not None and told["content"][0]["bytes"] == [228, 189] and content([]) is None


def test_models_are_listed_and_found_by_each_name(client: OpenAI) -> None:
    (listed,) = client.models.list().data
    assert listed.owned_by == "thumbwheel"
    for name in (listed.id, "champion"):
        assert client.models.retrieve(name).id == listed.id
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-4")
    assert error.value.code == "model_not_found"


def test_errors_are_the_clients_own(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        ask(client, model="gpt-4")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    for change, param in (({"temperature": 3}, "temperature"), ({"n": 2}, "n"), ({"tools": []}, "tools")):
        with pytest.raises(openai.BadRequestError) as bad:
            ask(client, **change)
        assert bad.value.param == param and bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, messages=[{"role": "user", "content": "x y z " * 200}])
    assert long.value.code == "context_length_exceeded"


def test_one_key_is_one_answer(client: OpenAI) -> None:
    key = {"Idempotency-Key": "the client's"}
    raw = client.chat.completions.with_raw_response
    first, again = (
        raw.create(model="champion", messages=HELLO, extra_headers=key, extra_body={"conversation": "c1"})
        for _ in range(2)
    )
    assert first.parse() == again.parse() and again.headers["Idempotent-Replayed"] == "true"
    with pytest.raises(openai.UnprocessableEntityError):
        ask(client, extra_headers=key, seed=9)


def test_figures_for_prometheus(client: OpenAI, server: Any) -> None:
    raw = client.chat.completions.with_raw_response.create(model="champion", messages=HELLO)
    url = f"/v1/feedback/{raw.parse().id}/thumb"
    for _ in range(2):
        server.client.put(url, json={"value": 1})
    server.client.get("/no/such/page")
    text = server.client.get("/metrics").text
    figures = {
        name: float(value) for name, value in (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    }
    route = 'method="PUT",route="/v1/feedback/{completion_id}/thumb"'
    assert figures[f'thumbwheel_requests_total{{{route},status="201"}}'] == 1
    assert figures[f'thumbwheel_requests_total{{{route},status="200"}}'] == 1
    assert figures[f"thumbwheel_request_seconds_count{{{route}}}"] == 2
    assert figures['thumbwheel_requests_total{method="none",route="none",status="404"}'] == 1
    assert figures['thumbwheel_opinions_total{how="created",kind="thumb"}'] == 1
    assert figures['thumbwheel_opinions_total{how="replayed",kind="thumb"}'] == 1
    assert figures['thumbwheel_tokens_total{part="completion"}'] > 0
    assert figures["thumbwheel_engine_ready"] == 1 and figures["thumbwheel_writes_waiting"] == 0
    assert "/no/such/page" not in text
    schema = server.client.get("/openapi.json").json()
    assert {"/metrics", "/v1/models/{name}", "/v1/export", "/v1/subjects/me"} <= set(schema["paths"])
