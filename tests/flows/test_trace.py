"""`thumbwheel trace`: from a thumb to the models that it taught, and back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from feedback import completions
from feedback.completions import Completion
from feedback.opinions import Vote
from feedback.store import Store
from flows.cli import app
from flows.lineage import BATCHES
from flows.record import FLOW_RUN, Records
from flows.trace import UnknownName, trace

MODELS = {"first": "a" * 64, "second": "ab" * 32, "third": "c" * 64}


@pytest.fixture
def store(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Three turns of the wheel: ann's thumb is in batch 1 and was taken back in batch 2; bob's stands in batch 2."""
    monkeypatch.setenv("THUMBWHEEL_ROOT", str(workspace))
    monkeypatch.delenv("THUMBWHEEL_DATABASE_URL", raising=False)
    store = Store(f"sqlite:///{workspace}/.thumbwheel/feedback.db")
    store.migrate()
    for number in (1, 2):
        answer = Completion(
            f"chatcmpl-{number}", "asker", "0" * 64, [{"role": "user", "content": "hi"}], {}, "e" * 64, [1]
        )
        with store.write() as connection:
            completions.insert(connection, answer)
            done = {"status": "complete", "response": "hey", "response_token_ids": [2]}
            completions.finish(connection, answer.id, done)
    records = Records(workspace)
    (workspace / "model").mkdir()

    def turn(name: str, batches: str) -> None:
        batch = store.open_batch()
        assert batch is not None
        marks = {BATCHES: batches, "dvc.stage": "reward"}
        records.client.create_run(records.experiment, run_name="reward", tags=marks)
        run = records.client.create_run(records.experiment, run_name="ppo").info.run_id
        origin = {
            BATCHES: batches,
            FLOW_RUN: f"flow of {name}",
            "code.revision": "f00d",
            "dvc.dep.artifacts/sft/model": "5f7",
        }
        records.register(run, "ppo", workspace / "model", MODELS[name], f"md5 of {name}", origin)
        store.consume_batch(batch.id, f"run of {name}", "5" * 64)

    store.vote(Vote("chatcmpl-1", "ann", value=1))
    turn("first", "1")
    store.vote(Vote("chatcmpl-1", "ann", value=1, retracted=True))
    store.vote(Vote("chatcmpl-2", "bob", value=-1))
    turn("second", "1-2")
    store.vote(Vote("chatcmpl-2", "carl", kind="edit", value=1, correction="better"))
    turn("third", "1-3")
    yield store
    store.close()


def ask(root: Path, store: Store, name: str) -> dict[str, Any]:
    return trace(root, store, Records(root), name)


def taught(found: dict[str, Any]) -> list[list[str]]:
    return [[model["version"] for model in opinion["models"]] for opinion in found["opinions"]]


def test_a_thumb_leads_to_its_batches_and_to_the_models_that_learned_from_it(workspace: Path, store: Store) -> None:
    found = ask(workspace, store, "chatcmpl-1")
    (opinion,) = found["opinions"]
    assert taught(found) == [["1"]]  # it was taken back before the second model was made
    assert [(p["batch_id"], p["accepted"], p["reason"]) for p in opinion["batches"]] == [
        (1, True, ""),
        (2, False, "revised"),
    ]
    assert opinion["batches"][0]["mlflow_run_id"] == "run of first" and opinion["state"] == "retracted"
    assert opinion["models"][0]["flow_run"] == "flow of first" and opinion["answered_by"] == "e" * 64
    assert taught(ask(workspace, store, "chatcmpl-2")) == [["2", "3"], ["3"]]
    assert taught(ask(workspace, store, "2")) == [["2", "3"]]
    assert [[run["stage"] for run in o["runs"]] for o in ask(workspace, store, "2")["opinions"]] == [["reward"] * 2]
    records = Records(workspace)
    records.register("0" * 32, "sft", workspace / "model", "d" * 64, "md5", {BATCHES: "2-3"})
    assert taught(ask(workspace, store, "chatcmpl-2")) == [
        ["2", "3"],
        ["3", "4"],
    ]  # SFT learned the better answer alone


def test_a_model_leads_to_its_batches_and_what_was_said_in_them(workspace: Path, store: Store) -> None:
    for name in ("v3", "c" * 64, "c" * 8):
        model = ask(workspace, store, name)["model"]
        assert [(b["id"], b["accepted"], b["said"]) for b in model["batches"]] == [
            (1, 1, {"thumb +1": 1}),
            (2, 1, {"thumb -1": 1}),
            (3, 1, {"edit": 1}),
        ]
        assert model["batches"][1]["excluded"] == {"revised": 1}
        assert (model["code_revision"], model["inputs"]) == ("f00d", {"artifacts/sft/model": "5f7"})
    assert ask(workspace, store, "aaaaaaaa")["model"]["version"] == "1"
    for name, match in (
        ("chatcmpl-9", "no opinion"),
        ("v9", "no opinion"),
        ("feedbeef", "no opinion"),
        ("99", "no opinion"),
    ):
        with pytest.raises(UnknownName, match=match):
            ask(workspace, store, name)
    Records(workspace).register("0" * 32, "ppo", workspace / "model", "c" * 63 + "d", "md5", {})
    with pytest.raises(UnknownName, match="beginning of 2 models"):
        ask(workspace, store, "cccccccc")


def test_what_was_erased_is_traced_without_its_words(workspace: Path, store: Store) -> None:
    store.erase("bob")
    runner = CliRunner()
    done = runner.invoke(app, ["trace", "chatcmpl-2", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert taught(found) == [["2", "3"], ["3"]]  # they learned it all the same: that is why they are flagged
    assert [(o["state"], o["value"]) for o in found["opinions"]] == [("erased", 0), ("accepted", 1)]
    assert ask(workspace, store, "v2")["model"]["batches"][1] == {
        "id": 2, "accepted": 1, "excluded": {"revised": 1}, "erased": 1, "said": {"erased": 1},
    }  # fmt: skip
    shown = runner.invoke(app, ["trace", "v2"])
    assert shown.exit_code == 0 and "1 erased" in shown.output and "batches that it learned from" in shown.output
    assert runner.invoke(app, ["trace", "nothing"]).exit_code == 1
