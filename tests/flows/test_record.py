"""MLflow's records on a real SQLite store: batches, reopening, dead owners, versions and aliases."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from flows.record import MODEL, Records, code_revision, draw_curves, is_gone, owner


@pytest.fixture
def records(workspace: Path) -> Records:
    """The records of the miniature workspace."""
    return Records(workspace)


def logged(records: Records, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in records.client.get_metric_history(run_id, key)]


def test_a_second_opening_of_a_fingerprint_reopens_and_skips_logged_steps(records: Records) -> None:
    with pytest.raises(KeyboardInterrupt), records.stage("train", "f1", None, {"train": {"steps": 4}}, {}) as run:
        first = run.run_id
        for step in (1, 2, 3):
            run.metrics(step, {"loss": 10.0 - step, **({"eval": 1.0} if step == 2 else {})})
        raise KeyboardInterrupt
    assert records.client.get_run(first).info.status == "KILLED"
    parent = records.open_flow("align", "flow-1", {"seed": 1})
    with records.stage("train", "f1", parent, {"train": {"steps": 4}}, {}) as run:
        assert run.run_id == first
        assert records.client.get_run(first).info.status == "RUNNING"
        for step in (2, 3, 4):
            run.metrics(step, {"loss": 10.0 - step, **({"eval": float(step)} if step != 3 else {})})
    assert logged(records, first, "loss") == [(1, 9.0), (2, 8.0), (3, 7.0), (4, 6.0)]
    assert logged(records, first, "eval") == [(2, 1.0), (4, 4.0)]
    found = records.client.get_run(first)
    assert found.info.status == "FINISHED" and found.data.tags["mlflow.parentRunId"] == parent
    with records.stage("train", "f2", parent, {}, {}) as run:
        assert run.run_id != first


def test_many_metrics_go_in_batches(records: Records) -> None:
    with records.stage("train", "f1", None, {}, {}) as run:
        for step in range(1, 2101):
            run.metrics(step, {"loss": float(step)})
    assert logged(records, run.run_id, "loss") == [(step, float(step)) for step in range(1, 2101)]


def test_an_error_makes_the_run_failed_and_keeps_its_metrics(records: Records) -> None:
    with pytest.raises(ValueError, match="no"), records.stage("train", "f1", None, {}, {}) as run:
        run.metrics(1, {"loss": 2.0})
        raise ValueError("no")
    assert records.client.get_run(run.run_id).info.status == "FAILED"
    assert logged(records, run.run_id, "loss") == [(1, 2.0)]


def test_only_runs_of_dead_processes_of_this_host_are_closed(records: Records) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    owners = {
        "mine": owner(),
        "dead": f"{platform.node()}:{dead.pid}:1.00",
        "recycled": f"{platform.node()}:{os.getpid()}:1.00",
        "elsewhere": f"another-{platform.node()}:{dead.pid}:1.00",
    }
    ids = {}
    for name, tag in owners.items():
        run = records.client.create_run(records.experiment, tags={"thumbwheel.owner": tag})
        ids[name] = run.info.run_id
    assert sorted(records.close_zombies()) == sorted([ids["dead"], ids["recycled"]])
    assert {name: is_gone(tag) for name, tag in owners.items()} == {
        "mine": False,
        "dead": True,
        "recycled": True,
        "elsewhere": False,
    }


def test_weights_are_one_version_and_aliases_move(records: Records, workspace: Path) -> None:
    with records.stage("sft", "f1", None, {}, {}) as run:
        first = records.register(run.run_id, "sft", workspace / "artifacts/sft/model", "a" * 64, "m1.dir")
        assert records.register(run.run_id, "sft", workspace / "artifacts/sft/model", "a" * 64, "m1.dir") == first
        second = records.register(run.run_id, "ppo", workspace / "artifacts/ppo/model", "b" * 64, "m2.dir")
    records.set_alias("champion", "a" * 64)
    records.set_alias("champion", "b" * 64)
    assert str(records.client.get_model_version_by_alias(MODEL, "champion").version) == second != first
    with pytest.raises(LookupError, match="no version of model thumbwheel with weights cccccccccccc"):
        records.set_alias("champion", "c" * 64)


def test_code_revision_names_commit_and_dirt(tmp_path: Path) -> None:
    assert code_revision(tmp_path) == "none"

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "a")
    revision = git("rev-parse", "HEAD").strip()
    assert code_revision(tmp_path) == revision
    (tmp_path / "a").write_text("2")
    assert code_revision(tmp_path) == revision + "-dirty"


def test_curves_are_drawn_one_picture_a_column(tmp_path: Path) -> None:
    (tmp_path / "curves.csv").write_text("step,loss,reward\n1,2.0,\n2,1.5,0.5\n3,1.0,\n")
    figure = draw_curves(tmp_path / "curves.csv")
    assert [axes.get_title() for axes in figure.axes] == ["loss", "reward"]
    assert list(figure.axes[0].lines[0].get_ydata()) == [2.0, 1.5, 1.0]
