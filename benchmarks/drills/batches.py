"""Batches: people write, take back and are moderated while batches are opened and consumed by processes that are killed between
the two, and by several at once; each accepted opinion is in exactly one batch, each other one is excluded by name.

    python -m benchmarks.drills.batches URL     # such a process: opens and consumes for ever
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from benchmarks.drills import databases
from benchmarks.drills.client import Client
from benchmarks.drills.kill import beside
from benchmarks.drills.services import Service, seed_answers
from benchmarks.peers import CHECKOUT
from feedback.store import Store

WRITERS, TRAINERS = 8, 2

# what must not be, as SQL that counts it
AUDIT = {
    "accepted in two batches": """
        SELECT count(*) FROM (SELECT feedback_id FROM training_batch_item WHERE accepted
        GROUP BY feedback_id HAVING count(*) > 1) AS twice""",
    "stands, and in no batch": """
        SELECT count(*) FROM feedback AS f JOIN completion AS c ON c.id = f.completion_id
        WHERE NOT f.retracted AND f.moderation = 'accepted' AND f.value <> 0 AND c.status = 'complete'
        AND NOT EXISTS (SELECT 1 FROM training_batch_item AS i WHERE i.feedback_id = f.id AND i.accepted)""",
    "left out without a name": """
        SELECT count(*) FROM feedback AS f WHERE NOT EXISTS (SELECT 1 FROM training_batch_item AS i
        WHERE i.feedback_id = f.id AND i.seq = f.last_seq AND (i.accepted OR i.reason <> ''))""",
    "event in no batch or in two": """
        SELECT count(*) FROM feedback_event AS e WHERE
        (SELECT count(*) FROM training_batch AS b WHERE e.seq BETWEEN b.first_seq AND b.last_seq) <> 1""",
    "item out of its batch's range": """
        SELECT count(*) FROM training_batch_item AS i JOIN training_batch AS b ON b.id = i.batch_id
        WHERE i.seq NOT BETWEEN b.first_seq AND b.last_seq""",
    "batch that counts wrongly": """
        SELECT count(*) FROM training_batch AS b WHERE b.accepted <> (SELECT count(*) FROM training_batch_item AS i
        WHERE i.batch_id = b.id AND i.accepted)""",
    "batch never consumed": "SELECT count(*) FROM training_batch WHERE consumed_at IS NULL",
}


async def people(place: int, port: int, answers: list[list[str]], counts: Counter[str], kills: int, seed: int) -> None:
    """One writer, until `kills` trainers are dead: thumbs of all values, revised, taken back, quarantined, accepted again."""
    luck, client = random.Random(f"{seed} {place}"), Client(port)
    flat = [id for group in answers for id in group]
    while counts["kills"] < kills:
        path, user = f"/v1/feedback/{luck.choice(flat)}/thumb", f"person {place}-{luck.randrange(4)}"
        response = await client.request("PUT", path, {"value": luck.choice((1, 1, -1, 0)), "user": user})
        kind = luck.random()
        if kind < 0.15:
            response = await client.request("DELETE", f"{path}?user={user.replace(' ', '%20')}")
        elif kind < 0.3:
            judged = {"state": luck.choice(("quarantined", "accepted", "rejected")), "reason": "a drill"}
            response = await client.request(
                "POST", f"/v1/moderation/{1 + luck.randrange(1 + counts['writes'])}", judged
            )
        if response.status >= 500:
            raise RuntimeError(f"{response.status}: {response.body[:200]!r}")
        counts["writes"] += 1
        await asyncio.sleep(0.005)  # the trainers need some of the two cores too
    client.close()


def trainer(database_url: str) -> subprocess.Popen[bytes]:
    """A process that opens and consumes batches until it is killed; writes a line when it begins."""
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-m", "benchmarks.drills.batches", database_url]
    return subprocess.Popen(command, env=env, cwd=CHECKOUT, stdout=subprocess.PIPE)


async def kill_trainers(database_url: str, luck: random.Random, counts: Counter[str]) -> None:
    """Keep TRAINERS of them running, and kill one after another, once it has begun."""
    running = [trainer(database_url) for _ in range(TRAINERS)]
    try:
        while True:
            one = running[0]
            assert one.stdout is not None
            await asyncio.to_thread(one.stdout.readline)
            await asyncio.sleep(luck.uniform(0, 1))
            if one.poll() is not None:
                raise RuntimeError(f"a process that opens batches ended by itself ({one.returncode})")
            end(one)
            counts["kills"] += 1
            running = [*running[1:], trainer(database_url)]
    finally:
        for one in running:
            end(one)


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL."""
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def train(database_url: str) -> None:
    """Open a batch, look at it for a moment as a training does, consume the oldest open one, twice; for ever."""
    store, luck = Store(database_url), random.Random(os.getpid())
    print("begins", flush=True)
    while True:
        store.open_batch(minimum=5)
        time.sleep(luck.uniform(0, 0.1))  # most kills come here
        for batch in store.open_batches()[:1]:
            list(store.opinions({"batches": store.manifest()["batches"]}))
            for _ in range(2):
                store.consume_batch(batch.id, f"run-{os.getpid()}")


def settle(database_url: str) -> int:
    """What the reconcile run does at the end: close the rest, consume what is open. How many batches were open."""
    store = Store(database_url)
    store.open_batch(minimum=0)
    left = store.open_batches()
    for batch in left:
        store.consume_batch(batch.id, "reconcile")
    store.close()
    return len(left)


def audit(database_url: str) -> dict[str, int]:
    """How many rows break each rule of AUDIT."""
    engine = sa.create_engine(database_url)
    with engine.connect() as connection:
        found = {name: int(connection.execute(sa.text(sql)).scalar_one()) for name, sql in AUDIT.items()}
    engine.dispose()
    return found


def tally(database_url: str) -> dict[str, int]:
    """Batches, accepted opinions, and exclusions by their name."""
    engine = sa.create_engine(database_url)
    with engine.connect() as connection:
        batches = int(connection.execute(sa.text("SELECT count(*) FROM training_batch")).scalar_one())
        reasons = connection.execute(sa.text("SELECT reason, count(*) FROM training_batch_item GROUP BY reason")).all()
    engine.dispose()
    return {"batches": batches, **{reason or "accepted": int(number) for reason, number in sorted(reasons)}}


def run(folder: Path, kind: str, kills: int, seed: int = 1) -> dict[str, Any]:
    """People write on a database of a kind while batches are opened and consumed, until `kills` of those who do are dead."""
    database = databases.make(kind, folder / "database")
    service, counts = Service(database.url, folder / "service"), Counter[str]()
    try:
        answers = seed_answers(database.url, 2000)
        service.start()
        service.wait()
        killer = partial(kill_trainers, database.url, random.Random(seed), counts)
        work = [people(place, service.port, answers, counts, kills, seed) for place in range(WRITERS)]
        asyncio.run(beside(killer, work))
        left = settle(database.url)
        broken, became = audit(database.url), tally(database.url)
    finally:
        service.close()
        database.close()
    return {
        "writes": counts["writes"],
        "kills": counts["kills"],
        "left_to_reconcile": left,
        **became,
        "broken": {name: number for name, number in broken.items() if number},
        "missed": [name for name, number in broken.items() if number],
    }


if __name__ == "__main__":
    train(sys.argv[1])
