"""/v1/tasks over HTTP, on SQLite and on PostgreSQL: made, handed out, ranked, skipped; nobody learns which ones are gold."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from parrot import ParrotServer

from feedback import keys
from feedback.engine import DecoderEngine
from feedback.guideline import guideline
from feedback.remote import RemoteEngine
from feedback.service import create_app
from feedback.settings import Settings
from feedback.store import Store

Answer = Callable[..., str]


@pytest.fixture
def gold_api(store: Store, database_url: str, tmp_path: Path) -> Iterator[TestClient]:
    """The service with keys, which hands out nothing but gold."""
    settings = Settings(gold_rate=1.0, require_keys=True)
    app = create_app(
        database_url, tmp_path / "models", DecoderEngine(), secret=b"a key for the tests", settings=settings
    )
    with TestClient(app, base_url="http://localhost") as client:
        yield client


@pytest.fixture
def parrot_api(store: Store, database_url: str, tmp_path: Path) -> Iterator[TestClient]:
    """The service before a parrot."""
    upstream = ParrotServer()
    settings = Settings(engine_url=upstream.url, gold_rate=0)
    app = create_app(
        database_url, tmp_path / "models", RemoteEngine(settings), secret=b"a key for the tests", settings=settings
    )
    with TestClient(app, base_url="http://localhost") as client:
        for _ in range(200):
            if client.get("/readyz").status_code == 200:
                break
            asyncio.run(asyncio.sleep(0.02))
        yield client
    upstream.close()


def key_of(store: Store, *scopes: str, name: str = "raters") -> dict[str, str]:
    """The header of a new key."""
    with store.write() as connection:
        _, secret = keys.create(connection, name, list(scopes), "command:test")
    return {"Authorization": f"Bearer {secret}"}


def test_a_task_is_made_handed_out_ranked_and_becomes_an_opinion(api: TestClient, store: Store, answer: Answer) -> None:
    ids = [answer(response=f"answer {n}") for n in range(4)]
    made = api.post("/v1/tasks", json={"completion_ids": ids, "raters": 2})
    assert made.status_code == 201 and made.json()["completion_ids"] == ids and made.json()["origin"] == "given"
    again = api.post("/v1/tasks", json={"completion_ids": ids, "raters": 2})
    assert again.status_code == 200 and again.json() == made.json() and again.headers["Idempotent-Replayed"] == "true"
    task = api.get("/v1/tasks/next?user=ann").json()["task"]
    assert task["id"] == made.json()["id"] and task["messages"] == [{"role": "user", "content": "hello"}]
    assert set(task) == {"id", "messages", "answers", "lease_until"}
    texts = {entry["number"]: entry["text"] for entry in task["answers"]}
    assert sorted(texts) == [1, 2, 3, 4] and sorted(texts.values()) == [f"answer {n}" for n in range(4)]
    said = {"ranking": [[3], [1, 4], [2]], "comment": "so", "reasons": ["correct"], "channel": "label", "user": "ann"}
    path = f"/v1/tasks/{task['id']}/ranking"
    first = api.post(path, json=said, headers={"Idempotency-Key": "k1"})
    assert first.status_code == 201 and first.json()["ranking"] == said["ranking"] and first.json()["revision"] == 1
    assert not set(ids) & set(re.findall(r"[\w-]+", first.text))
    second = api.post(path, json=said, headers={"Idempotency-Key": "k1"})
    assert second.status_code == 200 and second.headers["Idempotent-Replayed"] == "true"
    reused = api.post(path, json={**said, "comment": "else"}, headers={"Idempotency-Key": "k1"})
    assert reused.status_code == 422 and reused.json()["error"]["code"] == "idempotency_key_reused"
    changed = api.post(path, json={**said, "ranking": [[1], [2], [3], [4]]})
    assert changed.status_code == 200 and changed.json()["revision"] == 2
    # the same opinion as POST /v1/rankings makes, with the places in which the answers were shown
    named = {texts[number]: number for number in texts}
    shown = sorted(ids, key=lambda id: named[store.completion(id).response])  # type: ignore[union-attr]
    query = "&".join(f"completion_id={id}" for id in ids)
    kept = api.get(f"/v1/rankings?{query}&user=ann").json()
    assert [(place["completion_id"], place["rank"], place["position"]) for place in kept["ranked"]] == [
        (id, n + 1, n) for n, id in enumerate(shown)
    ]
    assert kept["kind"] == "ranking" and kept["comment"] == "so" and store.count_opinions() == 1
    same = {"completion_ids": shown, "ranking": [[id] for id in shown], "comment": "so", "reasons": ["correct"]}
    assert api.post("/v1/rankings", json={**same, "channel": "label", "user": "ann"}).status_code == 200
    assert api.get("/v1/tasks/next?user=ann").json() == {"task": None}
    report = api.get("/v1/tasks?user=ann").json()
    assert report["yours"] == {"ranked": 1, "skipped": 0} and report["tasks"] == {"open": 1, "closed": 0, "gold": 0}


def test_skipped_tasks_go_to_others_and_wrong_rankings_are_told_why(api: TestClient, answer: Answer) -> None:
    api.post("/v1/tasks", json={"completion_ids": [answer(response=text) for text in "ab"]})
    task = api.get("/v1/tasks/next?user=ann").json()["task"]
    path = f"/v1/tasks/{task['id']}"
    for ranking in ([[1]], [[1], [1]], [[1, 2, 3]], [[0], [1]]):
        wrong = api.post(f"{path}/ranking", json={"ranking": ranking, "user": "ann"})
        assert wrong.status_code == 422 and "1 to 2, once" in wrong.json()["error"]["message"]
    for ranking in ([], [[]], "12", [[1.5], [2]]):
        assert api.post(f"{path}/ranking", json={"ranking": ranking, "user": "ann"}).status_code == 422
    assert api.post(f"{path}/ranking", json={"ranking": [[1], [2]], "user": "bob"}).status_code == 404
    assert api.post(f"{path}/skip", json={"reason": "unsafe", "user": "bob"}).status_code == 404
    skipped = api.post(f"{path}/skip", json={"reason": "unsafe", "user": "ann"})
    assert skipped.json() == {"id": task["id"], "state": "skipped"}
    assert api.get("/v1/tasks/next?user=ann").json() == {"task": None}
    assert api.get("/v1/tasks/next?user=bob").json()["task"]["id"] == task["id"]
    mine = api.get("/v1/subjects/me?user=ann").json()
    assert [row["state"] for row in mine["assignments"]] == ["skipped"] and mine["assignments"][0]["reason"] == "unsafe"


def test_gold_looks_like_any_other_task_and_only_admins_hear_of_it(
    gold_api: TestClient, store: Store, answer: Answer
) -> None:
    admin, rater = key_of(store, "admin"), key_of(store, "label", "rate")
    ids = [answer("gold", text, id=f"import-{text}") for text in "abc"]
    made = gold_api.post("/v1/tasks", headers=admin, json={"completion_ids": ids, "ranking": [[ids[1]], ids[::2]]})
    assert made.json()["gold"] and made.json()["ranking"] == [[ids[1]], [ids[0], ids[2]]]
    plain = gold_api.post("/v1/tasks", headers=admin, json={"completion_ids": ids[:2]}).json()
    given = gold_api.get("/v1/tasks/next", headers=rater)
    assert given.json()["task"]["id"] == made.json()["id"] and "import" not in given.text and "gold" in given.text
    assert given.text.count("gold") == 1  # the prompt itself
    path = f"/v1/tasks/{made.json()['id']}"
    done = gold_api.post(f"{path}/ranking", headers=rater, json={"ranking": [[1], [2], [3]]})
    assert done.status_code == 201 and "gold" not in done.text and "import" not in done.text
    report = gold_api.get("/v1/tasks", headers=rater).json()
    assert set(report) == {"object", "yours", "everybody"}
    assert gold_api.get("/v1/tasks", headers=admin).status_code == 403  # admin alone is no rater
    both = key_of(store, "admin", "label", name="lead")
    listed = gold_api.get("/v1/tasks?limit=1", headers=both).json()
    assert [task["id"] for task in listed["data"]] == [plain["id"]] and listed["has_more"]
    rest = gold_api.get(f"/v1/tasks?before={listed['last_id']}", headers=both).json()
    assert [task["id"] for task in rest["data"]] == [made.json()["id"]] and not rest["has_more"]
    assert listed["tasks"] == {"open": 1, "closed": 0, "gold": 1}
    right = {entry["text"]: entry["number"] for entry in given.json()["task"]["answers"]}["b"]  # ranked by number
    assert [(row["tasks"], row["right"], row["pairs"]) for row in listed["raters"]] == [(1, 3 - right, 2)]


def test_an_expert_makes_gold_of_their_own_ranking(api: TestClient, store: Store, answer: Answer) -> None:
    api.post("/v1/tasks", json={"completion_ids": [answer(response=text) for text in "ab"]})
    task = api.get("/v1/tasks/next?user=ann").json()["task"]
    path = f"/v1/tasks/{task['id']}"
    assert api.post(f"{path}/gold?user=ann").json()["error"]["code"] == "no_expert_ranking"
    api.post(f"{path}/ranking", json={"ranking": [[2], [1]], "source": "human_expert", "user": "ann"})
    assert api.post(f"{path}/gold?user=ann").json() == {"id": task["id"], "gold": True}
    assert api.post(f"{path}/gold?user=ann").headers["Idempotent-Replayed"] == "true"
    assert [act["act"] for act in api.get("/v1/audit").json()["data"]] == ["task.gold"]


def test_answers_are_asked_of_the_model_and_belong_to_who_asked(parrot_api: TestClient, store: Store) -> None:
    question = [{"role": "user", "content": "answer N times: my cat"}]
    asked = parrot_api.post("/v1/chat/completions", json={"messages": question, "user": "ann"})
    original = asked.json()["id"]
    made = parrot_api.post("/v1/tasks", json={"of": original, "answers": 4, "raters": 3})
    assert made.status_code == 201 and made.json()["origin"] == "traffic" and len(made.json()["completion_ids"]) == 4
    first, *_ = rows = [store.completion(id) for id in made.json()["completion_ids"]]
    theirs = store.completion(original)
    assert first is not None and theirs is not None and first.sampling["temperature"] == 1.0
    assert all(row and row.subject == theirs.subject and row.parent == original for row in rows)
    assert len({row.response for row in rows if row}) == 4
    assert parrot_api.post("/v1/tasks", json={"of": original, "answers": 4, "raters": 3}).json() == made.json()
    given = parrot_api.post("/v1/tasks", json={"messages": question, "answers": 3})
    assert given.status_code == 201 and given.json()["origin"] == "asked"
    # of one who says the same thing every time there is nothing to rank
    alike = parrot_api.post("/v1/tasks", json={"messages": [{"role": "user", "content": "echo"}], "answers": 3})
    assert alike.status_code == 409 and alike.json()["error"]["code"] == "answers_alike"
    assert parrot_api.post("/v1/tasks", json={"of": "nowhere", "answers": 3}).status_code == 404
    parrot_api.delete("/v1/subjects/me?user=ann")
    first = store.completion(made.json()["completion_ids"][0])
    assert first is not None and first.status == "erased" and first.response == ""
    held = parrot_api.get("/v1/tasks/next?user=bob").json()["task"]
    assert held["id"] == given.json()["id"]  # the one of ann's words is closed


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"completion_ids": ["a"]}, "2 to 9 answers"),
        ({"completion_ids": ["a", "a"]}, "compared with itself"),
        ({"answers": 4}, "give the prompt"),
        ({"answers": 4, "of": "a", "messages": [{"role": "user", "content": "x"}]}, "give the prompt"),
        ({"completion_ids": ["a", "b"], "of": "a"}, "only where answers are asked for"),
        ({"completion_ids": ["a", "b"], "ranking": [["a"], ["c"]]}, "each of completion_ids once"),
        ({"completion_ids": ["a", "b"], "answers": 1, "of": "a", "ranking": [["a"], ["b"]]}, "not there yet"),
    ],
)
def test_tasks_that_make_no_sense_are_told_why(tmp_path: Path, body: dict[str, Any], message: str) -> None:
    from pydantic import ValidationError

    from feedback.schemas import NewTask

    with pytest.raises(ValidationError, match=message):
        NewTask.model_validate(body)


def test_a_teams_guideline_is_shown_without_any_html_of_theirs(tmp_path: Path) -> None:
    file = tmp_path / "ours.md"
    file.write_text(
        "# Ours\n\n<script>alert(1)</script> **bold** <b onclick=x>\n\n[good](https://example.org/a?b=1&c=2) "
        "[bad](javascript:alert(1)) [data](data:text/html,x) ![pixel](https://evil.example/p.png)\n\n"
        "| a | b |\n|--|--|\n| 1 | 2 |\n",
        encoding="utf-8",
    )
    html = guideline(file, "en")
    assert "<h1>Ours</h1>" in html and "<strong>bold</strong>" in html and "<td>1</td>" in html
    assert re.findall(r'href="([^"]*)"', html) == ["https://example.org/a?b=1&amp;c=2", "https://evil.example/p.png"]
    assert 'rel="noopener noreferrer nofollow"' in html
    assert set(re.findall(r"<(\w+)", html)) <= {"h1", "p", "strong", "a", "table", "thead", "tbody", "tr", "th", "td"}
    file.write_text("changed", encoding="utf-8")
    assert guideline(file, "zh") == "<p>changed</p>\n"
    assert "Longer is not better" in guideline(None, "en") and "更长不等于更好" in guideline(None, "zh")
    with pytest.raises(ValueError, match=r"THUMBWHEEL_GUIDELINE: .*nowhere\.md cannot be read"):
        guideline(tmp_path / "nowhere.md", "en")
