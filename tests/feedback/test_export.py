"""Exports as TRL documents its data sets, read by `datasets`: of one moment, and without what does not stand."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient

from feedback.comparisons import compared, ranked
from feedback.opinions import Vote
from feedback.store import Store

Answer = Callable[..., str]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def said(store: Store, answer: Answer) -> Store:
    """Opinions of each kind that stand, and of each kind that do not."""
    a, b, c = (answer("嗨", text) for text in ("one", "two", "three"))
    store.vote(Vote(a, "ann", value=1))
    store.vote(Vote(b, "ann", value=-1))
    store.vote(Vote(subject="ann", **compared([a, b], b)))
    store.vote(Vote(subject="ann", **compared([a, c], None)))  # a tie
    store.vote(Vote(subject="ann", **ranked([a, b, c], [[c], [a, b]])))
    store.vote(Vote(a, "ann", kind="edit", value=1, correction="better"))
    store.vote(Vote(a, "ann", kind="comment", comment="hm"))
    store.vote(Vote(a, "eve", kind="expert", value=-1, source="human_expert"))
    for subject, op in (("bob", "retract"), ("mallory", "quarantine"), ("robot", "simulated"), ("carl", "erase")):
        source = "simulated" if op == "simulated" else "human_user"
        votes = [Vote(a, subject, value=-1, source=source), Vote(subject=subject, source=source, **compared([b, c], b))]
        votes += [Vote(a, subject, kind="edit", value=1, source=source, correction=f"{op} me")]
        for vote in votes:
            event = store.vote(vote)[0]
            if op == "quarantine":
                store.moderate(event.feedback_id, "quarantined", "a swarm")
            if op == "retract":
                name = {"kind": vote.kind, "other": vote.other, "retracted": True}
                store.vote(Vote(vote.completion_id, subject, **name))
    store.erase("carl")
    return store


EXPECTED: dict[str, list[dict[str, Any]]] = {
    "trl_unpaired": [
        {"prompt": user("嗨"), "completion": assistant("one"), "label": True},
        {"prompt": user("嗨"), "completion": assistant("two"), "label": False},
    ],
    "trl_preference": [
        {"prompt": user("嗨"), "chosen": assistant(better), "rejected": assistant(worse)}
        for better, worse in (("two", "one"), ("three", "one"), ("three", "two"), ("better", "one"))
    ],
    "sft": [{"messages": [*user("嗨"), *assistant("better")]}],
}


@pytest.mark.parametrize("view", EXPECTED)
def test_both_forms_hold_what_stands_and_load_in_datasets(
    said: Store, api: TestClient, view: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from datasets import load_dataset

    expected = EXPECTED[view]
    lines = api.get("/v1/export", params={"view": view})
    assert [json.loads(line) for line in lines.text.splitlines()] == expected
    assert (lines.headers["X-Thumbwheel-Rows"], int(lines.headers["X-Thumbwheel-Last-Seq"])) == (
        str(len(expected)),
        said.events()[-1].seq,
    )
    parquet = api.get("/v1/export", params={"view": view, "format": "parquet"})
    assert pq.read_table(io.BytesIO(parquet.content)).to_pylist() == expected
    for form, response in (("json", lines), ("parquet", parquet)):
        path = tmp_path / f"{view}.{form}"
        path.write_bytes(response.content)
        data = load_dataset(form, data_files=str(path), split="train", cache_dir=str(tmp_path / form))
        assert data.column_names == list(expected[0]) and data.to_list() == expected
        first = {"trl_unpaired": "prompt", "trl_preference": "chosen", "sft": "messages"}[view]
        assert set(data.features[first].feature) == {"role", "content"}


def test_machines_are_exported_where_they_are_asked_for(said: Store, api: TestClient) -> None:
    params = {"view": "sft", "source": ["simulated"]}
    assert "simulated me" in api.get("/v1/export", params=params).text
    assert api.get("/v1/export", params={"view": "sft", "source": "nobody"}).status_code == 422
    assert api.get("/v1/export", params={"view": "everything"}).status_code == 422


def test_what_changed_since_is_exported_alone(said: Store, api: TestClient, answer: Answer) -> None:
    last = int(api.get("/v1/export", params={"view": "sft"}).headers["X-Thumbwheel-Last-Seq"])
    since = {"view": "sft", "after_seq": last}
    assert api.get("/v1/export", params=since).text == ""
    said.vote(Vote(answer("new"), "ann", kind="edit", value=1, correction="newer"))
    assert [
        json.loads(line)["messages"][1]["content"] for line in api.get("/v1/export", params=since).text.splitlines()
    ] == ["newer"]


def test_an_empty_export_still_has_its_columns(api: TestClient) -> None:
    for view, columns in (("sft", ["messages"]), ("trl_preference", ["prompt", "chosen", "rejected"])):
        table = pq.read_table(io.BytesIO(api.get("/v1/export", params={"view": view, "format": "parquet"}).content))
        assert (table.num_rows, table.column_names) == (0, columns)


def test_an_export_sees_one_moment(said: Store, answer: Answer) -> None:
    from feedback import export

    late = answer("late")
    with said.moment() as connection:
        file = io.BytesIO()
        rows = export.records(connection, "sft", ["human_user"], 0)
        first = next(rows)
        said.vote(Vote(late, "ann", kind="edit", value=1, correction="too late"))
        assert [first, *rows] == EXPECTED["sft"]
        _, last = export.write(connection, file, "sft", "jsonl", ["human_user"])
        assert last == said.events()[-1].seq - 1
