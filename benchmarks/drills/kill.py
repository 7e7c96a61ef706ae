"""Kill: SIGKILL of the API's process and of PostgreSQL, again and again, while 16 writers write; nothing that was acknowledged
may be missing, nothing may be there twice."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.drills import databases
from benchmarks.drills.databases import Postgres, Sqlite
from benchmarks.drills.services import Service, seed_answers
from benchmarks.drills.writers import WRITERS, Ledger, Writer, audit

PAUSE = 5.0  # seconds between two kills on average, with all running again


async def disturb(
    service: Service, database: Sqlite | Postgres, luck: random.Random, kills: Counter[str], pause: float
) -> None:
    """Kill one thing after another until cancelled; each is started again and has to answer before the next."""
    while True:
        await asyncio.sleep(luck.uniform(0.2, 1.8) * pause)
        what = luck.choice(("api", "postgres", "backend", "both") if isinstance(database, Postgres) else ("api",))
        kills[what] += 1
        await asyncio.to_thread(strike, what, service, database, luck)


def strike(what: str, service: Service, database: Sqlite | Postgres, luck: random.Random) -> None:
    """One kill, and the start of what was killed."""
    if what in ("api", "both"):
        service.kill()
    if isinstance(database, Postgres) and what != "api":
        database.kill(what != "backend", luck)
        if what != "backend":
            database.start()
        database.wait()
    if what in ("api", "both"):
        service.start()
    service.wait()


def run(folder: Path, kind: str, writes: int, pause: float = PAUSE, seed: int = 1) -> dict[str, Any]:
    """`writes` writes by WRITERS writers on a database of a kind; what was acknowledged, lost, doubled."""
    database = databases.make(kind, folder / "database")
    service = Service(database.url, folder / "service")
    ledger, kills = Ledger(), Counter[str]()
    try:
        answers = seed_answers(database.url, 2000)
        service.start()
        service.wait()
        began = time.monotonic()
        killer = partial(disturb, service, database, random.Random(f"{seed} kills"), kills, pause)
        writers = [Writer(place, service.port, answers, ledger, seed) for place in range(WRITERS)]
        asyncio.run(beside(killer, [writer.run(writes // WRITERS) for writer in writers]))
        seconds = time.monotonic() - began
        found = audit(database.url, ledger)
    finally:
        service.close()
        database.close()
    bars = {
        "acknowledged": ledger.done == writes // WRITERS * WRITERS,
        "lost": found.lost == 0,
        "doubled": found.doubled == 0 and found.events == ledger.done,
        "whole": found.behind == 0 and found.torn == 0,
        "errors": not ledger.bad_bodies,
        "killed": sum(kills.values()) > 0,
    }
    return {
        "acknowledged": ledger.done,
        "lost": found.lost,
        "doubled": found.doubled,
        "half_written": found.behind + found.torn,
        "kills": dict(kills),
        "sent_again": sum((tries - 1) * number for tries, number in ledger.tries.items()),
        "said_before": ledger.seen["replayed"],
        "seen": dict(sorted(ledger.seen.items())),
        "opinions": found.opinions,
        "wrong_errors": ledger.bad_bodies[:5],
        "per_second": round(ledger.done / seconds, 1),
        "missed": [name for name, holds in bars.items() if not holds],
    }


async def beside(disturbing: Callable[[], Coroutine[Any, Any, None]], work: list[Coroutine[Any, Any, None]]) -> None:
    """Do all of `work` while `disturbing` runs, which ends by an error alone; its last act is waited for."""
    disturber, working = asyncio.create_task(disturbing()), asyncio.gather(*work)
    done, _ = await asyncio.wait([disturber, working], return_when=asyncio.FIRST_COMPLETED)
    if disturber in done:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        disturber.result()
    disturber.cancel()
    await asyncio.gather(disturber, return_exceptions=True)
    working.result()
