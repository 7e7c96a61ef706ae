"""How far people agree: Krippendorff's alpha over what several of them judged, and each one's agreement with the others.

A unit is something that can be judged in two ways: an answer (up or down), or a pair of answers (which is better). Rankings
are read as the pairs they order; ties say nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import sqlalchemy as sa

from feedback.tables import FeedbackRow, table_of

feedback = table_of(FeedbackRow)
# units: name -> who said what of it
Units = Mapping[Any, Mapping[str, int]]
PEOPLE = ("human_user", "human_expert")
WINDOW = 20_000  # opinions that are looked at, the newest
RESAMPLES = 1000


@dataclass(frozen=True)
class Judgement:
    """One binary statement: `rater` said `value` (1 or -1) of `unit`; seq: the event that last made it so."""

    unit: tuple[str, ...]
    rater: str
    value: int
    seq: int


@dataclass(frozen=True)
class Alpha:
    """Krippendorff's alpha with a 95 % interval (bootstrap over units).

    None where it says nothing: fewer than two units with two raters, or only one value ever given. judgements: values in
    units that at least two people judged.
    """

    alpha: float | None
    low: float | None
    high: float | None
    units: int
    judgements: int
    raters: int


def judgements(row: Any) -> Iterator[Judgement]:
    """What a row of `feedback` says, unit by unit; nothing for ties, neutral thumbs and other kinds."""
    if row.kind == "thumb" and row.value:
        yield Judgement(("thumb", row.completion_id), row.subject, row.value, row.last_seq)
    elif row.kind == "comparison" and row.value:
        yield pair(row, row.completion_id, row.other, row.value)
    elif row.kind == "ranking":
        for one, two in combinations(row.ranked, 2):
            if one["rank"] != two["rank"]:
                yield pair(row, one["completion_id"], two["completion_id"], 1 if one["rank"] < two["rank"] else -1)


def pair(row: Any, one: str, two: str, value: int) -> Judgement:
    """That of two answers `one` is the better one (value 1) or not (-1), under one name whichever is named first."""
    first, second = sorted((one, two))
    return Judgement(("pair", first, second), row.subject, value if first == one else -value, row.last_seq)


def by_unit(said: Iterable[Judgement]) -> dict[tuple[str, ...], dict[str, int]]:
    """Units of judgements; of two by the same person on one unit the newer one counts."""
    units: dict[tuple[str, ...], dict[str, int]] = defaultdict(dict)
    for each in sorted(said, key=lambda judgement: judgement.seq):
        units[each.unit][each.rater] = each.value
    return dict(units)


def standing(connection: sa.Connection, sources: tuple[str, ...] = PEOPLE, window: int = WINDOW) -> list[sa.Row[Any]]:
    """The newest `window` thumbs, comparisons and rankings of people that stand and are accepted."""
    query = (
        sa.select(feedback)
        .where(
            feedback.c.kind.in_(("thumb", "comparison", "ranking")),
            feedback.c.source.in_(sources),
            sa.not_(feedback.c.retracted),
            feedback.c.moderation == "accepted",
        )
        .order_by(feedback.c.last_seq.desc())
        .limit(window)
    )
    return list(connection.execute(query))


def measure(connection: sa.Connection) -> dict[str, Alpha]:
    """The agreement of people on answers ("thumbs") and on pairs of answers ("pairs"), over the newest opinions."""
    said = [each for row in standing(connection) for each in judgements(row)]
    kinds = {"thumbs": "thumb", "pairs": "pair"}
    return {name: alpha(by_unit(each for each in said if each.unit[0] == kind)) for name, kind in kinds.items()}


def alpha(units: Units, resamples: int = RESAMPLES, seed: int = 1) -> Alpha:
    """Nominal alpha, 1 - D_o / D_e, of units with any values; raters may be missing from any unit.

    Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C.
    """
    import numpy as np

    shared = {unit: said for unit, said in units.items() if len(said) >= 2}
    raters = len({rater for said in shared.values() for rater in said})
    total = sum(len(said) for said in shared.values())
    values = sorted({value for said in shared.values() for value in said.values()})
    if len(shared) < 2 or len(values) < 2:
        return Alpha(None, None, None, len(shared), total, raters)
    counts = np.zeros((len(shared), len(values)))
    for place, said in enumerate(shared.values()):
        for value, number in Counter(said.values()).items():
            counts[place, values.index(value)] = number
    whole = float(_alpha(np.ones((1, len(shared))), counts)[0])
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(shared), np.full(len(shared), 1 / len(shared)), size=resamples)
    low, high = np.nanquantile(_alpha(drawn, counts), [0.025, 0.975])
    return Alpha(whole, float(low), float(high), len(shared), total, raters)


def _alpha(weights: Any, counts: Any) -> Any:
    """alpha of each row of `weights` [resamples, units], how often a unit is in; counts: [units, values]."""
    import numpy as np

    sizes = counts.sum(axis=1)
    differing = (sizes**2 - (counts**2).sum(axis=1)) / (sizes - 1)
    totals = weights @ counts
    n = totals.sum(axis=1)
    observed = (weights @ differing) / n
    expected = (n**2 - (totals**2).sum(axis=1)) / (n * (n - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected > 0, 1 - observed / expected, np.nan)


def with_the_others(units: Units) -> dict[str, tuple[float, int]]:
    """rater -> (share of the others who said the same, averaged over units; number of units that others judged too)."""
    sums: dict[str, list[float]] = defaultdict(list)
    for said in units.values():
        if len(said) >= 2:
            counts = Counter(said.values())
            for rater, value in said.items():
                sums[rater].append((counts[value] - 1) / (len(said) - 1))
    return {rater: (sum(shares) / len(shares), len(shares)) for rater, shares in sums.items()}
