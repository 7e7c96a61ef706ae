"""The bell on a real store: one batch when enough opinions wait, or when the oldest has waited long enough."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from feedback import completions
from feedback.completions import Completion
from feedback.opinions import Vote
from feedback.store import Batch, Store
from feedback.trust_options import UNTESTED
from flows import bell
from flows.bell import Bell
from flows.settings import BellOptions


class Clock:
    """Seconds that only the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path / 'feedback.db'}")
    store.migrate()
    yield store
    store.close()


def vote(store: Store, name: str) -> None:
    """One answer with one thumb up."""
    answer = Completion(
        id=name,
        subject="asker",
        request_sha256="0" * 64,
        request_messages=[{"role": "user", "content": "hello"}],
        sampling={"temperature": 1.0},
        model_hash="a" * 64,
        prompt_token_ids=[1],
        response="hi",
        response_token_ids=[2],
        response_logprobs=[-0.5],
        status="complete",
        finish_reason="stop",
    )
    with store.write() as connection:
        completions.insert(connection, answer)
    store.vote(Vote(name, "asker", value=1))


def test_the_third_of_three_opinions_opens_one_batch_and_rings_once(store: Store) -> None:
    rung: list[Batch] = []
    bell = Bell(store, BellOptions(opinions=3, max_wait_seconds=3600), UNTESTED, rung.append)
    for name in ("a", "b"):
        vote(store, name)
        assert bell.turn() == []
    vote(store, "c")
    assert [batch.accepted for batch in bell.turn()] == [3]
    assert bell.turn() == []
    assert [batch.id for batch in rung] == [batch.id for batch in store.open_batches()]


def test_two_bells_on_one_database_open_one_batch(store: Store) -> None:
    for number in range(40):
        vote(store, f"answer-{number}")
    rung: list[int] = []
    barrier = threading.Barrier(4)

    def listen() -> None:
        own = Store(str(store.engine.url))
        bell = Bell(own, BellOptions(opinions=40, max_wait_seconds=3600), UNTESTED, lambda batch: None)
        barrier.wait()
        if bell._open() is not None:
            rung.append(1)
        own.close()

    threads = [threading.Thread(target=listen) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rung == [1]
    assert [batch.accepted for batch in store.open_batches()] == [40]


def test_a_lone_opinion_is_not_left_waiting_for_ever(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    rung: list[Batch] = []
    waiting = Bell(store, BellOptions(opinions=100, max_wait_seconds=60), UNTESTED, rung.append)
    assert waiting.turn() == []
    vote(store, "only")
    assert waiting.turn() == []
    real_age = bell._age
    monkeypatch.setattr(bell, "_age", lambda moment: real_age(moment) + 61)  # a minute goes by
    assert [batch.accepted for batch in waiting.turn()] == [1]


def test_a_batch_nobody_consumed_is_rung_again_at_start_up_and_after_a_while(store: Store) -> None:
    vote(store, "a")
    batch = store.open_batch()
    assert batch is not None
    clock, rung, busy = Clock(), [], [False]
    listener = Bell(store, BellOptions(), UNTESTED, rung.append, lambda: busy[0], clock)
    listener.turn()
    assert [b.id for b in rung] == [batch.id]
    clock.now += bell.REMIND_SECONDS - 1
    assert listener.turn() == []
    clock.now += 1
    busy[0] = True  # a retraining runs: it takes the oldest open batch by itself
    assert listener.turn() == []
    busy[0] = False
    assert [b.id for b in listener.turn()] == [batch.id]
    clock.now += 2 * bell.REMIND_SECONDS - 1  # rung twice without success: the third ring waits twice as long
    assert listener.turn() == []
    clock.now += 1
    assert [b.id for b in listener.turn()] == [batch.id]
    clock.now += bell.PATIENCE_SECONDS + 1
    busy[0] = True  # it has been said to run for too long: it may be dead
    assert [b.id for b in listener.turn()] == [batch.id]
    store.consume_batch(batch.id, None)
    clock.now += bell.PATIENCE_SECONDS + 1
    assert listener.turn() == []
