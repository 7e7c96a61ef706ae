"""`thumbwheel status` with a store, a judge's report and a question, and without any of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_approval import report
from test_bell import vote
from typer.testing import CliRunner

from feedback.store import Store
from flows import approval, settings
from flows.cli import app

HASH, BEFORE = "a" * 64, "b" * 64  # vote() answers with model aaa…


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THUMBWHEEL_ROOT", str(tmp_path))
    monkeypatch.delenv("THUMBWHEEL_DATABASE_URL", raising=False)
    (tmp_path / "params.yaml").write_text(json.dumps(settings.Params().plain()))
    return tmp_path


def test_nothing_is_there_and_nothing_is_made(root: Path) -> None:
    shown = CliRunner().invoke(app, ["status"])
    assert shown.exit_code == 0, shown.output
    assert "champion   nobody yet" in shown.output and "✘" not in shown.output
    assert not (root / ".thumbwheel/feedback.db").exists()


def test_one_screen_says_who_serves_what_waits_and_why(root: Path) -> None:
    store = Store(f"sqlite:///{root / '.thumbwheel/feedback.db'}")
    store.migrate()
    for model, before in ((BEFORE, None), (HASH, BEFORE)):
        store.promote(model_hash=model, model_path="", figures={}, reason="it won", expected_champion=before)
    for name in ("x", "y", "z"):
        vote(store, name)
    store.open_batch()
    vote(store, "later")
    store.moderate(store.events()[-1].feedback_id, "quarantined", "odd")
    store.close()
    (root / "artifacts/judge").mkdir(parents=True)
    told = {**report(HASH, BEFORE), "gate": {"decision": "keep", "reasons": ["too few prompts"], "checks": {}}}
    (root / "artifacts/judge/report.json").write_text(json.dumps(told))
    approval.write(root, approval.Question("c" * 64, report("c" * 64, HASH), ["better"], "2026-01-01"))

    shown = CliRunner().invoke(app, ["status"])
    assert shown.exit_code == 0, shown.output
    for line in (
        "champion   aaaaaaaaaaaa since",
        "live: 100.0% of 3 thumbs up; bbbbbbbbbbbb before: no thumbs yet",
        "opinions   0 of 200 for the next batch",
        "batches    open: 1 (3 opinions)",
        "quarantine 1 opinions",
        "gate       keep aaaaaaaaaaaa",
        "- too few prompts",
        "approval   cccccccccccc waits for a person",
    ):
        assert line in shown.output, shown.output
    found = json.loads(CliRunner().invoke(app, ["status", "--json"]).stdout)
    assert found["champion"]["thumbs"] == 3 and found["champion"]["before_rate"] is None
    assert found["problems"] == [] and found["retrain"] is None and len(found["servers"]) >= 6


def test_a_database_that_is_away_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THUMBWHEEL_DATABASE_URL", "postgresql+psycopg://nobody@127.0.0.1:9/none")
    shown = CliRunner().invoke(app, ["status"])
    assert shown.exit_code == 0 and "✘ opinions:" in shown.output
