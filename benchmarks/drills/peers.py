"""Peers: MLflow's tracking server and Label Studio beside the service, in one run, on the same kind of database: thumbs a second,
what is missing after SIGKILL, and how many rows one thumb makes that is delivered three times.

Each stands as it comes: `mlflow server` with its four workers, `label-studio start`, one process of ours. All are driven by
the same client (benchmarks.drills.client), a kept connection for each writer, who sends the next thumb when the one before
is answered; they take turns, so that what the machine does beside falls on all.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from benchmarks.drills import databases
from benchmarks.drills.client import Broken, Client
from benchmarks.drills.databases import Postgres, Sqlite
from benchmarks.drills.load import figures
from benchmarks.drills.systems import WRITERS, LabelStudio, Mlflow, Ours, System, Write, expect, words

COPIES = 3


@dataclass
class Seen:
    """What came of a system. rounds: figures of each; kept: words whose write was acknowledged."""

    rounds: list[dict[str, Any]] = field(default_factory=list)
    kept: set[str] = field(default_factory=set)
    statuses: Counter[str] = field(default_factory=Counter)
    numbers: itertools.count[int] = field(default_factory=itertools.count)


async def write(system: System, seen: Seen, going: Callable[[], bool]) -> list[float]:
    """WRITERS writers send thumbs while `going`, and stop when the connection breaks; seconds that each thumb took."""
    taken = list[float]()

    async def one(client: Client) -> None:
        while going():
            number, sent = next(seen.numbers), time.perf_counter()
            try:
                response = await client.request(*system.thumb(number))
            except Broken:
                seen.statuses["broken"] += 1
                return
            taken.append(time.perf_counter() - sent)
            seen.statuses[str(response.status)] += 1
            if response.status in (200, 201):
                seen.kept.add(words(number))

    clients = [Client(system.port, 60.0) for _ in range(WRITERS)]
    await asyncio.gather(*(one(client) for client in clients))
    for client in clients:
        client.close()
    return taken


async def measure(system: System, seen: Seen, seconds: float) -> None:
    """One round of a closed loop."""
    before, began = Counter(seen.statuses), time.perf_counter()
    taken = await write(system, seen, lambda: time.perf_counter() < began + seconds)
    seen.rounds.append(figures(taken, seen.statuses - before, time.perf_counter() - began))


async def kill(system: System, seen: Seen, seconds: float, database: Sqlite | Postgres) -> None:
    """SIGKILL of the server, and of PostgreSQL with it, `seconds` after the writers began; then both are started again."""
    running = True

    async def strike() -> None:
        nonlocal running
        await asyncio.sleep(seconds)
        await asyncio.to_thread(system.kill)
        running = False

    await asyncio.gather(strike(), write(system, seen, lambda: running))
    if isinstance(database, Postgres):
        await asyncio.to_thread(database.kill, True, random.Random())
        database.start()
        database.wait()
    system.start()
    await asyncio.to_thread(system.wait)


async def deliver(system: System, seen: Seen, keyed: bool) -> dict[str, Any] | None:
    """One thumb COPIES times: how each was answered, and the rows that it made. None when the API knows no key."""
    number = next(seen.numbers)
    sent: Write | None = system.thumb(number)
    if keyed and sent is not None:
        sent = system.keyed(sent, f"delivery {number:08d}")
    if sent is None:
        return None
    client = Client(system.port, 60.0)
    answers = [(await client.request(*sent)).status for _ in range(COPIES)]
    client.close()
    return {"answers": answers, "rows": system.words().count(words(number))}


async def compare(
    systems: Sequence[System], database: Sqlite | Postgres, rounds: int, seconds: float, kills: int
) -> dict[str, Any]:
    """All figures of all systems, which stand and answer."""
    seen = {system.name: Seen() for system in systems}
    for system in systems:
        await system.prepare()
        await measure(system, Seen(numbers=seen[system.name].numbers), min(2.0, seconds))  # first requests cost more
    for _ in range(rounds):
        for system in systems:
            await measure(system, seen[system.name], seconds)
    told: dict[str, Any] = {}
    for system in systems:
        own = seen[system.name]
        copies = {"plain": await deliver(system, own, False), "with its key": await deliver(system, own, True)}
        if isinstance(system, Mlflow):
            told[system.name] = {"own_client": await asyncio.to_thread(system.own_client, seconds, own.numbers)}
        measured = len(own.kept)
        for _ in range(kills):
            await kill(system, own, min(2.0, seconds), database)
        there = Counter(system.words())
        told[system.name] = {
            **told.get(system.name, {}),
            "version": system.version,
            "per_second": [found["per_second"] for found in own.rounds],
            **{name: statistics.median(found[name] for found in own.rounds) for name in ("p50_ms", "p99_ms")},
            "median_per_second": statistics.median(found["per_second"] for found in own.rounds),
            "statuses": dict(own.statuses),
            "kills": kills,
            "acknowledged_under_kills": len(own.kept) - measured,
            "acknowledged": len(own.kept),
            "lost": sum(said not in there for said in own.kept),
            "doubled": sum(there[said] > 1 for said in own.kept),
            "copies": copies,
        }
    return told


def run(folder: Path, kind: str, rounds: float, seconds: float, kills: float) -> dict[str, Any]:
    """`rounds` rounds of `seconds` for each system in turn, then `kills` kills of each; Label Studio on SQLite alone."""
    database, absent = databases.make(kind, folder / "database"), dict[str, str]()
    systems: list[System] = [Ours(database.url, folder / "thumbwheel")]
    systems.append(Mlflow(beside(database, folder), folder / "mlflow"))
    if kind == "sqlite":
        try:
            systems.append(LabelStudio(folder / "label-studio"))
        except (OSError, subprocess.CalledProcessError) as error:
            absent["Label Studio"] = f"its environment was not built: {error}"
    try:
        systems = [system for system in systems if begin(system, absent)]
        expect(len(systems) > 1, f"no peer started: {absent}")
        told = asyncio.run(compare(systems, database, int(rounds), seconds, int(kills)))
    finally:
        for system in systems:
            system.close()
        database.close()
    ours = told[Ours.name]
    bars = {
        "lost": ours["lost"] == 0,
        "doubled": ours["doubled"] == 0 and all(found["rows"] == 1 for found in ours["copies"].values()),
        "errors": set(ours["statuses"]) <= {"200", "201", "broken"},
    }
    missed = [name for name, holds in bars.items() if not holds]
    return {"writers": WRITERS, "systems": told, "absent": absent, "missed": missed}


def begin(system: System, absent: dict[str, str]) -> bool:
    """Start a system; whether it answers. A peer that does not is told of in `absent`, ours raises."""
    try:
        system.start()
        system.wait()
    except (RuntimeError, TimeoutError) as error:
        if isinstance(system, Ours):
            raise
        system.close()
        absent[system.name] = str(error)
        return False
    return True


def beside(database: Sqlite | Postgres, folder: Path) -> str:
    """The URL of an empty database for MLflow: a file, or one more in the same PostgreSQL."""
    if isinstance(database, Sqlite):
        return f"sqlite:///{folder / 'mlflow.db'}"
    engine = sa.create_engine(database.url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE DATABASE mlflow")
    engine.dispose()
    return database.url.rsplit("/", 1)[0] + "/mlflow"
