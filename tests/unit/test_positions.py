"""Who may take a partition over: the fence between a worker and the one that was given its partitions."""

import pytest

from workers.lanes import Lease
from workers.positions import FORCE_SECONDS, LostOwnershipError, Position, Standoff


def lease(generation: int, worker: str = "old") -> Lease:
    return Lease(generation, worker, [], object())


def test_an_earlier_assignment_does_not_take_a_partition_back() -> None:
    position = Position("new", 6, 10, 10)

    with pytest.raises(LostOwnershipError):
        position.take_over(Standoff().claim(lease(5), 0.0))


def test_a_lease_that_waited_longer_than_a_frozen_worker_stays_takes_its_partition_by_force() -> None:
    position, standoff, ours = Position("gone", 6, 10, 10), Standoff(), lease(1)

    standoff.begin(ours, 0.0)
    position.take_over(standoff.claim(ours, FORCE_SECONDS + 1))

    assert (position.owner, position.generation) == ("old", 1)


def test_what_an_earlier_lease_waited_gives_a_later_one_no_right() -> None:
    position, standoff, later = Position("new", 6, 10, 10), Standoff(), lease(5)

    standoff.begin(lease(4), 0.0)

    with pytest.raises(LostOwnershipError):
        position.take_over(standoff.claim(later, FORCE_SECONDS + 1))
