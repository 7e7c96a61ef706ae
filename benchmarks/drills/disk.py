"""Disk full: the database's volume is filled while people write; a clean 503, no partial row, and recovery without help.

On PostgreSQL the whole data directory stands on the volume. Where its log cannot grow, PostgreSQL stops itself; the drill
starts it again as a service manager does (every half second), and it comes up when there is room.
"""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.drills.client import Broken, Client
from benchmarks.drills.databases import Postgres, Sqlite
from benchmarks.drills.services import Service, seed_answers
from benchmarks.drills.writers import WRITERS, Ledger, Writer, audit
from benchmarks.small_disk import fill, small_disk

SIZE = {"sqlite": 24 << 20, "postgresql": 192 << 20}
BAR_SECONDS = 30.0  # from room to the first write
REFUSALS = 20  # that are looked at while the disk is full
BIG = "x" * 9_000  # a comment that takes room


class Supervisor:
    """Starts PostgreSQL again whenever it has stopped, as a service manager does."""

    def __init__(self, database: Sqlite | Postgres) -> None:
        self.database, self.ended, self.starts = database, threading.Event(), 0
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self.ended.wait(0.5):
            if isinstance(self.database, Postgres) and self.database.process.poll() is not None:
                self.starts += 1
                self.database.start()

    def close(self) -> None:
        """End it; the database keeps running."""
        self.ended.set()
        self.thread.join()


async def fill_and_free(
    service: Service, answers: list[list[str]], ballast: Path, ledger: Ledger, writes: int
) -> dict[str, Any]:
    """Write, fill the disk, collect refusals, make room, write again; the seconds until the first write after it."""
    writers = [Writer(place, service.port, answers, ledger) for place in range(WRITERS)]
    await asyncio.gather(*(writer.run(writes // WRITERS) for writer in writers))
    await asyncio.to_thread(fill, ballast)
    refused, codes, acknowledged, slowest = 0, set[str](), 0, 0.0
    client = Client(service.port, seconds=60)
    deadline = time.monotonic() + 60
    while refused < REFUSALS and time.monotonic() < deadline:  # what is free inside the files is used up first
        await asyncio.to_thread(fill, ballast)
        sent = time.monotonic()
        body = {"value": 1, "user": f"full {acknowledged} {refused}", "comment": BIG}
        try:
            response = await client.request("PUT", f"/v1/feedback/{answers[0][0]}/thumb", body)
        except Broken:
            codes.add("broken")
            continue
        slowest = max(slowest, time.monotonic() - sent)
        if response.status == 201:
            acknowledged += 1
            continue
        refused += 1
        codes.add(f"{response.status} {response.json()['error']['code']}")
    health = await client.request("GET", "/healthz")
    ballast.unlink()
    began = time.monotonic()
    while time.monotonic() - began < 2 * BAR_SECONDS:
        body = {"value": 1, "user": "there is room again", "comment": BIG}
        if (await client.request("PUT", f"/v1/feedback/{answers[0][0]}/thumb", body)).status == 201:
            break
        await asyncio.sleep(0.05)
    recovered = time.monotonic() - began
    return {
        "refused": refused,
        "answers_when_full": sorted(codes),
        "slowest_refusal_seconds": round(slowest, 2),
        "healthz_when_full": health.status,
        "acknowledged_when_full": acknowledged,
        "recovered_seconds": round(recovered, 2),
    }


def run(folder: Path, kind: str, writes: int) -> dict[str, Any]:
    """Fill the volume of a database of a kind after `writes` writes."""
    with ExitStack() as stack:
        disk = stack.enter_context(small_disk(folder / "disk", SIZE[kind]))
        if kind == "postgresql":
            database: Sqlite | Postgres = Postgres(disk / "database", min_wal_size="32MB", max_wal_size="48MB")
        else:
            database = Sqlite(disk / "database")
        stack.callback(database.close)
        answers = seed_answers(database.url, 200)
        service, ledger = Service(database.url, folder / "service"), Ledger()
        service.start()
        stack.callback(service.close)
        service.wait()
        supervisor = Supervisor(database)
        stack.callback(supervisor.close)
        seen = asyncio.run(fill_and_free(service, answers, disk / "ballast", ledger, writes))
        found = audit(database.url, ledger)
    bars = {
        "clean_503": seen["refused"] == REFUSALS and seen["answers_when_full"] == ["503 database_unavailable"],
        "lost": found.lost == 0 and found.events == ledger.done + seen["acknowledged_when_full"] + 1,
        "partial": found.behind == 0 and found.torn == 0,
        "recovered": seen["recovered_seconds"] < BAR_SECONDS,
    }
    return {
        "disk_mb": SIZE[kind] >> 20,
        "acknowledged": ledger.done,
        "lost": found.lost,
        "half_written": found.behind + found.torn,
        **seen,
        "database_restarts": supervisor.starts,
        "missed": [name for name, holds in bars.items() if not holds],
    }
