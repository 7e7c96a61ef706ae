"""prefect.yaml, as Prefect's own `prefect deploy` reads it."""

from __future__ import annotations

import io
from datetime import timedelta

from prefect.cli.deploy._config import _load_deploy_configs_and_actions
from prefect.cli.deploy._triggers import _initialize_deployment_triggers
from prefect.flows import load_flow_from_entrypoint
from rich.console import Console

from flows import prefect_yaml
from flows.stage import STAGES


def test_the_file_is_what_the_code_says() -> None:
    assert prefect_yaml.PATH.read_text() == prefect_yaml.text(), "python -m flows.prefect_yaml --write"


def test_prefect_takes_it_without_a_complaint() -> None:
    said = io.StringIO()
    found, actions = _load_deploy_configs_and_actions(prefect_yaml.PATH, console=Console(file=said))
    assert said.getvalue() == ""
    assert actions["pull"] == []  # the worker runs in the checkout
    by_name = {each["name"]: each for each in found}
    assert set(by_name) == {"align", "retrain", "reconcile", "approve", *STAGES}
    for name, each in by_name.items():
        assert load_flow_from_entrypoint(each["entrypoint"]).name == name
        assert each["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}
        assert "thumbwheel" in each["tags"]
    pools = {name: each["work_pool"]["name"] for name, each in by_name.items()}
    assert (pools["ppo"], pools["curate"], pools["reconcile"]) == ("gpu", "cpu", "cpu")
    assert by_name["reconcile"]["schedules"][0]["interval"] == "PT10M"
    (trigger,) = _initialize_deployment_triggers("retrain", by_name["retrain"]["triggers"])
    assert trigger.expect == {"feedback.batch.ready"}
    assert (trigger.threshold, trigger.within) == (1, timedelta(0))
