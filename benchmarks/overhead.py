"""What orchestration and records cost: `python -m benchmarks.overhead` writes its section of docs/benchmarks.md.

On servers of its own (Prefect, MLflow, chat service, runner, bell) a flow runs a stage whose body does nothing, again and
again, each time with another input, so that it is looked up, run, recorded by DVC and MLflow and shown in Prefect as any
other; and the deployment `retrain` is run with no batch open. Exits 1 when a bar is missed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import psutil

from benchmarks.evidence import CHECKOUT, revision, table
from benchmarks.workspace import Workspace
from flows import servers
from flows.files import write_text

PAGE = CHECKOUT / "docs" / "benchmarks.md"
TITLE = "## Orchestration and records"
STAGE_BAR, RETRAIN_BAR = 1.5, 5.0  # seconds
REPEATS = 9
DVC_YAML = """\
stages:
  idle:
    cmd: "true"
    deps: [input.txt]
    outs: [artifacts/idle]
"""
FLOW = """
import json, sys, time
from pathlib import Path
from prefect import flow
from flows import stage
from flows.flowrun import open_flow_run
stage.STAGES["idle"] = stage.Body("benchmarks.idle")

@flow(name="overhead")
def overhead():
    with open_flow_run("overhead") as run:
        seconds = []
        for turn in range({repeats} + 1):
            (run.root / "input.txt").write_text(str(turn))
            started = time.perf_counter()
            assert run.stage("idle").how == "ran"
            seconds.append(time.perf_counter() - started)
        return seconds[1:]  # the first one imports what a running flow has imported

Path("seconds.json").write_text(json.dumps(overhead()))
"""


def main() -> int:
    """The command line."""
    with tempfile.TemporaryDirectory(prefix="thumbwheel-overhead-") as folder:
        stages, retrains = measure(Path(folder))
    write_text(PAGE, with_section(PAGE.read_text(encoding="utf-8"), section(stages, retrains)))
    print(section(stages, retrains))
    return 0 if statistics.median(stages) < STAGE_BAR and statistics.median(retrains) < RETRAIN_BAR else 1


def measure(folder: Path) -> tuple[list[float], list[float]]:
    """Seconds of each stage that does nothing, and of each `retrain` that finds nothing to do."""
    workspace = Workspace(folder / "workspace", folder / "cache", "micro", {})
    write_text(workspace.root / "dvc.yaml", DVC_YAML)
    workspace.command("up")
    try:
        environment = workspace.environment | servers.environment(workspace.root)
        flow = FLOW.format(repeats=REPEATS)
        subprocess.run([sys.executable, "-c", flow], cwd=workspace.root, env=environment, check=True)
        stages = json.loads((workspace.root / "seconds.json").read_text(encoding="utf-8"))
        retrains = []
        for _ in range(3):
            run = workspace.ended(workspace.start_flow("retrain"), 120)
            if run["state_name"] != "NothingToDo":
                raise RuntimeError(f"retrain ended as {run['state_name']}: {run['state']['message']}")
            retrains.append(between(run["start_time"], run["end_time"]))
            time.sleep(1)
        return stages, retrains
    finally:
        workspace.command("down")


def between(start: str, end: str) -> float:
    """Seconds from one of Prefect's moments to another."""
    first, last = (datetime.fromisoformat(text.replace("Z", "+00:00")) for text in (start, end))
    return (last - first).total_seconds()


def section(stages: list[float], retrains: list[float]) -> str:
    """The section's text."""

    def row(what: str, seconds: list[float], bar: float) -> list[str]:
        median = statistics.median(seconds)
        held = "" if median < bar else ", missed"
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        return [what, f"**{median:.2f} s**", f"{spread} ({len(seconds)})", f"{bar:.1f} s{held}"]

    load, cores = psutil.getloadavg()[0], os.cpu_count()
    code = revision()
    return "\n\n".join(
        [
            TITLE,
            f"Written by `python -m benchmarks.overhead` at revision {code[:12]}"
            f"{' with local changes' if code.endswith('-dirty') else ''}: seconds on the clock, on SQLite, with a load of "
            f"{load:.1f} on {cores} cores. A stage that does nothing is looked up and recorded by DVC, has its run in MLflow, "
            "its task in Prefect and its progress like any other.",
            table(
                ["what", "median", "lowest to highest (runs)", "must be under"],
                [
                    row("a stage whose body does nothing, in a flow that runs", stages, STAGE_BAR),
                    row("`retrain` with no open batch, from its start to its end", retrains, RETRAIN_BAR),
                ],
            ),
        ]
    )


def with_section(page: str, text: str) -> str:
    """The page with this section, which is its last."""
    return "\n\n".join(filter(None, (page.split(TITLE)[0].strip(), text.strip()))) + "\n"


def kept(page: str) -> str:
    """The section as the page has it, "" where it has none."""
    _, title, rest = page.partition(TITLE)
    return title + rest


if __name__ == "__main__":
    sys.exit(main())
