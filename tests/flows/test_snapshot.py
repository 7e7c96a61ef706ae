"""The snapshot stage, on a real store."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from feedback import completions
from feedback.completions import Completion
from feedback.opinions import Vote
from feedback.store import Store
from flows import snapshot
from models.job import Job


def opinion(store: Store, number: int, value: int, **values: Any) -> None:
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
    answer = replace(answer, **values)
    with store.write() as connection:
        completions.insert(connection, answer)
    store.vote(Vote(completion_id=answer.id, subject="rater", value=value, source="simulated"))


def run(root: Path, name: str, percent: int = 20) -> Path:
    job = Job(
        stage="snapshot",
        root=root,
        deps=("feedback.manifest.json", "artifacts/sft/model", "artifacts/curate"),
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
    (tmp_path / "artifacts/curate").mkdir(parents=True)
    for name in ("prompts.report", "prompts.tune", "sft.heldout"):
        (tmp_path / f"artifacts/curate/{name}.jsonl").touch()
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


def test_answers_from_elsewhere_are_tokenised_as_the_sft_model_reads_them(root: Path) -> None:
    from models.tokenizer import Tokenizer

    folder = root / "artifacts/sft/model"
    folder.mkdir(parents=True)
    tokenizer = Tokenizer.train(["hello there how are you", "fine thank you"] * 9, 300)
    tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 40}))
    user, assistant, end = (tokenizer.special[name] for name in ("<|user|>", "<|assistant|>", "<|end|>"))
    asked = [{"role": "user", "content": "how are you"}]
    prompt = [user, *tokenizer.encode("how are you"), end, assistant]
    ours = [*tokenizer.encode("fine"), end]
    store = Store(f"sqlite:///{root / '.thumbwheel' / 'feedback.db'}")
    unread = {"request_messages": asked, "prompt_token_ids": [], "response_token_ids": [], "response_logprobs": []}
    elsewhere = {"request_messages": asked, "prompt_token_ids": [5], "response_token_ids": [6], "response_logprobs": []}
    same = {"request_messages": asked, "prompt_token_ids": prompt, "response_token_ids": ours, "response_logprobs": []}
    cases: list[dict[str, Any]] = [
        {**unread, "origin": "import", "response": "fine thank you"},
        {**elsewhere, "origin": "remote", "response": "fine you", "finish_reason": "length"},
        {**same, "origin": "remote", "response": "fine"},
        {**unread, "origin": "import", "response": "you " * 50},
        {**unread, "origin": "import", "response": "x", "request_messages": [{"role": "robot", "content": "x"}]},
    ]
    for number, values in enumerate(cases, 100):
        opinion(store, number, 1, **values)
    assert store.open_batch() is not None
    (root / "feedback.manifest.json").write_text(json.dumps(store.manifest()))
    store.close()
    out = run(root, "out", 0)
    rows = {row["response"]: row for row in lines(out / "opinions.train.jsonl") if row["messages"] == asked}
    assert set(rows) == {"fine thank you", "fine you", "fine"}
    assert {tuple(row["prompt_ids"]) for row in rows.values()} == {tuple(prompt)}
    assert rows["fine thank you"]["response_ids"] == [*tokenizer.encode("fine thank you"), end]
    assert rows["fine you"]["response_ids"] == tokenizer.encode("fine you")  # it was cut off: no stop token
    assert rows["fine"]["response_ids"] == ours
    assert [rows[text].get("tokenised") for text in ("fine thank you", "fine you", "fine")] == [True, True, None]
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["train"], summary["tokenised"], summary["unreadable"]) == (43, 2, 2)
    assert (summary["unreadable.too_long"], summary["unreadable.no_template"]) == (1, 1)
    sampled = [row for row in lines(out / "opinions.train.jsonl") if row["messages"] != asked]
    assert {(tuple(row["prompt_ids"]), tuple(row["response_ids"])) for row in sampled} == {((1, 2), (3, 4))}
