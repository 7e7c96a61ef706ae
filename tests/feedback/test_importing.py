"""Import of other systems' logs: every format, dry run, rows that cannot be taken, repetition, an import killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from feedback import audit, logs
from feedback.identity import Identity
from feedback.importing import Options, Tally, load
from feedback.store import Store
from feedback.tables import CompletionRow, FeedbackRow

IDENTITY = Identity(b"the test's own secret")
QUESTION = [{"role": "user", "content": "你好?"}]


def bring(store: Store, path: Path, **options: Any) -> Tally:
    """Import a file."""
    return load(store, IDENTITY, path, Options(**options), path.with_name("rejected.jsonl"))


def said(store: Store) -> list[tuple[Any, ...]]:
    """(question, answer, kind, value, comment, source, channel) of every opinion."""
    names = ("kind", "value", "comment", "source", "channel")
    query = (
        sa.select(CompletionRow.request_messages, CompletionRow.response, *(getattr(FeedbackRow, n) for n in names))
        .join(FeedbackRow, FeedbackRow.completion_id == CompletionRow.id)
        .order_by(FeedbackRow.id)
    )
    with store.read() as connection:
        return [(row[0][-1]["content"], *row[1:]) for row in connection.execute(query)]


def refused(path: Path) -> list[tuple[int, str]]:
    """(line, field) of the rows that were not taken."""
    lines = path.with_name("rejected.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert all(entry["problem"] and entry["remedy"] and entry["file"] == str(path) for entry in entries)
    return [(entry["line"], entry["field"]) for entry in entries]


def write_lines(path: Path, *rows: Any) -> Path:
    """A jsonl file; strings are written as they are."""
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    )
    return path


def test_csv_with_its_errors_beside_it(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(
        b"\xef\xbb\xbfprompt,response,value,comment,user,source,created_at,page\n"
        b'hi,"hello,\nyou",up,fine,ann,,2026-01-02T03:04:05Z,7\n'
        b"hi,go away,-1,,bob,human_expert,1700000000,7\n"
        b"hi,x,maybe,,,,,\n"
        b"hi,\xff\xfe,1,,,,,\n"
        b"too,few\n"
        b"hi,,1,,,,,\n"
        b"hi,x,1,,,robot,,\n"
        b"hi,x,1,,,,yesterday,\n" + "你好,好,👎,,,,,\n".encode()
    )
    tally = bring(store, path)
    assert (tally.created, tally.rejected, tally.unread) == (3, 6, {"page"})
    assert said(store) == [
        ("hi", "hello,\nyou", "thumb", 1, "fine", "human_user", "import"),
        ("hi", "go away", "thumb", -1, "", "human_expert", "import"),
        ("你好", "好", "thumb", -1, "", "human_user", "import"),
    ]
    # the first row takes two lines, so that the next one is on the fourth
    assert refused(path) == [
        (5, "value"),
        (6, "response"),
        (7, "row"),
        (8, "response"),
        (9, "source"),
        (10, "created_at"),
    ]
    with store.read() as connection:
        rows = connection.execute(sa.select(CompletionRow).order_by(CompletionRow.created_at)).all()
    assert [row.created_at.isoformat()[:19] for row in rows[:2]] == ["2023-11-14T22:13:20", "2026-01-02T03:04:05"]
    assert {row.origin for row in rows} == {"import"} and {row.status for row in rows} == {"complete"}


def test_jsonl_of_every_shape(store: Store, tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "fine"}
    path = write_lines(
        tmp_path / "log.jsonl",
        {"prompt": "plain", "response": "p", "thumb": True, "model": "m-1"},
        {"messages": [*QUESTION, answer], "feedback": {"value": "down", "comment": "dull"}},
        {
            "request": {
                "model": "gpt-x",
                "messages": [{"role": "user", "content": [{"type": "text", "text": "parts"}]}],
            },
            "response": {"choices": [{"message": {"role": "assistant", "content": "whole"}}]},
            "rating": 1,
        },
        {"prompt": "unpaired", "completion": "u", "label": False},
        {"prompt": [{"role": "user", "content": "chat"}], "completion": [answer], "label": True},
        {"prompt": "pair", "chosen": "better", "rejected": "worse"},
        {"chosen": [*QUESTION, answer], "rejected": [*QUESTION, {"role": "assistant", "content": "bad"}]},
    )
    tally = bring(store, path, source="llm_judge", channel="old")
    assert (tally.created, tally.rejected) == (7, 0)
    assert not path.with_name("rejected.jsonl").exists()
    thumbs = [row for row in said(store) if row[2] == "thumb"]
    assert thumbs == [
        ("plain", "p", "thumb", 1, "", "llm_judge", "old"),
        ("你好?", "fine", "thumb", -1, "dull", "llm_judge", "old"),
        ("parts", "whole", "thumb", 1, "", "llm_judge", "old"),
        ("unpaired", "u", "thumb", -1, "", "llm_judge", "old"),
        ("chat", "fine", "thumb", 1, "", "llm_judge", "old"),
    ]
    with store.read() as connection:
        texts = dict(connection.execute(sa.select(CompletionRow.id, CompletionRow.response)).tuples().all())
        pairs = connection.execute(sa.select(FeedbackRow).where(FeedbackRow.kind == "comparison")).all()
        models = set(connection.execute(sa.select(CompletionRow.model_alias)).scalars())
    chosen = {
        (texts[p.completion_id], texts[p.other]) if p.value > 0 else (texts[p.other], texts[p.completion_id])
        for p in pairs
    }
    assert chosen == {("better", "worse"), ("fine", "bad")} and {p.position for p in pairs} == {None}
    assert models == {"m-1", "gpt-x", "import"}


def test_what_jsonl_cannot_say(store: Store, tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "log.jsonl",
        "{not json",
        "[1]",
        '{"prompt": "a", "response": "b", "value": NaN}',
        {"prompt": "a", "response": "b"},
        {"prompt": "", "response": "b", "value": 1},
        {"prompt": 7, "response": "b", "value": 1},
        {"messages": QUESTION, "value": 1},
        {"messages": [{"role": "robot", "content": "x"}], "response": "b", "value": 1},
        {"prompt": "a", "chosen": "same", "rejected": "same"},
        {"chosen": [*QUESTION, *QUESTION], "rejected": QUESTION},
        {"prompt": "a", "response": "b\u0000", "value": 1},
        {"prompt": "a", "response": {"text": "b"}, "value": 1},
        {"prompt": "a", "response": "x" * 100_001, "value": 1},
        "",
        {"prompt": "a", "response": "b", "value": 1},
    )
    tally = bring(store, path)
    assert (tally.created, tally.rejected) == (1, 13)
    assert refused(path) == [
        (1, "row"),
        (2, "row"),
        (3, "row"),
        (4, "value"),
        (5, "prompt"),
        (6, "prompt"),
        (7, "messages"),
        (8, "prompt.0.role"),
        (9, "rejected"),
        (10, "chosen"),
        (11, "response"),
        (12, "response"),
        (13, "response"),
    ]


def test_parquet_as_trl_writes_it(store: Store, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    question = [{"role": "user", "content": "q"}]
    rows = [
        {"prompt": question, "chosen": answer("good"), "rejected": answer("bad")},
        {"prompt": question, "chosen": answer("good"), "rejected": answer("good")},
    ]
    path = tmp_path / "pairs"  # no suffix: its first bytes tell
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert (logs.container(path, "auto"), logs.size(path, "parquet")) == ("parquet", 2)
    tally = bring(store, path, format="trl-preference")
    assert (tally.created, tally.rejected) == (1, 1) and refused(path) == [(2, "rejected")]
    with pytest.raises(ValueError, match="not a parquet file"):
        bring(store, write_lines(tmp_path / "x.jsonl", {"a": 1}), format="parquet")
    with pytest.raises(ValueError, match="cannot tell"):
        bring(store, write_lines(tmp_path / "x.txt", "hello"))


def answer(text: str) -> list[dict[str, str]]:
    """A conversational completion."""
    return [{"role": "assistant", "content": text}]


def test_equal_rows_of_unknown_people_count_and_a_repetition_adds_nothing(store: Store, tmp_path: Path) -> None:
    row = {"prompt": "a", "response": "b", "value": 1}
    ann = {**row, "user": "ann"}
    path = write_lines(
        tmp_path / "log.jsonl", row, row, {**row, "value": -1}, ann, {**ann, "value": -1}, ann, {**row, "user": "bob"}
    )
    first = bring(store, path)
    assert (first.created, first.revised, first.known) == (5, 2, 0)
    values = sorted(row[3] for row in said(store))
    assert values == [-1, 1, 1, 1, 1]  # three unknown people, ann, who ended where she began, and bob
    log = store.events()
    again = bring(store, path)
    assert (again.created, again.revised, again.known) == (0, 0, 7)
    assert store.events() == log
    part = write_lines(tmp_path / "part.jsonl", row, ann, {"prompt": "new", "response": "b", "value": 1})
    assert (bring(store, part).created, len(said(store))) == (1, 6)


def test_a_dry_run_says_what_would_happen_and_writes_nothing(store: Store, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "log.jsonl", {"prompt": "a", "response": "b", "value": 1}, "{")
    tally = bring(store, path, dry_run=True)
    assert (tally.created, tally.rejected) == (1, 1) and refused(path) == [(2, "row")]
    assert said(store) == [] and store.events() == []
    assert bring(store, path).created == 1


def test_a_dry_run_counts_an_opinion_once_however_far_apart_its_rows_stand(store: Store, tmp_path: Path) -> None:
    def pair(better: str, worse: str) -> dict[str, str]:
        return {"prompt": "p", "chosen": better, "rejected": worse, "user": "ann"}

    filling = [{"prompt": f"q{n}", "response": "r", "value": 1} for n in range(450)]  # more than two transactions
    ann = {"prompt": "a", "response": "b", "user": "ann"}
    path = write_lines(
        tmp_path / "log.jsonl",
        *({**ann, "value": 1}, pair("x", "y")),
        *filling[:220],
        *({**ann, "value": -1}, pair("y", "x")),
        *filling[220:],
        *({**ann, "value": -1}, {**ann, "value": 1}, pair("x", "y")),
    )
    would = bring(store, path, dry_run=True)
    assert store.events() == []
    assert (would.created, would.revised, would.known) == (452, 4, 1)
    assert vars(bring(store, path)) == vars(would)
    log = store.events()
    for dry_run in (True, False):  # a row that only repeated the one before it must not undo what came after
        assert bring(store, path, dry_run=dry_run).known == 457
    assert store.events() == log


def test_people_who_were_erased_are_not_brought_back_and_the_file_of_refusals_does_not_quote_them(
    store: Store, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "a", "response": "b", "value": 1, "user": "bob"},
        {"prompt": "a", "response": "b", "value": -1, "user": "ann", "comment": "a secret of hers"},
        {"prompt": "her own question", "response": "c", "value": -1, "user": "ann"},
    ]
    path = write_lines(tmp_path / "log.jsonl", *rows)
    bring(store, path)
    assert store.erase(IDENTITY.subject("import", "ann"), "command:eve") is not None
    before = store.events()
    for dry_run in (True, False):
        tally = bring(store, path, dry_run=dry_run)
        assert (tally.known, tally.erased, tally.created, tally.rejected, tally.rows) == (1, 2, 0, 0, 3)
    assert store.events() == before and not path.with_name("rejected.jsonl").exists()
    assert store.erase(IDENTITY.subject("import", "carl"), "command:eve") is None  # before anything of his came
    carl = write_lines(tmp_path / "carl.jsonl", {"prompt": "x", "response": "y", "value": 1, "user": "carl"})
    assert (bring(store, carl).erased, store.events()) == (1, before)
    with store.read() as connection:
        acts = audit.entries(connection)
        kept = set(connection.execute(sa.select(FeedbackRow.subject)).scalars())
    assert [(act.actor, act.act) for act in acts] == [("command:eve", "subject.erase")] * 2
    assert [act.after["opinions"] for act in acts if act.after] == [2, 0]
    names = {IDENTITY.subject("import", name) for name in ("ann", "carl")}
    assert not any(name in act.target for act in acts for name in names) and kept.isdisjoint(names)


def test_an_erased_answer_does_not_come_back(store: Store, tmp_path: Path) -> None:
    from feedback import erasure

    asked = {"prompt": "a", "response": "b", "value": 1}
    bring(store, write_lines(tmp_path / "log.jsonl", {**asked, "user": "ann"}))
    with store.write() as connection:
        assert erasure.erase(connection, IDENTITY.subject("import", "ann")) is not None
    path = write_lines(tmp_path / "log.jsonl", {**asked, "user": "ann"}, {**asked, "user": "bob"})
    tally = bring(store, path)
    assert (tally.created, tally.erased, tally.rejected) == (0, 1, 1)
    assert "erased" in path.with_name("rejected.jsonl").read_text()


def test_options_that_mean_nothing_are_refused() -> None:
    for values, match in (
        ({"format": "xml"}, "no format"),
        ({"source": "robot"}, "no source"),
        ({"channel": "far too long a name"}, "1 to 16"),
    ):
        with pytest.raises(ValueError, match=match):
            Options(**values)


@pytest.mark.fault
def test_an_import_that_is_killed_and_begun_again_has_the_same_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n % 700}", "response": f"a{n % 900}", "value": 1 - 2 * (n % 2)} for n in range(6000)]
    path = write_lines(tmp_path / "log.jsonl", *rows)
    whole = Store(f"sqlite:///{tmp_path}/whole.db")
    whole.migrate()
    bring(whole, path)
    killed = Store(f"sqlite:///{tmp_path}/state/.thumbwheel/feedback.db")
    killed.migrate()
    env = {**os.environ, "THUMBWHEEL_ROOT": str(tmp_path / "state"), "THUMBWHEEL_SECRET": "the test's own secret"}
    env.pop("THUMBWHEEL_DATABASE_URL", None)
    command = [sys.executable, "-m", "flows.cli", "import", str(path)]
    for share in (0.2, 0.5):
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
        while len(killed.events(limit=10_000)) < share * len(rows) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        count = len(killed.events(limit=10_000))
        assert count % 200 == 0 and 0 < count < len(rows)  # whole chunks
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "known already" in done.stdout
    assert said(killed) == said(whole)
    assert [e.payload for e in killed.events(limit=10_000)] == [e.payload for e in whole.events(limit=10_000)]
    whole.close()
    killed.close()
