"""A workspace with servers of its own, for what looks at the whole loop from outside: benchmarks, drills, end-to-end tests.

It is a copy of the checkout whose processes run the copy's code, so that neither the checkout's records nor an edit made
meanwhile touch it.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx

from benchmarks import evidence
from feedback.batches import Batch
from feedback.store import Store
from flows import rater, servers, settings
from flows.rater import Messages, Question, RaterOptions, Tally

COMMAND = "from flows.cli import app; app()"
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
POLL_SECONDS = 0.5
BUSY_SECONDS = 60.0
Found = TypeVar("Found")


class Workspace:
    """A copy of the checkout in `root`; stages of workspaces with one `cache` are taken from each other.

    database_url: of the opinions, by default SQLite in the workspace. What stands there already is left as it is.
    """

    def __init__(
        self, root: Path, cache: Path, preset: str, changes: Mapping[str, Any], seed: int = 1, database_url: str = ""
    ) -> None:
        self.root = root
        if not (root / "params.yaml").exists():
            evidence.prepare(root, cache, seed, preset)
            settings.set_params(root, changes)
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(evidence.PREFIXES)}
        self.environment |= {"PYTHONPATH": str(root), "THUMBWHEEL_ROOT": str(root), "THUMBWHEEL_THREADS": "1"}
        if database_url:
            self.environment["THUMBWHEEL_DATABASE_URL"] = database_url
        self.database_url = database_url or f"sqlite:///{servers.state_folder(root) / 'feedback.db'}"

    def command(self, *arguments: str, timeout: float = 900) -> str:
        """What `thumbwheel ARGUMENTS` prints. Raises RuntimeError with it when that fails."""
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *arguments],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        if done.returncode:
            raise RuntimeError(f"thumbwheel {' '.join(arguments)} in {self.root}: {done.stdout}{done.stderr}")
        return done.stdout

    def url(self, name: str) -> str:
        """The address of one of its servers."""
        return servers.read(self.root)[name].url

    def api(self, path: str, body: Any = None) -> Any:
        """Ask its Prefect server, again while its database is busy, as Prefect's own clients do."""
        url, end = f"{self.url('prefect')}/api{path}", time.monotonic() + BUSY_SECONDS
        while True:
            answer = httpx.post(url, json=body or {}, trust_env=False, timeout=60)
            if answer.status_code != 503 or time.monotonic() > end:
                break
            time.sleep(POLL_SECONDS)
        if answer.is_error:
            raise RuntimeError(f"{url}: {answer.status_code} {answer.text[:500]}")
        return answer.json()

    def start_flow(self, deployment: str, parameters: Mapping[str, Any] | None = None) -> str:
        """Ask for a run of a deployment; returns its id."""
        (found,) = self.api("/deployments/filter", {"deployments": {"name": {"any_": [deployment]}}})
        body = {"parameters": parameters or {}, "state": {"type": "SCHEDULED"}}
        body["idempotency_key"] = uuid.uuid4().hex
        return str(self.api(f"/deployments/{found['id']}/create_flow_run", body)["id"])

    def flow_runs(self, deployment: str) -> list[dict[str, Any]]:
        """The flow runs of a deployment, oldest first, without those that a schedule plans for later."""
        body = {"deployments": {"name": {"any_": [deployment]}}, "sort": "ID_DESC", "limit": 200}
        found = [run for run in self.api("/flow_runs/filter", body) if not run["auto_scheduled"]]
        return sorted(found, key=lambda run: str(run["created"]))

    def ended(self, run_id: str, seconds: float) -> dict[str, Any]:
        """Wait for the end of a flow run; its record."""

        def look() -> dict[str, Any] | None:
            (run,) = self.api("/flow_runs/filter", {"flow_runs": {"id": {"any_": [run_id]}}})
            return run if run["state_type"] in ENDED else None

        return wait(look, seconds, f"flow run {run_id} did not end")

    @contextmanager
    def store(self) -> Iterator[Store]:
        """Its feedback database."""
        store = Store(self.database_url)
        try:
            yield store
        finally:
            store.close()

    def batches(self) -> list[Batch]:
        """All batches so far, oldest first."""
        from feedback import batches

        with self.store() as store, store.read() as connection:
            return batches.listed(connection, only_open=False)

    def consumed(self, number: int, seconds: float) -> Batch:
        """Wait until batch `number` (from 1) is consumed. Raises RuntimeError when the retraining failed, or too late."""

        def look() -> Batch | None:
            known = self.batches()
            if len(known) >= number and known[number - 1].consumed_at is not None:
                return known[number - 1]
            runs = self.flow_runs("retrain")
            if runs and runs[-1]["state_type"] == "FAILED":
                raise RuntimeError(f"the retraining in {self.root} failed: {runs[-1]['state']['message']}")
            return None

        return wait(look, seconds, f"batch {number} in {self.root} was not consumed")

    def rate(self, prompts: list[Messages], count: int, options: RaterOptions, language: str = "en") -> Tally:
        """Give `count` opinions on the champion's answers to the first prompts that it can hold, over HTTP.

        Repeated after a kill it gives the same ones again, which changes nothing. Raises RuntimeError when prompts run out.
        """
        with self.store() as store:
            champion = store.champion()
        if champion is None:
            raise RuntimeError(f"nothing serves in {self.root}: run the flow align first")
        total, left = Tally(), list(prompts)
        while missing := count - total.up - total.down:
            if not left:
                raise RuntimeError(f"{len(prompts)} prompts gave only {count - missing} opinions of {count}")
            some, left = left[:missing], left[missing:]
            how = [options.temperature, options.max_tokens]
            asked = [Question(p, rater.digest([champion.model_hash, p, 0, *how])) for p in some]
            told = asyncio.run(
                rater.ask(self.url("service"), asked, champion.model_hash, options, language, lambda event: None)
            )
            for name in ("up", "down", "replayed", "refused"):
                setattr(total, name, getattr(total, name) + getattr(told, name))
        return total

    def prompts(self, seed: int) -> list[Messages]:
        """The training prompts, in an order of the seed's."""
        found = rater.read_prompts(self.root / rater.PROMPTS)
        return sorted(found, key=lambda messages: rater.digest([seed, messages]))


def wait(look: Callable[[], Found | None], seconds: float, otherwise: str) -> Found:
    """What `look` finds, asked again and again. Raises RuntimeError with `otherwise` after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        found = look()
        if found is not None:
            return found
        if time.monotonic() > end:
            raise RuntimeError(f"{otherwise} in {seconds:.0f} s")
        time.sleep(POLL_SECONDS)
