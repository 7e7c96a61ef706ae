"""Which of the processes that train together this one is; a Job names it, in processes that never train too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    def cut(self, items: Sequence[Item], size: int | None = None) -> Iterator[tuple[Sequence[Item], float]]:
        """This process's items of a batch, `size` at a time (all at once for None), and what their loss weighs.

        All processes must take part in each forward pass, so every one gets as many parts as the others: where no item is
        left for it, one of another's with weight 0. Else the weight is 1.
        """
        step = self.size * size if size else max(1, len(items))
        for start in range(0, len(items), step):
            part = items[start : start + step]
            mine = part[self.rank :: self.size]
            yield (mine, 1.0) if mine else (part[:1], 0.0)


ALONE = Ranks()
