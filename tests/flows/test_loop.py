"""The whole loop on real servers: opinions come over HTTP, and nobody lends a hand.

All drills, as `python -m benchmarks.loop_drills` runs them, take a quarter of an hour: THUMBWHEEL_DRILLS=1 asks for them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from leftovers import leftovers

from benchmarks import loop_drills
from benchmarks.loop_drills import CHANGES, DRILLS, Loop
from benchmarks.workspace import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.fault, pytest.mark.timeout(3600)]
SMALL = {"pretrain.steps": 10, "sft.steps": 10, "ppo.iterations": 3, "judge.bootstrap": 50}
ALWAYS = ("undisturbed", "killed in ppo")


def go_through(names: tuple[str, ...], folder: Path, database_url: str) -> None:
    workspace = Workspace(folder / "workspace", folder / "cache", "micro", {**CHANGES, **SMALL}, 1, database_url)
    with Loop(workspace).running() as loop:
        for name in names:
            assert loop_drills.drill(loop, name).wrong == [], name
    assert leftovers(workspace.root) == []


def test_opinions_become_models_by_themselves_also_when_a_worker_is_killed(tmp_path: Path, postgres_url: str) -> None:
    go_through(ALWAYS, tmp_path, postgres_url)


@pytest.mark.skipif(not os.environ.get("THUMBWHEEL_DRILLS"), reason="THUMBWHEEL_DRILLS asks for all drills")
def test_all_drills(tmp_path: Path) -> None:
    go_through(tuple(DRILLS), tmp_path, "")
