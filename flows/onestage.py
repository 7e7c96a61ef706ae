"""Each stage of dvc.yaml as a flow of its own, with the same records as within `align`."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.flows import Flow

from flows.flowrun import WEEK_SECONDS, open_flow_run
from flows.retrain import Overrides, Preset
from flows.stage import STAGES


def _stage_flow(name: str) -> Flow[Any, Any]:
    def one_stage(preset: Preset = None, overrides: Overrides = None) -> str:
        """Bring one stage up to date; says how ("unchanged", "restored", "ran").

        preset, overrides: changed parameters, written into params.yaml first.
        """
        with open_flow_run(name, preset, overrides.plain() if overrides else None) as run:
            return run.stage(name).how

    one_stage.__name__ = one_stage.__qualname__ = name
    options: dict[str, Any] = {"validate_parameters": True, "persist_result": True, "timeout_seconds": WEEK_SECONDS}
    return flow(name=name, **options)(one_stage)


STAGE_FLOWS: dict[str, Flow[Any, Any]] = {name: _stage_flow(name) for name in STAGES}
globals().update(STAGE_FLOWS)  # a deployment finds its flow as flows.onestage.NAME
