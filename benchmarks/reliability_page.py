"""The page of promises: `python -m benchmarks.reliability_page` writes docs/reliability.md from what the drills found.

Of each drill and kind of database the newest record counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.feedback_drills import DRILLS, RECORDS
from benchmarks.peers import CHECKOUT
from flows.files import write_text

Record = Mapping[str, Any]

HEAD = """# What the feedback service promises, and what it kept

Written by `python -m benchmarks.reliability_page` from what `python -m benchmarks.feedback_drills` found; every
figure here was measured, on the real service in a process of its own, PostgreSQL with its own durability (fsync and
synchronous commits on) and SQLite with `synchronous = FULL`. Anyone can run it on one machine (about 20 minutes;
`--only kill`, `--database sqlite`, `--quick` for less); it exits 1 when a promise is not kept. A small share of each
drill is a test (`tests/benchmarks/test_feedback_drills.py`). Load is the machine's load average before the drill:
above the number of cores, others were at work too and times are too long."""

TAIL = """## How each is put to the test

- **kill**: 16 writers send `PUT` thumbs, `POST /v1/feedback` and comparisons with an `Idempotency-Key`, each until it
  is acknowledged, while the API, PostgreSQL with all its processes, one of its backends, or both are killed by
  SIGKILL and started again. Every write says something new. Afterwards the log has to have the very event that each
  2xx named (`lost`), one for each write however often it was sent (`doubled`), and each opinion the state of its
  newest event (`half written`).
- **deliveries**: each request three times, overtaking each other on 16 connections, then once more with another body
  under its key (422).
- **latency**: 16 clients in a second process, a model loaded and idle; a write's time counts from the moment at which
  it was due, so that a pause is charged with all that should have come in it. Then as many as are answered (closed
  loop).
- **batches**: two processes open and consume batches at once and are killed one after another, while people write,
  revise, take back and are moderated; then SQL of the drill's own counts what breaks a rule.
- **disk**: the database's volume (memory, mounted for the drill) is filled; 20 writes have to be refused with 503 and
  OpenAI's error shape; then there is room again. PostgreSQL's whole data directory stands on the volume; were it to
  stop, the drill would start it again as a service manager does (`restarts`).
- **requests**: schemathesis makes valid and invalid requests of the OpenAPI schema for every route, half of them
  about answers that exist, of a service that asks everybody for keys. An answer has to be none of 5xx, documented,
  and of the documented shape. A quarter is sent again without a key, with a key that does not exist, and with one of
  all scopes but the route's: 401 or 403.
- **startup**: from the start of the process to the first thumb, migrated database, no model; median. `import
  feedback.service` loads neither torch nor Prefect, MLflow, DVC, Great Expectations, pandas or pyarrow.
- **rollback**: from the row in `promotion` to the first answer of the model before, while people ask."""


def kill(r: Record) -> str:
    """The figures of a record, as the table shows them; so do those below."""
    kills = ", ".join(f"{number} {what}" for what, number in r["kills"].items())
    return (
        f"{r['acknowledged']:,} acknowledged, **{r['lost']} lost**, {r['doubled']} doubled, {r['half_written']} half written; "
        f"kills: {kills}; {r['sent_again']:,} sent again, {r['said_before']} of them had been written; {r['per_second']:g}/s"
    )


def deliveries(r: Record) -> str:
    """See kill."""
    refused = r["seen"].get("other body: 422 idempotency_key_reused", 0)
    sent = f"{r['deliveries']:,} deliveries of {r['requests']:,} requests"
    return f"{sent}: {r['rows']:,} rows, {r['events']:,} events; {refused:,} × 422"


def latency(r: Record) -> str:
    """See kill."""
    s, m = r["steady"], r["most"]
    return (
        f"{s['per_second']:g}/s: p50 {s['p50_ms']:g}, **p99 {s['p99_ms']:g}**, max {s['max_ms']:g} ms "
        f"({s['service_cpu_ms_a_write']:g} ms of CPU a write); at most {m['per_second']:g}/s, p99 {m['p99_ms']:g} ms"
    )


def batches(r: Record) -> str:
    """See kill."""
    names = ("revised", "retracted", "neutral", "quarantined", "rejected")
    excluded = ", ".join(f"{r[name]} {name}" for name in names if name in r)
    broken = ", ".join(f"{number} {name}" for name, number in r["broken"].items()) or "0 rules broken"
    done = f"{r['writes']:,} writes, {r['kills']} kills, {r['batches']} batches"
    return f"{done}: {r['accepted']} accepted; {excluded}; **{broken}**"


def disk(r: Record) -> str:
    """See kill."""
    return (
        f"{r['refused']} refused ({', '.join(r['answers_when_full'])}, in {r['slowest_refusal_seconds']:g} s at most); "
        f"{r['lost']} lost, {r['half_written']} half written; "
        f"writes again after {r['recovered_seconds']:g} s; restarts: {r['database_restarts']}"
    )


def requests(r: Record) -> str:
    """See kill."""
    return (
        f"{r['requests']:,} requests: **{r['server_errors']} server errors, {r['unauthorised']} unauthorised successes**, "
        f"{r['contradictions']} contradictions of the schema"
    )


def startup(r: Record) -> str:
    """See kill."""
    return (
        f"/healthz {r['healthz_seconds']:g} s, first thumb **{r['first_thumb_seconds']:g} s** (median of {r['starts']})"
    )


def rollback(r: Record) -> str:
    """See kill."""
    return f"{r['rollbacks']} rollbacks, the slowest took **{r['slowest_seconds']:g} s**"


def injections(r: Record) -> str:
    """See kill."""
    return str(r["tests"])


SHOWN: dict[str, Callable[[Record], str]] = {
    "kill": kill,
    "deliveries": deliveries,
    "latency": latency,
    "batches": batches,
    "disk": disk,
    "requests": requests,
    "startup": startup,
    "rollback": rollback,
    "injections": injections,
}


BESIDE = """## Beside others

`python -m benchmarks.feedback_drills --only peers`: the same thumbs, each with words of its own, go to this service and to
others in the same run and on the same kind of database, in turns (A B A B), by the same client: {writers} writers, each with
a kept connection, send the next when the one before is answered. Medians of the rounds; "ours / it" is this service's
thumbs a second over theirs. Each stands as it comes: one process of ours; `mlflow server` with its four workers (its scoring
jobs are off) and the request that `mlflow.log_feedback` makes, on traces made before; `label-studio start` (its own way
of serving, Django's development server; tried on SQLite alone) and annotations of tasks. Then the server's whole process
group, and PostgreSQL with it, is killed by SIGKILL under the same writers: `lost` were acknowledged and are not in the
database, which is read by SQL. Last, one thumb is sent three times as it is, and three times with the key by which an API
knows a request again. No loss of power was tried, and no accounts: this service and MLflow ran without keys, Label Studio
with its token.

Argilla was not measured: as its documentation says, its server needs Elasticsearch or OpenSearch besides Redis, and neither
comes from PyPI or Debian."""


def beside(records: Mapping[tuple[str, str], Record]) -> str:
    """The section about others; empty when nothing was measured."""
    found = [record for (drill, _), record in records.items() if drill == "peers" and "error" not in record]
    if not found:
        return ""
    heads = [
        "database",
        "system",
        "thumbs/s",
        "ours / it",
        "p50 ms",
        "p99 ms",
        "SIGKILL",
        "three deliveries",
        "its own client",
    ]
    rows = [
        [r["database"], f"{name} {s['version']}", *compared(r["systems"], s)]
        for r in found
        for name, s in r["systems"].items()
    ]
    notes = [f"{name} on {r['database']}: not measured, {why}." for r in found for name, why in r["absent"].items()]
    when = [f"{r['database']}: {r['time'][:16]} UTC, load {r['load_before']:g} before, rounds × seconds × kills: "
            f"{' × '.join(f'{amount:g}' for amount in r['amounts'])}." for r in found]  # fmt: skip
    return "\n\n".join([BESIDE.format(writers=found[0]["writers"]), table(heads, rows), " ".join([*when, *notes])])


def compared(systems: Mapping[str, Record], s: Record) -> list[str]:
    """The figures of one system, for beside's table."""
    ratio = next(iter(systems.values()))["median_per_second"] / s["median_per_second"]
    own = s.get("own_client")
    wrong = {status: number for status, number in s["statuses"].items() if status not in ("200", "201", "broken")}
    copies = [f"{how}, rows made: {c['rows']}" if c else f"{how}: it has none" for how, c in s["copies"].items()]
    return [
        f"**{s['median_per_second']:g}**" + "".join(f", {number} × {status}" for status, number in wrong.items()),
        f"{ratio:.2f}",
        f"{s['p50_ms']:g}",
        f"{s['p99_ms']:g}",
        f"kills: {s['kills']}, {s['acknowledged_under_kills']:,} acknowledged under them, {s['lost']} lost",
        "; ".join(copies),
        f"{own['per_second']:g}/s, p99 {own['p99_ms']:g} ms" if own else "",
    ]


def newest(lines: Iterable[str]) -> dict[tuple[str, str], Record]:
    """The last record of each drill and kind of database."""
    records = [json.loads(line) for line in lines]
    return {(record["drill"], record["database"]): record for record in records}


def page(records: Mapping[tuple[str, str], Record]) -> str:
    """The whole page."""
    rows = [
        [
            drill.promise,
            f"`{drill.name}`",
            kind,
            str(r["error"]) if "error" in r else SHOWN[drill.name](r),
            f"no: {', '.join(r['missed'])}" if r["missed"] else "yes",
            f"{r['time'][:16]}, load {r['load_before']:g}, {r['seconds']:.0f} s",
        ]
        for drill in DRILLS
        if drill.name in SHOWN  # what peers are beside it stands in a section of its own
        for kind in drill.amounts
        if (r := records.get((drill.name, kind)))
    ]
    heads = ["promise", "drill", "database", "seen", "kept", "when (UTC)"]
    machine = next(iter(records.values()))["machine"] if records else "no machine yet"
    return (
        "\n\n".join([HEAD, f"Measured on: {machine}.", table(heads, rows), *filter(None, [beside(records)]), TAIL])
        + "\n"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *rows])


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability_page", description=__doc__.split("\n")[0])
    parser.add_argument("--input", type=Path, default=RECORDS)
    parser.add_argument("--output", type=Path, default=CHECKOUT / "docs" / "reliability.md")
    arguments = parser.parse_args()
    with arguments.input.open(encoding="utf-8") as file:
        write_text(arguments.output, page(newest(file)))
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
