"""Lanes, with a feed that only writes down what it is asked."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager

import pytest
from aiokafka import ConsumerRecord

from workers.lanes import TP, Chunk, Counters, Gate, Lane, LaneOptions, Lanes, Lease, Outcome, Record

A, B = TP("m.a", 0), TP("m.b", 0)


class Notes:
    """A feed."""

    def __init__(self) -> None:
        self.paused: set[TP] = set()
        self.sought: list[Mapping[TP, tuple[int, int]]] = []
        self.committed: dict[TP, int] = {}

    def pause(self, tp: TP) -> None:
        self.paused.add(tp)

    def resume(self, tps: Iterable[TP]) -> None:
        self.paused -= set(tps)

    async def seek(self, lease: Lease, positions: Mapping[TP, tuple[int, int]]) -> None:
        self.sought.append(positions)

    async def commit(self, lease: Lease, offsets: Mapping[TP, int]) -> bool:
        self.committed.update(offsets)
        return True


class Keeper:
    """A handler that keeps what it was given, and answers with the outcome set beforehand."""

    def __init__(self) -> None:
        self.batches: list[list[Record]] = []
        self.outcomes: list[Outcome] = []
        self.idles = 0
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def process(self, merchant: str, records: list[Record], lease: Lease) -> Outcome:
        self.batches.append(records)
        await self.go_on.wait()
        done = Outcome({TP(r.topic, r.partition): r.offset + 1 for r in records})
        return self.outcomes.pop(0) if self.outcomes else done

    async def idle(self, merchant: str, partitions: set[TP], lease: Lease) -> None:
        self.idles += 1

    @property
    def offsets(self) -> list[tuple[str, int]]:
        return [(r.topic[-1], r.offset) for batch in self.batches for r in batch]


def record(tp: TP, offset: int, timestamp: int) -> Record:
    return ConsumerRecord(tp.topic, tp.partition, offset, timestamp, 1, None, b"", None, 0, 0, ())


class Bench:
    """One lane of merchant m under a lease."""

    def __init__(self, batch_max: int) -> None:
        self.feed = Notes()
        self.handler = Keeper()
        self.lanes = Lanes(
            self.handler,
            self.feed,
            worker_id="w",
            options=LaneOptions(batch_max=batch_max),
            concurrency=1,
            counters=Counters(),
        )
        self.lane: Lane = self.lanes.add("m", {A.topic, B.topic})
        self.token = object()
        self.lease = self.lanes.open(1, {A, B}, self.token)
        self.ends: dict[TP, int] = {}

    def arrive(self, tp: TP, first: int, *timestamps: int, seek: int = 0, token: object = None) -> None:
        records = [record(tp, first + i, timestamp) for i, timestamp in enumerate(timestamps)]
        end = first + len(timestamps)
        self.lane.accept(Chunk(tp, records, token or self.token, seek, self.ends.get(tp), end))
        if token is None:
            self.ends[tp] = end

    async def handled(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.handler.offsets) < count or not self.lane._rest.is_set():
                await asyncio.sleep(0.001)


@asynccontextmanager
async def bench(batch_max: int = 100) -> AsyncIterator[Bench]:
    it = Bench(batch_max)
    yield it
    await it.lanes.stop(5)


async def test_records_are_merged_by_time_and_each_partition_keeps_its_order() -> None:
    async with bench() as it:
        it.arrive(A, 0, 10, 30, 20, 50)
        it.arrive(B, 7, 15, 25, 40)

        await it.handled(7)

        # The third record of A claims an earlier time than the second: it stays after it all the same.
        assert it.handler.offsets == [("a", 0), ("b", 7), ("b", 8), ("a", 1), ("a", 2), ("b", 9), ("a", 3)]
        assert len(it.handler.batches) == 1


async def test_what_was_done_is_committed() -> None:
    async with bench() as it:
        it.arrive(A, 0, 1, 2)
        await it.handled(2)

        assert await it.lanes.stop(5)
        assert it.feed.committed == {A: 2}


async def test_partitions_are_paused_when_much_waits_and_resumed_when_little_does() -> None:
    async with bench(batch_max=10) as it:
        it.handler.go_on.clear()
        it.arrive(A, 0, *range(29))
        assert not it.feed.paused
        it.arrive(B, 0, *range(11))
        assert it.feed.paused == {B}

        it.handler.go_on.set()
        await it.handled(40)

        assert not it.feed.paused
        assert max(len(batch) for batch in it.handler.batches) == 10


async def test_after_a_seek_only_what_was_fetched_after_it_is_worked_on() -> None:
    async with bench(batch_max=2) as it:
        it.handler.outcomes = [Outcome({B: 1}, {A: 0})]
        it.handler.go_on.clear()
        it.arrive(A, 5, 1)
        it.arrive(B, 0, 2)
        await asyncio.sleep(0.05)
        it.arrive(A, 6, 3, 4)
        it.arrive(B, 1, 5)
        it.handler.go_on.set()
        await it.handled(3)

        it.ends[A] = 8
        it.arrive(A, 8, 6)
        it.ends.pop(A)
        it.arrive(A, 0, 7, 8, seek=1)
        await it.handled(5)

        assert it.feed.sought == [{A: (0, 1)}]
        assert it.handler.offsets == [("a", 5), ("b", 0), ("b", 1), ("a", 0), ("a", 1)]
        assert it.lanes.counters.stale_drops == 1


async def test_a_partition_stays_among_the_first_until_a_batch_of_it_was_not_sought_back() -> None:
    async with bench() as it:
        it.handler.outcomes = [Outcome({}, {A: 0})]
        it.arrive(A, 5, 1)
        it.arrive(B, 0, 2)
        await it.handled(2)
        assert it.lease.first == {A}

        it.ends.pop(A)
        it.arrive(A, 0, 3, seek=1)
        await it.handled(3)
        assert it.lease.first == set()


async def test_chunks_of_another_assignment_are_dropped() -> None:
    async with bench() as it:
        it.arrive(A, 0, 1, 2, token=object())
        assert it.lane.queued == 0
        assert it.lanes.counters.stale_drops == 2


async def test_a_lease_that_ends_lets_the_batch_under_way_finish_and_drops_the_rest() -> None:
    async with bench(batch_max=1) as it:
        it.handler.go_on.clear()
        it.arrive(A, 0, 1, 2, 3)
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(it.lanes.close(5))
        await asyncio.sleep(0.01)
        assert not it.lease.alive()
        it.handler.go_on.set()

        assert await closing
        assert it.handler.offsets == [("a", 0)]
        assert it.feed.committed == {A: 1}


async def test_what_was_published_is_noted_before_the_next_owner_begins() -> None:
    async with bench() as it:
        it.arrive(A, 0, 1)
        await it.handled(1)

        assert await it.lanes.close(5)
        assert it.handler.idles == 1


async def test_a_batch_that_outlives_its_lease_commits_nothing() -> None:
    async with bench(batch_max=1) as it:
        it.handler.go_on.clear()
        it.arrive(A, 0, 1)
        await asyncio.sleep(0.05)
        assert not await it.lanes.close(0.01)
        it.lanes.open(2, {A, B}, object())
        it.handler.go_on.set()
        await it.handled(1)

        assert it.feed.committed == {}


async def test_offsets_are_committed_when_results_are_out_and_the_next_batch_does_not_wait_for_that() -> None:
    async with bench(batch_max=1) as it:
        gone = asyncio.Event()
        publishing = asyncio.create_task(_true_after(gone))
        it.handler.outcomes = [Outcome({A: 1}, published=publishing), Outcome(published=publishing)]
        it.arrive(A, 0, 1, 2)
        await it.handled(2)
        assert it.feed.committed == {}
        closing = asyncio.create_task(it.lanes.close(5))
        await asyncio.sleep(0.05)
        assert not closing.done()
        gone.set()

        assert await closing
        assert it.feed.committed == {A: 1}


async def _true_after(event: asyncio.Event) -> bool:
    await event.wait()
    return True


async def test_the_quiet_moment_comes_once_after_each_burst() -> None:
    async with bench() as it:
        await asyncio.sleep(1.1)
        assert it.handler.idles == 1
        await asyncio.sleep(1.1)
        assert it.handler.idles == 1

        it.arrive(A, 0, 1)
        await it.handled(1)
        assert await it.lanes.stop(5)
        assert it.handler.idles == 2


@pytest.mark.parametrize(("lanes", "high"), [(1, 6_000), (10, 3_200), (100, 320), (1_000, 250)])
def test_many_lanes_queue_no_more_than_few(lanes: int, high: int) -> None:
    assert LaneOptions().high(lanes) == high


async def test_a_held_lane_keeps_its_records() -> None:
    async with bench() as it:
        it.lanes.hold("m")
        it.arrive(A, 0, 1, 2)
        await asyncio.sleep(0.05)
        assert it.handler.offsets == []
        assert it.feed.paused == {A, B}

        it.lanes.release("m")
        await it.handled(2)
        assert it.feed.paused == set()


async def test_who_takes_too_long_no_longer_stands_in_others_way() -> None:
    gate = Gate(1, patience=0.05)
    async with gate.slot(), asyncio.timeout(1), gate.slot():
        pass

    # The slot was given back once, not twice.
    async with gate.slot():
        assert gate._semaphore.locked()
