"""`thumbwheel erase --user`: a person of an import, of a program on this machine, of an API key's program."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from feedback import audit, completions, keys
from feedback.completions import Completion
from feedback.identity import Identity
from feedback.opinions import Vote
from feedback.store import Store
from flows.cli import app

SECRET = "the secret of the tests"


def test_a_person_is_erased_under_every_name_and_the_audit_says_who_did_it(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THUMBWHEEL_SECRET", SECRET)
    monkeypatch.setenv("THUMBWHEEL_ROOT", str(workspace))
    monkeypatch.delenv("THUMBWHEEL_DATABASE_URL", raising=False)
    identity = Identity(SECRET.encode())
    store = Store(f"sqlite:///{workspace}/.thumbwheel/feedback.db")
    store.migrate()
    names = [("import", "ann"), ("user", "ann"), ("key", "shop", "ann"), ("import", "bob")]
    answer = Completion("chatcmpl-1", "asker", "0" * 64, [{"role": "user", "content": "hi"}], {}, "a" * 64, [1])
    with store.write() as connection:
        keys.create(connection, "shop", ["rate"], "command:test", None)
        completions.insert(connection, answer)
        completions.finish(connection, answer.id, {"status": "complete", "response": "hey", "response_token_ids": [2]})
    for name in names:
        store.vote(Vote(answer.id, identity.subject(*name), value=1))
    store.open_batch()

    runner = CliRunner()
    refused = runner.invoke(app, ["erase", "--user", "ann"], input="n\n")
    assert refused.exit_code == 1 and store.unflagged_erasures() == []
    done = runner.invoke(app, ["erase", "--user", "ann", "--yes"])
    assert done.exit_code == 0, done.output
    said = done.output.splitlines()
    assert said[:3] == [
        f"{where}: 0 answers and 1 opinions erased" for where in ("imports", "this machine", "key shop")
    ]
    assert said[3].startswith("batches [1] had accepted some of it; snapshots of before were deleted")
    assert store.count_opinions() == 1 and store.unflagged_erasures() == []
    with store.read() as connection:
        acts = [act.actor.partition(":")[0] for act in audit.entries(connection) if act.act == "subject.erase"]
    assert acts == ["command"] * 3
    store.close()
