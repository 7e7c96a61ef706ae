"""Batches: each opinion in exactly one, exclusions by name, hashes of content, voters against open_batch."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from feedback.opinions import Vote
from feedback.snapshot import write_snapshot
from feedback.store import Store
from feedback.tables import BatchItemRow, EventRow

Answer = Callable[..., str]
item = BatchItemRow.__table__


def items(store: Store, batch_id: int) -> dict[int, str]:
    """feedback id -> reason, "" when accepted."""
    with store.read() as connection:
        rows = connection.execute(sa.select(item).where(item.c.batch_id == batch_id))
        return {row.feedback_id: row.reason for row in rows}


def test_a_batch_takes_what_stands_and_names_what_it_leaves_out(store: Store, answer: Answer) -> None:
    votes = [Vote(answer(), "someone", value=value) for value in (1, -1, 1, 1, 0)]
    ids = [store.vote(vote)[0].feedback_id for vote in votes]
    store.vote(Vote(votes[2].completion_id, "someone", retracted=True))
    store.moderate(ids[3], "quarantined", "a swarm")
    store.vote(Vote(answer(status="aborted"), "someone", value=1))
    assert store.count_opinions() == 2 and store.pending().count == 2
    assert store.open_batch(minimum=3) is None and store.pending().count == 2
    batch = store.open_batch(minimum=2)
    assert batch is not None
    assert (batch.first_seq, batch.last_seq, batch.accepted) == (1, 8, 2)
    assert batch.excluded == {"neutral": 1, "quarantined": 1, "retracted": 1, "unfinished": 1}
    reasons = items(store, batch.id)
    assert [reasons[id] for id in ids] == ["", "", "retracted", "quarantined", "neutral"]
    assert store.pending() == type(store.pending())(0, None)
    assert store.open_batch() is None
    assert store.count_opinions() == 2 and store.count_opinions(pending_only=True) == 0


def test_an_opinion_belongs_to_its_first_batch_and_a_revision_to_a_later_one(
    store: Store, answer: Answer, tmp_path: Path
) -> None:
    first, second = answer("one"), answer("two")
    opinion = store.vote(Vote(first, "someone", value=1))[0].feedback_id
    assert store.open_batch() is not None
    early = store.manifest()
    store.vote(Vote(first, "someone", value=-1))
    store.vote(Vote(second, "someone", value=1))
    batch = store.open_batch()
    assert batch is not None
    assert (batch.accepted, batch.excluded) == (1, {"revised": 1})
    late = store.manifest()
    assert [o.value for o in store.opinions(early)] == [1]
    assert [(o.feedback_id == opinion, o.value, o.batch_id) for o in store.opinions(late)] == [
        (True, -1, 1),
        (False, 1, 2),
    ]
    store.vote(Vote(first, "someone", retracted=True))  # after both manifests: changes neither
    assert [o.value for o in store.opinions(late)] == [-1, 1]
    store.vote(Vote(answer("three"), "someone", value=1))
    assert store.open_batch() is not None
    assert [o.value for o in store.opinions(store.manifest())] == [1, 1]


def test_what_was_left_out_may_come_in_later(store: Store, answer: Answer) -> None:
    ids = [answer() for _ in range(3)]
    suspect = store.vote(Vote(ids[0], "someone", value=1))[0].feedback_id
    store.moderate(suspect, "pending", "new rater")
    store.vote(Vote(ids[1], "someone", value=1))
    batch = store.open_batch()
    assert batch is not None and batch.excluded == {"pending": 1}
    store.moderate(suspect, "accepted", "looked at")
    assert store.pending().count == 1
    batch = store.open_batch()
    assert batch is not None and batch.accepted == 1 and items(store, batch.id) == {suspect: ""}


def test_a_batch_is_consumed_once(store: Store, answer: Answer) -> None:
    for _ in range(2):
        store.vote(Vote(answer(), "someone", value=1))
        assert store.open_batch() is not None
    assert [batch.id for batch in store.open_batches()] == [1, 2]
    consumed = store.consume_batch(1, "run-1", "f" * 64)
    assert store.consume_batch(1, "run-2") == consumed
    assert (consumed.mlflow_run_id, consumed.snapshot_sha256) == ("run-1", "f" * 64)
    assert [batch.id for batch in store.open_batches()] == [2]
    with pytest.raises(KeyError, match="no batch 7"):
        store.consume_batch(7, None)


def test_counts_by_model_and_source(store: Store, answer: Answer) -> None:
    a, b = "a" * 64, "b" * 64
    for model, source in ((a, "simulated"), (a, "simulated"), (a, "human_user"), (b, "simulated")):
        store.vote(Vote(answer(model_hash=model), "someone", value=1, source=source))
    assert store.count_opinions() == 4
    assert store.count_opinions(model_hash=a) == 3
    assert store.count_opinions(model_hash=a, source="simulated") == 2
    assert store.open_batch() is not None
    store.vote(Vote(answer(model_hash=a), "someone", value=-1, source="human_user"))
    assert store.count_opinions(model_hash=a, pending_only=True) == 1
    assert store.count_opinions(source="simulated", pending_only=True) == 0


def test_equal_opinions_give_an_equal_hash_and_equal_bytes_in_any_order(
    tmp_path: Path, store: Store, answer: Answer, answer_into: Callable[[Store], Answer]
) -> None:
    said = [("one", "yes", 1), ("two", "no", -1), ("two", "no", -1), ("三", "好", 1)]
    other = Store(f"sqlite:///{tmp_path}/other.db")
    other.migrate()
    write = answer_into(other)
    for n, (prompt, response, value) in enumerate(said):
        store.vote(Vote(answer(prompt, response), f"rater {n}", value=value))
    for n, (prompt, response, value) in enumerate(reversed(said)):
        id = write(prompt, response, id=f"chatcmpl-other-{n}")
        other.vote(Vote(id, "another", value=-value))
        other.vote(Vote(id, "another", value=value))
    assert store.open_batch() is not None and other.open_batch() is not None
    hashes = [s.manifest()["batches"][0]["sha256"] for s in (store, other)]
    assert hashes[0] == hashes[1]
    for s, name in ((store, "a"), (other, "b")):
        write_snapshot(s, s.manifest(), tmp_path / name, 50)
    for name in ("opinions.train.jsonl", "opinions.heldout.jsonl", "summary.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    other.vote(Vote(write("four", "4"), "another", value=1))
    assert other.open_batch() is not None
    assert other.manifest()["batches"][0]["sha256"] == hashes[0] != other.manifest()["batches"][1]["sha256"]
    other.close()


def test_a_snapshot_holds_token_ids_and_keeps_doubles(store: Store, answer: Answer, tmp_path: Path) -> None:
    id = answer("hey", "yo")
    store.vote(Vote(id, "someone", value=1))
    store.vote(Vote(id, "somebody else", value=1, source="simulated"))
    store.vote(Vote(answer("hey", "no"), "someone", value=-1))
    assert store.open_batch() is not None
    counts = write_snapshot(store, store.manifest(), tmp_path / "s", 0)
    rest = '"prompt_ids":[1,104,101,121],"response":"yo","response_ids":[121,111,2],'
    start = '{"kind":"thumb","messages":[{"content":"hey","role":"user"}],"model_hash":"' + "a" * 64 + '",'
    lines = (tmp_path / "s" / "opinions.train.jsonl").read_text().splitlines()
    assert lines[1:] == [start + rest + f'"source":"{s}","value":1}}' for s in ("human_user", "simulated")]
    assert '"response_ids":[110,111,2]' in lines[0] and '"value":-1' in lines[0]
    assert (counts["train"], counts["train.up"], counts["train.down"], counts["heldout"]) == (3, 2, 1, 0)
    again = write_snapshot(store, store.manifest(), tmp_path / "t", 100)
    assert (again["train"], again["heldout"]) == (0, 3)
    assert (tmp_path / "t" / "opinions.heldout.jsonl").read_text().splitlines() == lines


def test_a_manifest_of_another_database_is_refused(store: Store, answer: Answer) -> None:
    store.vote(Vote(answer(), "someone", value=1))
    assert store.open_batch() is not None
    manifest = store.manifest()
    manifest["batches"][0]["sha256"] = hashlib.sha256(b"").hexdigest()
    with pytest.raises(ValueError, match="batch 1 differs from the feedback database"):
        list(store.opinions(manifest))
    manifest["batches"][0]["id"] = 9
    with pytest.raises(ValueError, match="batch 9 is not in the feedback database"):
        list(store.opinions(manifest))
    assert list(store.opinions({"batches": []})) == []


def test_voters_against_open_batch_put_every_opinion_into_exactly_one_batch(store: Store, answer: Answer) -> None:
    ids = [answer() for _ in range(40)]
    done = threading.Event()

    def vote(name: str) -> None:
        for n, id in enumerate(ids):
            store.vote(Vote(id, name, value=1))
            if n % 5 == 0:
                store.vote(Vote(id, name, value=-1))

    def close() -> None:
        while not done.is_set():
            store.open_batch()
            time.sleep(0.005)

    with ThreadPoolExecutor(5) as pool:
        closers = [pool.submit(close) for _ in range(2)]
        voters = [pool.submit(vote, f"voter {n}") for n in range(3)]
        try:
            for voter in voters:
                voter.result()
        finally:
            done.set()
        for closer in closers:
            closer.result()
    store.open_batch()
    with store.read() as connection:
        accepted = connection.execute(sa.select(item.c.feedback_id).where(item.c.accepted)).scalars().all()
        last = connection.execute(sa.select(sa.func.max(EventRow.seq))).scalar()
    assert max(Counter(accepted).values()) == 1
    assert len(accepted) == store.count_opinions() == 120
    batches = store.manifest()["batches"]
    assert len(batches) > 1 and batches[0]["first_seq"] == 1
    assert all(a["last_seq"] + 1 == b["first_seq"] for a, b in itertools.pairwise(batches))
    down = sum(opinion.value < 0 for opinion in store.opinions(store.manifest()))
    assert down <= 24 and batches[-1]["last_seq"] <= last
    if batches[-1]["last_seq"] == last:
        assert down == 24
