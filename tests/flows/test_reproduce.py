"""`thumbwheel reproduce`: in another checkout, from a DVC remote that is a folder, with MLflow's records."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from dvc.repo import Repo
from tiny_main import STAGES as TINY

from flows import ingest, settings
from flows import reproduce as reproduction
from flows.erasure import TAG
from flows.record import PARAMS, Records
from flows.reproduce import NotReproducible, reproduce
from flows.stage import StageResult, run_stage

REPOSITORY = Path(__file__).parents[2]


def remote_at(root: Path, remote: Path) -> None:
    """Give a workspace a DVC remote that is a folder."""
    with Repo(str(root)) as repo, repo.config.edit("repo") as config:
        config["core"]["remote"] = "away"
        config["remote"] = {"away": {"url": str(remote)}}


@pytest.fixture
def trained(workspace: Path, tmp_path: Path) -> StageResult:
    """The miniature workspace with both stages made and pushed."""
    remote_at(workspace, tmp_path / "remote")
    run_stage("grind", root=workspace, stages=TINY)
    result = run_stage("train", root=workspace, stages=TINY)
    with Repo(str(workspace)) as repo:
        repo.push()
    return result


@pytest.fixture
def elsewhere(tmp_path: Path, workspace: Path) -> Path:
    """Another checkout: an empty workspace that knows the remote."""
    root = tmp_path / "elsewhere"
    root.mkdir()
    Repo.init(str(root), no_scm=True).close()
    remote_at(root, tmp_path / "remote")
    return root


def uri(workspace: Path) -> str:
    return f"sqlite:///{workspace}/.thumbwheel/mlflow.db"


def test_another_checkout_makes_the_same_weights_from_the_remote_alone(
    workspace: Path, elsewhere: Path, trained: StageResult
) -> None:
    shutil.rmtree(workspace / ".dvc/cache")
    records, run_id = Records(elsewhere, uri(workspace)), trained.run_id or ""
    verdict = reproduce(elsewhere, records, run_id, stages=TINY)
    assert (verdict.same, verdict.promised, verdict.stage) == (True, True, "train")
    assert verdict.got == verdict.expected == trained.outs["artifacts/train/model"]
    run = records.client.get_run(verdict.run_id)
    assert run.info.status == "FINISHED" and run.data.tags["thumbwheel.reproduces"] == run_id
    steps = [metric.step for metric in records.client.get_metric_history(verdict.run_id, "loss")]
    assert steps == list(range(1, 21))
    assert not (elsewhere / ".thumbwheel/reproduce").exists() and not (elsewhere / "artifacts").exists()
    found = records.find("train", trained.fingerprint, trained.outs)
    assert found is not None and found.info.run_id == run_id  # a reproduction is never taken for the run itself


def test_other_weights_and_another_machine_are_told(workspace: Path, trained: StageResult) -> None:
    records, run_id = Records(workspace), trained.run_id or ""
    records.client.set_tag(run_id, "machine.torch", "1.0")
    params = json.loads(records.client.get_run(run_id).data.tags[PARAMS])
    params["train"]["steps"] = 3
    records.client.set_tag(run_id, PARAMS, json.dumps(params))
    verdict = reproduce(workspace, records, run_id, stages=TINY)
    assert not verdict.same and not verdict.promised and "torch: 1.0 then" in verdict.differences[0]
    assert records.client.get_run(verdict.run_id).data.tags["thumbwheel.same_weights"] == "false"


@pytest.mark.parametrize(
    ("tags", "match"),
    [
        ({TAG: "2"}, r"erased since \(erasure 2\)"),
        ({"dvc.dep.models/ppo.py": "0" * 32, "code.revision": "f00d-dirty"}, "never committed"),
        ({"dvc.dep.models/ppo.py": "0" * 32, "code.revision": "f00d" * 10}, "git has no revision f00df00d"),
        ({"dvc.dep.models/ppo.py": "0" * 32, "code.revision": "HEAD"}, "does not hold the code"),
        (
            {"dvc.dep.artifacts/grind": "0" * 32 + ".dir"},
            r"artifacts/grind .* is neither in DVC's cache here nor in away",
        ),
        ({"dvc.stage": "judge"}, "only training stages"),
    ],
)
def test_what_cannot_be_made_again_is_refused_and_leaves_nothing(
    workspace: Path, trained: StageResult, tags: dict[str, str], match: str
) -> None:
    records, run_id = Records(workspace), trained.run_id or ""
    for key, value in tags.items():
        records.client.set_tag(run_id, key, value)
    before = len(list(records.search("")))
    with pytest.raises(NotReproducible, match=match):
        reproduce(workspace, records, run_id, stages=TINY)
    assert len(list(records.search(""))) == before
    assert not (workspace / ".thumbwheel/reproduce").exists()
    with pytest.raises(NotReproducible, match="knows no run"):
        reproduce(workspace, records, "0" * 32, stages=TINY)


def test_code_of_an_older_revision_is_taken_from_git(
    workspace: Path, trained: StageResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "models").mkdir(parents=True)
    source = checkout / "models/noun.py"

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=checkout, check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    source.write_text("old")
    git("add", "-A")
    git("commit", "-qm", "old")
    revision = git("rev-parse", "HEAD").strip()
    source.write_text("new")
    monkeypatch.setattr(reproduction, "CODE", checkout)
    records, run_id = Records(workspace), trained.run_id or ""
    records.client.set_tag(run_id, "dvc.dep.models/noun.py", "149603e6c03516362a8da23f624db945")  # md5 of "old"
    records.client.set_tag(run_id, "code.revision", revision)
    assert reproduce(workspace, records, run_id, stages=TINY).same
    assert len(git("worktree", "list").splitlines()) == 1


@pytest.mark.slow
def test_the_base_and_the_sft_model_of_preset_micro_are_made_again_to_the_bit(
    tmp_path: Path, empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("THUMBWHEEL_MLFLOW_TRACKING_URI", "THUMBWHEEL_ROOT", "THUMBWHEEL_DATABASE_URL", "DVC_STAGE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("THUMBWHEEL_THREADS", "1")
    roots = [tmp_path / "here", tmp_path / "there"]
    for root in roots:
        for name in ("flows", "models", "feedback"):
            shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("dvc.yaml", "params.yaml", "data.dvc"):
            shutil.copy(REPOSITORY / name, root)
        Repo.init(str(root), no_scm=True).close()
        remote_at(root, tmp_path / "remote")
    here, there = roots
    (here / ".thumbwheel").mkdir()
    shutil.copy(empty_mlflow, here / ".thumbwheel/mlflow.db")
    params = settings.set_params(here, {**settings.flatten(settings.preset("micro")), "pretrain.steps": 12})
    monkeypatch.chdir(here)
    ingest.verify_data(here, params.data)
    (here / "written.manifest.json").write_text('{"batches": []}')
    made = {
        name: run_stage(name, root=here) for name in ("curate", "validate", "tokenize", "pretrain", "written", "sft")
    }
    with Repo(str(here)) as repo:
        repo.push()
    weights = [(here / f"artifacts/{name}/model/model.safetensors").read_bytes() for name in ("pretrain", "sft")]
    assert weights[0] != weights[1]
    for name in ("dvc.lock", "artifacts", "data", ".dvc/cache"):
        (shutil.rmtree if (here / name).is_dir() else Path.unlink)(here / name)
    for name in ("pretrain", "sft"):
        verdict = reproduce(there, Records(there, uri(here)), made[name].run_id or "")
        assert verdict.same and verdict.promised
        assert verdict.expected == made[name].outs[f"artifacts/{name}/model"]
