"""Startup: from the start of the process to the first answered request, without a model."""

from __future__ import annotations

import http.client
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.drills import databases
from benchmarks.drills.services import Service, seed_answers
from benchmarks.peers import CHECKOUT

BAR_SECONDS = 3.0
# what the service must not load before it is asked for an answer by its own decoder, or ever
FOREIGN = ("torch", "transformers", "prefect", "mlflow", "dvc", "great_expectations", "pandas", "pyarrow")


def run(folder: Path, kind: str, starts: int) -> dict[str, Any]:
    """Start a service on a database of a kind `starts` times; seconds to /healthz and to the first thumb."""
    database = databases.make(kind, folder / "database")
    health, thumbs = list[float](), list[float]()
    try:
        answers = seed_answers(database.url, 10)
        for i in range(starts):
            service = Service(database.url, folder / "service")
            began = time.monotonic()
            service.start()
            try:
                service.wait()
                health.append(time.monotonic() - began)
                thumb(service, answers[i % len(answers)][0], f"person {i}")
                thumbs.append(time.monotonic() - began)
            finally:
                service.close()
    finally:
        database.close()
    foreign = loaded()
    bars = {"seconds": statistics.median(thumbs) < BAR_SECONDS, "foreign": not foreign}
    return {
        "starts": starts,
        "healthz_seconds": round(statistics.median(health), 2),
        "first_thumb_seconds": round(statistics.median(thumbs), 2),
        "slowest_seconds": round(max(thumbs), 2),
        "foreign_modules": foreign,
        "load_average": round(os.getloadavg()[0], 1),
        "missed": [name for name, holds in bars.items() if not holds],
    }


def thumb(service: Service, completion_id: str, user: str) -> None:
    """One thumb. Raises RuntimeError when it is not created."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
    body, headers = json.dumps({"value": 1, "user": user}), {"Content-Type": "application/json"}
    connection.request("PUT", f"/v1/feedback/{completion_id}/thumb", body, headers)
    status = connection.getresponse().status
    connection.close()
    if status != 201:
        raise RuntimeError(f"the first thumb was answered by {status}")


def loaded() -> list[str]:
    """Modules of FOREIGN that `import feedback.service` loads."""
    code = f"import sys, feedback.service; print([name for name in {FOREIGN!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stdout.replace("'", '"'))
    return found
