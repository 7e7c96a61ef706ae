"""What people look at after a run: the tables and pictures in Prefect, the answers as a table in MLflow."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest

from flows import report
from flows.record import Records


@pytest.fixture
def root(tmp_path: Path, empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("THUMBWHEEL_MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / ".thumbwheel").mkdir()
    shutil.copy(empty_mlflow, tmp_path / ".thumbwheel/mlflow.db")
    judged = tmp_path / "artifacts/judge"
    judged.mkdir(parents=True)
    role = {"model_hash": "a", "thumbs_up_rate": 0.5, "thumbs_up_rate_low": 0.4, "most_common_answer": "yes"}
    told = {"sft": role, "champion_before": {}, "candidate": {**role, "thumbs_up_rate": 0.8}}
    told["gate"] = {"decision": "keep", "reasons": ["too few prompts"]}
    (judged / "report.json").write_text(json.dumps(told))
    rows = [{"prompt": f"<b>{i}</b>", "base": "x", "sft": "y", "candidate": "z"} for i in range(3)]
    (judged / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_gate_and_the_tables_say_what_the_judge_found(root: Path) -> None:
    assert report.decision(root) == "\n## The gate: keep\n\n- too few prompts\n"
    assert report.figures_table(root) == [
        {"figure": "thumbs up rate", "sft": 0.5, "champion_before": None, "candidate": 0.8}
    ]
    assert report.answers_table(root)[0]["prompt"] == "<b>0</b>"


def test_curves_become_a_picture(tmp_path: Path) -> None:
    (tmp_path / "curves.csv").write_text("step,loss\n1,3.0\n2,2.0\n")
    head, _, body = report.picture(tmp_path / "curves.csv").partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(body).startswith(b"\x89PNG")


def test_answers_are_a_table_of_mlflow_once(root: Path) -> None:
    records = Records(root)
    with records.stage("judge", "f" * 64, None, {}, {}) as run:
        run.outputs({"artifacts/judge": "md5"})
        run.outputs({"artifacts/judge": "md5"})
        run_id = run.run_id
    table = json.loads(Path(records.client.download_artifacts(run_id, "samples.json")).read_text())
    assert table["columns"] == ["prompt", "base", "sft", "candidate"] and len(table["data"]) == 3
