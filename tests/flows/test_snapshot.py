"""The snapshot stage, on a real store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from feedback import completions
from feedback.completions import Completion
from feedback.opinions import Vote
from feedback.store import Store
from flows import snapshot
from models.job import Job


def opinion(store: Store, number: int, value: int) -> None:
    """An answer and a thumb on it."""
    answer = Completion(
        id=f"chatcmpl-{number}",
        subject="asker",
        request_sha256="0" * 64,
        request_messages=[{"role": "user", "content": f"question {number // 2}"}],
        sampling={"temperature": 1.0},
        model_hash="a" * 64,
        prompt_token_ids=[1, 2],
        response=f"answer {number}",
        response_token_ids=[3, 4],
        response_logprobs=[-0.5, -0.5],
        status="complete",
        finish_reason="stop",
    )
    with store.write() as connection:
        completions.insert(connection, answer)
    store.vote(Vote(completion_id=answer.id, subject="rater", value=value, source="simulated"))


def run(root: Path, name: str, percent: int = 20) -> Path:
    job = Job(
        stage="snapshot",
        root=root,
        deps=("feedback.manifest.json",),
        output=root / name,
        work=root / "work",
        params={"snapshot": {"heldout_percent": percent}},
    )
    job.output.mkdir()
    counts: dict[str, Any] = snapshot.run(job)
    assert counts == json.loads((job.output / "summary.json").read_text())
    return job.output


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace whose database holds 40 opinions on 20 prompts, in one batch that the manifest names."""
    monkeypatch.delenv("THUMBWHEEL_DATABASE_URL", raising=False)
    store = Store(f"sqlite:///{tmp_path / '.thumbwheel' / 'feedback.db'}")
    store.migrate()
    for number in range(40):
        opinion(store, number, 1 if number % 4 == 0 else -1)
    assert store.open_batch() is not None
    (tmp_path / "feedback.manifest.json").write_text(json.dumps(store.manifest()))
    store.close()
    return tmp_path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_opinions_become_files_and_later_votes_change_nothing(root: Path) -> None:
    first = run(root, "first")
    train, heldout = lines(first / "opinions.train.jsonl"), lines(first / "opinions.heldout.jsonl")
    assert len(train) + len(heldout) == 40
    assert sum(row["value"] == 1 for row in train + heldout) == 10
    assert not {row["messages"][0]["content"] for row in train} & {row["messages"][0]["content"] for row in heldout}

    store = Store(f"sqlite:///{root / '.thumbwheel' / 'feedback.db'}")
    opinion(store, 99, 1)
    store.close()
    second = run(root, "second")
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_the_held_out_share_is_an_option(root: Path) -> None:
    assert len(lines(run(root, "all", 100) / "opinions.heldout.jsonl")) == 40
    assert len(lines(run(root, "none", 0) / "opinions.train.jsonl")) == 40
    with pytest.raises(ValueError, match=r"params\.yaml: snapshot: heldout_percent must be 0 to 100, it is 101"):
        run(root, "more", 101)


def test_the_database_may_stand_elsewhere(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = tmp_path / "elsewhere.db"
    (root / ".thumbwheel" / "feedback.db").rename(moved)
    monkeypatch.setenv("THUMBWHEEL_DATABASE_URL", f"sqlite:///{moved}")
    assert len(lines(run(root, "out", 0) / "opinions.train.jsonl")) == 40


def test_a_manifest_that_does_not_fit_is_refused(root: Path) -> None:
    manifest = json.loads((root / "feedback.manifest.json").read_text())
    manifest["batches"][0]["sha256"] = "0" * 64
    (root / "feedback.manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="batch 1"):
        run(root, "out")
    (root / "feedback.manifest.json").write_text("[]")
    with pytest.raises(ValueError, match=r"feedback\.manifest\.json is no manifest"):
        run(root, "broken")
