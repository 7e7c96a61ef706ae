"""The drills of the feedback service: each of its promises is put to the test on real processes, on SQLite and PostgreSQL.

    python -m benchmarks.feedback_drills                     # all of them: about 20 minutes on two cores
    python -m benchmarks.feedback_drills --only kill latency # some
    python -m benchmarks.feedback_drills --quick             # a small share of each, two or three minutes
    python -m benchmarks.feedback_drills --only peers        # MLflow and Label Studio beside it; installs the latter

Prints PASS or FAIL with figures for each drill, appends a record of each to .thumbwheel/drills/records.jsonl at once, so that
what was measured is kept when a later drill breaks, and exits 1 when a promise is not kept.
`python -m benchmarks.reliability_page` makes docs/reliability.md of the newest records.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.drills import batches, deliveries, disk, kill, latency, peers, requests, rollback, startup
from benchmarks.peers import CHECKOUT

FOLDER = CHECKOUT / ".thumbwheel" / "drills"
RECORDS = FOLDER / "records.jsonl"
Run = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Drill:
    """run(folder, kind of database, *amounts); quick: the amounts of a small share. databases: kinds that it runs on."""

    name: str
    promise: str
    run: Run
    amounts: dict[str, tuple[float, ...]]
    quick: tuple[float, ...]

    def turns(self, quick: bool) -> Iterator[tuple[str, tuple[float, ...]]]:
        """(kind of database, amounts) of each of its runs."""
        for kind, amounts in self.amounts.items():
            yield kind, self.quick if quick else amounts


def injections(folder: Path, kind: str) -> dict[str, Any]:
    """The injection corpus in a real browser: the tests of the pages."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "test_nothing and runs",
        "tests/feedback",
    ]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr.strip()[-200:]
    fine = done.returncode == 0 and "skipped" not in last
    return {"tests": last, "missed": [] if fine else ["tests"]}


DRILLS = (
    Drill(
        "kill",
        "0 acknowledged opinions lost in 100,000 writes, API and PostgreSQL killed in a loop",
        kill.run,
        {"sqlite": (20_000, 3.0), "postgresql": (100_000, 6.0)},
        (160, 1.0),
    ),
    Drill("deliveries", "K deliveries make 1 row", deliveries.run, {"sqlite": (2000,), "postgresql": (2000,)}, (60,)),
    Drill(
        "latency", "p99 under 50 ms at 200 writes/s", latency.run, {"sqlite": (60.0,), "postgresql": (60.0,)}, (2.0,)
    ),
    Drill(
        "batches",
        "every accepted opinion in exactly one batch, or excluded by name",
        batches.run,
        {"sqlite": (20,), "postgresql": (20,)},
        (1,),
    ),
    Drill(
        "disk",
        "disk full: a clean 503, no partial row, recovery without help",
        disk.run,
        {"sqlite": (1600,), "postgresql": (1600,)},
        (160,),
    ),
    Drill(
        "requests",
        "0 server errors and 0 unauthorised successes in 10,000 generated requests",
        requests.run,
        {"sqlite": (10_000,)},
        (60,),
    ),
    Drill("startup", "first answer within 3 s of the start", startup.run, {"sqlite": (5,), "postgresql": (5,)}, (1,)),
    Drill("rollback", "rollback within 30 s", rollback.run, {"sqlite": (5,), "postgresql": (5,)}, (1,)),
    Drill(
        "peers",
        "beside MLflow and Label Studio: no bar but the service's own, 0 lost and 1 row for K deliveries",
        peers.run,
        {"sqlite": (3, 10.0, 3), "postgresql": (3, 10.0, 3)},
        (1, 2.0, 1),
    ),
    Drill("injections", "nothing that a user writes runs", injections, {"sqlite": ()}, ()),
)
NAMES = [drill.name for drill in DRILLS]
OWN = [name for name in NAMES if name != "peers"]  # that one installs Label Studio: only when it is named


def perform(drill: Drill, kind: str, amounts: Sequence[float], folder: Path) -> dict[str, Any]:
    """One run of a drill in `folder`, made anew; its record. A drill that breaks has failed, and says how."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began, load = time.monotonic(), os.getloadavg()[0]
    try:
        found = drill.run(folder, kind, *amounts)
    except Exception as error:
        found = {"missed": ["ran"], "error": f"{type(error).__name__}: {error}"}
    return {
        "drill": drill.name,
        "database": kind,
        "amounts": list(amounts),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - began, 1),
        "load_before": round(load, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **found,
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.feedback_drills", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=OWN, metavar="DRILL", help=", ".join(NAMES))
    parser.add_argument("--database", choices=("sqlite", "postgresql"), help="only this one")
    parser.add_argument("--quick", action="store_true", help="a small share; its records are not kept")
    parser.add_argument("--workdir", type=Path, default=FOLDER / "work", help="made anew for each run")
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    args.workdir.chmod(0o755)  # PostgreSQL's user has to reach its folder
    failed = 0
    for drill in (drill for drill in DRILLS if drill.name in args.only):
        for kind, amounts in drill.turns(args.quick):
            if args.database in (None, kind):
                record = perform(drill, kind, amounts, args.workdir.resolve() / f"{drill.name}-{kind}")
                failed += bool(record["missed"])
                print("FAIL" if record["missed"] else "PASS", json.dumps(record), flush=True)
                if not args.quick:
                    RECORDS.parent.mkdir(parents=True, exist_ok=True)
                    with RECORDS.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
