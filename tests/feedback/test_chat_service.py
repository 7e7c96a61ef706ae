"""The service over real HTTP, with a real tiny model in its worker: answers, streams, thumbs, keys, the crown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

Models = tuple[Path, str, str]


def events(response: httpx.Response) -> list[Any]:
    """The data of server-sent events; the last must be [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_importing_the_service_does_not_import_torch() -> None:
    code = (
        "import sys, feedback.service; "
        "print([m for m in ('torch', 'prefect', 'mlflow', 'dvc', 'great_expectations') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_beyond_loopback_it_starts_only_when_a_key_works(tmp_path: Path) -> None:
    from feedback.service import is_loopback

    assert not any(is_loopback(host) for host in ("0.0.0.0", "192.168.1.4", "::", "example", ""))
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.0.0.9", "::1", "localhost"))
    command = [sys.executable, "-m", "feedback.service", "--database-url", f"sqlite:///{tmp_path}/x"]
    for host, env in (("0.0.0.0", {}), ("127.0.0.1", {"THUMBWHEEL_REQUIRE_KEYS": "1"})):
        done = subprocess.run([*command, "--host", host], capture_output=True, text=True, env={**os.environ, **env})
        assert done.returncode == 2 and "thumbwheel key create" in done.stderr


def test_an_answer_in_openais_schema_is_committed_when_it_arrives(server: Any) -> None:
    response = server.chat(seed=7, max_tokens=12)
    assert response.status_code == 200, response.text
    body = response.json()
    choice = body["choices"][0]
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
    assert choice["message"]["role"] == "assistant" and choice["finish_reason"] in ("stop", "length")
    assert 1 <= len(choice["token_ids"]) <= 12
    assert body["usage"]["completion_tokens"] == len(choice["token_ids"])
    assert response.headers["X-Thumbwheel-Model"] == body["system_fingerprint"] == server.store.champion().model_hash
    row = server.store.completion(body["id"])
    assert row.response == choice["message"]["content"] and row.response_token_ids == choice["token_ids"]
    assert row.prompt_token_ids == body["prompt_token_ids"] and row.status == "complete"
    assert len(row.response_logprobs) == len(row.response_token_ids) and max(row.response_logprobs) <= 0
    assert row.sampling == {"temperature": 1.0, "top_p": 1.0, "max_tokens": 12, "seed": 7, "stop": []}


def test_the_same_seed_gives_the_same_answer_and_greedy_needs_none(server: Any) -> None:
    texts = [server.chat(seed=seed).json()["choices"][0]["token_ids"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    greedy = [server.chat(temperature=0).json()["choices"][0]["token_ids"] for _ in range(2)]
    assert greedy[0] == greedy[1]


def test_a_stream_says_the_same_as_a_whole_answer(server: Any) -> None:
    whole = server.chat(seed=3).json()
    response = server.chat(seed=3, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response)
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert chunks[-2]["choices"][0]["token_ids"] == whole["choices"][0]["token_ids"]
    assert chunks[-1]["usage"] == whole["usage"] and chunks[-1]["choices"] == []
    row = server.store.completion(chunks[0]["id"])
    assert row.response == text and row.status == "complete" and row.first_token_ms > 0


def test_a_stream_stands_in_the_database_before_its_first_byte_and_as_aborted_when_its_reader_leaves(
    server: Any,
) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 80, "seed": 5}
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        id = response.headers["X-Request-Id"]
        assert server.store.completion(id).prompt_token_ids
    for _ in range(200):
        row = server.store.completion(id)
        if row.status != "streaming":
            break
        threading.Event().wait(0.05)
    assert row.status in ("aborted", "complete") and row.finished_at is not None


def test_a_stop_string_ends_an_answer_and_is_not_part_of_it(server: Any) -> None:
    text = server.chat(seed=3).json()["choices"][0]["message"]["content"]
    stop = text[4:6]
    before = text[: text.index(stop)]
    body = server.chat(seed=3, stop=[stop]).json()
    assert (body["choices"][0]["message"]["content"], body["choices"][0]["finish_reason"]) == (before, "stop")
    chunks = events(server.chat(seed=3, stop=stop, stream=True))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == before


def test_what_it_cannot_do_is_refused_in_openais_shape(server: Any) -> None:
    cases = [
        ({"n": 2}, "n"),
        ({"temperature": 3}, "temperature"),
        ({"tools": []}, "tools"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, None),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, None),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ]
    for change, param in cases:
        response = server.chat(**change)
        assert response.status_code == 400, (change, response.text)
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}
        assert param is None or error["param"] == param
    assert server.chat(model="gpt-4").json()["error"]["code"] == "model_not_found"
    too_long = server.chat("x y z " * 200)
    assert (too_long.status_code, too_long.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert server.client.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert server.client.post("/v1/chat/completions", content=b"{").status_code == 400
    surrogate = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    headers = {"Content-Type": "application/json"}
    assert server.client.post("/v1/chat/completions", content=surrogate, headers=headers).status_code == 400


def test_models_are_listed_and_may_be_asked_for_by_name(server: Any) -> None:
    listed = server.client.get("/v1/models").json()
    assert [model["model_hash"] for model in listed["data"]] == [server.store.champion().model_hash]
    for name in (listed["data"][0]["id"], "champion"):
        assert server.chat(model=name, max_tokens=1).status_code == 200


def test_a_repeated_question_under_one_key_gets_the_stored_answer(server: Any) -> None:
    headers = {"Idempotency-Key": "question-1"}
    first = server.chat(headers=headers)
    again = server.chat(headers=headers)
    assert again.json() == first.json() and again.headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in first.headers
    assert server.chat("another", headers=headers).status_code == 422
    key = {"Idempotency-Key": "question-2"}
    with ThreadPoolExecutor(6) as pool:
        at_once = list(pool.map(lambda _: server.chat("at once", headers=key).json()["id"], range(6)))
    assert len(set(at_once)) == 1
    streamed = {"Idempotency-Key": "question-3"}
    texts = []
    for _ in range(2):
        chunks = events(server.chat("stream", headers=streamed, stream=True))
        texts.append("".join(c["choices"][0]["delta"].get("content", "") for c in chunks))
    assert texts[0] == texts[1]


def test_thumbs_over_http(server: Any) -> None:
    id = server.chat().json()["id"]
    url = f"/v1/feedback/{id}/thumb"
    assert server.client.get(url).status_code == 404
    created = server.client.put(url, json={"value": 1, "reasons": ["kind"], "comment": "<b>好</b>"})
    assert created.status_code == 201 and created.json()["comment"] == "<b>好</b>"
    same = server.client.put(url, json={"value": 1, "reasons": ["kind"], "comment": "<b>好</b>"})
    assert same.status_code == 200 and same.headers["Idempotent-Replayed"] == "true"
    revised = server.client.put(url, json={"value": -1, "source": "simulated"})
    assert (revised.status_code, revised.json()["revision"], revised.json()["source"]) == (200, 2, "simulated")
    other = server.client.put(url, json={"value": 1, "user": "somebody else"})
    assert other.status_code == 201
    assert server.client.delete(url).json()["retracted"] is True
    assert server.client.get(url).json()["retracted"] is True
    assert server.client.get(url, params={"user": "somebody else"}).json()["value"] == 1
    assert server.client.put("/v1/feedback/chatcmpl-nowhere/thumb", json={"value": 1}).status_code == 404
    for bad in (
        {"value": 2},
        {"value": 1, "source": "a bot"},
        {"value": 1, "more": 1},
        {},
        {"value": 1, "comment": "\0"},
    ):
        assert server.client.put(url, json=bad).status_code == 422


def test_a_thumb_with_a_key_delivered_late_does_not_undo_a_newer_one(server: Any) -> None:
    url = f"/v1/feedback/{server.chat().json()['id']}/thumb"
    key = {"Idempotency-Key": "thumb-1"}
    assert server.client.put(url, json={"value": 1}, headers=key).status_code == 201
    assert server.client.put(url, json={"value": -1}).status_code == 200
    assert server.client.put(url, json={"value": 1}, headers=key).headers["Idempotent-Replayed"] == "true"
    assert server.client.get(url).json()["value"] == -1
    assert server.client.put(url, json={"value": -1}, headers=key).status_code == 422


def test_a_feedback_token_speaks_for_its_asker_and_for_one_answer_only(server: Any) -> None:
    first, second = server.chat(user="ann"), server.chat(user="ann")
    token = {"X-Thumbwheel-Feedback-Token": first.headers["X-Thumbwheel-Feedback-Token"]}
    url = f"/v1/feedback/{first.json()['id']}/thumb"
    assert server.client.put(url, json={"value": 1}, headers=token).status_code == 201
    assert server.client.get(url, params={"user": "ann"}).json()["value"] == 1
    forged = {"X-Thumbwheel-Feedback-Token": token["X-Thumbwheel-Feedback-Token"][:-3] + "AAA"}
    for target, bad in ((url, forged), (f"/v1/feedback/{second.json()['id']}/thumb", token), (url, {**forged})):
        refused = server.client.put(target, json={"value": -1}, headers=bad)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "invalid_feedback_token")
    for junk in ("", "..", "1.2.3", "9" * 30 + ".x.y"):
        headers = {"X-Thumbwheel-Feedback-Token": junk}
        assert server.client.put(url, json={"value": -1}, headers=headers).status_code == 403
    assert server.client.get(url, params={"user": "ann"}).json()["value"] == 1


def test_the_log_is_read_in_pages(server: Any) -> None:
    for _ in range(3):
        server.client.put(f"/v1/feedback/{server.chat(max_tokens=1).json()['id']}/thumb", json={"value": 1})
    seen: list[int] = []
    while True:
        page = server.client.get("/v1/feedback", params={"after_seq": seen[-1] if seen else 0, "limit": 2}).json()
        seen += [event["seq"] for event in page["data"]]
        if not page["has_more"]:
            break
    assert seen == [event.seq for event in server.store.events()] and len(seen) >= 3


def test_a_page_of_another_name_is_not_answered(server: Any) -> None:
    assert server.client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 400


def test_the_key_is_made_once_and_for_its_owner_only(server: Any) -> None:
    assert (server.models.parent / "secret").stat().st_mode & 0o777 == 0o600


def test_thumbs_of_many_at_once_are_all_there(server: Any) -> None:
    before = len(server.store.events())

    def pair(n: int) -> int:
        id = server.chat(f"question {n}", max_tokens=2).json()["id"]
        return int(server.client.put(f"/v1/feedback/{id}/thumb", json={"value": 1 - 2 * (n % 2)}).status_code)

    with ThreadPoolExecutor(16) as pool:
        assert Counter(pool.map(pair, range(200))) == {201: 200}
    assert len(server.store.events()) == before + 200


def test_the_service_on_postgresql(serve: Any, two_models: Models, postgres_url: str) -> None:
    models, first, _ = two_models
    server = serve(postgres_url, models)
    try:
        assert server.client.get("/readyz").status_code == 503
        early = server.chat()
        assert (early.status_code, early.json()["error"]["code"]) == (503, "not_ready")
        server.crown(first)
        body = server.chat("你好 😀", seed=1).json()
        put = server.client.put(f"/v1/feedback/{body['id']}/thumb", json={"value": 1})
        assert put.status_code == 201 and server.store.count_opinions() == 1
    finally:
        server.close()


def test_a_new_champion_takes_over_while_answers_under_way_finish_on_the_old_one(
    serve: Any, two_models: Models, tmp_path: Path
) -> None:
    models, first, second = two_models
    server = serve(f"sqlite:///{tmp_path}/feedback.db", models)
    try:
        server.crown(first)
        stop, seen, failed = threading.Event(), Counter[str](), []

        def ask() -> None:
            while not stop.is_set():
                response = server.chat(max_tokens=60)
                if response.status_code != 200:
                    failed.append(response.text)
                seen[response.headers["X-Thumbwheel-Model"]] += 1

        askers = [threading.Thread(target=ask) for _ in range(4)]
        for asker in askers:
            asker.start()
        threading.Event().wait(0.5)
        server.crown(second)
        threading.Event().wait(0.5)
        stop.set()
        for asker in askers:
            asker.join()
        assert failed == [] and set(seen) == {first, second}
        server.store.rollback("a test")
        server.wait_for("/readyz", first)
        assert server.chat().headers["X-Thumbwheel-Model"] == first
    finally:
        server.close()


def test_a_champion_that_cannot_be_read_leaves_the_old_one_answering(
    serve: Any, two_models: Models, tmp_path: Path
) -> None:
    models, first, _ = two_models
    server = serve(f"sqlite:///{tmp_path}/feedback.db", models)
    try:
        server.crown(first)
        server.store.promote(
            model_hash="f" * 64, model_path=str(models / first), figures={}, reason="wrong", expected_champion=first
        )
        threading.Event().wait(1.5)
        assert server.chat().headers["X-Thumbwheel-Model"] == first
        assert server.client.get("/readyz").status_code == 200
    finally:
        server.close()


@pytest.mark.fault
def test_a_killed_worker_is_started_again(serve: Any, two_models: Models, tmp_path: Path) -> None:
    import psutil

    models, first, _ = two_models
    server = serve(f"sqlite:///{tmp_path}/feedback.db", models)
    try:
        server.crown(first)
        (worker,) = psutil.Process(server.process.pid).children()
        worker.kill()
        threading.Event().wait(0.2)
        server.wait_for("/readyz", first)
        assert server.chat().status_code == 200
        server.process.kill()
        (worker,) = [p for p in psutil.process_iter(["cmdline"]) if is_worker_of(p, server.process.pid)] or [None]
        assert worker is None or worker.wait(10) is None
    finally:
        server.close()


def is_worker_of(process: Any, pid: int) -> bool:
    """Whether a process is the decoder of service `pid`."""
    return process.ppid() == pid and "feedback.decoder" in (process.info["cmdline"] or [])
