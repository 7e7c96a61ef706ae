"""The flows as deployments, so that they can be started from the Prefect UI, by an event, on a schedule; and their runner."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterTags,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, State, StateType
from prefect.deployments.runner import EntrypointType, RunnerDeployment
from prefect.events import DeploymentEventTrigger
from prefect.events.schemas.automations import Posture
from prefect.flows import Flow
from prefect.runner import Runner
from prefect.states import Scheduled

from flows import bell, servers
from flows.align import align
from flows.approve import approve
from flows.flowrun import TAG, close_zombies
from flows.onestage import STAGE_FLOWS
from flows.reconcile import reconcile
from flows.record import Records
from flows.retrain import retrain

RECONCILE_EVERY = timedelta(minutes=10)
BELL_MATCH = {"prefect.resource.id": f"{bell.RESOURCE}.*"}
# a second run waits for the first; CANCEL_NEW would lose what came meanwhile
ONE_AFTER_ANOTHER = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE)


def deployments() -> Iterator[RunnerDeployment]:
    """align, retrain (started by the bell as well), reconcile (on a schedule as well), and each stage by itself."""
    yield _deployment(
        align,
        "The whole wheel: data, data gate, training, opinions, reward model, PPO, judgement, promotion. "
        "What is up to date is not run again. Parameters given here are written into params.yaml.",
    )
    yield _deployment(
        retrain,
        "Learns from the open batches of opinions: snapshot, reward model, PPO, judgement, promotion. "
        "The bell starts it; without an open batch it ends as *nothing to do*.",
        triggers=[bell_trigger()],
    )
    yield _deployment(
        reconcile,
        "Brings the mirrors back in line with the feedback database, and closes what killed processes left open.",
        interval=RECONCILE_EVERY,
    )
    yield _deployment(
        approve,
        "Asks a person whether a candidate may serve (params.yaml: approval.mode). A retraining starts it: the run waits here, "
        "suspended; *Resume* shows the form.",
    )
    for name, flow in STAGE_FLOWS.items():
        yield _deployment(flow, f"The stage {name} of dvc.yaml alone. What it reads has to be there.", "stage")


def bell_trigger() -> DeploymentEventTrigger:
    """Every ring starts one run: Prefect's own counting of events within a time was seen to drop some."""
    return DeploymentEventTrigger(
        name="a batch of opinions is ready",
        expect={bell.EVENT},
        match=dict(BELL_MATCH),
        posture=Posture.Reactive,
        threshold=1,
        within=timedelta(0),
    )


def _deployment(flow: Flow[Any, Any], description: str, kind: str = "wheel", **options: Any) -> RunnerDeployment:
    made = flow.to_deployment(
        flow.name,
        description=description,
        concurrency_limit=ONE_AFTER_ANOTHER,
        entrypoint_type=EntrypointType.MODULE_PATH,
        tags=[TAG, kind],
        **options,
    )
    assert isinstance(made, RunnerDeployment)
    for parameter in made._parameter_openapi_schema.properties.values():
        if parameter.get("default", "") is None:
            del parameter["default"]  # the form would send the null back, and the server refuse it
    return made


def requeue() -> int:
    """Schedule again what an earlier runner of this workspace had taken up and not begun when it ended; how many."""
    pending = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PENDING])))
    ours = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
    with get_client(sync_client=True) as client:
        left = client.read_flow_runs(flow_run_filter=pending, deployment_filter=ours, limit=200)
        for each in left:
            again: State[Any] = Scheduled(message="its runner had ended")
            client.set_flow_run_state(each.id, again, force=True)
    return len(left)


async def run(chosen: list[RunnerDeployment], ready: Path) -> None:
    """Register the deployments `chosen` and run what is asked for, one flow run at a time: a workspace has one writer."""
    runner = Runner(name="thumbwheel", limit=1, pause_on_shutdown=False)
    for deployment in chosen:
        await runner.aadd_deployment(deployment)
    ready.write_text(str(os.getpid()))
    await runner.start()


def main() -> None:
    """The process that `thumbwheel up` starts; ends at SIGTERM."""
    close_zombies(
        Records(servers.workspace())
    )  # of a runner that was killed; else their places stay taken for the lease
    requeue()
    asyncio.run(run(list(deployments()), servers.ready_path(servers.workspace(), "runner")))


if __name__ == "__main__":
    main()
