"""After an erasure: no file of the workspace holds the person's words any more, and MLflow tells who learned from them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from feedback import completions
from feedback.completions import Completion
from feedback.opinions import Vote
from feedback.store import Store
from flows.erasure import TAG, catch_up
from flows.record import MODEL, Records
from flows.workspace import hold

WORD = "xyzzySECRETplugh"
DVC_YAML = """\
stages:
  snapshot:
    cmd: {python} -c "import pathlib, shutil; out = pathlib.Path('artifacts/snapshot'); out.mkdir(parents=True); \
shutil.copy('said.txt', out / 'opinions.jsonl'); (out / 'empty').touch()"
    deps: [said.txt]
    outs: [artifacts/snapshot]
  written:
    cmd: {python} -c "import pathlib, shutil; out = pathlib.Path('artifacts/written'); out.mkdir(parents=True); \
shutil.copy('said.txt', out / 'conversations.jsonl')"
    deps: [said.txt]
    outs: [artifacts/written]
  other:
    cmd: {python} -c "import pathlib; pathlib.Path('other').touch()"
    outs: [other]
"""
CONFIG = """\
[core]
    remote = here
    no_scm = true
    autostage = false
['remote "here"']
    url = ../.thumbwheel/dvc-remote
"""


@pytest.fixture
def store(workspace: Path) -> Iterator[Store]:
    """Ann's opinion, learned from by the run that the test names."""
    store = Store(f"sqlite:///{workspace}/.thumbwheel/feedback.db")
    store.migrate()
    answer = Completion("chatcmpl-1", "asker", "0" * 64, [{"role": "user", "content": "hi"}], {}, "a" * 64, [1])
    with store.write() as connection:
        completions.insert(connection, answer)
        completions.finish(connection, answer.id, {"status": "complete", "response": "hey", "response_token_ids": [2]})
    store.vote(Vote(answer.id, "ann", kind="edit", value=1, correction=WORD))
    yield store
    store.close()


def snapshot(root: Path, said: str) -> None:
    """Make a snapshot as DVC does, and push it to a remote that is a folder."""
    from dvc.repo import Repo

    (root / "said.txt").write_text(said)
    repo = Repo(str(root))
    repo.reproduce()
    repo.push()
    repo.close()


def found(root: Path) -> list[str]:
    """The files under `root` that hold the word."""
    return [str(path) for path in root.rglob("*") if path.is_file() and WORD.encode() in path.read_bytes()]


def test_snapshots_are_deleted_wherever_they_stand_and_the_runs_flagged(workspace: Path, store: Store) -> None:
    (workspace / "dvc.yaml").write_text(DVC_YAML.format(python=sys.executable))
    remote = workspace / ".thumbwheel" / "dvc-remote"
    (workspace / ".dvc" / "config").write_text(CONFIG)
    for n in range(2):  # two of them: the older one stands in the cache alone
        snapshot(workspace, f"{WORD} {n}")
    (workspace / "said.txt").unlink()
    for stage in ("snapshot", "written"):  # as a run that was killed leaves it
        (workspace / ".thumbwheel/work" / stage / "f00d/output").mkdir(parents=True)
        (workspace / ".thumbwheel/work" / stage / "f00d/output/prompts.jsonl").write_text(WORD)
    assert len(found(workspace)) >= 9 and any(str(remote) in path for path in found(workspace))
    records = Records(workspace)
    parent, reward = (
        records.client.create_run(records.experiment, run_name=n).info.run_id for n in ("retrain", "reward")
    )
    records.link_stage(parent, "reward", "ran", reward)
    (workspace / "model").mkdir()
    version = records.register(reward, "reward", workspace / "model", "b" * 64, "md5")
    batch = store.open_batch()
    assert batch is not None
    store.consume_batch(batch.id, parent)
    assert catch_up(workspace, store, records) == 0
    store.erase("ann")

    lock = hold(workspace / ".thumbwheel" / "workspace.lock")  # as a process that runs stages there
    assert catch_up(workspace, store, records) == 0 and found(workspace) != []
    os.close(lock)
    assert catch_up(workspace, store, records) == 1
    assert found(workspace) == []
    assert [records.client.get_run(run).data.tags[TAG] for run in (parent, reward)] == ["1", "1"]
    assert records.client.get_model_version(MODEL, version).tags[TAG] == "1"
    assert catch_up(workspace, store, records) == 0
    empty = workspace / ".dvc/cache/files/md5/d4/1d8cd98f00b204e9800998ecf8427e"
    assert empty.exists()  # another stage's output is the same bytes
    snapshot(workspace, "what is left")
    assert (workspace / "artifacts/snapshot/opinions.jsonl").read_text() == "what is left"
    assert (workspace / "artifacts/written/conversations.jsonl").read_text() == "what is left"
