"""The whole wheel with preset micro: a real Prefect server, MLflow server and chat service, killed in PPO on the way."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from feedback.opinions import Vote
from feedback.store import Store
from feedback.tables import CompletionRow

REPOSITORY = Path(__file__).parents[2]
COPIED = ("flows", "models", "feedback", ".dvc", ".dvcignore", "dvc.yaml", "params.yaml", "data.dvc", "pyproject.toml")
BEFORE = ["curate", "validate", "tokenize", "pretrain", "written", "sft", "snapshot", "reward"]
STAGES = [*BEFORE, "ppo", "judge"]
PARAMETERS = {"preset": "micro", "overrides": {"ppo.iterations": 8, "ppo": {"checkpoint_every": 2}}}
DVC_AGREES = (
    "from dvc.repo import Repo\nwith Repo('.') as repo: assert repo.status() == {}; assert repo.reproduce() == []"
)
SERVERS = "import sys; from pathlib import Path; from flows import servers; servers.{}(Path.cwd())"

pytestmark = [pytest.mark.slow, pytest.mark.fault, pytest.mark.timeout(1200)]


class Checkout:
    """A copy of the repository with servers of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.started: list[subprocess.Popen] = []
        for name in COPIED:
            source, target = REPOSITORY / name, root / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "cache", "tmp", "node_modules")
                shutil.copytree(source, target, ignore=ignored)
            else:
                shutil.copy(source, target)
        for command in (["init", "-q"], ["add", "-A"]):
            subprocess.run(["git", *command], cwd=root, check=True)
        left_out = ("PREFECT_", "MLFLOW_", "THUMBWHEEL_", "DVC_")
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(left_out)}
        self.environment |= {"PYTHONPATH": str(root), "THUMBWHEEL_ROOT": str(root), "THUMBWHEEL_THREADS": "1"}

    def python(self, *arguments: str, **options: Any) -> subprocess.Popen:
        """A Python of this checkout, in a session of its own."""
        command = [sys.executable, *arguments]
        process = subprocess.Popen(command, cwd=self.root, env=self.environment, start_new_session=True, **options)
        self.started.append(process)
        return process

    def end(self) -> None:
        """Kill what still runs, with its children, and stop the servers."""
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.python("-c", SERVERS.format("stop")).wait(60)

    def drive(self, flow: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Run a flow to its end; its state as {"type", "name", "message"}."""
        process = self.flow(flow, parameters)
        output = process.communicate(timeout=900)[0]
        assert process.returncode == 0, output
        return json.loads(output.splitlines()[-1])

    def flow(self, flow: str, parameters: dict[str, Any]) -> subprocess.Popen:
        """Start a flow."""
        driver = str(Path(__file__).with_name("drive_align.py"))
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return self.python(driver, flow, json.dumps(parameters), **output)

    def events(self) -> list[dict[str, Any]]:
        """All progress so far."""
        path = self.root / ".thumbwheel/progress.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def states(self, since: int = 0) -> dict[str, str]:
        """How each stage of dvc.yaml ended, from event number `since` on."""
        told = [
            event for event in self.events()[since:] if event["event"] == "stage" and event["stage"] in {*STAGES, "kto"}
        ]
        return {event["stage"]: event["state"] for event in told}

    def mlflow(self) -> list[Any]:
        """All MLflow runs, from the server."""
        import mlflow

        client = mlflow.MlflowClient(self.address("mlflow"))
        return list(client.search_runs([client.get_experiment_by_name("thumbwheel").experiment_id]))

    def history(self, run_id: str, key: str) -> list[int]:
        """The steps of a metric in the order in which they were logged."""
        import mlflow

        return [m.step for m in mlflow.MlflowClient(self.address("mlflow")).get_metric_history(run_id, key)]

    def address(self, name: str) -> str:
        """The server's address."""
        return json.loads((self.root / ".thumbwheel/servers.json").read_text())[name]["url"]

    def flow_runs(self) -> list[dict[str, Any]]:
        """All Prefect flow runs, oldest first."""
        import httpx

        body = {"sort": "START_TIME_ASC", "limit": 50}
        answer = httpx.post(f"{self.address('prefect')}/api/flow_runs/filter", json=body, trust_env=False, timeout=60)
        return answer.raise_for_status().json()

    def weights(self, stage: str) -> str:
        """sha256 of a stage's model."""
        return hashlib.sha256((self.root / f"artifacts/{stage}/model/model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    """A checkout whose servers run; they are ended with the module."""
    made = Checkout(tmp_path_factory.mktemp("wheel") / "checkout")
    try:
        assert made.python("-c", SERVERS.format("start")).wait(200) == 0
        yield made
    finally:
        made.end()


def test_killed_in_ppo_the_wheel_goes_on_and_turns_to_its_end(checkout: Checkout) -> None:
    process, end = checkout.flow("align", PARAMETERS), time.monotonic() + 900
    while not any(e["stage"] == "ppo" and e["event"] == "metrics" and e["step"] >= 3 for e in checkout.events()):
        assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=10)[0]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = len(checkout.events())

    assert checkout.drive("align", {})["type"] == "COMPLETED"

    assert checkout.states(before) == {
        **dict.fromkeys(BEFORE, "unchanged"),
        "ppo": "finished",
        "judge": "finished",
    }
    assert next(e["step"] for e in checkout.events()[before:] if e["event"] == "resumed") >= 2
    runs = checkout.mlflow()
    assert not [run for run in runs if run.info.status == "RUNNING"]
    fingerprints = Counter(run.data.tags.get("thumbwheel.fingerprint") for run in runs)
    assert len([f for f in fingerprints if f]) == len(STAGES) and fingerprints[None] == 2
    assert max(count for fingerprint, count in fingerprints.items() if fingerprint) == 1
    (ppo,) = [run for run in runs if run.info.run_name == "ppo"]
    keys = [key for key in ppo.data.metrics if not key.startswith(("system/", "final."))]
    assert keys and all(checkout.history(ppo.info.run_id, key) == list(range(1, 9)) for key in keys)
    assert [run["state_type"] for run in checkout.flow_runs()] == ["CRASHED", "COMPLETED"]


def test_the_weights_are_those_of_an_undisturbed_run(checkout: Checkout) -> None:
    after_kill = checkout.weights("ppo")
    again = "from flows.stage import run_stage; assert run_stage('ppo', force=True).how == 'ran'"
    assert checkout.python("-c", again).wait(200) == 0
    assert checkout.weights("ppo") == after_kill
    assert [run.info.run_name for run in checkout.mlflow()].count("ppo") == 1


def test_a_second_turn_runs_nothing_and_dvc_agrees(checkout: Checkout) -> None:
    before = len(checkout.events())
    assert checkout.drive("align", {})["type"] == "COMPLETED"
    assert checkout.states(before) == dict.fromkeys(STAGES, "unchanged")
    assert checkout.python("-c", DVC_AGREES).wait(100) == 0


def test_one_changed_ppo_parameter_reruns_ppo_and_judge_only(checkout: Checkout) -> None:
    before = len(checkout.events())
    assert checkout.drive("align", {"overrides": {"ppo": {"iterations": 3}}})["type"] == "COMPLETED"
    ran = {stage for stage, state in checkout.states(before).items() if state == "finished"}
    assert ran == {"ppo", "judge"}
    assert "iterations: 3" in (checkout.root / "params.yaml").read_text()


def test_another_method_reruns_itself_and_the_judge_and_the_way_back_is_kept(checkout: Checkout) -> None:
    ppo, before = checkout.weights("ppo"), len(checkout.events())
    assert checkout.drive("align", {"overrides": {"align": {"method": "kto"}}})["type"] == "COMPLETED"
    assert checkout.states(before) == {**dict.fromkeys(BEFORE, "unchanged"), "kto": "finished", "judge": "finished"}
    report = json.loads((checkout.root / "artifacts/judge/report.json").read_text())
    assert (report["method"], report["candidate"]["model_hash"]) == ("kto", checkout.weights("kto"))
    assert checkout.python("-c", DVC_AGREES).wait(100) == 0
    before = len(checkout.events())
    assert checkout.drive("align", {"overrides": {"align.method": "ppo"}})["type"] == "COMPLETED"
    assert checkout.states(before)["ppo"] == "unchanged" and "kto" not in checkout.states(before)
    assert checkout.weights("ppo") == ppo


def test_retrain_without_an_open_batch_has_nothing_to_do(checkout: Checkout) -> None:
    state = checkout.drive("retrain", {})
    assert (state["type"], state["message"]) == ("COMPLETED", "nothing to do: no batch is open")


def test_a_refused_parameter_stops_before_anything_runs(checkout: Checkout) -> None:
    before = len(checkout.events())
    output = checkout.flow("align", {"overrides": {"ppo.iteration": 3}}).communicate(timeout=100)[0]
    assert "params.yaml: ppo.iteration is not known" in output
    assert checkout.events()[before:] == []


def test_what_people_wrote_trains_sft_and_all_after_it_and_never_the_base(checkout: Checkout) -> None:
    assert checkout.drive("align", {"preset": "micro"})["type"] == "COMPLETED"
    base, sft, before = checkout.weights("pretrain"), checkout.weights("sft"), len(checkout.events())
    store = Store(f"sqlite:///{checkout.root}/.thumbwheel/feedback.db")
    with store.read() as connection:
        ids = list(connection.execute(sa.select(CompletionRow.id).order_by(CompletionRow.id).limit(30)).scalars())
    for number, id in enumerate(ids):
        store.vote(Vote(id, "ann", kind="edit", value=1, correction=f"I would rather say so, {number} times."))
    assert store.open_batch() is not None
    store.close()

    assert checkout.drive("align", {})["type"] == "COMPLETED"

    assert checkout.states(before) == {
        **dict.fromkeys(["curate", "validate", "tokenize", "pretrain"], "unchanged"),
        **dict.fromkeys(["written", "sft", "snapshot", "reward", "ppo", "judge"], "finished"),
    }
    assert checkout.weights("pretrain") == base and checkout.weights("sft") != sft
    figures = {
        name: json.loads((checkout.root / f"artifacts/{name}").read_text())
        for name in ("written/summary.json", "sft/metrics.json", "snapshot/summary.json")
    }
    learned = figures["written/summary.json"]["conversations"]
    assert 0 < learned == figures["sft/metrics.json"]["written_conversations"] < 30  # the others are held out
    assert figures["snapshot/summary.json"]["train.edits"] >= learned
    assert figures["snapshot/summary.json"]["prompts"] > 0
    learners = {(run.info.run_name, run.data.tags.get("thumbwheel.batches")) for run in checkout.mlflow()}
    assert {("sft", ""), ("sft", "2"), ("reward", "1"), ("reward", "1-2"), ("ppo", "1-2")} <= learners
