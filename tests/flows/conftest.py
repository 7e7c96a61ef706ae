"""A real workspace in miniature: DVC, MLflow on SQLite, a data stage in the process and a training stage in a child."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from leftovers import leftovers

HERE = Path(__file__).parent
DVC_YAML = """\
stages:
  grind:
    cmd: {python} {main} grind
    deps: [data]
    params: [grind]
    outs: [artifacts/grind]
  train:
    cmd: {python} {main} train
    deps: [artifacts/grind]
    params: [seed, train]
    outs: [artifacts/train/model]
    metrics: [artifacts/train/metrics.json]
    plots: [artifacts/train/curves.csv]
"""
PARAMS = """\
seed: 1 # of everything
grind:
  times: 2 # how fine
train: {steps: 20, sleep: 0.0, kill_at: 0, fail_at: 0}
"""


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables without a row: making them takes seconds, copying them does not."""
    import mlflow

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def workspace(tmp_path: Path, empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace `tmp_path/miniature` with the stages grind and train, threads set to 1."""
    from dvc.repo import Repo

    root = tmp_path / "miniature"
    (root / "data").mkdir(parents=True)
    (root / ".thumbwheel").mkdir()
    shutil.copy(empty_mlflow, root / ".thumbwheel" / "mlflow.db")
    (root / "data" / "grain.txt").write_text("corn ")
    main = HERE / "tiny_main.py"
    (root / "dvc.yaml").write_text(DVC_YAML.format(python=sys.executable, main=main))
    (root / "params.yaml").write_text(PARAMS)
    for key in ("THUMBWHEEL_MLFLOW_TRACKING_URI", "THUMBWHEEL_ROOT", "DVC_STAGE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("THUMBWHEEL_THREADS", "1")
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.chdir(root)
    Repo.init(str(root), no_scm=True).close()
    return root


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A workspace with everything that `thumbwheel up` starts, once a session; nothing of it may be left in the end.

    Its params.yaml is the preset micro, and names a data folder that does not exist: a flow run there
    reads and writes parameters, and then stops at the data.
    """
    from flows import servers, settings

    root = tmp_path_factory.mktemp("wheel")
    (root / "params.yaml").write_text(json.dumps(settings.Params().plain()))
    settings.set_params(root, settings.preset("micro"))
    settings.set_params(root, {"data.folder": "nowhere", "bell.opinions": 2})
    (root / "click.py").write_text("raise SystemExit('a file of the user was taken for a library')")
    try:
        servers.start(root)
        servers.start(root, servers.BACKGROUND)
        yield root
    finally:
        ended = servers.stop(root)
    assert set(ended) == set(servers.ALL)
    assert leftovers(root) == []
