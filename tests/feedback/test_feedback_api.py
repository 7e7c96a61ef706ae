"""Opinions of every kind over HTTP, on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from feedback.store import Store

Answer = Callable[..., str]
SAID: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "thumb": ({"value": 1}, {"value": -1}),
    "edit": ({"correction": "Good morning!"}, {"correction": "早上好 😀"}),
    "comment": ({"comment": "too short"}, {"comment": "<script>alert(1)</script>"}),
    "expert": ({"value": 1, "reasons": ["correct"]}, {"value": -1, "correction": "It is 42."}),
}


@pytest.mark.parametrize("kind", SAID)
def test_saying_changing_and_taking_back(api: TestClient, answer: Answer, kind: str) -> None:
    url = f"/v1/feedback/{answer()}/{kind}"
    first, second = SAID[kind]
    assert api.get(url).status_code == api.delete(url).status_code == 404
    created = api.put(url, json=first)
    assert created.status_code == 201 and created.json()["kind"] == kind
    repeated = api.put(url, json=first)
    assert (repeated.status_code, repeated.headers["Idempotent-Replayed"]) == (200, "true")
    revised = api.put(url, json=second)
    assert (revised.status_code, revised.json()["revision"]) == (200, 2)
    assert {name: api.get(url).json()[name] for name in second} == second
    assert api.put(url, json=second, params={}).headers["Idempotent-Replayed"] == "true"
    assert api.delete(url).json()["retracted"] is True
    assert api.delete(url).headers["Idempotent-Replayed"] == "true"
    assert api.get(url).json()["retracted"] is True
    assert api.put(url, json=second).json()["retracted"] is False


@pytest.mark.parametrize("kind", SAID)
def test_a_key_makes_one_opinion_through_put_and_through_post(api: TestClient, answer: Answer, kind: str) -> None:
    id, (first, second) = answer(), SAID[kind]
    key = {"Idempotency-Key": f"put-{kind}"}
    assert api.put(f"/v1/feedback/{id}/{kind}", json=first, headers=key).status_code == 201
    assert api.put(f"/v1/feedback/{id}/{kind}", json=second).status_code == 200
    late = api.put(f"/v1/feedback/{id}/{kind}", json=first, headers=key)
    assert (late.status_code, late.headers["Idempotent-Replayed"]) == (200, "true")
    other = api.put(f"/v1/feedback/{id}/{kind}", json=second, headers=key)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    body = {"kind": kind, "completion_id": answer(), **first}
    key = {"Idempotency-Key": f"post-{kind}"}
    posted = api.post("/v1/feedback", json=body, headers=key)
    assert posted.status_code == 201
    again = api.post("/v1/feedback", json=body, headers=key)
    assert (again.status_code, again.json()) == (200, posted.json())
    assert api.post("/v1/feedback", json={**body, **second}, headers=key).status_code == 422
    assert api.post("/v1/feedback", json={**body, **second}).status_code == 200  # without a key: the newest counts
    assert api.get(f"/v1/feedback/{body['completion_id']}/{kind}").json()["revision"] == 2


def test_comparisons_over_http(api: TestClient, answer: Answer) -> None:
    a, b = sorted(answer(response=text) for text in ("one", "two"))
    body = {"completion_ids": [b, a], "chosen": b, "strength": 2, "channel": "page", "reasons": ["kind"]}
    created = api.post("/v1/comparisons", json=body)
    assert created.status_code == 201, created.text
    assert (
        created.json() | {"completion_id": a, "other": b, "value": -1, "position": 1, "strength": 2.0} == created.json()
    )
    assert api.post("/v1/comparisons", json=body).headers["Idempotent-Replayed"] == "true"
    tie = api.post("/v1/comparisons", json={"completion_ids": [a, b], "chosen": None})
    assert (tie.status_code, tie.json()["value"], tie.json()["revision"]) == (200, 0, 2)
    named = {"completion_id": [b, a]}
    assert api.get("/v1/comparisons", params=named).json()["value"] == 0
    assert api.get("/v1/comparisons", params={**named, "user": "somebody else"}).status_code == 404
    assert api.delete("/v1/comparisons", params={"completion_id": [a, b]}).json()["retracted"] is True
    for bad in (
        {"completion_ids": [a, a], "chosen": a},
        {"completion_ids": [a], "chosen": a},
        {"completion_ids": [a, b], "chosen": "chatcmpl-x"},
        {"completion_ids": [a, b]},
        {"completion_ids": [a, b], "chosen": a, "strength": 0},
    ):
        assert api.post("/v1/comparisons", json=bad).status_code == 422
    assert api.delete("/v1/comparisons", params={"completion_id": [a, a]}).status_code == 422
    other = api.post("/v1/comparisons", json={"completion_ids": [a, answer("else")], "chosen": a})
    assert (other.status_code, other.json()["error"]["code"]) == (422, "prompts_differ")


def test_rankings_over_http(api: TestClient, answer: Answer) -> None:
    ids = [answer(response=str(n)) for n in range(9)]
    key = {"Idempotency-Key": "ranking"}
    body = {"completion_ids": ids, "ranking": [ids[3:5], ids[:3], ids[5:]]}
    created = api.post("/v1/rankings", json=body, headers=key)
    assert created.status_code == 201
    assert [place["rank"] for place in created.json()["ranked"]] == [1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert api.post("/v1/rankings", json=body, headers=key).headers["Idempotent-Replayed"] == "true"
    other = {**body, "ranking": [ids]}
    assert api.post("/v1/rankings", json=other, headers=key).status_code == 422
    assert api.post("/v1/rankings", json=other).json()["revision"] == 2
    named = {"completion_id": ids[::-1]}
    assert {place["rank"] for place in api.get("/v1/rankings", params=named).json()["ranked"]} == {1}
    assert api.delete("/v1/rankings", params=named).json()["retracted"] is True
    for bad in (
        {"completion_ids": ids, "ranking": [ids[:8]]},
        {"completion_ids": ids, "ranking": [ids, []]},
        {"completion_ids": [*ids, "chatcmpl-x"], "ranking": [[*ids, "chatcmpl-x"]]},
        {"completion_ids": [ids[0]] * 2, "ranking": [[ids[0]], [ids[0]]]},
    ):
        assert api.post("/v1/rankings", json=bad).status_code == 422


def test_what_cannot_be_stored_is_refused_before_the_database_sees_it(api: TestClient, answer: Answer) -> None:
    """A channel of 17 characters was let through: PostgreSQL's column holds 16, and the answer was a 500."""
    url = f"/v1/feedback/{answer()}"
    for kind, bad in (
        ("thumb", {"value": 1, "channel": "a" * 17}),
        ("thumb", {"value": 1, "client_time": "2026-01-01T00:00:00"}),
        ("thumb", {"value": 1, "client_time": "0001-01-01T00:00:00+14:00"}),  # overflowed on its way to UTC
        ("edit", {"correction": ""}),
        ("edit", {"correction": "a\0b"}),
        ("edit", {"value": 1}),
        ("comment", {}),
        ("expert", {"value": 1, "source": "human_user"}),
        ("shout", {"value": 1}),
    ):
        assert api.put(f"{url}/{kind}", json=bad).status_code in (404, 405, 422), (kind, bad)
    timed = {"value": 1, "channel": "a" * 16, "client_time": "2026-01-01T00:00:00+08:00"}
    assert api.put(f"{url}/thumb", json=timed).status_code == 201


def test_the_log_tells_every_kind_in_order(api: TestClient, answer: Answer, store: Store) -> None:
    a, b = answer(response="one"), answer(response="two")
    api.put(f"/v1/feedback/{a}/edit", json={"correction": "three", "user": "ann"})
    api.post("/v1/comparisons", json={"completion_ids": [a, b], "chosen": b})
    api.post("/v1/rankings", json={"completion_ids": [a, b], "ranking": [[a], [b]]})
    page = api.get("/v1/feedback", params={"after_seq": 0, "limit": 2}).json()
    assert [event["kind"] for event in page["data"]] == ["edit", "comparison"] and page["has_more"]
    assert page["data"][0]["correction"] == "three"
    rest = api.get("/v1/feedback", params={"after_seq": page["last_seq"]}).json()
    assert [event["kind"] for event in rest["data"]] == ["ranking"] and not rest["has_more"]


def test_the_openapi_schema_names_every_route(api: TestClient) -> None:
    paths = api.get("/openapi.json").json()["paths"]
    assert {"put", "get", "delete"} <= {m for p in paths if p.startswith("/v1/feedback/") for m in paths[p]}
    assert set(paths["/v1/comparisons"]) == set(paths["/v1/rankings"]) == {"post", "get", "delete"}


def test_whoever_compares_with_tokens_needs_one_for_each_answer(api: TestClient, answer: Answer) -> None:
    identity = api.app.state.service.identity
    a, b, c = (answer(response=text) for text in ("one", "two", "three"))
    ann, bob = identity.subject("cookie", "ann"), identity.subject("cookie", "bob")
    body = {"completion_ids": [a, b], "chosen": a}

    def send(*tokens: str) -> int:
        header = {"X-Thumbwheel-Feedback-Token": ", ".join(tokens)}
        return int(api.post("/v1/comparisons", json=body, headers=header).status_code)

    of = {id: identity.token(id, ann) for id in (a, b, c)}
    for few in ([of[a]], [of[a], of[a]], [of[a], of[c]], [of[a], identity.token(b, bob)], ["x"], [of[a], of[b] + "x"]):
        assert send(*few) == 403, few
    assert send(of[b], of[a]) == 201
    assert api.app.state.service.store.events()[0].subject == ann
