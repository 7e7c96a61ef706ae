"""prefect.yaml, for `prefect deploy` to a Prefect server of one's own: the deployments of `make up`, on work pools.

    python -m flows.prefect_yaml --write    # after a change of flows/deployments.py; a test compares

Stages that train go to the work pool `gpu`, the others to `cpu` (`prefect work-pool create cpu --type process`). A worker
runs in the checkout: `cd CHECKOUT && prefect worker start --pool cpu`.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

from prefect.client.schemas.schedules import IntervalSchedule
from prefect.deployments.runner import RunnerDeployment

from flows.deployments import BELL_MATCH, bell_trigger, deployments
from flows.files import write_text
from flows.stage import STAGES
from flows.values import yaml

PATH = Path(__file__).resolve().parents[1] / "prefect.yaml"
HEAD = "# Written by `python -m flows.prefect_yaml --write`; flows/prefect_yaml.py says how to use it.\n"
TRAINS = {"align", "retrain", "judge", *(name for name, body in STAGES.items() if body.shared)}


def content() -> dict[str, Any]:
    """The whole file."""
    return {"name": "thumbwheel", "pull": [], "deployments": [entry(each) for each in deployments()]}


def entry(deployment: RunnerDeployment) -> dict[str, Any]:
    """A deployment as prefect.yaml has it."""
    limit = deployment.concurrency_options
    assert limit is not None and deployment.concurrency_limit is not None
    found: dict[str, Any] = {
        "name": deployment.name,
        "description": deployment.description,
        "entrypoint": deployment.entrypoint,
        "tags": list(deployment.tags),
        "concurrency_limit": {
            "limit": deployment.concurrency_limit,
            "collision_strategy": limit.collision_strategy.value,
        },
        "work_pool": {"name": "gpu" if deployment.name in TRAINS else "cpu"},
    }
    if deployment.triggers:
        trigger = bell_trigger()
        found["triggers"] = [
            {
                "type": "event",
                "name": trigger.name,
                "expect": sorted(trigger.expect),
                "match": dict(BELL_MATCH),
                "posture": trigger.posture.value,
                "threshold": trigger.threshold,
                "within": trigger.within.total_seconds(),
            }
        ]
    intervals = [s.schedule for s in deployment.schedules or [] if isinstance(s.schedule, IntervalSchedule)]
    if intervals:
        found["schedules"] = [{"interval": each.interval.total_seconds()} for each in intervals]
    return found


def text() -> str:
    """The file's text."""
    buffer = io.StringIO()
    yaml().dump(content(), buffer)
    return HEAD + buffer.getvalue()


def main() -> int:
    """Say whether prefect.yaml is up to date; with --write, make it so."""
    parser = argparse.ArgumentParser(prog="python -m flows.prefect_yaml", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        write_text(PATH, text())
    current = PATH.exists() and PATH.read_text(encoding="utf-8") == text()
    print(f"{PATH} is {'up to date' if current else 'out of date: python -m flows.prefect_yaml --write'}")
    return 0 if current else 1


if __name__ == "__main__":
    sys.exit(main())
