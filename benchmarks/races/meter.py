"""What a run measures: CPU seconds (user and system, all threads) between start and stop, and the process's peak memory.

Runs in every peer's environment: the standard library alone.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any


class Meter:
    """start after the warm-up, stop at the end of what counts, write the result where the race asked for it."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.cpu = self.wall = 0.0
        self.result: dict[str, Any] = {}

    def start(self) -> None:
        """Begin to count (again: what was counted before is forgotten)."""
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def stop(self, **facts: Any) -> None:
        """End counting: `work` units were done; other facts are kept with the result."""
        seconds, wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
        self.result = {"cpu_seconds": seconds, "wall_seconds": wall, "peak_mb": peak_mb(), **facts}

    def write(self, **facts: Any) -> None:
        """Write the result as one JSON object."""
        self.path.write_text(json.dumps(self.result | facts), encoding="utf-8")


def peak_mb() -> float:
    """The most memory that this process ever had in use, in 10⁶ bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6
