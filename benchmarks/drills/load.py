"""The load of the latency drill, in a process of its own: writes at a fixed rate, or as fast as they are answered.

    python -m benchmarks.drills.load --port 8000 --answers 2000 --rate 200 --seconds 60

At a fixed rate (open loop) a request's time is counted from the moment at which it should have been sent, so that a service
that stops for a second is charged for all that should have come meanwhile. Prints one JSON line, times in milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import time
from collections import Counter
from typing import Any

from benchmarks.drills.client import Broken, Client
from benchmarks.drills.services import PROMPTS, percentile

CLIENTS = 16


def thumb(luck: random.Random, answers: int, number: int) -> tuple[str, str, dict[str, Any], dict[str, str]]:
    """One write (method, path, body, headers): mostly a thumb, some through POST with a key, some comparisons.

    Its comment was never sent before, so that it is written and not found to be said already.
    """
    kind, said = (
        luck.random(),
        {"user": f"user {luck.randrange(200)}", "comment": f"{number} {luck.randrange(1 << 62)}"},
    )
    completion = luck.randrange(answers)
    if kind < 0.7:
        body: dict[str, Any] = {**said, "value": luck.choice((1, -1))}
        return "PUT", f"/v1/feedback/chatcmpl-drill-{completion}/thumb", body, {}
    key = {"Idempotency-Key": f"load-{number}-{luck.randrange(1 << 62)}"}
    if kind < 0.9:
        body = {**said, "kind": "thumb", "completion_id": f"chatcmpl-drill-{completion}", "value": 1}
        return "POST", "/v1/feedback", body, key
    other = completion + PROMPTS if completion + PROMPTS < answers else completion - PROMPTS
    pair = [f"chatcmpl-drill-{completion}", f"chatcmpl-drill-{other}"]
    return "POST", "/v1/comparisons", {**said, "completion_ids": pair, "chosen": pair[0]}, key


async def send(client: Client, write: tuple[str, str, dict[str, Any], dict[str, str]]) -> str:
    """The status of one write, or "broken"."""
    try:
        return str((await client.request(*write)).status)
    except Broken:
        return "broken"


async def open_loop(port: int, answers: int, rate: float, seconds: float) -> dict[str, Any]:
    """`rate` writes a second; client i sends the i-th, the (i + CLIENTS)-th, … each at its moment or as soon as it can."""
    luck, number = random.Random(), int(rate * seconds)
    writes = [thumb(luck, answers, i) for i in range(number)]
    clients = [Client(port) for _ in range(CLIENTS)]
    await asyncio.gather(*(client.request("GET", "/healthz") for client in clients))
    begin = time.perf_counter() + 0.1
    taken, statuses = [0.0] * number, Counter[str]()

    async def one(place: int) -> None:
        for i in range(place, number, CLIENTS):
            due = begin + i / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            statuses[await send(clients[place], writes[i])] += 1
            taken[i] = time.perf_counter() - due

    await asyncio.gather(*(one(place) for place in range(CLIENTS)))
    return figures(taken, statuses, time.perf_counter() - begin)


async def closed_loop(port: int, answers: int, seconds: float) -> dict[str, Any]:
    """Each client sends its next write when the one before is answered."""
    clients, statuses, taken = [Client(port) for _ in range(CLIENTS)], Counter[str](), list[float]()
    begin = time.perf_counter()

    async def one(place: int) -> None:
        luck, number = random.Random(), 0
        while (sent := time.perf_counter()) < begin + seconds:
            number += 1
            statuses[await send(clients[place], thumb(luck, answers, number))] += 1
            taken.append(time.perf_counter() - sent)

    await asyncio.gather(*(one(place) for place in range(CLIENTS)))
    return figures(taken, statuses, time.perf_counter() - begin)


def figures(taken: list[float], statuses: Counter[str], seconds: float) -> dict[str, Any]:
    """What a run came to; `taken` in seconds."""
    at = {f"p{share * 100:g}_ms": round(percentile(taken, share) * 1000, 2) for share in (0.5, 0.9, 0.99, 0.999)}
    rate = round(len(taken) / seconds, 1)
    return {
        "requests": len(taken),
        "per_second": rate,
        **at,
        "max_ms": round(max(taken) * 1000, 2),
        "statuses": statuses,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drills.load", description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--answers", type=int, required=True, help="that services.seed_answers wrote")
    parser.add_argument("--rate", type=float, default=0.0, help="writes a second; 0: as fast as they are answered")
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    gc.disable()
    if args.rate:
        done = asyncio.run(open_loop(args.port, args.answers, args.rate, args.seconds))
    else:
        done = asyncio.run(closed_loop(args.port, args.answers, args.seconds))
    print(json.dumps(done))


if __name__ == "__main__":
    main()
