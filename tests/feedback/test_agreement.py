"""Agreement between raters: Krippendorff's own example, hand-worked cases, and what is read from the tables."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from feedback import agreement
from feedback.comparisons import compared, ranked
from feedback.opinions import Vote
from feedback.store import Store

Answer = Callable[..., str]
# four observers, twelve units, as printed in "Computing Krippendorff's Alpha-Reliability" (2011), section C; 0: no value
OBSERVERS = {
    "A": [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
    "B": [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
    "C": [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
    "D": [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
}
UNITS = {unit: {name: row[unit] for name, row in OBSERVERS.items() if row[unit]} for unit in range(12)}


def test_krippendorffs_own_example() -> None:
    found = agreement.alpha(UNITS)
    assert found.alpha == pytest.approx(0.743, abs=5e-4)
    assert (found.units, found.judgements, found.raters) == (11, 40, 4)  # unit 12 has one observer: not paired
    assert found.low is not None and found.high is not None and found.low < 0.743 < found.high


def test_perfect_agreement_chance_and_nothing_to_say() -> None:
    same = {unit: {"a": value, "b": value} for unit, value in enumerate([1, 1, -1, -1])}
    assert agreement.alpha(same).alpha == 1
    # two units, each with one up and one down: D_o = 1, D_e = 2*2*2 / (4*3) = 2/3
    split = {0: {"a": 1, "b": -1}, 1: {"a": 1, "b": -1}}
    assert agreement.alpha(split).alpha == pytest.approx(1 - 1 / (2 / 3))
    assert agreement.alpha({0: {"a": 1, "b": 1}, 1: {"a": 1, "b": 1}}).alpha is None  # no variation: not 1
    assert agreement.alpha({0: {"a": 1}, 1: {"b": -1}}).alpha is None


def test_agreement_with_the_others() -> None:
    shares = agreement.with_the_others({0: {"a": 1, "b": 1, "c": -1}, 1: {"a": -1, "c": -1}, 2: {"a": 1}})
    assert shares == {"a": (0.75, 2), "b": (0.5, 1), "c": (0.5, 2)}


def test_thumbs_comparisons_and_rankings_become_units(store: Store, answer: Answer) -> None:
    one, two, three = (answer("q", text) for text in ("one", "two", "three"))
    store.vote(Vote(one, "ann", value=1))
    store.vote(Vote(one, "ben", value=-1))
    store.vote(Vote(one, "robot", value=1, source="simulated"))
    store.vote(Vote(**compared([two, one], two), subject="ann"))
    store.vote(Vote(**ranked([one, two, three], [[two], [one, three]]), subject="ben"))
    with store.read() as connection:
        said = [each for row in agreement.standing(connection) for each in agreement.judgements(row)]
    units = agreement.by_unit(said)
    assert units[("thumb", one)] == {"ann": 1, "ben": -1}
    better = {tuple(sorted((two, other))): 1 if two < other else -1 for other in (one, three)}
    key = tuple(sorted((one, two)))
    assert units[("pair", *key)] == {"ann": better[key], "ben": better[key]}
    key = tuple(sorted((two, three)))
    assert units[("pair", *key)] == {"ben": better[key]}
    assert ("pair", *sorted((one, three))) not in units  # a tie
    with store.read() as connection:
        measured = agreement.measure(connection)
    assert measured["thumbs"].units == 1 and measured["thumbs"].alpha is None
    assert measured["pairs"].units == 1 and not math.isnan(measured["pairs"].judgements)
