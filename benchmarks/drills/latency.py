"""Latency: 200 writes a second by 16 clients from a second process, while a model is loaded and idle; and as many as go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from benchmarks.drills import databases
from benchmarks.drills.services import Service, make_model, promote, seed_answers
from benchmarks.peers import CHECKOUT
from feedback.store import Store

RATE, BAR_MS = 200.0, 50.0
ANSWERS = 2000


def run(folder: Path, kind: str, seconds: float) -> dict[str, Any]:
    """`seconds` at RATE, then a quarter of it closed loop, on a database of a kind."""
    database = databases.make(kind, folder / "database")
    service = Service(database.url, folder / "service")
    models = folder / "service" / "models"
    models.mkdir(parents=True)
    try:
        seed_answers(database.url, ANSWERS)
        store = Store(database.url)
        promote(store, models, make_model(models, 1))
        store.close()
        service.start()
        service.wait("/readyz")
        load(service, RATE, min(3.0, seconds))  # what the first requests of a process cost is not what is asked here
        before = psutil.Process(service.process.pid).cpu_times()
        steady = load(service, RATE, seconds)
        after = psutil.Process(service.process.pid).cpu_times()
        most = load(service, 0.0, max(2.0, seconds / 4))
    finally:
        service.close()
        database.close()
    fine = {"200", "201"}
    bars = {
        "p99": steady["p99_ms"] < BAR_MS,
        "rate": steady["per_second"] >= 0.98 * RATE,
        "errors": set(steady["statuses"]) <= fine and set(most["statuses"]) <= fine,
    }
    used = after.user + after.system - before.user - before.system
    return {
        "steady": {**steady, "service_cpu_ms_a_write": round(1000 * used / steady["requests"], 3)},
        "most": most,
        "load_average": round(os.getloadavg()[0], 1),
        "missed": [name for name, holds in bars.items() if not holds],
    }


def load(service: Service, rate: float, seconds: float) -> dict[str, Any]:
    """benchmarks.drills.load against a service."""
    command = [sys.executable, "-m", "benchmarks.drills.load", "--port", str(service.port), "--answers", str(ANSWERS)]
    command += ["--rate", str(rate), "--seconds", str(seconds)]
    done = subprocess.run(command, cwd=CHECKOUT, env=service.env, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found
