"""A stage that does nothing, for `benchmarks.overhead`: what is left is the cost of orchestration and records."""

from __future__ import annotations

from typing import Any

from models.job import Job


def run(job: Job) -> dict[str, Any]:
    """Write the one declared output."""
    (job.output / "out.txt").write_text("nothing\n")
    return {}
