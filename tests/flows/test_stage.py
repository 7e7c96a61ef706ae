"""A stage runs when it must, once; is put back when it can be; goes on where it was killed; leaves one record."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from dvc.repo import Repo
from tiny_main import STAGES

from flows import pipeline
from flows.child import ChildError
from flows.progress import path as progress_path
from flows.record import Records
from flows.stage import StageError, StageResult, run_stage
from flows.workspace import WorkspaceBusyError, writer

HERE = Path(__file__).parent


def stage(name: str, root: Path) -> StageResult:
    return run_stage(name, root=root, stages=STAGES)


def runs(root: Path, name: str) -> list:
    records = Records(root)
    return list(records.client.search_runs([records.experiment], f"tags.`dvc.stage` = '{name}'"))


def history(root: Path, run_id: str, key: str = "loss") -> list[tuple[int, float]]:
    records = Records(root)
    return [(m.step, m.value) for m in records.client.get_metric_history(run_id, key)]


def dvc_status(root: Path) -> dict:
    with Repo(str(root)) as repo:
        return repo.status()


def chain(start: int, steps: int) -> list[int]:
    values = [start]
    for step in range(1, steps + 1):
        values.append((values[-1] * 31 + step) % 1009)
    return values[1:]


def test_a_data_stage_runs_once_and_then_is_unchanged(workspace: Path) -> None:
    first = stage("grind", workspace)
    assert first.how == "ran" and first.figures == {"length": 5, "kind": "rye"}
    assert (workspace / "artifacts/grind/flour.txt").read_text() == "corn corn "
    second = stage("grind", workspace)
    assert second.how == "unchanged"
    assert (second.run_id, second.outs, second.fingerprint) == (first.run_id, first.outs, first.fingerprint)
    assert second.figures == {"length": 5.0}
    assert len(runs(workspace, "grind")) == 1
    assert (workspace / "runs.log").read_text() == "x"
    assert not list((workspace / ".thumbwheel/work/grind").iterdir())


def test_param_changed_and_back_is_restored_with_the_right_content(workspace: Path) -> None:
    first = stage("grind", workspace)
    text = (workspace / "params.yaml").read_text()
    (workspace / "params.yaml").write_text(text.replace("times: 2", "times: 3"))
    changed = stage("grind", workspace)
    assert changed.how == "ran" and changed.fingerprint != first.fingerprint
    assert (workspace / "artifacts/grind/flour.txt").read_text() == "corn corn corn "
    (workspace / "params.yaml").write_text(text)
    back = stage("grind", workspace)
    assert back.how == "restored" and back.outs == first.outs and back.run_id == first.run_id
    assert (workspace / "artifacts/grind/flour.txt").read_text() == "corn corn "
    assert stage("grind", workspace).how == "unchanged"
    (workspace / "params.yaml").write_text(text.replace("times: 2", "times: 3"))
    assert stage("grind", workspace).how == "restored"
    assert (workspace / "artifacts/grind/flour.txt").read_text() == "corn corn corn "
    assert (workspace / "runs.log").read_text() == "xx"


def test_deleted_outputs_come_back_from_the_cache(workspace: Path) -> None:
    first = stage("grind", workspace)
    shutil.rmtree(workspace / "artifacts")
    again = stage("grind", workspace)
    assert again.how == "restored" and again.run_id == first.run_id
    assert (workspace / "artifacts/grind/flour.txt").read_text() == "corn corn "


def test_outputs_and_cache_deleted_runs_again_in_the_same_record(workspace: Path) -> None:
    first = stage("grind", workspace)
    shutil.rmtree(workspace / "artifacts")
    shutil.rmtree(workspace / ".dvc/cache")
    again = stage("grind", workspace)
    assert again.how == "ran" and again.run_id == first.run_id
    assert len(runs(workspace, "grind")) == 1
    assert history(workspace, first.run_id or "", "length") == [(1, 5.0)]


def test_dvc_agrees_and_repro_runs_nothing(workspace: Path) -> None:
    stage("grind", workspace)
    stage("train", workspace)
    assert dvc_status(workspace) == {}
    with Repo(str(workspace)) as repo:
        assert repo.reproduce() == []


def test_dvc_repro_leaves_the_same_records(workspace: Path) -> None:
    with Repo(str(workspace)) as repo:
        assert len(repo.reproduce()) == 2
    (run,) = runs(workspace, "train")
    assert run.info.status == "FINISHED" and run.data.params["train.steps"] == "20"
    assert history(workspace, run.info.run_id) == list(enumerate(chain(10, 20), start=1))
    later = stage("train", workspace)
    assert later.how == "unchanged" and later.run_id == run.info.run_id
    tags = {key: value for key, value in run.data.tags.items() if key.startswith("dvc.out.")}
    assert tags == {f"dvc.out.{path}": md5 for path, md5 in later.outs.items()}


def test_a_training_stage_is_recorded_in_full(workspace: Path) -> None:
    stage("grind", workspace)
    result = stage("train", workspace)
    assert result.how == "ran" and result.figures == {"loss": chain(10, 20)[-1]}
    (run,) = runs(workspace, "train")
    assert run.info.status == "FINISHED"
    assert history(workspace, run.info.run_id) == list(enumerate(chain(10, 20), start=1))
    assert run.data.tags["machine.threads"] == "1" and run.data.tags["machine.device"] == "cpu"
    assert run.data.tags["dvc.dep.artifacts/grind"] == result.deps["artifacts/grind"]
    (given,) = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("artifacts/grind", result.deps["artifacts/grind"])
    names = {file.path for file in Records(workspace).client.list_artifacts(run.info.run_id)}
    assert {"curves.csv", "curves.png", "metrics.json", "figures.json"} <= names
    events = [json.loads(line) for line in progress_path(workspace).read_text().splitlines()]
    states = [event["state"] for event in events if event["stage"] == "train" and event["event"] == "stage"]
    assert states == ["started", "finished"]
    assert [event["step"] for event in events if event["event"] == "metrics" and event["stage"] == "train"][-1] == 20


def test_a_failing_child_says_why_and_its_run_is_failed(workspace: Path) -> None:
    stage("grind", workspace)
    text = (workspace / "params.yaml").read_text()
    (workspace / "params.yaml").write_text(text.replace("fail_at: 0", "fail_at: 3"))
    with pytest.raises(ChildError, match="stage train failed: the loss is not a number"):
        stage("train", workspace)
    (run,) = runs(workspace, "train")
    assert run.info.status == "FAILED"
    assert not (workspace / "artifacts/train").exists()


def test_a_crashing_child_shows_its_last_lines(workspace: Path) -> None:
    stage("grind", workspace)
    (workspace / "params.yaml").write_text((workspace / "params.yaml").read_text().replace("sleep: 0.0, ", ""))
    with pytest.raises(ChildError, match="KeyError: 'sleep'"):
        stage("train", workspace)


def test_a_missing_dep_names_the_remedy(workspace: Path) -> None:
    with pytest.raises(pipeline.PipelineError, match="stage train needs artifacts/grind, which is missing: run the"):
        stage("train", workspace)


def test_an_unknown_stage_is_refused(workspace: Path) -> None:
    with pytest.raises(StageError, match="there is no stage nosuch; there are grind, train"):
        run_stage("nosuch", root=workspace, stages=STAGES)


def test_data_that_changes_meanwhile_is_refused(workspace: Path) -> None:
    seen = pipeline.look(workspace, "grind")
    (workspace / "data/grain.txt").write_text("wheat ")
    (workspace / "artifacts/grind").mkdir(parents=True)
    (workspace / "artifacts/grind/flour.txt").write_text("?")
    with pytest.raises(pipeline.PipelineError, match="data changed while stage grind was reading it"):
        pipeline.commit(workspace, seen)


def test_an_undeclared_output_is_refused(workspace: Path) -> None:
    stage("grind", workspace)
    text = (workspace / "dvc.yaml").read_text()
    (workspace / "dvc.yaml").write_text(text.replace("    plots: [artifacts/train/curves.csv]\n", ""))
    with pytest.raises(StageError, match=r"made artifacts/train/curves.csv, which dvc.yaml does not declare"):
        stage("train", workspace)


def test_another_process_in_the_workspace_is_named(workspace: Path) -> None:
    code = (
        f"import tiny_main, sys; from flows.workspace import writer; from pathlib import Path\n"
        f"with writer(Path({str(workspace)!r}), 'align'): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout and other.stdin and other.stdout.readline() == "held\n"
    with pytest.raises(WorkspaceBusyError, match=rf"`align` \(pid {other.pid}, since 20.*wait until it ends"):
        stage("grind", workspace)
    other.stdin.close()
    other.wait()
    with writer(workspace, "a"), writer(workspace, "b"):
        assert stage("grind", workspace).how == "ran"


def start(root: Path, name: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(HERE / "tiny_main.py"), name], cwd=root, start_new_session=True)


def children_of(root: Path) -> list[psutil.Process]:
    def ours(process: psutil.Process) -> bool:
        try:
            return any(str(root / ".thumbwheel/work") in part for part in process.cmdline())
        except psutil.Error:
            return False

    return [process for process in psutil.process_iter() if ours(process)]


def test_a_stage_that_cannot_share_its_work_is_one_process(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THUMBWHEEL_PROCESSES", "2")
    stage("grind", workspace)
    result = stage("train", workspace)  # torchrun would start its child twice
    (run,) = runs(workspace, "train")
    assert history(workspace, run.info.run_id) == list(enumerate(chain(10, 20), start=1))
    assert result.figures["loss"] == chain(10, 20)[-1]


@pytest.mark.fault
@pytest.mark.parametrize("sleep", ["0.2", "0.1"], ids=["after metrics were sent", "before any metric was sent"])
def test_killed_in_the_middle_it_goes_on_in_the_same_run(workspace: Path, sleep: str) -> None:
    stage("grind", workspace)
    text = (workspace / "params.yaml").read_text()
    (workspace / "params.yaml").write_text(
        text.replace("kill_at: 0", "kill_at: 13").replace("sleep: 0.0", f"sleep: {sleep}")
    )
    assert start(workspace, "train").wait() == -signal.SIGKILL
    (killed,) = runs(workspace, "train")
    assert killed.info.status == "RUNNING"
    result = stage("train", workspace)  # waits for the orphan to notice
    assert children_of(workspace) == []
    (run,) = runs(workspace, "train")
    assert (run.info.run_id, run.info.status) == (result.run_id, "FINISHED")
    assert history(workspace, run.info.run_id) == list(enumerate(chain(10, 20), start=1))
    assert (workspace / "artifacts/train/model/weights.txt").read_text() == str(chain(10, 20)[-1])
    events = [json.loads(line) for line in progress_path(workspace).read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resumed"] == [10]


@pytest.mark.fault
def test_sigterm_ends_the_child_and_closes_the_run(workspace: Path) -> None:
    stage("grind", workspace)
    text = (workspace / "params.yaml").read_text()
    (workspace / "params.yaml").write_text(text.replace("sleep: 0.0", "sleep: 0.5").replace("steps: 20", "steps: 500"))
    process = start(workspace, "train")
    end = time.monotonic() + 60
    while not children_of(workspace) and time.monotonic() < end:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert children_of(workspace) == []
    (run,) = runs(workspace, "train")
    assert run.info.status == "KILLED"


@pytest.mark.fault
def test_a_dead_process_run_is_closed_by_whoever_finds_it(workspace: Path) -> None:
    stage("grind", workspace)
    text = (workspace / "params.yaml").read_text()
    (workspace / "params.yaml").write_text(text.replace("kill_at: 0", "kill_at: 7"))
    start(workspace, "train").wait()
    (run,) = runs(workspace, "train")
    assert Records(workspace).close_zombies() == [run.info.run_id]
    assert runs(workspace, "train")[0].info.status == "KILLED"
    assert Records(workspace).close_zombies() == []


def test_a_run_left_open_after_its_outputs_were_recorded_is_completed(workspace: Path) -> None:
    first = stage("grind", workspace)
    records = Records(workspace)
    records.client.update_run(first.run_id, status="RUNNING")
    assert stage("grind", workspace).run_id == first.run_id
    assert runs(workspace, "grind")[0].info.status == "FINISHED"
