"""One's own data: all of it comes out, and after an erasure no byte of it is left in any table or file of the database."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from feedback import completions
from feedback.comparisons import compared, ranked
from feedback.opinions import Refused, Vote, sha256
from feedback.snapshot import write_snapshot
from feedback.store import Store
from feedback.tables import Table

Answer = Callable[..., str]
WORD = "xyzzySECRETplugh"  # in everything that the person ever said


def everything(store: Store, folder: Path) -> str:
    """All text of all tables; on SQLite also every byte of its files."""
    with store.read() as connection:
        rows = [list(connection.execute(sa.select(table))) for table in Table.metadata.sorted_tables]
    found = repr(rows)
    if store.dialect == "sqlite":
        files = [path for path in folder.iterdir() if path.name.startswith("feedback.db")]
        assert files
        found += "".join(path.read_bytes().decode("latin-1") for path in files)
    return found


def asked(store: Store, answer: Answer, subject: str, response: str, key: str | None = None) -> str:
    """An answer to a question of `subject`'s that has the word in it."""
    made = store.completion(answer(f"I am {WORD}", response))
    assert made is not None
    id = made.id + "x"
    change: dict[str, Any] = {
        "id": id,
        "subject": subject,
        "idempotency_key": key,
        "conversation": WORD,
        "locale": "en",
    }
    change["request_sha256"] = sha256(WORD)
    with store.write() as connection:
        connection.exec_driver_sql(f"DELETE FROM completion WHERE id = '{made.id}'")
        completions.insert(connection, replace(made, **change, sampling={"stop": [WORD]}))
    return id


@pytest.fixture
def ann(store: Store, answer: Answer) -> dict[str, str]:
    """Ann asks and says everything that one can say; Bob compares answers of hers with each other, and asks something too."""
    mine = [asked(store, answer, "ann", f"{WORD} {n}", key=WORD + str(n)) for n in range(3)]
    other = answer("what else?", "nothing")
    for n, id in enumerate(mine):
        store.vote(Vote(id, "ann", value=1, comment=WORD, idempotency_key=WORD + str(n), request_sha256=sha256(WORD)))
        store.vote(Vote(id, "ann", value=-1, comment=f"no, {WORD}"))
        store.vote(Vote(id, "ann", kind="edit", value=1, correction=f"say {WORD}"))
    store.vote(Vote(other, "ann", kind="comment", comment=WORD))
    store.vote(Vote(other, "ann", value=1))
    store.vote(Vote(subject="ann", **compared(mine[:2], mine[0])))
    store.vote(Vote(subject="bob", **compared(mine[1:], mine[2])))
    store.vote(Vote(subject="bob", comment=WORD, **ranked(mine, [mine[:1], mine[1:]])))
    store.vote(Vote(other, "bob", value=-1))
    return {"mine": mine[0], "other": other}


def test_nothing_of_a_person_is_left_and_the_counts_stay_true(
    store: Store, ann: dict[str, str], answer: Answer, tmp_path: Path
) -> None:
    batch = store.open_batch()
    assert batch is not None and batch.accepted == 11
    store.consume_batch(batch.id, "run-1")
    store.vote(Vote(answer("later"), "bob", value=1))
    later = store.open_batch()
    assert later is not None
    store.consume_batch(later.id, "run-2")
    manifest, before = store.manifest(), store.events()
    assert WORD in everything(store, tmp_path)
    done = store.erase("ann")
    assert done is not None and (done.completions, done.opinions) == (3, 11)
    assert (done.batches, done.mlflow_runs) == ([1], ["run-1", "run-2"])  # a later run learned from the first batch too
    left = everything(store, tmp_path)
    assert WORD not in left and sha256(WORD) not in left and "'ann'" not in left
    assert str(list(f"I am {WORD}".encode()))[1:-1] not in left  # nor as token ids

    after = store.events()
    assert [event.seq for event in after[: len(before)]] == [event.seq for event in before]
    assert [event.op for event in after[len(before) :]] == ["erase"] * 11
    assert {event.subject for event in after if event.subject not in ("bob",)} == {"erased-1"}
    first, second = store.manifest()["batches"]
    assert first == {**manifest["batches"][0], "erased": 10} and second == manifest["batches"][1]
    assert store.count_opinions() == 2  # Bob's thumbs on other answers
    with pytest.raises(ValueError, match="opinions of batch 1 were erased on demand"):
        list(store.opinions(manifest))
    counts = write_snapshot(store, store.manifest(), tmp_path / "snapshot", 0)
    assert (counts["train"], counts["conversations"]) == (2, 0)
    for path in (tmp_path / "snapshot").iterdir():
        assert WORD not in path.read_text()

    with pytest.raises(Refused) as refused:
        store.vote(Vote(ann["mine"], "bob", value=1))
    assert (refused.value.status, refused.value.code) == (404, "completion_not_found")
    assert store.erase("ann") is None  # a repetition
    assert store.vote(Vote(ann["other"], "ann", value=1))[1] == "created"  # they may come back
    assert [e.id for e in store.unflagged_erasures()] == [1]
    store.erasure_flagged(1)
    assert store.unflagged_erasures() == []


def test_no_byte_is_left_among_many_people_in_a_file_that_was_written_for_long(
    tmp_path: Path, answer_into: Callable[[Store], Answer]
) -> None:
    """Rows grow, move and split pages between those of others; SQLite leaves old copies unless it is told not to."""
    store = Store(f"sqlite:///{tmp_path}/feedback.db")
    store.migrate()
    answer = answer_into(store)
    for n in range(150):
        id = asked(store, answer, f"ann{n % 3}" if n % 5 == 0 else "bob", f"{WORD}{n} " * (1 + n % 40), key=f"k{n}")
        subject = "ann0" if n % 2 else "bob"
        for size in (1, 30):
            store.vote(Vote(id, subject, kind="edit", value=1, correction=f"{WORD} ann " * size))
    for subject in ("ann0", "ann1", "ann2", "bob"):
        assert store.erase(subject) is not None
    assert WORD not in everything(store, tmp_path)
    store.close()


def test_an_answer_under_way_stays_erased_when_it_ends(store: Store, answer: Answer) -> None:
    id = answer(status="streaming")
    store.erase("asker")
    with store.write() as connection:
        completions.finish(connection, id, {"status": "complete", "response": WORD})
    row = store.completion(id)
    assert row is not None and (row.status, row.response) == ("erased", "")


def test_ones_own_data_over_http(api: TestClient, store: Store, answer: Answer) -> None:
    id = answer()
    api.put(f"/v1/feedback/{id}/edit", json={"correction": "早上好", "user": "ann"})
    api.put(f"/v1/feedback/{id}/thumb", json={"value": 1, "user": "bob"})
    mine = api.get("/v1/subjects/me", params={"user": "ann"}).json()
    assert [row["correction"] for row in mine["feedback"]] == ["早上好"] and len(mine["events"]) == 1
    assert mine["completions"] == [] and mine["subject"] == mine["feedback"][0]["subject"]
    assert json.loads(api.get("/v1/subjects/me", params={"user": "nobody"}).text)["feedback"] == []
    assert api.delete("/v1/subjects/me").json()["error"]["code"] == "user_required"
    gone = api.delete("/v1/subjects/me", params={"user": "ann"})
    assert (gone.status_code, gone.json()["opinions"]) == (200, 1)
    assert api.delete("/v1/subjects/me", params={"user": "ann"}).json()["opinions"] == 0
    assert "早上好" not in api.get("/v1/feedback").text
    assert [event["op"] for event in api.get("/v1/feedback").json()["data"]] == ["create", "create", "erase"]
    assert api.get(f"/v1/feedback/{id}/thumb", params={"user": "bob"}).json()["value"] == 1


def test_a_file_of_the_first_version_is_cleaned_when_it_is_migrated(tmp_path: Path, answer_into: Any) -> None:
    store = Store(f"sqlite:///{tmp_path}/feedback.db")
    store.migrate()
    answer_into(store)(WORD, WORD * 20)
    store.migrate("0001")
    with store.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA secure_delete = OFF")
        connection.exec_driver_sql("DELETE FROM completion")
        connection.commit()
    store._alone("PRAGMA wal_checkpoint(TRUNCATE)")
    assert WORD.encode() in (tmp_path / "feedback.db").read_bytes()
    store.migrate()
    store.close()
    assert WORD.encode() not in (tmp_path / "feedback.db").read_bytes()
