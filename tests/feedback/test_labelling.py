"""Who is given which task, what becomes of it, and what gold tasks tell, on SQLite and on PostgreSQL."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from feedback import labelling
from feedback.labelling import Assignment, Handing, Task
from feedback.opinions import Refused
from feedback.store import Store
from feedback.tables import AssignmentRow, FeedbackRow

Answer = Callable[..., str]
MakeTask = Callable[..., Task]
PLAIN = Handing(gold_rate=0.0)
SAID = {"source": "human_user", "channel": "label"}


@pytest.fixture
def make_task(store: Store, answer: Answer) -> MakeTask:
    """Make a task of answers "0" to "n - 1" to a prompt."""

    def make(prompt: str = "hello", number: int = 3, **options: Any) -> Task:
        ids = [answer(prompt, str(place)) for place in range(number)]
        with store.write() as connection:
            return labelling.make(connection, ids, **options)[0]

    return make


def take(store: Store, subject: str, handing: Handing = PLAIN, seed: int = 0) -> Assignment | None:
    with store.write() as connection:
        return labelling.next_task(connection, subject, handing, random.Random(seed))


def rank(store: Store, given: Assignment, subject: str, texts: Sequence[Sequence[str]], **said: Any) -> Any:
    """Rank by the answers' texts."""
    shown = [text for _, text in given.answers]
    with store.write() as connection:
        numbers = [[shown.index(text) + 1 for text in group] for group in texts]
        return labelling.rank(connection, given.task_id, subject, numbers, {**SAID, **said})


def expire(store: Store, subject: str) -> None:
    """Let somebody's leases run out."""
    with store.write() as connection:
        change = sa.update(AssignmentRow).where(AssignmentRow.subject == subject)
        connection.execute(change.values(lease_until=datetime.now(UTC) - timedelta(seconds=1)))


def test_a_task_is_of_whole_answers_to_one_prompt_and_made_once(store: Store, answer: Answer) -> None:
    ids = [answer(response=text) for text in "abc"]
    with store.write() as connection:
        made, new = labelling.make(connection, ids, raters=2)
        assert new and made.answers == ids and made.raters == 2 and not made.gold
        assert labelling.make(connection, list(reversed(ids))) == (made, False)
        for wrong, code in (
            ([ids[0]], "invalid_request"),
            ([ids[0], ids[0]], "invalid_request"),
            ([*ids, *(f"x{n}" for n in range(7))], "invalid_request"),
            ([ids[0], "nowhere"], "completion_not_found"),
        ):
            with pytest.raises(Refused) as refused:
                labelling.make(connection, wrong)
            assert refused.value.code == code
    other, unfinished = answer("another prompt"), answer(status="streaming")
    with store.write() as connection:
        for wrong, code in (([ids[0], other], "prompts_differ"), ([ids[0], unfinished], "completion_not_finished")):
            with pytest.raises(Refused) as refused:
                labelling.make(connection, wrong)
            assert refused.value.code == code
        for expected in ([[0, 1]], [[0, 1, 2]], [[0], [1], [3]], [[0], [], [1, 2]]):
            with pytest.raises(ValueError, match="ranking: "):
                labelling.make(connection, ids, name="gold", expected=expected)
        assert labelling.totals(connection) == {"open": 1, "closed": 0, "gold": 0}


def test_a_task_stays_in_ones_hands_and_what_is_kept_is_what_was_shown(store: Store, make_task: MakeTask) -> None:
    task = make_task(number=4)
    given = take(store, "ann", seed=1)
    assert given is not None and given.messages == [{"role": "user", "content": "hello"}]
    assert sorted(given.ids()) == sorted(task.answers)
    again = take(store, "ann", seed=2)
    assert again is not None and again.answers == given.answers and again.lease_until > given.lease_until
    with store.write() as connection:
        for wrong in ([[1], [2], [3]], [[1, 2, 3, 4, 5]], [[1], [1], [2, 3, 4]], [[0, 1, 2, 3]]):
            with pytest.raises(Refused, match="1 to 4, once"):
                labelling.rank(connection, task.id, "ann", wrong, SAID)
        with pytest.raises(Refused) as stranger:
            labelling.rank(connection, task.id, "bob", [[1, 2, 3, 4]], SAID)
    assert stranger.value.status == 404
    event, how = rank(store, given, "ann", [["2"], ["0", "3"], ["1"]], comment="clear")
    assert how == "created" and event.payload["kind"] == "ranking" and event.payload["comment"] == "clear"
    shown = given.ids()
    by_text = {text: id for id, text in given.answers}
    assert {place["completion_id"]: (place["rank"], place["position"]) for place in event.payload["ranked"]} == {
        by_text["2"]: (1, shown.index(by_text["2"])),
        by_text["0"]: (2, shown.index(by_text["0"])),
        by_text["3"]: (2, shown.index(by_text["3"])),
        by_text["1"]: (3, shown.index(by_text["1"])),
    }
    assert rank(store, given, "ann", [["2"], ["0", "3"], ["1"]], comment="clear")[1] == "replayed"
    assert rank(store, given, "ann", [["0", "1", "2", "3"]])[1] == "revised"
    assert take(store, "ann") is None and take(store, "bob") is None  # one person was needed
    with store.read() as connection:
        assert labelling.get(connection, task.id).closed_at is not None
        assert labelling.progress(connection, "ann") == {"ranked": 1, "skipped": 0}


def test_orders_differ_between_people_and_each_is_as_likely(store: Store, make_task: MakeTask) -> None:
    make_task(number=2, raters=100)
    first = [take(store, f"rater-{n}", seed=n) for n in range(40)]
    texts = [given.answers[0][1] for given in first if given]
    assert 10 <= texts.count("0") <= 30  # 40 fair coins: outside of this once in 2,000 such tests


def test_a_lease_runs_out_and_skipped_or_ranked_never_comes_back(store: Store, make_task: MakeTask) -> None:
    task = make_task("one")
    given = take(store, "ann")
    assert given is not None and take(store, "bob") is None
    expire(store, "ann")
    late = take(store, "bob")
    assert late is not None and late.task_id == task.id
    assert take(store, "ann") is None  # bob has it now
    with store.write() as connection:
        assert labelling.skip(connection, task.id, "bob", "no idea of cars")
        assert not labelling.skip(connection, task.id, "bob", "said again")
        row = connection.execute(sa.select(AssignmentRow).where(AssignmentRow.subject == "bob")).mappings().one()
        assert (row["state"], row["reason"]) == ("skipped", "no idea of cars")
        with pytest.raises(Refused) as refused:
            labelling.rank(connection, task.id, "bob", [[1, 2, 3]], SAID)
        assert refused.value.code == "task_skipped"
    assert take(store, "bob") is None
    back = take(store, "ann", seed=9)
    assert back is not None and back.answers == given.answers
    rank(store, back, "ann", [["0"], ["1"], ["2"]])
    with store.write() as connection, pytest.raises(Refused) as refused:
        labelling.skip(connection, task.id, "ann", "")
    assert refused.value.code == "task_ranked"


def test_an_opinion_after_the_lease_is_kept_though_somebody_else_was_quicker(store: Store, make_task: MakeTask) -> None:
    make_task("one")
    slow = take(store, "ann")
    expire(store, "ann")
    quick = take(store, "bob")
    assert slow is not None and quick is not None
    rank(store, quick, "bob", [["0"], ["1"], ["2"]])
    assert rank(store, slow, "ann", [["2"], ["1"], ["0"]])[1] == "created"
    with store.read() as connection:
        assert labelling.progress(connection) == {"ranked": 2, "skipped": 0}


def test_many_at_once_never_hold_a_task_more_often_than_it_needs(store: Store, make_task: MakeTask) -> None:
    tasks = [make_task(f"prompt {n}", 2, raters=2) for n in range(3)]
    handed: list[str] = []
    gate = threading.Barrier(12)

    def work(subject: str) -> None:
        gate.wait()
        given = take(store, subject)
        if given is not None:
            handed.append(given.task_id)

    threads = [threading.Thread(target=work, args=(f"rater-{n}",)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(handed) == sorted(2 * [task.id for task in tasks])  # six places for twelve people


def test_gold_is_mixed_in_at_its_rate_and_left_alone_when_the_rest_is_done(store: Store, make_task: MakeTask) -> None:
    for n in range(40):
        make_task(f"plain {n}", 2)
    gold = {make_task(f"gold {n}", 2, expected=[[1], [0]]).id for n in range(40)}
    coin, met = random.Random(3), []
    handing = Handing(gold_rate=0.25)
    for _ in range(80):
        with store.write() as connection:
            given = labelling.next_task(connection, "ann", handing, coin)
        if given is None:
            break
        met.append(given.task_id in gold)
        rank(store, given, "ann", [["1"], ["0"]])
    assert met.count(False) == 40 and 5 <= met.count(True) <= 25  # 13 are expected
    assert take(store, "ann", handing) is None and met[-1] is False
    only = take(store, "ann", Handing(gold_rate=1.0))
    assert only is not None and only.task_id in gold
    assert take(store, "bob", Handing(gold_rate=1.0)) is not None  # gold is for everybody


def test_gold_results_count_the_pairs_whose_order_is_known(store: Store, make_task: MakeTask) -> None:
    gold = make_task("gold", 4, expected=[[2], [0, 1], [3]])  # five of six pairs have a known order
    handing = Handing(gold_rate=1.0)
    cases: dict[str, tuple[list[list[str]], float]] = {
        "ann": ([["2"], ["1"], ["0"], ["3"]], 5.0),
        "bob": ([["3"], ["0", "1"], ["2"]], 0.0),
        "carl": ([["0", "1", "2", "3"]], 2.5),
        "dora": ([["0"], ["2"], ["1"], ["3"]], 4.0),
        "erna": ([["2"], ["0", "3"], ["1"]], 3.5),
        "fred": ([["2"], ["0"], ["1"], ["3"]], 5.0),
    }
    for subject, (texts, _) in cases.items():
        given = take(store, subject, handing)
        assert given is not None
        rank(store, given, subject, texts)
    with store.write() as connection:
        connection.execute(sa.update(FeedbackRow).where(FeedbackRow.subject == "fred").values(retracted=True))
        results = labelling.gold_results(connection)
    assert [tuple(result) for result in results] == [
        (subject, gold.id, right, 5) for subject, (_, right) in cases.items() if subject != "fred"
    ]


def test_an_experts_own_ranking_becomes_gold_and_is_no_result(store: Store, make_task: MakeTask) -> None:
    task = make_task("one", 3)
    given = take(store, "expert")
    assert given is not None
    with store.write() as connection, pytest.raises(Refused) as refused:
        labelling.make_gold(connection, task.id, "expert", "key:1")
    assert refused.value.code == "no_expert_ranking"
    rank(store, given, "expert", [["1"], ["0", "2"]])
    with store.write() as connection, pytest.raises(Refused):
        labelling.make_gold(connection, task.id, "expert", "key:1")  # said as anybody, not as an expert
    rank(store, given, "expert", [["1"], ["0", "2"]], source="human_expert")
    with store.write() as connection:
        made, changed = labelling.make_gold(connection, task.id, "expert", "key:1")
        assert changed and made.gold and made.expected == [[1], [0, 2]] and made.closed_at is None
        assert labelling.make_gold(connection, task.id, "expert", "key:1") == (made, False)
        assert labelling.gold_results(connection) == []
    other = take(store, "ann", Handing(gold_rate=1.0))
    assert other is not None
    rank(store, other, "ann", [["1"], ["2"], ["0"]])
    with store.read() as connection:
        assert labelling.gold_results(connection) == [("ann", task.id, 2.0, 2)]


def test_erasure_closes_the_tasks_of_the_asker_and_takes_the_raters_name(
    store: Store, make_task: MakeTask, answer: Answer
) -> None:
    task, other = make_task("one", raters=5), make_task("two", raters=5)
    given = take(store, "ann")
    assert given is not None and given.task_id == task.id
    with store.write() as connection:
        labelling.skip(connection, task.id, "ann", "my secret reason")
    assert store.erase("ann") is not None and store.erase("ann") is None
    with store.read() as connection:
        row = connection.execute(sa.select(AssignmentRow)).mappings().one()
        assert row["subject"].startswith("erased-") and row["reason"] == "" and row["state"] == "skipped"
    held = take(store, "bob")
    assert held is not None and held.task_id == task.id
    store.erase("asker")
    with store.write() as connection:
        assert labelling.totals(connection) == {"open": 0, "closed": 2, "gold": 0}
        with pytest.raises(Refused) as refused:
            labelling.rank(connection, task.id, "bob", [[1, 2, 3]], SAID)
    assert refused.value.code == "completion_not_found"
    assert take(store, "bob") is None and take(store, "carl") is None and other.id != task.id
