"""Which of the processes that train together this one is; a Job names it, in processes that never train too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together: its rank and how many there are (models/distributed.py)."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process reports, saves and evaluates."""
        return self.rank == 0

    def part(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of a batch. Raises ValueError when there are fewer items than processes."""
        if len(items) < self.size:
            raise ValueError(f"a batch of {len(items)} cannot be shared by {self.size} processes: use fewer processes")
        return items[self.rank :: self.size]
