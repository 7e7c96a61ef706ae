"""Opinions of every kind on SQLite and on PostgreSQL: natural keys, what the database refuses, what training is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from feedback.comparisons import compared, ranked
from feedback.opinions import Refused, Vote
from feedback.snapshot import write_snapshot
from feedback.store import Store
from feedback.tables import FeedbackRow
from models.opinions import Preference, read_opinions

Answer = Callable[..., str]


def snapshot(store: Store, folder: Path, heldout_percent: int = 0) -> dict[str, Any]:
    """Open a batch, and write everything so far; returns the summary."""
    store.open_batch()
    return write_snapshot(store, store.manifest(), folder, heldout_percent)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_two_answers_compared_in_either_order_are_one_opinion(store: Store, answer: Answer) -> None:
    a, b = answer(id="chatcmpl-a"), answer(response="hey", id="chatcmpl-b")
    first, how = store.vote(Vote(subject="someone", **compared([b, a], b)))
    assert (how, first.payload["completion_id"], first.payload["other"]) == ("created", a, b)
    assert (first.payload["value"], first.payload["position"]) == (-1, 1)  # a was shown second, and lost
    again, how = store.vote(Vote(subject="someone", **compared([a, b], a)))
    assert (how, again.feedback_id, again.payload["value"], again.payload["position"]) == (
        "revised",
        first.feedback_id,
        1,
        0,
    )
    tie, _ = store.vote(Vote(subject="someone", **compared([a, b], None)))
    assert tie.payload["value"] == 0 and store.count_opinions() == 0
    with pytest.raises(ValueError, match="chatcmpl-c is not among"):
        compared([a, b], "chatcmpl-c")


def test_a_ranking_is_named_by_its_answers_and_holds_each_once(store: Store, answer: Answer) -> None:
    ids = [answer(response=str(n), id=f"chatcmpl-{n}") for n in range(3)]
    first, how = store.vote(Vote(subject="someone", **ranked([ids[2], ids[0], ids[1]], [[ids[1]], [ids[2], ids[0]]])))
    assert how == "created" and first.payload["value"] == 1
    assert first.payload["ranked"] == [
        {"completion_id": ids[1], "rank": 1, "position": 2},
        {"completion_id": ids[0], "rank": 2, "position": 1},
        {"completion_id": ids[2], "rank": 2, "position": 0},
    ]
    assert store.vote(Vote(subject="someone", **ranked(ids, [ids])))[1] == "revised"
    assert store.count_opinions() == 0  # all equal: nothing said
    assert store.vote(Vote(subject="someone", **ranked(ids[:2], [ids[:1], ids[1:2]])))[1] == "created"
    gone, how = store.vote(Vote(subject="someone", retracted=True, **ranked(list(reversed(ids)))))
    assert (how, gone.payload["retracted"], gone.feedback_id) == ("revised", True, first.feedback_id)
    for groups in ([[ids[0]], [ids[1]]], [ids, [ids[0]]], [[ids[0], ids[1], "x"]]):
        with pytest.raises(ValueError, match="each of completion_ids once"):
            ranked(ids, groups)


def test_only_whole_answers_to_one_prompt_are_compared(store: Store, answer: Answer) -> None:
    one, two = answer("a", id="chatcmpl-1"), answer("b", id="chatcmpl-2")
    cut = answer("a", id="chatcmpl-3", status="aborted")
    cases = [([one, two], 422, "prompts_differ"), ([one, cut], 409, "completion_not_finished")]
    cases += [([one, "chatcmpl-no"], 404, "completion_not_found")]
    for ids, status, code in cases:
        for said in (compared(ids, ids[0]), ranked(ids, [ids[:1], ids[1:]])):
            with pytest.raises(Refused) as refused:
                store.vote(Vote(subject="someone", **said))
            assert (refused.value.status, refused.value.code) == (status, code)
    assert store.events() == []


def test_each_kind_is_an_opinion_of_its_own(store: Store, answer: Answer) -> None:
    id = answer()
    for kind, said in {"thumb": {"value": -1}, "edit": {"value": 1, "correction": "better"}}.items():
        assert store.vote(Vote(id, "someone", kind=kind, **said))[1] == "created"
        assert store.vote(Vote(id, "someone", kind=kind, **said))[1] == "replayed"
    assert store.vote(Vote(id, "someone", kind="comment", comment="hm"))[1] == "created"
    assert store.vote(Vote(id, "someone", kind="expert", value=1, source="human_expert"))[1] == "created"
    batch = store.open_batch()
    assert batch is not None and (batch.accepted, batch.excluded) == (3, {"neutral": 1})


def test_the_trainer_reads_comparisons_and_rankings_of_a_snapshot(store: Store, answer: Answer, tmp_path: Path) -> None:
    a, b, c = (answer("hey", text, id=f"chatcmpl-{text}") for text in ("x", "y", "z"))
    store.vote(Vote(a, "one", value=1))
    store.vote(Vote(subject="one", strength=2.0, **compared([a, b], b)))
    store.vote(Vote(subject="two", **compared([c, b], None)))
    store.vote(Vote(subject="two", **ranked([a, b, c], [[c], [a, b]])))
    counts = snapshot(store, tmp_path)
    assert (counts["train"], counts["train.comparisons"], counts["train.rankings"], counts["train.up"]) == (3, 1, 1, 1)
    (rated,) = read_opinions(tmp_path / "opinions.train.jsonl")
    texts = [bytes(ids[:-1]).decode() for ids in rated.answers]
    assert rated.prompt == [1, *b"hey"]
    assert {(texts[p.winner], texts[p.loser], p.strength) for p in rated.preferences} == {
        ("y", "x", 2.0),
        ("z", "x", 1.0),
        ("z", "y", 1.0),
    }
    assert [text for text, value in zip(texts, rated.values, strict=True) if value == 1] == ["x"]
    assert isinstance(rated.preferences[0], Preference)


def test_edits_become_conversations_and_questions_prompts(store: Store, answer: Answer, tmp_path: Path) -> None:
    store.vote(Vote(answer("hey"), "one", kind="edit", value=1, correction="Hello to you!"))
    store.vote(Vote(answer("hey"), "two", kind="edit", value=1, correction="Hello to you!"))
    gone = answer("secret")
    store.vote(Vote(gone, "one", kind="edit", value=1, correction="never mind"))
    bad = store.vote(Vote(answer("bad"), "one", kind="edit", value=1, correction="spam"))[0].feedback_id
    store.vote(Vote(answer("from the data"), "rater", value=1, source="simulated"))
    store.vote(Vote(answer("liked"), "one", value=1))
    store.vote(Vote(gone, "one", kind="edit", retracted=True))
    store.moderate(bad, "quarantined", "a swarm")
    counts = snapshot(store, tmp_path)
    assert (counts["conversations"], counts["prompts"], counts["train"]) == (1, 2, 2)
    (chat,) = lines(tmp_path / "conversations.jsonl")
    assert chat["source"] == "feedback" and len(chat["id"]) == 16
    assert chat["messages"] == [{"role": "user", "content": "hey"}, {"role": "assistant", "content": "Hello to you!"}]
    asked = [row["messages"][0]["content"] for row in lines(tmp_path / "prompts.jsonl")]
    assert sorted(asked) == ["hey", "liked"]
    store.vote(Vote(answer("new"), "one", value=1))
    store.moderate(store.events()[0].feedback_id, "rejected", "looked at")
    counts = snapshot(store, tmp_path)
    assert counts["conversations"] == 1  # the second person still says it
    store.moderate(store.events()[1].feedback_id, "rejected", "looked at")
    store.vote(Vote(answer("newer"), "one", value=1))
    assert snapshot(store, tmp_path)["conversations"] == 0


def test_what_experts_judged_is_held_out_with_all_that_was_said_of_its_prompt(
    store: Store, answer: Answer, tmp_path: Path
) -> None:
    id = answer("hard question")
    store.vote(Vote(id, "expert", kind="expert", value=-1, source="human_expert"))
    store.vote(Vote(id, "someone", value=1))
    store.vote(Vote(answer("easy question"), "someone", value=1))
    counts = snapshot(store, tmp_path, heldout_percent=0)
    assert (counts["train"], counts["heldout.up"], counts["heldout.down"]) == (1, 1, 1)
    assert {row["source"] for row in lines(tmp_path / "opinions.heldout.jsonl")} == {"human_expert", "human_user"}
    (rated,) = read_opinions(tmp_path / "opinions.heldout.jsonl")
    assert sorted(rated.values) == [-1, 1]


def test_answers_of_two_tokenizers_are_not_given_to_the_trainer(store: Store, answer: Answer, tmp_path: Path) -> None:
    a, b = answer("hey", "x", id="chatcmpl-1"), answer("hey", "y", id="chatcmpl-2")
    same = answer("hey", "x", id="chatcmpl-3")
    with store.write() as connection:
        connection.exec_driver_sql("UPDATE completion SET prompt_token_ids = '[7, 7]' WHERE id = 'chatcmpl-2'")
    far = answer("hey", "w", id="chatcmpl-4")
    with store.write() as connection:
        connection.exec_driver_sql("UPDATE completion SET origin = 'remote' WHERE id = 'chatcmpl-4'")
    store.vote(Vote(subject="someone", **compared([a, b], b)))
    store.vote(Vote(subject="someone", **compared([a, same], a)))
    store.vote(Vote(far, "someone", value=1))
    counts = snapshot(store, tmp_path)
    assert (counts["train"], counts["unreadable"]) == (0, 3)
    assert read_opinions(tmp_path / "opinions.train.jsonl") == []


def test_equal_comparisons_give_an_equal_hash_whatever_their_ids(
    store: Store, answer: Answer, answer_into: Callable[[Store], Answer], tmp_path: Path
) -> None:
    other = Store(f"sqlite:///{tmp_path}/other.db")
    other.migrate()
    for name, where, write in (("a", store, answer), ("b", other, answer_into(other))):
        yes, no = write("hey", "yes", id="chatcmpl-1" + name), write("hey", "no", id="chatcmpl-0" + name)
        if name == "b":  # the order of the ids is the other way round
            yes, no = write("hey", "yes", id="chatcmpl-00"), no
        where.vote(Vote(subject=name, **compared([yes, no], yes)))
        where.vote(Vote(subject=name, **ranked([yes, no], [[no], [yes]])))
        snapshot(where, tmp_path / name)
    assert store.manifest()["batches"][0]["sha256"] == other.manifest()["batches"][0]["sha256"]
    name = "opinions.train.jsonl"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() != b""
    other.close()


PLANS = {
    "the log after a number": (
        "SELECT * FROM feedback_event WHERE seq > 5 ORDER BY seq LIMIT 10",
        "pk_feedback_event|PRIMARY KEY",
    ),
    "what an opinion was": (
        "SELECT max(seq) FROM feedback_event WHERE feedback_id = 3",
        "ix_feedback_event_feedback_id",
    ),
    "changed since": ("SELECT * FROM feedback WHERE last_seq >= 9", "ix_feedback_last_seq"),
    "one's own": ("SELECT * FROM feedback WHERE subject = 'x'", "ix_feedback_subject"),
    "one's own answers": ("SELECT * FROM completion WHERE subject = 'x'", "uq_completion_subject|autoindex_completion"),
    "of an answer": ("SELECT * FROM feedback WHERE completion_id = 'x'", "uq_feedback_completion|autoindex_feedback"),
    "compared with": ("SELECT * FROM feedback WHERE other = 'x' AND other <> ''", "ix_feedback_other"),
    "to moderate": (
        "SELECT * FROM feedback WHERE moderation = 'quarantined' AND moderation <> 'accepted' ORDER BY id",
        "ix_feedback_moderation",
    ),
    "the batch of an opinion": ("SELECT * FROM training_batch_item WHERE feedback_id = 3", "ix_training_batch_item"),
    "said on a day": (
        "SELECT kind, count(*) FROM feedback WHERE created_at >= '2026-01-01' AND created_at < '2026-01-02' GROUP BY kind",
        "ix_feedback_created_at",
    ),
    "answered on a day": (
        "SELECT model_hash, status, count(*) FROM completion WHERE created_at >= '2026-01-01' AND created_at < '2026-01-02' "
        "GROUP BY model_hash, status",
        "ix_completion_served",
    ),
    "the newest times of answers": (
        "SELECT first_token_ms, total_ms FROM completion WHERE created_at >= '2026-01-01' AND status = 'complete' "
        "ORDER BY created_at DESC LIMIT 9",
        "ix_completion_served",
    ),
    "other tries": ("SELECT * FROM completion WHERE parent = 'x'", "ix_completion_parent"),
}


@pytest.mark.parametrize("what", PLANS)
def test_each_question_of_the_page_and_the_trainer_has_an_index(store: Store, what: str) -> None:
    query, index = PLANS[what]
    with store.read() as connection:
        if store.dialect == "postgresql":
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")  # the tables are empty
            plan = "\n".join(row[0] for row in connection.exec_driver_sql(f"EXPLAIN {query}"))
            assert "Seq Scan" not in plan
        else:
            plan = "\n".join(row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}"))
            assert "SCAN" not in plan
    assert any(name in plan for name in index.split("|")), plan


def test_two_deliveries_of_a_comparison_are_one_row(store: Store, answer: Answer) -> None:
    ids = [answer(response=text) for text in ("a", "b")]
    for shown in (ids, ids[::-1], ids):
        store.vote(Vote(subject="someone", **compared(shown, ids[0])))
    with store.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(FeedbackRow)).scalar() == 1
