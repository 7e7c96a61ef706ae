"""Comparisons of two answers and rankings of several, in the one order in which they stand in the tables.

The order in which answers were shown is no part of what was said: the same two answers compared left to right and right
to left are one opinion, with another position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from feedback.opinions import sha256


def compared(shown: Sequence[str], chosen: str | None = None) -> dict[str, Any]:
    """The fields of a Vote that says which of two answers is better; None: neither.

    shown: both ids, in the order in which they were shown. Raises ValueError when `chosen` is none of them.
    """
    if chosen is not None and chosen not in shown:
        raise ValueError(f"chosen: {chosen} is not among completion_ids")
    first, other = sorted(shown)
    value = 0 if chosen is None else 1 if chosen == first else -1
    return {
        "kind": "comparison",
        "completion_id": first,
        "other": other,
        "value": value,
        "position": shown.index(first),
    }


def ranked(shown: Sequence[str], groups: Sequence[Sequence[str]] | None = None) -> dict[str, Any]:
    """The fields of a Vote that ranks answers: `groups` from the best to the worst, equal ones in one group.

    shown: the ids, in the order in which they were shown; without `groups`, the fields that name the opinion, for taking it
    back. Raises ValueError when the groups do not hold each answer once.
    """
    first = min(shown)
    name = {"kind": "ranking", "completion_id": first, "other": sha256(sorted(shown)), "position": shown.index(first)}
    if groups is None:
        return name
    if sorted(id for group in groups for id in group) != sorted(shown):
        raise ValueError("ranking: its groups must hold each of completion_ids once")
    places = [
        {"completion_id": id, "rank": rank, "position": shown.index(id)}
        for rank, group in enumerate(groups, 1)
        for id in sorted(group)
    ]
    return {**name, "value": int(len(groups) > 1), "ranked": places}
