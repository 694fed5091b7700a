"""Lanes: one queue and one task a merchant, so that no merchant waits for another one's database.

Records arrive in chunks (what one fetch brought of one partition), leave in batches (what one call of the handler
gets), and are bounded by pausing the partitions that feed the lane. Nothing here knows Faust or what a record means.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Protocol, TypeAlias

from aiokafka import ConsumerRecord, TopicPartition

from workers.faults import planted
from workers.logs import die

TP: TypeAlias = TopicPartition
Record: TypeAlias = ConsumerRecord[bytes | None, bytes | None]

QUIET_SECONDS = 1.0
# A lane that works longer than this lets another one begin, so that a few stuck databases don't stop all merchants.
PATIENCE_SECONDS = 0.5
# For the quiet moment at the end of a lease: all merchants wait for a rebalance, one's database may be away.
LAST_IDLE_SECONDS_MAX = 2.0
# So many records a lane may queue, however many lanes there are: smaller batches cost too much.
LANE_RECORDS_MIN = 250


class Lease:
    """The right to work on some partitions, from one assignment until they are revoked.

    Attributes:
        generation: of the consumer group; a later lease of this process has a higher one.
        worker_id: of this process.
        partitions: all partitions of the assignment, of all merchants.
        first: the partitions of which no batch has been finished under this lease; the handler may take some out.
        token: the assignment as the transport knows it, to be compared by identity only.
    """

    def __init__(self, generation: int, worker_id: str, partitions: Iterable[TP], token: object) -> None:
        self.generation = generation
        self.worker_id = worker_id
        self.partitions = frozenset(partitions)
        self.first = set(self.partitions)
        self.token = token
        self._alive = True

    def alive(self) -> bool:
        """Return False once the partitions are being revoked, or the process stops and its time is over."""
        return self._alive

    def end(self) -> None:
        """Let nobody begin anything under this lease any more."""
        self._alive = False


@dataclass
class Outcome:
    """What the handler made of a batch.

    Attributes:
        commit: next offset by partition, to be committed to Kafka; only after the broker acknowledged the results.
        seek: partitions to read again from an offset; what the lane has of them is dropped.
        published: tells whether the broker acknowledged them; None if that is sure already. The next batch may begin
            meanwhile.
    """

    commit: dict[TP, int] = field(default_factory=dict)
    seek: dict[TP, int] = field(default_factory=dict)
    published: asyncio.Task[bool] | None = None


class Handler(Protocol):
    """Whoever works on the records of a merchant."""

    async def process(self, merchant: str, records: list[Record], lease: Lease) -> Outcome:
        """Work on a batch: records of one merchant and one lease, by record time, each partition's own order kept.

        Trouble is retried inside, with a look at `lease.alive()` before each try. An exception ends the process.
        """
        ...

    async def idle(self, merchant: str, partitions: set[TP], lease: Lease) -> None:
        """Use a quiet moment: a second without records (once), or the end of a lease whose work came to rest.

        Args:
            merchant: whose records have all been worked on, or are dropped with the lease.
            partitions: the merchant's partitions under this lease, possibly none.
            lease: alive, or ended just now: the next owner waits until this returns, or does not wait any longer.
        """
        ...


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one fetch brought of one partition.

    Attributes:
        token: the assignment under which it was fetched.
        seek: how often the partition had been sought under that assignment.
        start: where the chunk before ended; None for the first one after an assignment or a seek.
        end: where the next one begins. There may be fewer offsets than records between: transaction markers have some.
    """

    tp: TP
    records: Sequence[Record]
    token: object
    seek: int
    start: int | None
    end: int


class Feed(Protocol):
    """Where the chunks come from."""

    def pause(self, tp: TP) -> None:
        """Fetch no more of the partition; a chunk under way may still arrive."""

    def resume(self, tps: Iterable[TP]) -> None:
        """Fetch the partitions again."""

    async def seek(self, lease: Lease, positions: Mapping[TP, tuple[int, int]]) -> None:
        """Go on at these offsets and stamp later chunks with these numbers; for a lease that is over, do nothing."""

    async def commit(self, lease: Lease, offsets: Mapping[TP, int]) -> bool:
        """Commit next offsets; False when the lease is over."""
        ...


@dataclass
class Counters:
    """What happened since the process started."""

    batches: int = 0
    records: int = 0
    commits: int = 0
    commit_failures: int = 0
    rebalances: int = 0
    stale_drops: int = 0
    seeks: int = 0
    pauses: int = 0


class Gate:
    """At most so many lanes work at once; they get their turn in the order they asked."""

    def __init__(self, slots: int, patience: float = PATIENCE_SECONDS) -> None:
        self._semaphore = asyncio.Semaphore(slots)
        self._patience = patience

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Wait for a turn. Who takes longer than the patience goes on, but no longer stands in others' way."""
        await self._semaphore.acquire()
        held = [self._semaphore]

        def give_up() -> None:
            if held:
                held.pop().release()

        timer = asyncio.get_running_loop().call_later(self._patience, give_up)
        try:
            yield
        finally:
            timer.cancel()
            give_up()


class Committer:
    """Commits offsets one call at a time, and merges what is handed in meanwhile."""

    def __init__(self, feed: Feed, counters: Counters, interval: float = 0.02) -> None:
        self._feed = feed
        self._counters = counters
        self._interval = interval
        self._lease: Lease | None = None
        self._offsets: dict[TP, int] = {}
        self._wake = asyncio.Event()
        self._done = asyncio.Event()
        self._done.set()

    def submit(self, lease: Lease, offsets: Mapping[TP, int]) -> None:
        """Have the offsets committed soon. Those of an older lease are forgotten: another worker may own them."""
        if not offsets:
            return
        if lease is not self._lease:
            self._lease, self._offsets = lease, {}
        self._offsets.update(offsets)
        self._done.clear()
        self._wake.set()

    async def flush(self) -> None:
        """Wait until everything submitted is committed, or given up."""
        await self._done.wait()

    async def run(self) -> None:
        """Commit for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            lease, offsets, self._offsets = self._lease, self._offsets, {}
            if lease is not None and offsets:
                if await self._feed.commit(lease, offsets):
                    self._counters.commits += 1
                else:
                    self._counters.commit_failures += 1
            if not self._offsets:
                self._done.set()
            await asyncio.sleep(self._interval)


@dataclass(frozen=True, kw_only=True)
class LaneOptions:
    """Sizes of a lane.

    When a batch ends: at `batch_max` records. Otherwise a lane that was idle, or whose last batch was a single record,
    waits only for an eighth of `linger` seconds of quiet, so that a lone command isn't held up; a lane under load
    waits the whole `linger` for more. Neither waits longer than `linger` after the first record.
    """

    batch_max: int = 2000
    linger: float = 0.01
    # In all queues together: a record takes about 4 KiB.
    records_max: int = 32_000

    def high(self, lanes: int) -> int:
        """With so many records queued in one of so many lanes, its partitions are paused; they resume at a third."""
        return min(3 * self.batch_max, max(LANE_RECORDS_MIN, self.records_max // lanes))


class Lane:
    """The queue and the task of one merchant."""

    def __init__(
        self,
        merchant: str,
        handler: Handler,
        feed: Feed,
        *,
        options: LaneOptions,
        peers: Mapping[str, "Lane"],
        gate: Gate,
        committer: Committer,
        counters: Counters,
    ) -> None:
        self.merchant = merchant
        self.topics: set[str] = set()
        self.partitions: set[TP] = set()
        self.held = False
        self._handler = handler
        self._feed = feed
        self._options = options
        self._peers = peers
        self._gate = gate
        self._committer = committer
        self._counters = counters
        self._lease: Lease | None = None
        self._stopping = False
        self._publishing: asyncio.Task[bool] | None = None
        self._wake = asyncio.Event()
        self._rest = asyncio.Event()
        self._rest.set()
        self._idle_due = False
        self._last_active = 0.0
        self._last_size = 0
        self._clear()

    @property
    def queued(self) -> int:
        """The number of records that wait."""
        return len(self._ready) - self._taken + len(self._arrived)

    @property
    def _high(self) -> int:
        return self._options.high(len(self._peers))

    def _clear(self) -> None:
        # `_ready[_taken:]` is sorted by time; what arrived later is merged into it when a batch needs more.
        self._ready: list[tuple[int, Record]] = []
        self._taken = 0
        self._arrived: list[tuple[int, Record]] = []
        self._paused: set[TP] = set()
        self._seeks: dict[TP, int] = {}
        self._ends: dict[TP, int] = {}
        self._latest: dict[TP, int] = {}

    def open(self, lease: Lease) -> None:
        """Begin anew under a lease."""
        self._clear()
        self._lease = lease
        self.partitions = {tp for tp in lease.partitions if tp.topic in self.topics}
        self._idle_due = bool(self.partitions)
        self._last_active = asyncio.get_running_loop().time()
        self._wake.set()

    def close(self) -> None:
        """Drop everything queued; what is being worked on goes on."""
        self._clear()
        self.partitions = set()
        self._lease = None
        self._wake.set()

    def hold(self) -> None:
        """Work on nothing more; records stay in Kafka."""
        self.held = True
        if self._lease is not None:
            self._pause(*self.partitions)

    def release(self) -> None:
        """Go on after a hold."""
        self.held = False
        self._resume_if_low()
        self._wake.set()

    def accept(self, chunk: Chunk) -> None:
        """Queue a chunk, or drop it if it belongs to an earlier assignment or was fetched before a seek."""
        lease, tp = self._lease, chunk.tp
        if lease is None or chunk.token is not lease.token or chunk.seek != self._seeks.get(tp, 0):
            self._counters.stale_drops += len(chunk.records)
            return
        if chunk.start != self._ends.get(tp):
            # A chunk got lost on its way here. Nothing of it is committed, so that it comes again after a restart.
            die("a chunk is missing", merchant=self.merchant, partition=tp, start=chunk.start, end=self._ends.get(tp))
        self._ends[tp] = chunk.end
        # Time may go back within a partition when its leader changes: then its own order counts.
        times = itertools.accumulate((r.timestamp for r in chunk.records), max, initial=self._latest.get(tp, 0))
        next(times)
        self._arrived.extend(zip(times, chunk.records, strict=True))
        self._latest[tp] = self._arrived[-1][0]
        if self.held or self.queued >= self._high:
            self._pause(tp)
        self._wake.set()

    def _pause(self, *tps: TP) -> None:
        for tp in tps:
            if tp not in self._paused:
                self._paused.add(tp)
                self._counters.pauses += 1
                self._feed.pause(tp)

    def _resume_if_low(self) -> None:
        if self._paused and not self.held and self.queued <= self._high // 3:
            paused, self._paused = self._paused, set()
            self._feed.resume(paused)

    async def run(self) -> None:
        """Work for ever."""
        try:
            while True:
                if await self._wait_for_records():
                    await self._linger()
                    async with self._gate.slot():
                        await self._work()
                else:
                    async with self._gate.slot():
                        await self.idle()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            die("a lane failed", error, merchant=self.merchant)

    def _may_work(self) -> bool:
        lease = self._lease
        return lease is not None and lease.alive() and not self.held and not self._stopping

    async def _wait_for_records(self) -> bool:
        """Return True when there are records to work on, False after a second of quiet."""
        loop = asyncio.get_running_loop()
        while not (self.queued and self._may_work()):
            self._wake.clear()
            quiet_at = self._last_active + QUIET_SECONDS if self._idle_due and self._may_work() else None
            if quiet_at is not None and loop.time() >= quiet_at:
                return False
            try:
                async with asyncio.timeout_at(quiet_at):
                    await self._wake.wait()
            except TimeoutError:
                return False
        return True

    async def _linger(self) -> None:
        """Wait for company of the first records, see LaneOptions."""
        loop = asyncio.get_running_loop()
        now, linger = loop.time(), self._options.linger
        busy = self._last_size > 1 and now - self._last_active < linger
        end, quiet = now + linger, linger if busy else linger / 8
        while 0 < self.queued < self._options.batch_max and loop.time() < end:
            self._wake.clear()
            try:
                async with asyncio.timeout_at(min(end, loop.time() + quiet)):
                    await self._wake.wait()
            except TimeoutError:
                return

    def _take(self) -> list[Record]:
        """Return the next batch, sorted by time, and make room for more."""
        if len(self._ready) - self._taken < self._options.batch_max and self._arrived:
            self._ready = self._ready[self._taken :] + self._arrived
            self._ready.sort(key=itemgetter(0))
            self._arrived, self._taken = [], 0
        batch = [record for _, record in self._ready[self._taken : self._taken + self._options.batch_max]]
        self._taken += len(batch)
        if self._taken == len(self._ready):
            self._ready, self._taken = [], 0
        self._resume_if_low()
        return batch

    async def _work(self) -> None:
        # Between the wait and our turn a rebalance may have taken everything.
        lease = self._lease
        batch = self._take() if self._may_work() else []
        if lease is None or not batch:
            return
        self._rest.clear()
        try:
            if planted("commit_early"):
                self._committer.submit(lease, {TP(r.topic, r.partition): r.offset + 1 for r in batch})
            outcome = await self._handler.process(self.merchant, batch, lease)
            self._counters.batches += 1
            self._counters.records += len(batch)
            await self._apply(outcome, batch, lease)
        finally:
            self._last_size = len(batch)
            self._last_active = asyncio.get_running_loop().time()
            self._idle_due = True
            self._rest.set()

    async def _apply(self, outcome: Outcome, batch: list[Record], lease: Lease) -> None:
        if outcome.published is not None:
            self._publishing = outcome.published
        if lease is not self._lease:
            # The revocation did not wait for us any longer: somebody else owns the partitions.
            return
        if lease.first:
            lease.first -= {TP(r.topic, r.partition) for r in batch} - outcome.seek.keys()
        if outcome.published is None:
            self._committer.submit(lease, outcome.commit)
        else:
            outcome.published.add_done_callback(lambda task: self._commit_published(task, lease, outcome.commit))
        if not outcome.seek:
            return
        positions = {}
        for tp, offset in outcome.seek.items():
            self._seeks[tp] = self._seeks.get(tp, 0) + 1
            self._ends.pop(tp, None)
            self._latest.pop(tp, None)
            positions[tp] = (offset, self._seeks[tp])
        self._drop(outcome.seek.keys())
        self._counters.seeks += len(positions)
        await self._feed.seek(lease, positions)

    def _commit_published(self, published: asyncio.Task[bool], lease: Lease, offsets: dict[TP, int]) -> None:
        if lease is self._lease and not published.cancelled() and published.result():
            self._committer.submit(lease, offsets)
            # There is something to be noted in the next quiet moment.
            self._last_active = asyncio.get_running_loop().time()
            self._idle_due = True
            self._wake.set()

    def _drop(self, tps: Iterable[TP]) -> None:
        dropped = {(tp.topic, tp.partition) for tp in tps}
        rest = itertools.chain(itertools.islice(self._ready, self._taken, None), self._arrived)
        self._ready = sorted((e for e in rest if (e[1].topic, e[1].partition) not in dropped), key=itemgetter(0))
        self._arrived, self._taken = [], 0
        self._resume_if_low()

    async def idle(self) -> None:
        """Call the handler's `idle`, once for each quiet period."""
        lease = self._lease
        if lease is None or not self._idle_due:
            return
        self._idle_due = False
        self._rest.clear()
        try:
            await self._handler.idle(self.merchant, set(self.partitions), lease)
        finally:
            self._rest.set()

    def stop(self) -> None:
        """Begin no further batch."""
        self._stopping = True

    async def rest(self) -> None:
        """Wait until the handler is not at work for this merchant, and everything is published or given up."""
        await self._rest.wait()
        if self._publishing is not None:
            await asyncio.wait({self._publishing})


class Lanes:
    """All lanes of the process, and the lease they share."""

    def __init__(
        self,
        handler: Handler,
        feed: Feed,
        *,
        worker_id: str,
        options: LaneOptions,
        concurrency: int,
        counters: Counters,
    ) -> None:
        self.lease: Lease | None = None
        self.counters = counters
        self.by_merchant: dict[str, Lane] = {}
        self._handler = handler
        self._feed = feed
        self._worker_id = worker_id
        self._options = options
        self._gate = Gate(concurrency)
        self._committer = Committer(feed, counters)
        self._held: set[str] = set()
        self._tasks = [asyncio.create_task(self._commit(), name="committer")]

    async def _commit(self) -> None:
        try:
            await self._committer.run()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            die("the committer failed", error)

    def add(self, merchant: str, topics: Iterable[str]) -> Lane:
        """Make the lane of a merchant and start it; it gets records from the next lease on."""
        lane = Lane(
            merchant,
            self._handler,
            self._feed,
            options=self._options,
            peers=self.by_merchant,
            gate=self._gate,
            committer=self._committer,
            counters=self.counters,
        )
        lane.topics = set(topics)
        lane.held = merchant in self._held
        self.by_merchant[merchant] = lane
        self._tasks.append(asyncio.create_task(lane.run(), name=f"lane {merchant}"))
        return lane

    def hold(self, merchant: str) -> None:
        """Work on nothing more of a merchant, known already or not; its records stay in Kafka."""
        self._held.add(merchant)
        if lane := self.by_merchant.get(merchant):
            lane.hold()

    def release(self, merchant: str) -> None:
        """Go on after a hold; without one, do nothing."""
        if merchant in self._held:
            self._held.discard(merchant)
            if lane := self.by_merchant.get(merchant):
                lane.release()

    def open(self, generation: int, partitions: Iterable[TP], token: object) -> Lease:
        """Begin to work under a new assignment."""
        lease = self.lease = Lease(generation, self._worker_id, partitions, token)
        self.counters.rebalances += 1
        for lane in self.by_merchant.values():
            lane.open(lease)
        return lease

    async def close(self, limit: float) -> bool:
        """End the lease: drop what is queued, wait for what is being worked on, use the quiet moment.

        Args:
            limit: in seconds, for all of it.

        Returns:
            Whether all work came to rest in time.
        """
        if self.lease is None:
            return True
        loop = asyncio.get_running_loop()
        end = loop.time() + limit
        self.lease.end()
        # The next owner would begin where this one noted last, and repeat what came after it.
        rested = await self._rest(limit) and await self._last_idles(min(end - loop.time(), LAST_IDLE_SECONDS_MAX))
        for lane in self.by_merchant.values():
            lane.close()
        self.lease = None
        return rested

    async def stop(self, limit: float) -> bool:
        """Finish what is being worked on, commit, end the lease; at most `limit` seconds.

        Returns:
            Whether all work came to rest in time.
        """
        end = asyncio.get_running_loop().time() + limit
        for lane in self.by_merchant.values():
            lane.stop()
        rested = await self._rest(limit)
        # With the lease alive the handlers tried until now; they get a last second to notice.
        closed = await self.close(max(1.0, end - asyncio.get_running_loop().time()))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        return rested and closed

    async def _last_idles(self, limit: float) -> bool:
        try:
            async with asyncio.timeout(limit):
                await asyncio.gather(*[self._last_idle(lane) for lane in self.by_merchant.values()])
        except TimeoutError:
            return False
        return True

    async def _last_idle(self, lane: Lane) -> None:
        async with self._gate.slot():
            await lane.idle()

    async def _rest(self, limit: float) -> bool:
        """Wait until no lane works and everything is committed."""
        try:
            async with asyncio.timeout(limit):
                for lane in list(self.by_merchant.values()):
                    await lane.rest()
                await self._committer.flush()
        except TimeoutError:
            return False
        return True

    def assigned(self) -> dict[str, set[TP]]:
        """Return the partitions of each merchant."""
        return {merchant: set(lane.partitions) for merchant, lane in self.by_merchant.items()}

    def queued(self) -> Counter[str]:
        """Return how many records wait, by merchant."""
        return Counter({merchant: lane.queued for merchant, lane in self.by_merchant.items()})
