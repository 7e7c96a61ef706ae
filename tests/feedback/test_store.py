"""The storage layer on SQLite and on PostgreSQL: migrations, opinions and their log, late commits, the crown."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from feedback import completions, opinions
from feedback.opinions import Refused, Vote
from feedback.store import StaleChampion, Store
from feedback.tables import CompletionRow, FeedbackRow, PromotionRow, Table

Answer = Callable[..., str]


def test_migrations_make_exactly_the_tables_that_the_code_declares(store: Store) -> None:
    with store.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Table.metadata) == []
        found = sa.inspect(connection)
        for table in Table.metadata.sorted_tables:  # what compare_metadata does not look at
            declared = {str(c.name) for c in table.constraints if isinstance(c, sa.CheckConstraint)}
            assert {check["name"] for check in found.get_check_constraints(table.name)} == declared
            assert {index["name"] for index in found.get_indexes(table.name)} >= {i.name for i in table.indexes}


def rows_of(store: Store) -> dict[str, list[tuple[object, ...]]]:
    """Every row of every table, but for what later migrations added."""
    new = {"origin", "prompt_tokens", "completion_tokens", "strength", "erased", "snapshot_sha256"}
    with store.read() as connection:
        return {
            table.name: sorted(
                connection.execute(sa.select(*(c for c in table.c if c.name not in new))).tuples().all(), key=repr
            )
            for table in Table.metadata.sorted_tables
            if table.name in FIRST_TABLES
        }


FIRST_TABLES = ("completion", "feedback", "feedback_event", "training_batch", "training_batch_item", "promotion")


def test_migrations_go_down_and_up_again_with_data_in_the_tables(store: Store, answer: Answer) -> None:
    id = answer()
    store.vote(Vote(id, "someone", value=1))
    again = store.completion(id)
    assert again is not None
    with store.write() as connection:  # a row that points to another of its own table
        completions.insert(connection, replace(again, id="chatcmpl-again", parent=id))
    store.promote(model_hash="a" * 64, model_path="m", figures={}, reason="first", expected_champion=None)
    assert store.open_batch() is not None
    before = rows_of(store)
    store.migrate("0001")
    assert rows_of(store) == before
    with store.read() as connection:
        assert "strength" not in {c["name"] for c in sa.inspect(connection).get_columns("feedback")}
    store.migrate()
    assert rows_of(store) == before
    counted = store.completion(id)
    assert counted is not None and (counted.prompt_tokens, counted.completion_tokens) == (6, 3)
    # numbers go on where they stood: a counter that began anew would give the number of a deleted row again
    assert store.vote(Vote(id, "another", value=1))[0].seq == 2
    with pytest.raises(sa.exc.IntegrityError), store.write() as connection:
        connection.execute(sa.update(FeedbackRow).values(completion_id="nowhere"))
    store.migrate("base")
    with store.read() as connection:
        assert set(sa.inspect(connection).get_table_names()) == {"alembic_version"}
    store.migrate()
    assert store.champion() is None and store.events() == []
    store.migrate()  # a repetition changes nothing
    store.ping()


def test_erased_rows_go_down_to_the_first_tables_under_names_that_those_know(store: Store, answer: Answer) -> None:
    id = answer()
    store.vote(Vote(id, "someone", kind="edit", value=1, correction="better"))
    with store.write() as connection:
        connection.execute(sa.update(CompletionRow).values(status="erased"))
        connection.execute(sa.update(FeedbackRow).values(moderation="erased", correction=""))
    store.migrate("0001")
    with store.read() as connection:
        assert connection.execute(sa.select(CompletionRow.status)).scalar() == "error"
        assert connection.execute(sa.select(FeedbackRow.moderation)).scalar() == "rejected"
    store.migrate()


def test_many_processes_may_migrate_at_once(database_url: str) -> None:
    stores = [Store(database_url) for _ in range(4)]
    threads = [threading.Thread(target=store.migrate) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for store in stores:
        store.ping()
        store.close()


def test_a_completion_comes_back_as_it_was_written(store: Store, answer: Answer) -> None:
    id = answer("你好", "hi\n<b>")
    found = store.completion(id)
    assert found is not None
    assert found.request_messages == [{"role": "user", "content": "你好"}]
    assert found.response_token_ids == [104, 105, 10, 60, 98, 62, 2]
    assert found.created_at.tzinfo is UTC
    assert abs((datetime.now(UTC) - found.created_at).total_seconds()) < 60


def test_sqlite_is_durable_and_checks_foreign_keys(tmp_path: object) -> None:
    store = Store(f"sqlite:///{tmp_path}/deep/feedback.db")
    store.migrate()
    with store.read() as connection:
        values = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")]
        assert values == ["wal", 2]
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    store.close()


def test_a_store_in_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a file"):
        Store("sqlite://")
    with pytest.raises(ValueError, match="SQLite or PostgreSQL, not mysql"):
        Store("mysql://x/y")


def test_a_vote_is_created_revised_retracted_and_given_again(store: Store, answer: Answer) -> None:
    id = answer()
    created, how = store.vote(Vote(id, "someone", value=1))
    assert (how, created.op, created.payload["value"]) == ("created", "create", 1)
    same, how = store.vote(Vote(id, "someone", value=1))
    assert (how, same.seq) == ("replayed", created.seq)
    revised, how = store.vote(Vote(id, "someone", value=-1))
    assert (how, revised.op, revised.payload["revision"]) == ("revised", "revise", 2)
    gone, how = store.vote(Vote(id, "someone", retracted=True))
    assert (how, gone.op, gone.payload["retracted"], gone.payload["value"]) == ("revised", "retract", True, -1)
    assert store.vote(Vote(id, "someone", retracted=True))[1] == "replayed"
    again, how = store.vote(Vote(id, "someone", value=-1))
    assert (how, again.payload["retracted"], again.payload["revision"]) == ("revised", False, 4)
    assert [event.op for event in store.events()] == ["create", "revise", "retract", "revise"]
    with store.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(FeedbackRow)).scalar() == 1


def test_votes_on_what_is_not_there_are_refused_and_write_nothing(store: Store, answer: Answer) -> None:
    cases = [
        (Vote("chatcmpl-nowhere", "someone", value=1), 404, "completion_not_found"),
        (Vote(answer(status="streaming"), "someone", value=1), 409, "completion_not_finished"),
        (Vote(answer(), "someone", retracted=True), 404, "feedback_not_found"),
    ]
    for vote, status, code in cases:
        with pytest.raises(Refused) as refused:
            store.vote(vote)
        assert (refused.value.status, refused.value.code) == (status, code)
    assert store.events() == []


def test_one_key_makes_one_event_and_refuses_another_body(store: Store, answer: Answer) -> None:
    id = answer()
    up = Vote(id, "someone", value=1, idempotency_key="k", request_sha256="1")
    first, _ = store.vote(up)
    store.vote(Vote(id, "someone", value=-1, idempotency_key="l", request_sha256="2"))
    late, how = store.vote(up)  # the first delivery comes again, late: it must not undo the second vote
    assert (how, late.seq) == ("replayed", first.seq)
    assert store.events()[-1].payload["value"] == -1
    with pytest.raises(Refused) as refused:
        store.vote(Vote(id, "someone", value=-1, idempotency_key="k", request_sha256="2"))
    assert refused.value.status == 422
    _, how = store.vote(Vote(id, "somebody else", value=-1, idempotency_key="k", request_sha256="2"))
    assert how == "created"  # keys belong to their subject


def test_the_database_itself_refuses_what_the_code_should_never_write(store: Store, answer: Answer) -> None:
    id = answer()
    store.vote(Vote(id, "someone", value=1))
    changes: list[dict[str, object]] = [
        {"value": 2},
        {"kind": "shout"},
        {"source": "a bot"},
        {"completion_id": "nowhere"},
    ]
    changes += [{"trust": 2.0}, {"strength": 0.0}, {"position": -1}, {"kind": "edit"}, {"kind": "comparison"}]
    changes += [{"other": "another"}, {"kind": "comparison", "other": id}, {"kind": "ranking", "other": ""}]
    for change in changes:
        with pytest.raises(sa.exc.IntegrityError), store.write() as connection:
            connection.execute(sa.update(FeedbackRow).values(**change))


def test_a_late_commit_is_never_skipped_by_the_cursor(store: Store, answer: Answer) -> None:
    """A slow transaction draws its number first and commits late: nobody may see a higher number before."""
    slow_id, fast_id = answer(), answer()
    drawn, seen = threading.Event(), []

    def slow() -> None:
        with store.write() as connection:
            opinions.vote(connection, Vote(slow_id, "slow", value=1))
            drawn.set()
            time.sleep(0.5)

    def fast() -> None:
        drawn.wait()
        store.vote(Vote(fast_id, "fast", value=1))
        seen.append([event.subject for event in store.events()])

    threads = [threading.Thread(target=slow), threading.Thread(target=fast)]
    for thread in threads:
        thread.start()
    drawn.wait()
    assert store.events() == []  # readers do not wait for the writer
    for thread in threads:
        thread.join()
    assert seen == [["slow", "fast"]]


def test_a_reader_that_follows_the_log_sees_every_event_of_many_writers(store: Store, answer: Answer) -> None:
    ids = [answer() for _ in range(20)]
    followed: list[int] = []
    done = threading.Event()

    def follow() -> None:
        while True:
            last = done.is_set()
            for event in store.events(after_seq=followed[-1] if followed else 0, limit=7):
                followed.append(event.seq)
            if last and not store.events(after_seq=followed[-1], limit=1):
                return

    def write(name: str) -> None:
        for id in ids:
            store.vote(Vote(id, name, value=1))

    reader = threading.Thread(target=follow)
    writers = [threading.Thread(target=write, args=(f"writer {n}",)) for n in range(4)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert len(followed) == 80 and followed == [event.seq for event in store.events()]


def test_a_rolled_back_writer_leaves_nothing(store: Store, answer: Answer) -> None:
    id = answer()
    with pytest.raises(RuntimeError), store.write() as connection:
        opinions.vote(connection, Vote(id, "someone", value=1))
        raise RuntimeError("the machine stumbles")
    assert store.events() == [] and store.count_opinions() == 0


def test_the_crown_is_a_stack(store: Store) -> None:
    assert store.champion() is None
    a, b, c = "a" * 64, "b" * 64, "c" * 64
    store.promote(model_hash=a, model_path="models/a", figures={}, reason="first", expected_champion=None)
    store.promote(model_hash=b, model_path="models/b", figures={"rate": 0.8}, reason="better", expected_champion=a)
    store.promote(model_hash=c, model_path="models/c", figures={}, reason="better", expected_champion=b)
    back = store.rollback("it swears")
    assert (back.action, back.from_hash, back.model_hash, back.model_path) == ("rollback", c, b, "models/b")
    assert back.figures == {"rate": 0.8}
    assert store.rollback("this one too").model_hash == a
    champion = store.champion()
    assert champion is not None and champion.model_hash == a
    with pytest.raises(ValueError, match="no earlier champion"):
        store.rollback("and this one")
    assert [row.action for row in store.promotions()] == ["promote"] * 3 + ["rollback"] * 2


def test_a_report_against_another_champion_promotes_nobody(store: Store) -> None:
    a, b, c = "a" * 64, "b" * 64, "c" * 64
    store.promote(model_hash=a, model_path="a", figures={}, reason="first", expected_champion=None)
    store.promote(model_hash=b, model_path="b", figures={}, reason="better", expected_champion=a)
    with pytest.raises(StaleChampion, match="judged against champion aaaaaaaaaaaa, but bbbbbbbbbbbb reigns"):
        store.promote(model_hash=c, model_path="c", figures={}, reason="better", expected_champion=a)
    repeated = store.promote(model_hash=b, model_path="b", figures={}, reason="again", expected_champion=a)
    assert repeated.id == 2  # a killed run that promotes again finds its own row
    with store.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(PromotionRow)).scalar() == 2


def test_two_equal_keys_of_one_asker_are_one_answer(store: Store, answer: Answer) -> None:
    first = store.completion(answer())
    assert first is not None
    fields = {**first.__dict__, "idempotency_key": "k"}
    with store.write() as connection:
        completions.insert(connection, completions.Completion(**{**fields, "id": "chatcmpl-1"}))
    with pytest.raises(sa.exc.IntegrityError), store.write() as connection:
        completions.insert(connection, completions.Completion(**{**fields, "id": "chatcmpl-2"}))
    with store.read() as connection:
        found = completions.replay(connection, "asker", "k")
    assert found is not None and found.id == "chatcmpl-1"
