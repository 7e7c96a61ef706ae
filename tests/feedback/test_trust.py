"""Trust: who is right how often, the sequential test and its error rates, quarantine, moderators, caps, the batch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from feedback import labelling, opinions, trust
from feedback.opinions import Vote
from feedback.store import Store
from feedback.tables import BatchItemRow, FeedbackRow
from feedback.trust_options import TrustOptions

Answer = Callable[..., str]
OPTIONS = TrustOptions(max_per_minute=None)
feedback, item = FeedbackRow.__table__, BatchItemRow.__table__


def panel(store: Store, answer: Answer, raters: dict[str, float], answers: int, seed: int = 1) -> list[str]:
    """Answers, half of them good, each judged by everybody, who is right with the given probability. Returns the ids."""
    rng = random.Random(seed)
    ids = [answer(f"prompt {number}") for number in range(answers)]
    with store.write() as connection:
        for number, id in enumerate(ids):
            good = 1 if number % 2 else -1
            for name, p in raters.items():
                opinions.vote(connection, Vote(id, name, value=good if rng.random() < p else -good))
    return ids


def states(store: Store) -> dict[str, set[str]]:
    """subject -> moderation states of their opinions."""
    found: dict[str, set[str]] = {}
    with store.read() as connection:
        for row in connection.execute(sa.select(feedback.c.subject, feedback.c.moderation)):
            found.setdefault(row.subject, set()).add(row.moderation)
    return found


def test_the_sequential_test_by_hand() -> None:
    options = TrustOptions()
    wrong, right = (
        math.log(0.5 / 0.3),
        math.log(0.5 / 0.7),
    )  # ln of guessing over honest, for a known wrong and a known right
    ratio, crossed = trust.sprt([0.0, 0.0, 1.0], options)
    assert ratio == pytest.approx(2 * wrong + right) and not crossed
    # the upper bound ln(.95 / .001) = 6.86 takes 14 wrong ones in a row (14 * .5108 = 7.15, 13 make 6.64)
    assert trust.sprt([0.0] * 13, options)[1] is False
    assert trust.sprt([0.0] * 14, options)[1] is True
    # nine right ones reach ln(.05 / .999) = -2.99 (9 * -.3365): the test begins anew, so a sleeper is found by 14 again
    assert trust.sprt([1.0] * 9, options)[0] == 0
    assert trust.sprt([1.0] * 900 + [0.0] * 14, options)[1] is True
    assert trust.sprt([0.5] * 1000, options) == (pytest.approx(0), False)  # others who do not know say nothing


def test_error_rates_of_the_test() -> None:
    rng = random.Random(7)
    honest = [[float(rng.random() < 0.75) for _ in range(200)] for _ in range(400)]
    guessing = [[float(rng.random() < 0.5) for _ in range(200)] for _ in range(400)]
    options = TrustOptions()
    assert sum(trust.sprt(said, options)[1] for said in honest) <= 4  # 1 % in 200 judgements each
    assert sum(trust.sprt(said, options)[1] for said in guessing) >= 380


def test_those_who_contradict_everybody_are_found_and_the_others_left_alone(store: Store, answer: Answer) -> None:
    honest = {f"honest {n}": 0.85 for n in range(5)}
    panel(store, answer, {**honest, "flipper": 0.1, "contrary": 0.3}, 80)
    looked = store.review(OPTIONS, act=False)
    assert looked.quarantined == 0 and states(store)["flipper"] == {"accepted"}
    review = store.review(OPTIONS)
    found = {rater.subject: rater for rater in review.raters}
    assert {name for name, rater in found.items() if rater.why} == {"flipper", "contrary"}
    assert found["flipper"].accuracy < 0.25 and found["contrary"].trust < 0.6
    assert all(abs(found[name].accuracy - 0.85) < 0.1 for name in honest)
    assert states(store)["flipper"] == states(store)["contrary"] == {"quarantined"}
    assert all(states(store)[name] == {"accepted"} for name in honest)
    assert review.quarantined == 160 and store.review(OPTIONS).quarantined == 0
    batch = store.open_batch(1, OPTIONS)
    assert batch is not None and batch.accepted == 400 and batch.excluded == {"quarantined": 160}
    with store.read() as connection:
        row = connection.execute(sa.select(feedback).where(feedback.c.subject == "flipper")).first()
    assert row is not None and row.moderation_reason.startswith("outlier: in ") and row.trust < 0.4


def test_what_a_batch_took_of_somebody_found_out_later_is_not_learned_from_again(store: Store, answer: Answer) -> None:
    raters = {**{f"honest {n}": 0.95 for n in range(4)}, "flipper": 0.0}
    panel(store, answer, raters, 10)
    first = store.open_batch(1, OPTIONS)
    assert first is not None and first.accepted == 50
    panel(store, answer, raters, 20, seed=2)
    second = store.open_batch(1, OPTIONS)
    assert second is not None and (second.accepted, second.excluded) == (80, {"quarantined": 20, "revised": 10})
    assert len(list(store.opinions(store.manifest()))) == 120


def test_gold_finds_out_a_rater_whom_nobody_else_contradicts(store: Store, answer: Answer) -> None:
    for number in range(20):
        id = answer(f"prompt {number}")
        store.vote(Vote(id, "expert", kind="expert", value=-1, source="human_expert"))
        store.vote(Vote(id, "always up", value=1))
        store.vote(Vote(id, "careful", value=-1))
    found = {rater.subject: rater for rater in store.review(OPTIONS).raters}
    assert found["always up"].gold == 20 and found["always up"].why and not found["careful"].why
    assert "expert" not in found
    # Beta(8, 2) and 20 wrong ones: 8 / 30; 20 right ones: 28 / 30
    assert found["always up"].accuracy == pytest.approx(8 / 30, abs=1e-4)
    assert found["careful"].accuracy == pytest.approx(28 / 30, abs=1e-4) and found["careful"].trust == 1


def test_gold_tasks_test_those_who_rank(store: Store, answer: Answer) -> None:
    words = ("best", "middling", "worst")
    told = {number: [answer(f"prompt {number}", word) for word in words] for number in range(6)}
    with store.write() as connection:
        for ids in told.values():
            labelling.make(connection, ids, expected=[[0], [1], [2]])
        for name, order in (("careful", words), ("backwards", words[::-1])):
            while (given := labelling.next_task(connection, name, labelling.Handing(gold_rate=1.0))) is not None:
                shown = [text for _, text in given.answers]
                labelling.rank(connection, given.task_id, name, [[shown.index(word) + 1] for word in order], {})
    found = {rater.subject: rater for rater in store.review(OPTIONS).raters}
    assert found["careful"].gold == found["backwards"].gold == 18  # three pairs of six tasks
    assert found["backwards"].why and not found["careful"].why


def test_nobody_is_judged_by_answers_that_nobody_else_saw(store: Store, answer: Answer) -> None:
    for number in range(60):
        store.vote(Vote(answer(f"prompt {number}"), "alone", value=-1))
    (rater,) = store.review(OPTIONS).raters
    assert (rater.compared, rater.trust, rater.why) == (0, 1.0, "")


def test_a_moderator_who_accepts_restarts_the_test(store: Store, answer: Answer) -> None:
    raters = {**{f"honest {n}": 0.95 for n in range(4)}, "flipper": 0.0}
    panel(store, answer, raters, 30)
    assert store.review(OPTIONS).quarantined == 30
    with store.read() as connection:
        ids = connection.execute(sa.select(feedback.c.id).where(feedback.c.subject == "flipper")).scalars().all()
    for id in ids:
        store.moderate(id, "accepted", "I know them")
    assert store.review(OPTIONS).quarantined == 0 and states(store)["flipper"] == {"accepted"}
    panel(store, answer, raters, 30, seed=2)
    assert store.review(OPTIONS).quarantined == 30  # what they said since, and not what was accepted


def test_more_a_minute_than_a_person_can(store: Store, answer: Answer) -> None:
    for number in range(12):
        store.vote(Vote(answer(f"prompt {number}"), "robot", value=1))
        if number < 5:
            store.vote(Vote(answer(f"other {number}"), "person", value=1))
    start = datetime(2026, 1, 1, tzinfo=UTC)
    with store.write() as connection:
        for id in connection.execute(sa.select(feedback.c.id)).scalars().all():
            moment = start + timedelta(seconds=5 * id)
            connection.execute(sa.update(feedback).where(feedback.c.id == id).values(created_at=moment))
    assert store.review(TrustOptions(max_per_minute=12)).quarantined == 0
    assert store.review(TrustOptions(max_per_minute=8)).quarantined == 12
    assert states(store) == {"robot": {"quarantined"}, "person": {"accepted"}}


def test_simulated_raters_are_not_tested(store: Store, answer: Answer) -> None:
    for number in range(200):
        id = answer(f"prompt {number}")
        store.vote(Vote(id, "rater", value=1, source="simulated"))
        store.vote(Vote(id, "expert", kind="expert", value=-1, source="human_expert"))
    assert store.review(TrustOptions(max_per_subject=1, max_per_minute=1)).raters == []
    batch = store.open_batch(1, TrustOptions(max_per_subject=1, max_per_minute=1))
    assert batch is not None and batch.accepted == 400


def test_a_rater_brings_no_more_than_their_cap_into_a_batch(store: Store, answer: Answer) -> None:
    ids = [store.vote(Vote(answer(f"a {n}"), "eager", value=1))[0].feedback_id for n in range(6)]
    store.vote(Vote(answer("b"), "other", value=1))
    limits = TrustOptions(max_per_subject=4, max_per_minute=None)
    assert store.pending(limits).count == 5 and store.pending().count == 7
    assert store.open_batch(6, limits) is None
    batch = store.open_batch(5, limits)
    assert batch is not None and (batch.accepted, batch.excluded) == (5, {"capped": 2})
    with store.read() as connection:
        capped = connection.execute(sa.select(item.c.feedback_id).where(item.c.reason == "capped")).scalars().all()
    assert sorted(capped) == ids[4:]  # the earlier ones go in: a flood cannot push them out
    assert store.pending(limits).count == 0


@pytest.mark.parametrize(
    ("counts", "free", "share", "most"),
    [
        ({"a": 100, "b": 10, "c": 10, "d": 10}, 0, 0.4, 20),  # 20 of 50
        ({"a": 100}, 0, 0.4, 100),  # alone: no share can be met
        ({"a": 100}, 30, 0.4, 20),  # beside 30 of the operator's own
        ({"a": 5, "b": 5, "c": 5}, 0, 0.4, 5),
    ],
)
def test_the_share_holds_of_what_is_left(counts: dict[str, int], free: int, share: float, most: int) -> None:
    assert trust.most_per_rater(counts, free, TrustOptions(max_share=share)) == most


@pytest.mark.parametrize(
    ("values", "named"),
    [({"alpha": 0}, "alpha"), ({"guess_accuracy": 0.9}, "guess_accuracy"), ({"max_share": 1.5}, "max_share"),
     ({"window": 0}, "window")],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(values: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TrustOptions(**values)  # type: ignore[arg-type]
