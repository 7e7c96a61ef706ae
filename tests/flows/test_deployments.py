"""What `thumbwheel up` registers with a real Prefect server, and what the bell sets going."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from test_bell import vote

from feedback.store import Store
from flows import servers
from flows.stage import STAGES

pytestmark = pytest.mark.slow


def api(root: Path, path: str, body: dict[str, Any] | None = None) -> Any:
    """Ask the workspace's Prefect server."""
    url = servers.read(root)["prefect"].url + "/api" + path
    for _ in range(10):
        answer = httpx.post(url, json=body or {}, trust_env=False, timeout=30)
        if answer.status_code != 503:  # its SQLite was busy: Prefect's own client asks again too
            break
        time.sleep(1)
    answer.raise_for_status()
    return answer.json()


def runs_of(root: Path, deployment: str) -> list[dict[str, Any]]:
    """Flow runs of a deployment, oldest first."""
    body = {"deployments": {"name": {"any_": [deployment]}}, "sort": "START_TIME_ASC"}
    return list(api(root, "/flow_runs/filter", body))


def test_every_flow_and_stage_is_a_deployment_that_queues(wheel: Path) -> None:
    found = {each["name"]: each for each in api(wheel, "/deployments/filter")}
    assert set(found) == {"align", "retrain", "reconcile", "approve", *STAGES}
    for each in found.values():
        assert each["description"]
        assert each["global_concurrency_limit"]["limit"] == 1
        assert each["concurrency_options"]["collision_strategy"] == "ENQUEUE"
        assert each["tags"] == ["thumbwheel", "stage" if each["name"] in STAGES else "wheel"]
    schema = found["align"]["parameter_openapi_schema"]
    assert set(schema["properties"]) == {"preset", "overrides"}
    ppo, rater = (schema["definitions"][name]["properties"] for name in ("PpoChanges", "RaterChanges"))
    shown = {key: ppo["iterations"][key] for key in ("type", "minimum", "description")}
    assert shown == {"type": "integer", "minimum": 1, "description": "tiny: 20"}
    assert (rater["temperature"]["minimum"], rater["temperature"]["maximum"]) == (0, 2)
    assert (ppo["gamma"]["maximum"], ppo["learning_rate"]["exclusiveMinimum"]) == (1, 0)
    assert "maximum" not in ppo["batch_size"]
    assert schema["properties"]["preset"]["enum"] == ["tiny", "micro"]
    assert found["reconcile"]["schedules"][0]["schedule"]["interval"] == 600
    automations = api(wheel, "/automations/filter", {"sort": "CREATED_DESC"})
    assert [(a["trigger"]["expect"], a["trigger"]["threshold"]) for a in automations] == [(["feedback.batch.ready"], 1)]


def test_two_opinions_ring_the_bell_and_one_retraining_starts(wheel: Path) -> None:
    store = Store(servers.database_url(wheel))
    vote(store, "first")
    vote(store, "second")
    deadline = time.monotonic() + 90
    while not runs_of(wheel, "retrain") and time.monotonic() < deadline:
        time.sleep(0.5)
    batches = store.open_batches()
    store.close()
    assert [batch.accepted for batch in batches] == [2]
    assert len(runs_of(wheel, "retrain")) == 1
    assert f"rang for batch {batches[0].id}" in servers.log_path(wheel, "bell").read_text()


def test_a_run_that_was_killed_before_it_marked_itself_is_closed_with_its_tasks(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import timedelta

    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows import flowrun
    from flows.record import Records

    (deployment,) = api(wheel, "/deployments/filter", {"deployments": {"name": {"any_": ["judge"]}}})
    scheduled = {"state": {"type": "SCHEDULED", "state_details": {"scheduled_time": "2099-01-01T00:00:00Z"}}}
    ours = api(wheel, f"/deployments/{deployment['id']}/create_flow_run", scheduled)["id"]
    theirs = api(wheel, "/flow_runs/", {"flow_id": deployment["flow_id"], "state": {"type": "PENDING"}})["id"]
    for run in (ours, theirs):
        api(wheel, f"/flow_runs/{run}/set_state", {"state": {"type": "RUNNING"}, "force": True})
    task = {"flow_run_id": ours, "task_key": "ppo", "dynamic_key": "0", "state": {"type": "RUNNING"}}
    task_id = api(wheel, "/task_runs/", task)["id"]

    def states() -> list[str]:
        flows = api(wheel, "/flow_runs/filter", {"flow_runs": {"id": {"any_": [ours, theirs]}}})
        tasks = api(wheel, "/task_runs/filter", {"task_runs": {"id": {"any_": [task_id]}}})
        found = {each["id"]: each["state_type"] for each in [*flows, *tasks]}
        return [found[each] for each in (ours, task_id, theirs)]

    with temporary_settings({PREFECT_API_URL: servers.read(wheel)["prefect"].url + "/api"}):
        flowrun.close_zombies(Records(wheel))
        assert states() == ["RUNNING", "RUNNING", "RUNNING"]  # it may have begun a moment ago
        monkeypatch.setattr(flowrun, "UNMARKED", timedelta(0))
        flowrun.close_zombies(Records(wheel))
    assert states() == ["CRASHED", "CRASHED", "RUNNING"]  # who is not of our deployments is let alone
