"""Moderation and the audit log, over the real application on both databases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from feedback import audit, keys, moderation
from feedback.engine import DecoderEngine
from feedback.moderation import Judgement
from feedback.opinions import Refused
from feedback.service import create_app
from feedback.settings import Settings
from feedback.store import Store, Vote

Answer = Callable[..., str]


@pytest.fixture
def client(store: Store, database_url: str, tmp_path: Path) -> Iterator[TestClient]:
    """The application on the database of `store`; keys are asked for."""
    engine = DecoderEngine()
    app = create_app(database_url, tmp_path / "models", engine, secret=b"x" * 32, settings=Settings(), keys_needed=True)
    with TestClient(app, "http://localhost") as client:
        yield client


def header(store: Store, *scopes: str) -> dict[str, str]:
    """A new key's header."""
    with store.write() as connection:
        _, secret = keys.create(connection, "moderator", list(scopes), "command:test")
    return {"Authorization": f"Bearer {secret}"}


def acts(store: Store) -> list[audit.Act]:
    """The audit log without the keys."""
    with store.read() as connection:
        return [act for act in audit.entries(connection) if not act.act.startswith("key.")]


def test_quarantine_is_read_in_pages_judged_and_audited(client: TestClient, store: Store, answer: Answer) -> None:
    for n in range(5):
        event, _ = store.vote(Vote(answer(f"question {n}", "<b>hi</b>"), "someone", value=1, comment="why"))
        store.moderate(event.feedback_id, "quarantined", "outlier")
    store.vote(Vote(answer(), "another", value=1))
    moderator = header(store, "moderate")
    seen: list[dict[str, Any]] = []
    after = 0
    while True:
        page = client.get(f"/v1/moderation?state=quarantined&limit=2&after_id={after}", headers=moderator).json()
        seen += page["data"]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert [entry["messages"][0]["content"] for entry in seen] == [f"question {n}" for n in range(5)]
    assert {entry["reason"] for entry in seen} == {"outlier"} and seen[0]["response"] == "<b>hi</b>"
    assert store.count_opinions() == 1

    url = f"/v1/moderation/{seen[0]['feedback_id']}"
    judged = client.post(url, json={"state": "accepted", "reason": "it is fine"}, headers=moderator)
    assert judged.status_code == 200 and judged.json()["moderation"] == "accepted"
    again = client.post(url, json={"state": "accepted", "reason": "it is fine"}, headers=moderator)
    assert again.headers["Idempotent-Replayed"] == "true" and again.json()["seq"] == judged.json()["seq"]
    assert store.count_opinions() == 2 and store.events()[-1].op == "moderate"
    (act,) = acts(store)
    assert (act.actor, act.act, act.target) == ("key:1", "feedback.moderate", f"feedback:{seen[0]['feedback_id']}")
    assert act.before == {"state": "quarantined", "reason": "outlier"}
    assert act.after == {"state": "accepted", "reason": "it is fine"}

    admin = header(store, "admin")
    log = client.get("/v1/audit", params={"target": act.target}, headers=admin).json()
    assert [entry["act"] for entry in log["data"]] == ["feedback.moderate"] and not log["has_more"]
    first = client.get("/v1/audit?limit=1", headers=admin).json()
    assert first["has_more"] and first["data"][0]["act"] == "key.create"
    rest = client.get(f"/v1/audit?after_id={first['last_id']}", headers=admin).json()["data"]
    assert [entry["act"] for entry in rest] == ["feedback.moderate", "key.create"]
    assert client.get("/v1/audit", headers=moderator).status_code == 403


def test_what_cannot_be_judged_is_refused_and_not_audited(client: TestClient, store: Store, answer: Answer) -> None:
    event, _ = store.vote(Vote(answer(), "someone", value=1))
    moderator = header(store, "moderate")
    for path, body, status in (
        ("/v1/moderation/99", {"state": "accepted"}, 404),
        (f"/v1/moderation/{event.feedback_id}", {"state": "rejected", "reason": " "}, 422),
        (f"/v1/moderation/{event.feedback_id}", {"state": "erased", "reason": "x"}, 422),
        (f"/v1/moderation/{event.feedback_id}", {"state": "rejected", "reason": "\0"}, 422),
        ("/v1/moderation/0", {"state": "accepted"}, 422),
    ):
        assert client.post(path, json=body, headers=moderator).status_code == status, (path, body)
    assert client.get("/v1/moderation?state=erased", headers=moderator).status_code == 422
    assert acts(store) == [] and len(store.events()) == 1


def test_a_judgement_and_its_audit_are_one_transaction(store: Store, answer: Answer) -> None:
    event, _ = store.vote(Vote(answer(), "someone", value=1))
    judgement = Judgement(state="rejected", reason="spam")
    with pytest.raises(RuntimeError), store.write() as connection:
        moderation.judge(connection, event.feedback_id, judgement, "key:1")
        raise RuntimeError("the machine stumbles")
    assert acts(store) == [] and store.count_opinions() == 1
    with store.write() as connection:
        assert moderation.judge(connection, event.feedback_id, judgement, "key:1")[1] > 0
        with pytest.raises(Refused):
            moderation.judge(connection, 99, judgement, "key:1")
    assert len(acts(store)) == 1 and store.count_opinions() == 0
