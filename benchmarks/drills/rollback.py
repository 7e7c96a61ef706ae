"""Rollback: a model is promoted and taken back while people ask; how long until the model before it answers again."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from benchmarks.drills import databases
from benchmarks.drills.client import Client
from benchmarks.drills.services import Service, make_model, promote
from feedback.store import Store

BAR_SECONDS = 30.0


async def until(client: Client, model_hash: str) -> float:
    """Ask until an answer comes from this model; the seconds. Raises RuntimeError for an answer that is no 200."""
    began = time.monotonic()
    while True:
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        response = await client.request("POST", "/v1/chat/completions", body)
        if response.status != 200:
            raise RuntimeError(f"no answer while the model changed: {response.status} {response.body[:200]!r}")
        if response.headers["x-thumbwheel-model"] == model_hash:
            return time.monotonic() - began
        if time.monotonic() - began > 2 * BAR_SECONDS:
            raise TimeoutError(f"{model_hash[:12]} does not answer")


async def turns(store: Store, models: Path, port: int, old: str, new: str, rounds: int) -> list[float]:
    """Promote and take back `rounds` times; the seconds from each rollback to the old model's answer."""
    client, taken = Client(port), list[float]()
    for _ in range(rounds):
        await asyncio.to_thread(promote, store, models, new)
        await until(client, new)
        await asyncio.to_thread(store.rollback, "a drill")
        taken.append(await until(client, old))
    client.close()
    return taken


def run(folder: Path, kind: str, rounds: int) -> dict[str, Any]:
    """`rounds` rollbacks on a database of a kind."""
    database = databases.make(kind, folder / "database")
    service = Service(database.url, folder / "service")
    models = folder / "service" / "models"
    models.mkdir(parents=True)
    old, new = make_model(models, 1), make_model(models, 2)
    try:
        store = Store(database.url)
        store.migrate()
        promote(store, models, old)
        service.start()
        service.wait("/readyz")
        taken = asyncio.run(turns(store, models, service.port, old, new, rounds))
        store.close()
    finally:
        service.close()
        database.close()
    return {
        "rollbacks": rounds,
        "slowest_seconds": round(max(taken), 2),
        "missed": ["seconds"] if max(taken) >= BAR_SECONDS else [],
    }
