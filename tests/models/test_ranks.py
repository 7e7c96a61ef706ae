"""How a batch is shared among processes that train together."""

from __future__ import annotations

import pytest

from models.ranks import Ranks


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("size", [None, 1, 2])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_item_is_in_one_part_and_all_processes_have_as_many_parts(
    count: int, size: int | None, processes: int
) -> None:
    shares = [list(Ranks(rank, processes).cut(range(count), size)) for rank in range(processes)]
    taken = [item for share in shares for part, weight in share for item in part if weight]
    assert sorted(taken) == list(range(count))
    assert len({len(share) for share in shares}) == 1  # else one would wait for the others' forward pass for ever
    assert all(part and weight in (0.0, 1.0) for share in shares for part, weight in share)
    if size is not None:
        assert max(len(part) for share in shares for part, _ in share) <= size


def test_one_process_has_all_of_a_batch_in_its_order() -> None:
    assert list(Ranks().cut([3, 1, 2])) == [([3, 1, 2], 1.0)]
