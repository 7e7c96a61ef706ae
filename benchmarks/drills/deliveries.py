"""Deliveries: every request is sent three times, at once and out of order, some once more with another body under the same
key; there is one row and one event of it, with the first body's state."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.drills import databases
from benchmarks.drills.client import Client
from benchmarks.drills.services import Service, seed_answers, value_of

COPIES = 3
WINDOW = 64  # deliveries that overtake each other


async def deliver(port: int, answers: list[list[str]], requests: int, seed: int) -> Counter[str]:
    """Send `requests` requests COPIES times each in a shuffled order by many connections, then each once more with another
    body; how they were answered."""
    luck, seen = random.Random(seed), Counter[str]()
    flat = [id for group in answers for id in group]
    bodies = []
    for i in range(requests):
        body = {"kind": "thumb", "completion_id": flat[i % len(flat)], "value": luck.choice((1, -1))}
        bodies.append({**body, "comment": f"delivery {i}", "user": f"person {i // len(flat)}"})
    order = [i for i in range(requests) for _ in range(COPIES)]
    order = [i for _, i in sorted((place + luck.uniform(0, WINDOW), i) for place, i in enumerate(order))]
    waiting = iter(order)
    first: dict[int, int] = {}

    async def courier(client: Client) -> None:
        for i in waiting:
            response = await client.request("POST", "/v1/feedback", bodies[i], {"Idempotency-Key": f"request {i}"})
            seen[str(response.status)] += 1
            if first.setdefault(i, response.json()["seq"]) != response.json()["seq"]:
                seen["another event"] += 1

    clients = [Client(port) for _ in range(16)]
    await asyncio.gather(*(courier(client) for client in clients))
    for i in range(requests):  # the same key, another body: refused, and nothing changes
        other = {**bodies[i], "value": -int(bodies[i]["value"])}
        response = await clients[0].request("POST", "/v1/feedback", other, {"Idempotency-Key": f"request {i}"})
        code = response.json()["error"]["code"] if response.status == 422 else "taken"
        seen[f"other body: {response.status} {code}"] += 1
    return seen


def run(folder: Path, kind: str, requests: int, seed: int = 1) -> dict[str, Any]:
    """`requests` requests on a database of a kind; rows and events that they made."""
    database = databases.make(kind, folder / "database")
    service = Service(database.url, folder / "service")
    try:
        answers = seed_answers(database.url, 500)
        service.start()
        service.wait()
        seen = asyncio.run(deliver(service.port, answers, requests, seed))
        rows = value_of(database.url, "SELECT count(*) FROM feedback")
        events = value_of(database.url, "SELECT count(*) FROM feedback_event")
    finally:
        service.close()
        database.close()
    bars = {
        "one_row": rows == requests,
        "one_event": events == requests and not seen["another event"],
        "created_once": seen["201"] == requests and seen["200"] == requests * (COPIES - 1),
        "other_body_refused": seen["other body: 422 idempotency_key_reused"] == requests,
    }
    return {
        "requests": requests,
        "deliveries": requests * (COPIES + 1),
        "rows": rows,
        "events": events,
        "seen": dict(sorted(seen.items())),
        "missed": [name for name, holds in bars.items() if not holds],
    }
