"""A champion's probation on a real store: what counts, and that only the model that failed loses the crown."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from feedback import completions
from feedback.completions import Completion
from feedback.opinions import Vote
from feedback.store import StaleChampion, Store
from flows.probation import ProbationOptions, examine, watch

OLD, NEW, OTHER = "a" * 64, "b" * 64, "c" * 64
Say = Callable[..., None]


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    store = Store(database_url)
    store.migrate()
    yield store
    store.close()


@pytest.fixture
def say(store: Store) -> Say:
    """Thumbs on answers of a model, each of another person unless said."""
    said: list[str] = []

    def say(model: str, up: int, down: int = 0, subject: str = "", source: str = "human_user") -> None:
        for number in range(up + down):
            said.append(f"answer-{len(said)}")
            answer = Completion(
                id=said[-1],
                subject="asker",
                request_sha256="0" * 64,
                request_messages=[{"role": "user", "content": "hello"}],
                sampling={"temperature": 1.0},
                model_hash=model,
                prompt_token_ids=[1],
                response="hi",
                response_token_ids=[2],
                response_logprobs=[-0.5],
                status="complete",
                finish_reason="stop",
            )
            with store.write() as connection:
                completions.insert(connection, answer)
            vote = Vote(said[-1], subject or f"rater-{len(said)}", value=1 if number < up else -1, source=source)
            store.vote(vote)

    return say


def crown(store: Store, model: str, before: str | None) -> None:
    store.promote(
        model_hash=model, model_path="", figures={"win_rate": 0.9}, reason="by force", expected_champion=before
    )


OPTIONS = ProbationOptions(min_thumbs=20)


def test_a_worse_champion_loses_the_crown_once_and_the_row_says_why(store: Store, say: Say) -> None:
    assert examine(store, OPTIONS) is None
    crown(store, OLD, None)
    say(OLD, up=28, down=2)
    assert watch(store, OPTIONS) is None  # nobody to go back to
    crown(store, NEW, OLD)
    say(NEW, up=0, down=19)
    found = examine(store, OPTIONS)
    assert found is not None and not found.failed and found.evidence.value > 100  # one thumb too few
    say(NEW, up=1)
    row = watch(store, OPTIONS)
    assert row is not None and (row.action, row.from_hash, row.model_hash) == ("rollback", NEW, OLD)
    assert "5.0% of 20 thumbs are up, 93.3% of 30 were before" in row.reason
    assert row.figures["win_rate"] == 0.9  # of the model that reigns again: where it comes from stays known
    assert row.figures["probation"]["thumbs"] == 20 and row.figures["probation"]["evidence"]["against"] >= 17
    assert watch(store, OPTIONS) is None
    assert len(store.promotions()) == 3


def test_a_champion_that_is_as_good_stays(store: Store, say: Say) -> None:
    crown(store, OLD, None)
    say(OLD, up=30, down=10)
    crown(store, NEW, OLD)
    say(NEW, up=28, down=12)
    assert watch(store, OPTIONS) is None
    found = examine(store, OPTIONS)
    assert found is not None and (found.rate, found.before_rate) == (0.7, 0.75)


def test_what_does_not_count(store: Store, say: Say) -> None:
    crown(store, OLD, None)
    say(OLD, up=40)
    crown(store, NEW, OLD)
    say(NEW, up=0, down=40, subject="one angry person")
    say(NEW, up=0, down=40, source="simulated")
    say(OLD, up=0, down=5)  # on old answers, but after the promotion: the old list is fixed by then
    found = examine(store, OPTIONS)
    assert found is not None and (found.thumbs, found.before_thumbs) == (20, 40)
    assert watch(store, ProbationOptions(min_thumbs=21)) is None
    assert watch(store, ProbationOptions(min_thumbs=20, enabled=False)) is None
    assert watch(store, ProbationOptions(min_thumbs=20, sources=["simulated"], per_person=None)) is None  # no old ones
    assert store.champion().model_hash == NEW  # type: ignore[union-attr]


def test_a_second_reign_is_a_test_of_its_own(store: Store, say: Say) -> None:
    crown(store, OLD, None)
    say(OLD, up=30)
    crown(store, NEW, OLD)
    say(NEW, up=0, down=30)
    assert watch(store, OPTIONS) is not None
    assert watch(store, OPTIONS) is None  # who came back is on no probation
    crown(store, NEW, OLD)  # by force, again
    found = examine(store, OPTIONS)
    assert found is not None and found.thumbs == 0


def test_another_champion_is_left_alone(store: Store, say: Say) -> None:
    crown(store, OLD, None)
    crown(store, NEW, OLD)
    crown(store, OTHER, NEW)
    with pytest.raises(StaleChampion, match="was to be rolled back"):
        store.rollback("late", expected_champion=NEW)


@pytest.mark.parametrize(
    "change",
    [{"alpha": 0.0}, {"alpha": 1.0}, {"min_thumbs": 0}, {"per_person": 0}, {"sources": []}, {"sources": ["x"]}],
)
def test_impossible_options_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        ProbationOptions(**change)  # type: ignore[arg-type]
