"""The drills of the loop: what feedback does on its way into a model while the machinery around it is being killed.

    python -m benchmarks.loop_drills            # all drills; --only NAME … for some

One workspace (preset micro, everything that `make up` starts) goes through all drills in turn. Each gives opinions over
HTTP and disturbs something; nobody lends a hand. Afterwards every opinion has to stand in exactly one batch, or be left
out by name; every batch has to be learned from once; MLflow has to hold one run a stage and fingerprint, none of them open;
Prefect no open run; and no process may be left that nobody owns. Writes docs/reliability-loop.md, exits 1 when a drill fails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa

from benchmarks.evidence import CHECKOUT, revision, table
from benchmarks.workspace import ENDED, Workspace, wait
from feedback import promotions
from feedback.batches import Batch
from feedback.tables import BatchItemRow, BatchRow, FeedbackRow, table_of
from flows import bell, rater, servers
from flows.files import write_text

OPINIONS = 8  # a batch
RECOVERY_SECONDS = 400.0
NEW_PRESS_SECONDS = 60.0  # from the last opinion of a batch to the start of its retraining, with nothing in the way
STAGES = ("snapshot", "reward", "ppo", "judge", "promote")
# what comes is promoted, whatever it is, and it is nearly the SFT model: drills look at the way, not at the model
OPEN_GATE = {
    "min_gain": -2.0,
    "max_second_judge_fall": 1.0,
    "max_most_common": 1.0,
    "min_distinct": 0.0,
    "min_relevance_kept": 0.0,
    "min_ended_kept": 0.0,
    "max_perplexity_ratio": 100.0,
    "max_kl": 1000.0,
    "min_prompts": 0,
}
CHANGES = {
    "rater.enabled": False,
    "bell.opinions": OPINIONS,
    "ppo.learning_rate": 1e-6,
    "judge.prompts": 12,
    "gate": OPEN_GATE,
}


class Loop:
    """A workspace in which the loop runs, and who asks it."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.seen = 0  # prompts that were asked already
        self.given = 0  # opinions

    @contextmanager
    def running(self) -> Iterator[Loop]:
        """With everything started and the SFT model serving; everything ended afterwards."""
        self.workspace.command("up")
        try:
            with self.workspace.store() as store, store.read() as connection:
                crowned = promotions.champion(connection) is not None
                count = sa.select(sa.func.count()).select_from(table_of(FeedbackRow))
                self.given = self.seen = connection.execute(count).scalar_one()  # by an earlier run of drills
            if not crowned:
                ended = self.workspace.ended(self.workspace.start_flow("align"), 600)
                if ended["state_type"] != "COMPLETED":
                    raise RuntimeError(f"align ended as {ended['state_type']}: {ended['state']['message']}")
            yield self
        finally:
            self.workspace.command("down")

    def opine(self, count: int = OPINIONS) -> None:
        """Give `count` opinions on the champion's answers to prompts that nobody asked before."""
        prompts = self.workspace.prompts(seed=1)[self.seen :]
        options = rater.RaterOptions(max_tokens=16, concurrency=4)
        tally = self.workspace.rate(prompts, count, options)
        self.seen += count + tally.refused
        self.given += count

    @property
    def runner(self) -> psutil.Process:
        """The process that runs flow runs."""
        return psutil.Process(servers.read(self.workspace.root)["runner"].pid)

    def workers(self) -> list[psutil.Process]:
        """The processes of flow runs under way."""
        with suppress(psutil.NoSuchProcess):
            return self.runner.children()
        return []

    def progress(self) -> list[dict[str, Any]]:
        """What all stages told so far."""
        path = servers.state_folder(self.workspace.root) / "progress.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def when(self, stage: str, since: int, seconds: float = RECOVERY_SECONDS) -> None:
        """Wait until a stage starts that had not when there were `since` lines of progress."""
        end = time.monotonic() + seconds
        while not any(e["stage"] == stage and e.get("state") == "started" for e in self.progress()[since:]):
            if time.monotonic() > end:
                raise RuntimeError(f"stage {stage} did not start in {seconds:.0f} s")
            time.sleep(0.02)

    def settled(self, seconds: float = RECOVERY_SECONDS) -> None:
        """Wait until no opinion waits, every batch is consumed and no run is under way."""

        def look() -> bool | None:
            with self.workspace.store() as store:
                if store.pending().count or store.open_batches():
                    return None
            runs = self.workspace.flow_runs("retrain")
            return True if all(run["state_type"] in ENDED for run in runs) else None

        wait(patiently(look), seconds, "the loop did not come to rest")

    def learned(self) -> list[dict[str, Any]]:
        """The flow runs that learned from something, oldest first."""
        runs = self.workspace.flow_runs("retrain")
        return [r for r in runs if r["state_type"] == "COMPLETED" and r["state_name"] != "NothingToDo"]


def patiently(look: Callable[[], Any]) -> Callable[[], Any]:
    """`look`, that finds nothing as long as a server or the database is away."""
    import httpx

    def asked() -> Any:
        try:
            return look()
        except (httpx.HTTPError, sa.exc.OperationalError, sa.exc.DBAPIError, RuntimeError, KeyError):
            return None

    return asked


# ---------------------------------------------------------------- what has to hold


def audit(loop: Loop) -> list[str]:
    """What does not hold, in words; empty when all is well."""
    return [*audit_opinions(loop), *audit_mlflow(loop), *audit_prefect(loop), *audit_processes(loop)]


def audit_opinions(loop: Loop) -> list[str]:
    """Every opinion given is in exactly one batch, or left out by name; every batch was learned from once."""
    opinion, item, batch = table_of(FeedbackRow), table_of(BatchItemRow), table_of(BatchRow)
    with loop.workspace.store() as store, store.read() as connection:
        stored = connection.execute(sa.select(sa.func.count()).select_from(opinion)).scalar_one()
        items = connection.execute(sa.select(item.c.feedback_id, item.c.accepted, item.c.reason)).all()
        accepted = Counter(row.feedback_id for row in items if row.accepted)
        named = {row.feedback_id for row in items if row.reason}
        known = set(connection.execute(sa.select(opinion.c.id)).scalars())
        batches = connection.execute(sa.select(batch).order_by(batch.c.id)).all()
    wrong = []
    if stored != loop.given:
        wrong.append(f"{loop.given} opinions were given, {stored} are stored")
    if several := [id for id, times in accepted.items() if times != 1]:
        wrong.append(f"opinions {several} are in several batches")
    if lost := known - set(accepted) - named:
        wrong.append(f"opinions {sorted(lost)} are in no batch, and no reason is named")
    if unlearned := [row.id for row in batches if row.consumed_at is None or not row.mlflow_run_id]:
        wrong.append(f"batches {unlearned} taught nobody")
    ends = [(row.first_seq, row.last_seq) for row in batches]
    if any(first != before + 1 for (_, before), (first, _) in itertools.pairwise(ends)):
        wrong.append(f"the batches' ranges are not one after the other: {ends}")
    return wrong


def audit_mlflow(loop: Loop) -> list[str]:
    """One run a stage and fingerprint, none of them open."""
    import mlflow

    client = mlflow.MlflowClient(loop.workspace.url("mlflow"))
    experiment = client.get_experiment_by_name("thumbwheel")
    runs = client.search_runs([experiment.experiment_id], max_results=5000)
    wrong = [f"MLflow's run {run.info.run_name} is open" for run in runs if run.info.status == "RUNNING"]
    prints = Counter(run.data.tags.get("thumbwheel.fingerprint") for run in runs)
    wrong += [
        f"{times} runs in MLflow with the fingerprint {name}" for name, times in prints.items() if name and times > 1
    ]
    return wrong


def audit_prefect(loop: Loop) -> list[str]:
    """No flow run and no task run is open."""
    running = {"state": {"type": {"any_": ["RUNNING", "PENDING"]}}}
    found = [("flow", run) for run in loop.workspace.api("/flow_runs/filter", {"flow_runs": running})]
    found += [("task", run) for run in loop.workspace.api("/task_runs/filter", {"task_runs": running})]
    return [f"Prefect's {kind} run {run['name']} is open" for kind, run in found]


def audit_processes(loop: Loop) -> list[str]:
    """No process of the workspace but its servers and what they started themselves."""
    owned: set[int] = set()
    for server in servers.read(loop.workspace.root).values():
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(server.pid)
            owned |= {process.pid, *(child.pid for child in process.children(recursive=True))}
    left = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            ours = process.environ().get("THUMBWHEEL_ROOT") == str(loop.workspace.root)
            if ours and process.pid not in owned and process.status() != psutil.STATUS_ZOMBIE:
                left.append(f"process {process.pid} is left: {' '.join(process.cmdline())[:80]}")
    return left


# ---------------------------------------------------------------- the drills


def undisturbed(loop: Loop) -> str:
    """The loop turns by itself, twice: N opinions, one retraining, whose model serves; the next N, the next."""
    slowest = 0.0
    for _ in range(2):
        before, batches, champion = len(loop.learned()), len(loop.workspace.batches()), champion_of(loop)
        loop.opine()
        last = datetime.now(UTC)
        loop.workspace.consumed(batches + 1, RECOVERY_SECONDS)
        loop.settled()
        runs = loop.learned()
        if len(runs) != before + 1:
            raise RuntimeError(f"{len(runs) - before} retrainings followed {OPINIONS} opinions")
        started = datetime.fromisoformat(runs[-1]["start_time"].replace("Z", "+00:00"))
        slowest = max(slowest, (started - last).total_seconds())
        serves(loop, champion)
    if slowest > NEW_PRESS_SECONDS:
        raise RuntimeError(f"a retraining began {slowest:.0f} s after the last opinion")
    return f"each began {slowest:.1f} s after its last opinion at the latest"


def champion_of(loop: Loop) -> str:
    """The model that reigns."""
    with loop.workspace.store() as store:
        champion = store.champion()
    assert champion is not None
    return champion.model_hash


def serves(loop: Loop, before: str, seconds: float = 60.0) -> None:
    """Wait until the chat service answers with a champion that is another than `before`."""
    import httpx

    def look() -> bool | None:
        ready = httpx.get(loop.workspace.url("service") + "/readyz", trust_env=False, timeout=30)
        reigns = champion_of(loop)
        return True if reigns != before and ready.json().get("model_hash") == reigns else None

    wait(patiently(look), seconds, "the new champion does not serve")


def events_lost(loop: Loop) -> str:
    """Prefect's server is down when the bell rings."""
    stop(loop, "prefect")
    try:
        batches = len(loop.workspace.batches())
        loop.opine()
        wait(lambda: len(loop.workspace.batches()) > batches or None, 60, "the bell did not open a batch")
        time.sleep(3)  # its ring goes nowhere
    finally:
        start(loop)
    loop.settled()
    return "the bell rang again"


def events_doubled(loop: Loop) -> str:
    """Every ring comes three times, and those of an old batch after those of a new one."""
    before = len(loop.learned())
    first = opened(loop)
    second = opened(loop)
    for batch in (second, first, second, first, second, first):
        ring(loop, batch)
    time.sleep(5)
    loop.settled()
    learned = len(loop.learned()) - before
    if learned > 2:
        raise RuntimeError(f"{learned} retrainings learned from 2 batches")
    idle = sum(run["state_name"] == "NothingToDo" for run in loop.workspace.flow_runs("retrain"))
    return f"{learned} learned, {idle} found nothing to do"


def opened(loop: Loop) -> Batch:
    """A batch more, open."""
    batches = len(loop.workspace.batches())
    loop.opine()
    wait(lambda: len(loop.workspace.batches()) > batches or None, 60, "the bell did not open a batch")
    return loop.workspace.batches()[-1]


def ring(loop: Loop, batch: Batch) -> None:
    """Send the event of a batch once more."""
    event = {
        "occurred": datetime.now(UTC).isoformat(),
        "event": bell.EVENT,
        "resource": {"prefect.resource.id": f"{bell.RESOURCE}.{batch.id}"},
        "payload": {"batch_id": batch.id},
        "id": str(uuid.uuid4()),
    }
    loop.workspace.api("/events", [event])


def written_meanwhile(loop: Loop) -> str:
    """Opinions arrive in the middle of a retraining: they wait for the next batch."""
    before, since = len(loop.workspace.batches()), len(loop.progress())
    loop.opine()
    loop.when("reward", since)
    loop.opine()
    loop.settled()
    batches = loop.workspace.batches()[before:]
    sizes = [batch.accepted for batch in batches]
    if sizes != [OPINIONS, OPINIONS]:
        raise RuntimeError(f"batches of {sizes} instead of two of {OPINIONS}")
    return f"batches of {sizes[0]} and {sizes[1]}"


def killed_in(stage: str) -> Callable[[Loop], str]:
    """The drill that kills the flow run's process as soon as a stage starts."""

    def drill(loop: Loop) -> str:
        since = len(loop.progress())
        loop.opine()
        loop.when(stage, since)
        began = time.monotonic()
        for worker in loop.workers():
            worker.kill()
        loop.settled()
        return f"done {time.monotonic() - began:.0f} s after the kill"

    drill.__doc__ = f"The flow run's process is killed as `{stage}` starts."
    return drill


def runner_killed(loop: Loop) -> str:
    """The runner and its flow run are killed at once, as when a machine dies."""
    since = len(loop.progress())
    loop.opine()
    loop.when("ppo", since)
    began = time.monotonic()
    for process in [loop.runner, *loop.workers()]:
        process.kill()
    loop.settled()
    return f"done {time.monotonic() - began:.0f} s after the kill"


def servers_killed(loop: Loop) -> str:
    """Prefect's and MLflow's servers are killed in the middle of PPO."""
    since = len(loop.progress())
    loop.opine()
    loop.when("ppo", since)
    began = time.monotonic()
    for name in ("prefect", "mlflow"):
        psutil.Process(servers.read(loop.workspace.root)[name].pid).kill()
    loop.settled()
    return f"done {time.monotonic() - began:.0f} s after the kill"


def two_workers(loop: Loop) -> str:
    """A second runner serves the same deployments, and two runs are asked for at once."""
    import subprocess

    batches = len(loop.workspace.batches())
    environment = loop.workspace.environment | servers.environment(loop.workspace.root)
    other = subprocess.Popen(
        [sys.executable, "-c", SECOND_RUNNER], cwd=loop.workspace.root, env=environment, start_new_session=True
    )
    try:
        loop.opine()
        for _ in range(2):
            loop.workspace.start_flow("retrain")
        loop.workspace.consumed(batches + 1, RECOVERY_SECONDS)
        loop.settled()
    finally:
        other.terminate()
        with suppress(subprocess.TimeoutExpired):
            other.wait(20)
        if other.poll() is None:
            other.kill()
            other.wait()
    return "one learned, the others found nothing to do"


SECOND_RUNNER = """
import asyncio, pathlib, tempfile
from flows import deployments
asyncio.run(deployments.run(list(deployments.deployments()), pathlib.Path(tempfile.mkdtemp()) / 'ready'))
"""

DRILLS: dict[str, Callable[[Loop], str]] = {
    "undisturbed": undisturbed,
    "events lost": events_lost,
    "events doubled and reordered": events_doubled,
    "written during a retraining": written_meanwhile,
    **{f"killed in {stage}": killed_in(stage) for stage in STAGES},
    "runner killed": runner_killed,
    "servers killed": servers_killed,
    "two workers": two_workers,
}


def stop(loop: Loop, name: str) -> None:
    """End a server, and have nobody start it again."""
    servers.stop(loop.workspace.root, [name, "keeper"])  # the keeper goes first


def start(loop: Loop) -> None:
    """Start servers again, and the keeper."""
    loop.workspace.command("up")


@dataclass(frozen=True)
class Outcome:
    """How a drill went. seconds: until the loop was at rest again; wrong: what did not hold, empty when all did."""

    name: str
    seconds: float
    told: str
    wrong: list[str]


def drill(loop: Loop, name: str) -> Outcome:
    """Run one drill and look at what it left."""
    started = time.monotonic()
    try:
        told = DRILLS[name](loop)
        wrong: list[str] = []
    except RuntimeError as error:
        told, wrong = "", [str(error)]
    seconds = time.monotonic() - started
    try:
        # the last words of processes that end now
        wait(lambda: True if not audit(loop) else None, 30, "")
    except RuntimeError:
        wrong += audit(loop)
    return Outcome(name, round(seconds, 1), told, wrong)


# ---------------------------------------------------------------- the page


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop_drills", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(DRILLS), default=list(DRILLS))
    parser.add_argument("--workdir", type=Path, help="by default a temporary folder")
    parser.add_argument("--output", type=Path, default=CHECKOUT / "docs" / "reliability-loop.md")
    arguments = parser.parse_args()
    workdir = (arguments.workdir or Path(tempfile.mkdtemp(prefix="thumbwheel-loop-"))).resolve()
    run(workdir, arguments.only)
    outcomes = read_outcomes(workdir)
    write_text(arguments.output, page(outcomes))
    return 1 if any(outcome.wrong for outcome in outcomes) else 0


def run(workdir: Path, names: Sequence[str]) -> None:
    """The drills, one after the other, in one workspace; what came of each goes to outcomes.jsonl."""
    workspace = Workspace(workdir / "workspace", workdir / "cache", "micro", CHANGES)
    with Loop(workspace).running() as loop, (workdir / "outcomes.jsonl").open("a", encoding="utf-8") as file:
        for name in names:
            line = json.dumps(vars(drill(loop, name)))
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()


def read_outcomes(workdir: Path) -> list[Outcome]:
    """The newest outcome of each drill, in their order."""
    lines = (workdir / "outcomes.jsonl").read_text(encoding="utf-8").splitlines()
    newest = {outcome.name: outcome for outcome in (Outcome(**json.loads(line)) for line in lines)}
    return [newest[name] for name in DRILLS if name in newest]


def page(outcomes: Sequence[Outcome]) -> str:
    """docs/reliability-loop.md."""
    rows = []
    for outcome in outcomes:
        held = "yes" if not outcome.wrong else "**no**: " + "; ".join(outcome.wrong)
        what = (DRILLS[outcome.name].__doc__ or "").strip().rstrip(".")
        rows.append([outcome.name, what, outcome.told, f"{outcome.seconds:.0f}", held])
    code = revision()
    return (
        "\n\n".join(
            [
                "# The loop under fire",
                f"Written by `python -m benchmarks.loop_drills` at revision {code[:12]}"
                f"{' with local changes' if code.endswith('-dirty') else ''}.",
                "One workspace of the preset micro, with everything that `make up` starts, goes through the drills one after "
                f"the other; a batch is {OPINIONS} opinions, given over HTTP. Nobody lends a hand: the keeper starts dead "
                "servers again, the bell rings again for what nobody learned from, and the next run closes what a dead one left.",
                "After each drill: every opinion stands in exactly one batch or is left out by name, every batch taught one "
                "model, MLflow holds one run a stage and fingerprint and none that is open, Prefect none that is open, and no "
                "process is left.",
                table(["drill", "what happens", "what was seen", "seconds to rest", "all holds"], rows),
            ]
        )
        + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
