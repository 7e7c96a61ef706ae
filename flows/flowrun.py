"""A flow run that runs stages: it holds the workspace, has one MLflow run, and makes every stage a Prefect task."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from prefect import get_client, get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import State, StateType
from prefect.concurrency.sync import concurrency
from prefect.runtime import flow_run
from prefect.states import Crashed
from prefect.tasks import exponential_backoff

from flows import settings
from flows.environment import environment
from flows.files import write_text
from flows.machine import workspace_id
from flows.progress import Progress
from flows.record import Records, is_gone, owner
from flows.report import publish
from flows.stage import StageResult, run_stage
from flows.workspace import writer

TAG = "thumbwheel"  # of our deployments and their runs
OWNER_TAG = "owner:"
UNMARKED = timedelta(minutes=2)
RUNNING_TASKS = TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=[StateType.RUNNING])))
WEEK_SECONDS = 7 * 24 * 3600.0  # a flow that trains for longer hangs
_ARTIFACT_SECONDS = 2.0
Result = TypeVar("Result")


@dataclass
class FlowRun:
    """root: the workspace; id: Prefect's id of the flow run; parent: its MLflow run; params: the whole of params.yaml;
    results: how each stage went, in order."""

    root: Path
    id: str
    name: str
    records: Records
    parent: str
    params: settings.Params
    results: list[StageResult] = field(default_factory=list)

    def stage(self, name: str) -> StageResult:
        """Bring a stage of dvc.yaml up to date, as a Prefect task of its name."""
        result = _stage_task.with_options(name=name, task_run_name=name)(name, self.root, self.parent, self.id)
        self.results.append(result)
        get_run_logger().info("%s: %s in %.1f s", name, result.how, result.seconds)
        return result

    def step(self, name: str, work: Callable[[Callable[[dict[str, Any]], None]], Result]) -> Result:
        """Do what is no stage of dvc.yaml (opinions, promote) as a Prefect task; `work` is given an emit for progress."""
        named: Any = _step_task.with_options(name=name, task_run_name=name)
        return named(name, self.root, self.id, work)

    def write_json(self, path: str, content: Mapping[str, Any]) -> bool:
        """Write a small file at the workspace's root, when it differs. True when it did."""
        target, text = self.root / path, json.dumps(content, indent=2, sort_keys=True) + "\n"
        if target.exists() and target.read_text(encoding="utf-8") == text:
            return False
        write_text(target, text)
        return True


@contextmanager
def open_flow_run(
    name: str, preset: str | None = None, overrides: Mapping[str, Any] | None = None
) -> Iterator[FlowRun]:
    """Everything a flow needs around its stages.

    Holds the workspace (lock file, then the Prefect limit `workspace-<id>`), closes what killed processes left open, writes
    the parameters given into params.yaml, opens the MLflow run; in the end a report in Prefect, and the run closed.
    Raises SettingsError for a parameter that is refused, WorkspaceBusyError when another process holds the workspace.
    """
    root, run_id = environment().root, str(flow_run.get_id())
    mark(UUID(run_id))
    with writer(root, f"flow {name}"):
        records = Records(root)
        close_zombies(records)
        with _slot(root):
            params = settings.set_params(
                root, settings.merge(settings.preset(preset) if preset else {}, overrides or {})
            )
            settings.load(root)
            parent = records.open_flow(name, run_id, params.plain())
            run = FlowRun(root, run_id, name, records, parent, params)
            status = "KILLED"
            try:
                yield run
                status = "FINISHED"
            except Exception:
                status = "FAILED"
                raise
            finally:
                records.close(parent, status)
                if status != "KILLED":
                    publish(run.name, run.results, records, parent)


def passing(task: Any, task_run: Any, state: State[Any]) -> bool:
    """Whether a task failed of what passes by itself: a server or the database is away. It then goes on where it was."""
    from httpx import TransportError
    from requests import ConnectionError as RequestsConnectionError
    from sqlalchemy.exc import OperationalError

    away = (TransportError, RequestsConnectionError, OperationalError, ConnectionError)
    error = state.result(raise_on_failure=False)
    while isinstance(error, BaseException):
        if isinstance(error, away):
            return True
        error = error.__cause__ or error.__context__
    return False


# 4, 8 and 16 seconds: as long as a server needs to start again
AGAIN: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "retries": 3,
    "retry_delay_seconds": exponential_backoff(backoff_factor=4),
    "retry_condition_fn": passing,
}


@task(**AGAIN)
def _stage_task(name: str, root: Path, parent: str, flow_run_id: str) -> StageResult:
    return run_stage(name, root=root, parent_run_id=parent, flow_run_id=flow_run_id, emit=Bar(name))


@task(**AGAIN)
def _step_task(name: str, root: Path, flow_run_id: str, work: Callable[[Any], Any]) -> Any:
    tell, started = Progress(root, name, flow_run_id), time.monotonic()
    tell({"event": "stage", "state": "started", "seconds": 0.0})
    state = "failed"
    try:
        result = work(tell)
        state = "finished"
        return result
    finally:
        tell({"event": "stage", "state": state, "seconds": round(time.monotonic() - started, 3)})


class Bar:
    """A Prefect progress artifact of a stage, made at its first metrics and renewed every other second."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.artifact: UUID | None = None
        self.renewed = 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        """Take one event of the stage."""
        if event["event"] != "metrics" or event["total"] < 2:
            return
        share = 100.0 * event["step"] / event["total"]
        if self.artifact is None:
            made = create_progress_artifact(progress=share, key=f"progress-{self.stage}", description=self.stage)
            assert isinstance(made, UUID)
            self.artifact = made
        elif time.monotonic() - self.renewed > _ARTIFACT_SECONDS or event["step"] == event["total"]:
            update_progress_artifact(self.artifact, progress=share)
        else:
            return
        self.renewed = time.monotonic()


# ---------------------------------------------------------------- who holds the workspace, who is dead


@contextmanager
def _slot(root: Path) -> Iterator[None]:
    """The Prefect limit of this workspace. The lock file is held already: whoever has a slot still is dead."""
    name = f"workspace-{workspace_id(root)}"
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(name, 1)
        if client.read_global_concurrency_limit_by_name(name).active_slots:
            client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(active_slots=0))
    with concurrency(name, occupy=1, strict=True, lease_duration=60, timeout_seconds=120):
        yield


def mark(this: UUID) -> None:
    """Note on a flow run which process it is, so that others can tell when that is dead."""
    with get_client(sync_client=True) as client:
        mine = client.read_flow_run(this)
        client.update_flow_run(this, tags=[*mine.tags, OWNER_TAG + owner()])


def close_zombies(records: Records) -> None:
    """Runs that dead processes of this host left open: MLflow's become KILLED, Prefect's flow and task runs Crashed."""
    records.close_zombies()
    running = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING])))
    with get_client(sync_client=True) as client:
        for left in client.read_flow_runs(flow_run_filter=running, limit=200):
            owners = [tag.removeprefix(OWNER_TAG) for tag in left.tags if tag.startswith(OWNER_TAG)]
            if all(is_gone(each) for each in owners) if owners else _died_unmarked(left):
                _crash(client, left.id)
        close_tasks(client)


def _died_unmarked(run: Any) -> bool:
    """Whether a run of our deployments was killed before it could mark itself, which takes it seconds."""
    since = datetime.now(UTC) - run.start_time if run.start_time else timedelta(0)
    return TAG in run.tags and since > UNMARKED


def close_tasks(client: SyncPrefectClient) -> None:
    """Task runs that are open though their flow run has ended: the runner tells Prefect of a killed process's flow run alone."""
    ended = [StateType.COMPLETED, StateType.FAILED, StateType.CRASHED, StateType.CANCELLED]
    left = client.read_task_runs(
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=ended))),
        task_run_filter=RUNNING_TASKS,
        limit=200,
    )
    for each in left:
        client.set_task_run_state(each.id, Crashed(message="its flow run has ended"), force=True)


def _crash(client: SyncPrefectClient, flow_run_id: UUID) -> None:
    state: State[Any] = Crashed(message="its process is gone")
    tasks = client.read_task_runs(
        flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [flow_run_id]}}), task_run_filter=RUNNING_TASKS
    )
    for each in tasks:
        client.set_task_run_state(each.id, state, force=True)
    client.set_flow_run_state(flow_run_id, state, force=True)
