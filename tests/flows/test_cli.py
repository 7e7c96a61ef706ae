"""The command line: quick to start, clear when something is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows import settings
from flows.cli import app


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with every parameter at its default."""
    monkeypatch.setenv("THUMBWHEEL_ROOT", str(tmp_path))
    with (tmp_path / "params.yaml").open("w") as file:
        settings.yaml().dump(settings.Params().plain(), file)
    return tmp_path


def test_help_imports_nothing_heavy() -> None:
    probe = (
        "import sys; from flows.cli import app; "
        "print([m for m in ('torch', 'prefect', 'mlflow', 'dvc', 'great_expectations', 'pydantic') if m in sys.modules])"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert time.monotonic() - started < 5  # about 0.2 s on a quiet machine


def test_config_shows_every_parameter_and_leaves_the_file_alone(root: Path) -> None:
    before = (root / "params.yaml").read_text()
    result = CliRunner().invoke(app, ["config", "--set", "seed=7", "--set", "bell.opinions=50"])
    assert result.exit_code == 0, result.output
    shown = settings.yaml().load(result.stdout)
    assert (shown["seed"], shown["bell"]["opinions"]) == (7, 50)
    assert (root / "params.yaml").read_text() == before


def test_config_writes_what_it_shows(root: Path) -> None:
    result = CliRunner().invoke(app, ["config", "--set", "bell.opinions=50", "--write"])
    assert result.exit_code == 0, result.output
    assert settings.load(root).bell.opinions == 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "bell.opinion=50"], "bell.opinion is not known"),
        (["--set", "bell.opinions=0"], "opinions must be at least 1"),
        (["--set", "seed"], "write section.key=value"),
        (["--preset", "enormous"], "preset enormous is not known; known are"),
    ],
)
def test_config_refuses_what_is_wrong_and_writes_nothing(root: Path, arguments: list[str], message: str) -> None:
    before = (root / "params.yaml").read_text()
    result = CliRunner().invoke(app, ["config", *arguments, "--write"])
    assert result.exit_code == 1
    assert message in result.output
    assert (root / "params.yaml").read_text() == before


def test_nothing_runs_in_a_new_workspace(root: Path) -> None:
    status = CliRunner().invoke(app, ["status"])
    assert status.exit_code == 0
    assert status.output.count("not running") == 6
    assert "nothing was running" in CliRunner().invoke(app, ["down"]).output
    assert not os.environ.get("PREFECT_API_URL")


def test_a_folder_that_is_no_workspace_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THUMBWHEEL_ROOT", str(tmp_path))
    result = CliRunner().invoke(app, ["config"])
    assert result.exit_code == 1
    assert "params.yaml is missing" in result.output


def test_keys_are_made_shown_once_listed_and_revoked(root: Path) -> None:
    made = CliRunner().invoke(app, ["key", "create", "--scope", "chat", "--scope", "rate", "my app"])
    assert made.exit_code == 0 and made.stdout.startswith("tw_") and len(made.stdout.split()) == 1
    secret = made.stdout.strip()
    listed = CliRunner().invoke(app, ["key", "list"]).stdout
    assert "my app" in listed and "chat,rate" in listed and "works" in listed and secret not in listed
    assert "is revoked" in CliRunner().invoke(app, ["key", "revoke", "1"]).stdout
    assert "revoked" in CliRunner().invoke(app, ["key", "list"]).stdout
    assert "no key 9" in CliRunner().invoke(app, ["key", "revoke", "9"]).stderr
    wrong = CliRunner().invoke(app, ["key", "create", "--scope", "fly", "x"])
    assert wrong.exit_code == 1 and "no scope fly" in wrong.stderr


def test_gold_tasks_are_made_from_a_file_and_tasks_need_the_service(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "gold.jsonl"
    file.write_text('{"prompt": "2 + 2?", "answers": ["4", "5"], "ranking": [[1], [2]]}\n')
    assert "1 gold tasks made, 0 were" in CliRunner().invoke(app, ["label", "gold", str(file)]).stdout
    assert "0 gold tasks made, 1 were" in CliRunner().invoke(app, ["label", "gold", str(file)]).stdout
    file.write_text('{"prompt": "2 + 2?"}\n')
    wrong = CliRunner().invoke(app, ["label", "gold", str(file)])
    assert wrong.exit_code == 1 and "gold.jsonl:1: answers: Field required" in wrong.stderr
    alone = CliRunner().invoke(app, ["label", "make"])
    assert alone.exit_code == 1 and "the chat service does not run" in alone.stderr
