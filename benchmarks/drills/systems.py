"""Servers that thumbs can be sent to, for the drill of peers: this project's, MLflow's and Label Studio."""

from __future__ import annotations

import asyncio
import importlib.metadata
import itertools
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa

from benchmarks.drills.client import Client
from benchmarks.drills.databases import free_port
from benchmarks.drills.load import figures
from benchmarks.drills.services import Service, seed_answers
from benchmarks.peers import PEERS, python_of

WRITERS, ANSWERS = 4, 200
Write = tuple[str, str, dict[str, Any], dict[str, str]]


class System(Protocol):
    """A server that thumbs are sent to. port: of loopback, the same after each start."""

    name: str
    version: str
    port: int

    def start(self) -> None:
        """Start it; `wait` says when it answers."""

    def wait(self) -> None:
        """Until it answers."""

    def kill(self) -> None:
        """SIGKILL of all its processes."""

    def close(self) -> None:
        """End it."""

    async def prepare(self) -> None:
        """Make ANSWERS things to have an opinion about."""

    def thumb(self, number: int) -> Write:
        """The thumb `number`, whose words no other has: method, path, body, headers."""

    def keyed(self, write: Write, key: str) -> Write | None:
        """The same with a key by which its API knows a request again; None when it has none."""

    def words(self) -> list[str]:
        """The words of all thumbs in its database, which is read by SQL."""


def words(number: int) -> str:
    """What thumb `number` says."""
    return f"thumb {number:07d} said"


class Process:
    """A server in a process group of its own."""

    def __init__(self, command: Sequence[str], folder: Path, env: Mapping[str, str], ready: str) -> None:
        """ready: a URL that answers 200 when it is up."""
        folder.mkdir(parents=True, exist_ok=True)
        self.command, self.folder, self.ready = list(command), folder, ready
        self.env, self.log = {**os.environ, **env}, folder / "server.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env=self.env, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self, seconds: float = 600.0) -> None:
        """Until it answers. Raises RuntimeError when it has ended, TimeoutError."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                raise RuntimeError(f"it ended: {self.log.read_text(errors='replace')[-500:]}")
            try:
                with urllib.request.urlopen(self.ready, timeout=10):  # a URL of loopback, made here
                    return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError(f"{self.ready} does not answer within {seconds:g} s: see {self.log}")

    def kill(self) -> None:
        """SIGKILL of the whole group."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def close(self) -> None:
        """Nothing of it is needed any more, and some of its processes outlive their parent's SIGTERM: killed."""
        self.kill()


class Ours(Service):
    """This project's service."""

    name, version = "thumbwheel", "this commit"

    async def prepare(self) -> None:
        """See System; so below."""
        await asyncio.to_thread(seed_answers, self.database_url, ANSWERS)

    def thumb(self, number: int) -> Write:
        body = {"user": f"person {number // ANSWERS}", "value": 1 if number % 3 else -1, "comment": words(number)}
        return "PUT", f"/v1/feedback/chatcmpl-drill-{number % ANSWERS}/thumb", body, {}

    def keyed(self, write: Write, key: str) -> Write:
        completion = write[1].split("/")[3]
        body = {**write[2], "kind": "thumb", "completion_id": completion}
        return "POST", "/v1/feedback", body, {"Idempotency-Key": key}

    def words(self) -> list[str]:
        return spoken(column(self.database_url, "SELECT payload FROM feedback_event"))


class Mlflow(Process):
    """`mlflow server`, its jobs for scoring off (they would take processor time); a thumb is the request that
    `mlflow.log_feedback` makes."""

    name = "MLflow"

    def __init__(self, database_url: str, folder: Path) -> None:
        self.version, self.port, self.database_url = importlib.metadata.version("mlflow"), free_port(), database_url
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", database_url, "--default-artifact-root", str(folder / "artifacts")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "DO_NOT_TRACK": "true", "OMP_NUM_THREADS": "1"}
        super().__init__(command, folder, quiet, f"http://127.0.0.1:{self.port}/health")
        self.traces: list[str] = []

    async def prepare(self) -> None:
        client = Client(self.port)
        path, place = (
            "/api/3.0/mlflow/traces",
            {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": "0"}},
        )
        for number in range(ANSWERS):
            info: dict[str, Any] = {
                "trace_id": f"tr-{number:032x}",
                "trace_location": place,
                "request_time": "2026-01-01T00:00:00Z",
                "execution_duration": "0.1s",
                "state": "OK",
                "trace_metadata": {"mlflow.trace_schema.version": "3"},
                "request_preview": f"prompt {number}",
                "response_preview": f"answer {number}",
            }
            made = await client.request("POST", path, {"trace": {"trace_info": info}})
            expect(made.status == 200, f"a trace was not made: {made.status} {made.body[:200]!r}")
            self.traces.append(info["trace_id"])
        client.close()

    def thumb(self, number: int) -> Write:
        trace = self.traces[number % ANSWERS]
        assessment = {
            "assessment_name": "thumb",
            "trace_id": trace,
            "source": {"source_type": "HUMAN", "source_id": f"person {number // ANSWERS}"},
            "create_time": "2026-01-01T00:00:00Z",
            "last_update_time": "2026-01-01T00:00:00Z",
            "feedback": {"value": bool(number % 3)},
            "rationale": words(number),
            "valid": True,
        }
        return "POST", f"/api/3.0/mlflow/traces/{trace}/assessments", {"assessment": assessment}, {}

    def keyed(self, write: Write, key: str) -> None:
        return None

    def words(self) -> list[str]:
        return column(self.database_url, "SELECT rationale FROM assessments")

    def own_client(self, seconds: float, numbers: itertools.count[int]) -> dict[str, Any]:
        """WRITERS threads that call `mlflow.log_feedback`: thumbs a second with what the client itself costs."""
        import mlflow  # here: only this asks for it
        from mlflow.entities import AssessmentSource

        mlflow.set_tracking_uri(f"http://127.0.0.1:{self.port}")
        taken, end = list[float](), time.perf_counter() + seconds

        def write() -> None:
            while (sent := time.perf_counter()) < end:
                number = next(numbers)
                source = AssessmentSource("HUMAN", f"person {number // ANSWERS}")
                trace = self.traces[number % ANSWERS]
                mlflow.log_feedback(
                    trace_id=trace, name="thumb", value=bool(number % 3), source=source, rationale=words(number)
                )
                taken.append(time.perf_counter() - sent)

        threads, began = [threading.Thread(target=write) for _ in range(WRITERS)], time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return figures(taken, Counter({"200": len(taken)}), time.perf_counter() - began)


class LabelStudio(Process):
    """`label-studio start` from an environment of its own; a thumb is an annotation of a task: a choice and its words."""

    name = "Label Studio"
    LABELS = (
        '<View><Text name="text" value="$text"/><Choices name="thumb" toName="text"><Choice value="up"/>'
        '<Choice value="down"/></Choices><TextArea name="words" toName="text"/></View>'
    )

    def __init__(self, folder: Path) -> None:
        python = python_of("label-studio")
        self.version, self.port = PEERS["label-studio"][0].split("==")[1], free_port()
        self.database_url = f"sqlite:///{folder / 'label_studio.sqlite3'}"
        token = secrets.token_hex(20)
        self.headers, self.tasks = {"Authorization": f"Token {token}"}, list[int]()
        command = [str(python.parent / "label-studio"), "start", "--init", "--no-browser", "--enable-legacy-api-token"]
        command += ["--data-dir", str(folder), "--internal-host", "127.0.0.1", "--port", str(self.port)]
        command += ["--username", "drill@example.org", "--password", secrets.token_hex(8), "--user-token", token]
        quiet = {"COLLECT_ANALYTICS": "false", "LATEST_VERSION_CHECK": "false", "SENTRY_DSN": "", "LOG_LEVEL": "ERROR"}
        quiet["LABEL_STUDIO_BASE_DATA_DIR"] = str(folder)  # else it makes empty folders in the home first
        super().__init__(command, folder, quiet, f"http://127.0.0.1:{self.port}/health")

    async def prepare(self) -> None:
        client = Client(self.port)
        project = {"title": "drill", "label_config": self.LABELS}
        made = await client.request("POST", "/api/projects/", project, self.headers)
        expect(made.status == 201, f"no project was made: {made.status} {made.body[:200]!r}")
        tasks = [{"data": {"text": f"answer {number}"}} for number in range(ANSWERS)]
        path = f"/api/projects/{made.json()['id']}/import?return_task_ids=true"
        done = await client.request("POST", path, tasks, self.headers)
        expect(done.status == 201, f"no tasks were made: {done.status} {done.body[:200]!r}")
        self.tasks = done.json()["task_ids"]
        client.close()

    def thumb(self, number: int) -> Write:
        said = [("thumb", "choices", {"choices": ["up" if number % 3 else "down"]})]
        said += [("words", "textarea", {"text": [words(number)]})]
        result = [{"from_name": name, "to_name": "text", "type": kind, "value": value} for name, kind, value in said]
        return "POST", f"/api/tasks/{self.tasks[number % ANSWERS]}/annotations/", {"result": result}, self.headers

    def keyed(self, write: Write, key: str) -> Write:
        unique = f"{int.from_bytes(key.encode()[-8:]):032x}"
        return write[0], write[1], {**write[2], "unique_id": unique}, write[3]

    def words(self) -> list[str]:
        return spoken(column(self.database_url, "SELECT result FROM task_completion"))


def column(database_url: str, statement: str) -> list[str]:
    """The first column of what a SQL statement finds."""
    engine = sa.create_engine(database_url)
    try:
        with engine.connect() as connection:
            return [str(value) for value in connection.execute(sa.text(statement)).scalars()]
    finally:
        engine.dispose()


def spoken(texts: Sequence[str]) -> list[str]:
    """The words of thumbs that stand in texts, one in each."""
    return [text[text.index(words(0)[:7]) :][: len(words(0))] for text in texts]


def expect(holds: bool, otherwise: str) -> None:
    """Raises RuntimeError with `otherwise` unless it holds."""
    if not holds:
        raise RuntimeError(otherwise)
