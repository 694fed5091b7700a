"""Everything of Faust, mode and aiokafka that is not their public interface: the one module that touches it.

The three packages are pinned exactly, and `tests/unit/test_transport_names.py` checks each name and each behaviour
relied on. What is changed, and why:

- A fetch is handed over as one event per partition (a chunk) instead of one per record, which is 20 times as fast.
- Transactions are respected (`read_committed`), partitions stay where they are if possible (sticky assignor).
- Faust's filter of read offsets is passed by, its seek to committed offsets after a rebalance and commits are off. A
  chunk carries the assignment it was fetched under instead, and nothing is fetched for an assignment before the lanes
  have a lease on it; so what was fetched is either accepted by a lane or fetched again by the next owner.
- Topics are subscribed to only while the group's coordinator is known: aiokafka's coordination task dies otherwise, and
  the process would live on and consume nothing.
- A record with a header whose name is not UTF-8, which a broker lets through, is read all the same: aiokafka raises in
  the middle of the fetch, again after every restart, and one such record would end every worker for good.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

import faust
import structlog
from aiokafka import AIOKafkaConsumer, OffsetAndMetadata
from aiokafka.consumer import fetcher
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.structs import ConsumerRecord
from faust.agents.manager import AgentManager
from faust.app import base
from faust.transport.conductor import Conductor
from faust.transport.drivers import aiokafka as driver
from faust.types import tuples
from faust.types.tuples import ConsumerMessage

from workers.lanes import TP, Chunk, Lane, Lease
from workers.logs import die
from workers.settings import WorkerSettings

T = TypeVar("T")
FaustTP = tuples.TP
log = structlog.get_logger(__name__)

# A partition that is resumed is looked at again after this time at the latest.
POLL_SECONDS = 0.1
# After this many seconds without a lease, though the coordinator is known, the process gives up and is started anew.
STUCK_SECONDS = 120
RESUBSCRIBE_SECONDS = 1.0
# A fetch that brought more chunks than this is followed by a pause of so much for each of them.
CHUNKS_AT_ONCE = 8
CHUNK_SECONDS = 0.001
# Of all partitions together, and of one at least.
FETCHED_BYTES_MAX = 16 << 20
FETCH_BYTES_MIN = 64 << 10
FLAG_SECONDS = 5.0


class TransportEndedError(Exception):
    """The consumer's thread has ended or has not been started."""


@dataclass
class Report:
    """What the consumer's thread says of itself, once a second.

    Attributes:
        coordinator_known: whether the broker that coordinates the group is known.
        dead: what must never end and has ended; None if all is well.
        lag: records not yet committed, by partition.
        token: the current assignment, None during a rebalance.
        subscription: the topics subscribed to.
    """

    coordinator_known: bool = False
    dead: str | None = None
    lag: dict[TP, int] = field(default_factory=dict)
    token: object = None
    subscription: frozenset[str] = frozenset()


class _Name(bytes):
    """The name of a header, which always decodes."""

    def decode(self, encoding: str = "utf-8", errors: str = "backslashreplace") -> str:
        return super().decode(encoding, errors)


class _Lenient(bytearray):
    """A batch's bytes of which every slice can be read as a name."""

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        return found if isinstance(found, int) else _Name(found)


class RecordBatch:
    """A batch of a fetch, read by aiokafka's fast reader, and from a name that is not UTF-8 on by its slow one."""

    def __init__(self, batch: Any, raw: memoryview) -> None:
        self._batch = batch
        self._raw = raw

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batch, name)

    def __next__(self) -> Any:
        return next(self._batch)

    def __iter__(self) -> Iterator[Any]:
        done = 0
        try:
            for record in self._batch:
                yield record
                done += 1
        except UnicodeDecodeError:
            log.warning("a header's name is not UTF-8", offset=self._batch.base_offset + done)
            batch = iter(_DefaultRecordBatchPy(self._raw))
            batch._buffer = _Lenient(batch._buffer)
            yield from list(batch)[done:]


class Records:
    """The batches of one partition's fetch; see ``RecordBatch``."""

    def __init__(self, data: bytes) -> None:
        self._records: Any = MemoryRecords(data)
        self._data = memoryview(data)
        self._at = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._records, name)

    def next_batch(self) -> RecordBatch | None:
        batch = self._records.next_batch()
        if batch is None:
            return None
        # Base offset and length stand before what the length counts.
        start, self._at = self._at, self._at + 12 + int.from_bytes(self._data[self._at + 8 : self._at + 12])
        return RecordBatch(batch, self._data[start : self._at])


fetcher.MemoryRecords = Records


class ConsumerThread(driver.AIOKafkaConsumerThread):
    """The thread that talks to the broker; methods with a leading underscore run in it."""

    mundane_level = "debug"

    # The assignment the lanes work on, set by the main thread; nothing is fetched for any other.
    leased: object = None
    _known: object = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._committing = asyncio.Lock()

    def _create_worker_consumer(self, transport: Any) -> AIOKafkaConsumer:  # noqa: ARG002
        settings = cast(BaseApp, self.app).settings
        self._assignor = StickyPartitionAssignor
        return AIOKafkaConsumer(
            client_id="credits-worker",
            group_id=settings.group,
            bootstrap_servers=settings.kafka_bootstrap_servers,
            partition_assignment_strategy=(StickyPartitionAssignor,),
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            max_partition_fetch_bytes=settings.fetch_max_bytes,
            fetch_max_wait_ms=settings.fetch_max_wait_ms,
            request_timeout_ms=max(40, settings.session_timeout + 10) * 1000,
            session_timeout_ms=settings.session_timeout * 1000,
            rebalance_timeout_ms=settings.rebalance_timeout * 1000,
            heartbeat_interval_ms=1000,
            # A merchant's database may be away for long: that must not cost the membership.
            max_poll_interval_ms=24 * 3600 * 1000,
            metadata_max_age_ms=10_000,
            **settings.security_kwargs(),
        )

    async def call(self, work: Coroutine[Any, Any, T], limit: float | None = None) -> T:
        """Run a coroutine in this thread. Faust's own queue has two workers, and a slow commit would occupy one.

        Raises:
            TransportEndedError: the thread has ended.
            TimeoutError: it took longer than `limit` seconds.
        """
        if self._consumer is None or self.thread_loop.is_closed():
            work.close()
            raise TransportEndedError
        try:
            future = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.thread_loop))
        except RuntimeError as error:
            work.close()
            raise TransportEndedError from error
        async with asyncio.timeout(limit):
            try:
                return await future
            except asyncio.CancelledError:
                # The thread cancels what is left when it ends; our own cancellation has to go on.
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                raise TransportEndedError from None

    async def subscribe(self, topics: Iterable[str]) -> None:
        """Subscribe as soon as the coordinator is known."""
        while not self.should_stop and not await self.call(self._try_to_subscribe(set(topics))):
            await asyncio.sleep(0.2)

    async def _try_to_subscribe(self, topics: set[str]) -> bool:
        consumer = self._ensure_consumer()
        coordinator = consumer._coordinator
        if consumer.subscription() and (
            coordinator.coordinator_id is None or coordinator._coordinator_lookup_lock.locked()
        ):
            return False
        consumer.subscribe(topics=topics, listener=self._rebalance_listener)
        return True

    def share_fetches(self, partitions: int) -> None:
        """Have as much less of each partition fetched at once as there are more of them, to bound the memory."""
        share = max(FETCH_BYTES_MIN, FETCHED_BYTES_MAX // max(1, partitions))
        settings = cast(BaseApp, self.app).settings
        self._ensure_consumer()._fetcher._max_partition_fetch_bytes = min(settings.fetch_max_bytes, share)

    def current(self) -> Any:
        """Return the current assignment, None while there is none."""
        consumer = self._consumer
        subscription = None if consumer is None else consumer._subscription.subscription
        assignment = None if subscription is None else subscription.assignment
        return assignment if assignment is not None and assignment.active else None

    async def _fetch_records(  # type: ignore[override]
        self,
        consumer: AIOKafkaConsumer,
        active_partitions: set[FaustTP],
        timeout: float | None = None,  # noqa: ASYNC109
        max_records: int | None = None,
    ) -> dict[FaustTP, Chunk]:
        if self.leased is None or self.current() is not self.leased:
            await asyncio.sleep(0.02)
            return {}
        records = await super()._fetch_records(consumer, active_partitions, timeout=timeout, max_records=max_records)
        # No other task of this thread can have run since the records were taken.
        assignment = self.current()
        if assignment is None or assignment is not self.leased or not self.consumer.flow_active:
            for tp, taken in records.items() if assignment is not None else ():
                consumer.seek(tp, taken[0].offset)
            return {}
        self._know(assignment)
        return {FaustTP(*tp): self._chunk(assignment, tp, taken) for tp, taken in records.items()}

    def _know(self, assignment: object) -> None:
        """Begin the books anew for a new assignment."""
        if assignment is not self._known:
            self._known = assignment
            # Numbers of seeks; ends of the chunks handed out; next offsets of the last records handed out; next
            # offsets of what is done. A partition is in the last two from its first record on.
            self._seeks: dict[TP, int] = {}
            self._ends: dict[TP, int] = {}
            self._handed: dict[TP, int] = {}
            self._done: dict[TP, int] = {}

    def _chunk(self, assignment: Any, tp: TP, records: list[ConsumerRecord[Any, Any]]) -> Chunk:
        start, end = self._ends.get(tp), assignment.state_value(tp).position
        self._ends[tp] = end
        self._handed[tp] = records[-1].offset + 1
        self._done.setdefault(tp, records[0].offset)
        return Chunk(tp, records, assignment, self._seeks.get(tp, 0), start, end)

    async def seek_leased(self, lease: Lease, positions: Mapping[TP, tuple[int, int]]) -> None:
        """See Feed.seek."""
        await self.call(self._seek_leased(lease, positions))

    async def _seek_leased(self, lease: Lease, positions: Mapping[TP, tuple[int, int]]) -> None:
        if self.current() is not lease.token:
            return
        self._know(lease.token)
        for tp, (offset, number) in positions.items():
            self._ensure_consumer().seek(tp, offset)
            self._seeks[tp] = number
            for book in (self._ends, self._handed, self._done):
                book.pop(tp, None)

    async def commit_leased(self, lease: Lease, offsets: Mapping[TP, int]) -> bool:
        """See Feed.commit."""
        return await self.call(self._commit_leased(lease, lambda: offsets))

    async def commit_tails(self, lease: Lease, limit: float) -> None:
        """Commit past the markers of transactions and aborted records that nobody is given.

        Without it a partition whose last record is such a one would never be without lag.
        """
        await self.call(self._commit_leased(lease, lambda: self._tails(lease.token)), limit)

    async def _commit_leased(self, lease: Lease, offsets: Callable[[], Mapping[TP, int]]) -> bool:
        # One at a time: while one is tried again, no later one may overtake it and be undone by it.
        async with self._committing:
            token: Any = lease.token
            consumer = self._ensure_consumer()
            if self.current() is not token or consumer._coordinator.generation != lease.generation:
                return False
            self._know(token)
            committed = offsets()
            if not await self._commit_while_assigned(consumer, token, committed):
                return False
            self._done.update(committed)
            return True

    async def _commit_while_assigned(
        self, consumer: AIOKafkaConsumer, assignment: Any, offsets: Mapping[TP, int]
    ) -> bool:
        """Commit, as long as it takes; aiokafka tries for ever, but must not go on under the next assignment."""
        if not offsets:
            return True
        committing = asyncio.ensure_future(
            consumer.commit({tp: OffsetAndMetadata(offset, "") for tp, offset in offsets.items()})
        )
        try:
            await asyncio.wait({committing, assignment.unassign_future}, return_when=asyncio.FIRST_COMPLETED)
            if not committing.done():
                return False
            committing.result()
        except (CommitFailedError, IllegalStateError):
            return False
        finally:
            committing.cancel()
        return True

    def _tails(self, assignment: Any) -> dict[TP, int]:
        """Return the positions of partitions that moved on after everything that was handed out was done."""
        tails = {}
        for tp in assignment.tps:
            state, handed, done = assignment.state_value(tp), self._handed.get(tp), self._done.get(tp, -1)
            if state.has_valid_position and state.position > done and (handed is None or handed <= done):
                tails[tp] = state.position
        return tails

    async def report(self) -> Report:
        """Return the state of the thread."""
        consumer = self._ensure_consumer()
        coordinator, fetcher = consumer._coordinator, consumer._fetcher
        assignment = self.current()
        report = Report(
            coordinator_known=coordinator.coordinator_id is not None,
            token=assignment,
            subscription=frozenset(consumer.subscription()),
        )
        if coordinator._coordination_task.done():
            report.dead = "coordination task"
        elif fetcher._fetch_task.done():
            report.dead = "fetch task"
        if assignment is not None and assignment is self.leased:
            self._know(assignment)
            report.lag = self._lag(assignment)
        return report

    def _lag(self, assignment: Any) -> dict[TP, int]:
        lag = {}
        for tp in assignment.tps:
            state = assignment.state_value(tp)
            if state.highwater is not None and state.has_valid_position:
                lag[tp] = max(0, state.highwater - self._done.get(tp, state.position))
        return lag


class Consumer(driver.Consumer):
    """Faust's consumer, handing over chunks."""

    mundane_level = "debug"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._resumed = asyncio.Event()

    def _new_consumer_thread(self) -> ConsumerThread:
        return ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    async def perform_seek(self) -> None:
        """Do nothing: an assignment begins at the committed offsets, and nothing was fetched under it before."""

    def verify_event_path(self, now: float, tp: FaustTP) -> None:
        """Do nothing: Faust's own watch reads state of the other thread and only warns; see `Watch`."""

    def on_buffer_drop(self, tp: FaustTP) -> None:
        """Fetch a partition again."""
        super().on_buffer_drop(tp)
        self._resumed.set()

    def forget_pauses(self) -> None:
        """Begin an assignment without paused partitions."""
        self._buffered_partitions.clear()
        self._resumed.set()

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[FaustTP, Any]]:  # noqa: ASYNC109
        """Hand over what was fetched, one message per partition, whose value is the chunk; yield nothing.

        Faust's loop makes two tasks of each message that is yielded, and waits for them; and it would drop what is read
        again after a seek.
        """
        chunks = await self._next_chunks(min(timeout, POLL_SECONDS))
        if chunks:
            await self.wait_first(self._hand_over(chunks), self.suspend_flow.wait())
        if len(chunks) > CHUNKS_AT_ONCE:
            # The broker gets the time to collect more for each.
            await asyncio.sleep(len(chunks) * CHUNK_SECONDS)
        nothing: tuple[FaustTP, Any]
        for nothing in ():
            yield nothing

    async def _hand_over(self, chunks: Mapping[FaustTP, Chunk]) -> None:
        for tp, chunk in chunks.items():
            last = chunk.records[-1]
            message: Any = partial(ConsumerMessage, tp=tp, generation_id=self.app.consumer_generation_id)
            # Offset, time and its type, headers, key, value, checksum and two sizes; only the value is looked at.
            await self.callback(
                message(*tp, last.offset, last.timestamp / 1000, last.timestamp_type, [], None, chunk, None, 0, 0)
            )

    async def _next_chunks(self, timeout: float) -> Mapping[FaustTP, Chunk]:  # noqa: ASYNC109
        if not self.flow_active:
            await self.wait(cast(Any, self.can_resume_flow))
        self._resumed.clear()
        # A copy: the thread reads it while this one changes the original.
        active = set(self._get_active_partitions())
        if self.should_stop:
            return {}
        if not active:
            # All are paused, and an empty set would mean all of them.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._resumed.wait()
            return {}
        chunks = cast(Mapping[FaustTP, Chunk], await self._getmany(active_partitions=active, timeout=timeout))
        return {} if self.should_stop else chunks


class QuickConductor(Conductor):
    """Faust's conductor, which waits 45 seconds for further additions before it subscribes."""

    _resubscribe_sleep_lock_seconds = RESUBSCRIBE_SECONDS


class Transport(driver.Transport):
    """Faust's transport, made of the parts above."""

    Consumer = Consumer
    Conductor = QuickConductor


class RawSchema(faust.Schema[Any, Any]):
    """Nothing is decoded: the value is a chunk."""

    def compile(self, app: Any, **_: Any) -> Callable[..., Awaitable[Any]]:
        """Return the function that makes an event of a message."""

        async def decode(message: ConsumerMessage, *, propagate: bool = False) -> Any:  # noqa: ARG001
            return app.create_event(message.key, message.value, message.headers, message)

        return decode


class BootStrategy(base.BootStrategy):
    """Everything but Faust's producer: it is not idempotent, and ours is used."""

    enable_kafka_producer = False


class BaseApp(faust.App):
    """A Faust app on the transport above, with hooks in place of signals that come at the wrong moment.

    A subclass overrides `open_lease`, `close_lease` and `lose_lease`.
    """

    BootStrategy = BootStrategy
    mundane_level = "debug"

    def __init__(self, settings: WorkerSettings, **options: Any) -> None:
        self.settings = settings
        servers = settings.kafka_bootstrap_servers.split(",")
        super().__init__(
            settings.group,
            broker=";".join(f"kafka://{server.strip()}" for server in servers),
            web_bind=settings.web_bind,
            web_port=settings.web_port,
            web_router_enabled=False,
            web_tables_enabled=False,
            web_stats_enabled=False,
            web_graph_enabled=False,
            web_metrics_enabled=False,
            table_standby_replicas=0,
            topic_disable_leader=True,
            topic_allow_declare=False,
            broker_session_timeout=settings.session_timeout,
            broker_request_timeout=max(40, settings.session_timeout + 10),
            broker_rebalance_timeout=settings.rebalance_timeout,
            # Counts chunks. A lane takes them at once, so that Faust's own back-pressure never sets in.
            stream_buffer_maxsize=4096,
            stream_wait_empty=False,
            stream_recovery_delay=0.0,
            worker_redirect_stdouts=False,
            **options,
        )
        self.on_partitions_revoked.connect(self._revoked)

    def _create_directories(self) -> None:
        """Make none: they are for tables, which are not used."""

    def _new_transport(self) -> Transport:
        return Transport(self.conf.broker_consumer, self)

    @property
    def thread(self) -> ConsumerThread | None:
        """The consumer's thread, None before it exists."""
        consumer = self._consumer
        return None if consumer is None else cast(ConsumerThread, cast(Consumer, consumer)._thread)

    def open_lease(self, generation: int, partitions: set[TP], token: object) -> None:
        """Begin to work on an assignment."""

    async def close_lease(self) -> None:
        """Let go of the assignment; the rebalance waits for it."""

    def lose_lease(self) -> None:
        """Begin nothing more: the assignment is gone while the process stops."""

    async def _revoked(self, *_: Any, **__: Any) -> None:
        if thread := self.thread:
            thread.leased = None
        try:
            await self.close_lease()
        except Exception as error:
            die("a revocation failed", error)

    def on_rebalance_end(self) -> None:
        """Open the lease: here, after Faust has emptied its queues for the last time, and not at the assignment."""
        super().on_rebalance_end()
        thread = self.thread
        token = None if thread is None else thread.current()
        if thread is None or token is None or self.should_stop:
            # The next rebalance has begun.
            return
        try:
            cast(Consumer, self.consumer).forget_pauses()
            self.open_lease(self.consumer_generation_id, set(token.tps), token)
            thread.share_fetches(len(token.tps))
        except Exception as error:
            die("an assignment failed", error)
        thread.leased = token

    def _on_rebalance_when_stopped(self) -> None:
        super()._on_rebalance_when_stopped()
        self.lose_lease()

    async def feed_lane(self, lane: Lane) -> None:
        """Make the Faust agent that hands a merchant's chunks to its lane; start it if the app runs already."""
        topic = self.topic(
            *sorted(lane.topics),
            schema=RawSchema(key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw"),
            acks=False,
        )

        async def agent(stream: Any) -> None:
            async for event in stream.events():
                try:
                    lane.accept(event.value)
                except Exception as error:
                    # An exception that leaves an agent skips the event.
                    die("a chunk could not be queued", error, merchant=lane.merchant)

        made = self.agent(topic, name=f"credits-{lane.merchant}", concurrency=1)(agent)
        cast(AgentManager, self.agents).update_topic_index()
        if self.agents.started:
            await self.agents.add_runtime_dependency(made)

    def subscribe_again(self) -> None:
        """Have Faust look for topics it does not subscribe to yet; it forgets additions made during a rebalance."""
        cast(Conductor, self.topics)._flag_changes()


class ConsumerFeed:
    """Faust's consumer as the lanes see it."""

    def __init__(self, app: BaseApp) -> None:
        self._app = app

    def pause(self, tp: TP) -> None:
        """See Feed.pause."""
        self._app.consumer.on_buffer_full(FaustTP(*tp))

    def resume(self, tps: Iterable[TP]) -> None:
        """See Feed.resume."""
        for tp in tps:
            self._app.consumer.on_buffer_drop(FaustTP(*tp))

    async def seek(self, lease: Lease, positions: Mapping[TP, tuple[int, int]]) -> None:
        """See Feed.seek."""
        if thread := self._app.thread:
            with contextlib.suppress(TransportEndedError, IllegalStateError):
                await thread.seek_leased(lease, positions)

    async def commit(self, lease: Lease, offsets: Mapping[TP, int]) -> bool:
        """See Feed.commit."""
        thread = self._app.thread
        if thread is None:
            return False
        try:
            return await thread.commit_leased(lease, offsets)
        except TransportEndedError:
            return False
        except KafkaError as error:
            log.warning("offsets could not be committed", error=repr(error))
            return False


class Watch:
    """Looks after the consumer once a second, and ends the process if it can't recover.

    Attributes:
        report: the last one.
    """

    def __init__(self, app: BaseApp, lease: Callable[[], Lease | None], topics: Callable[[], set[str]]) -> None:
        self.report = Report()
        self._app = app
        self._lease = lease
        self._topics = topics
        self._unanswered = 0
        self._stuck = 0
        self._flag_pause = 0

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await asyncio.sleep(1.0)
            thread = self._app.thread
            if thread is None or thread._consumer is None or self._app.should_stop:
                continue
            await self._look(thread)

    async def _look(self, thread: ConsumerThread) -> None:
        try:
            self.report = await thread.call(thread.report(), limit=10.0)
            self._unanswered = 0
        except (TransportEndedError, TimeoutError):
            self._unanswered += 1
        if self._app.should_stop:
            return
        if self.report.dead:
            die("the consumer is dead", part=self.report.dead)
        if self._unanswered >= 3:
            die("the consumer's thread does not answer")
        self._watch_for_standstill()
        self._reconcile()
        lease = self._lease()
        if lease is not None and lease.alive() and self.report.coordinator_known:
            # While the broker is away this takes its time; the next look tries again.
            with contextlib.suppress(TransportEndedError, TimeoutError, KafkaError):
                await thread.commit_tails(lease, limit=5.0)

    def _watch_for_standstill(self) -> None:
        lease = self._lease()
        works = lease is not None and lease.token is self.report.token
        self._stuck = 0 if works or not self.report.coordinator_known else self._stuck + 1
        if self._stuck > STUCK_SECONDS:
            die("no assignment though the coordinator is known", seconds=self._stuck)

    def _reconcile(self) -> None:
        self._flag_pause = max(0, self._flag_pause - 1)
        missing = self._topics() - self.report.subscription
        # A flag while a subscription is under way costs a rebalance more.
        if missing and self.report.subscription and not self._app.rebalancing and not self._flag_pause:
            self._app.subscribe_again()
            self._flag_pause = int(FLAG_SECONDS)


class Worker(faust.Worker):
    """Runs the app and ends with it; logging is ours, and the end does not wait for a broker that is away."""

    def __init__(self, app: BaseApp, *, on_signal: Callable[[], None], **options: Any) -> None:
        super().__init__(app, override_logging=False, quiet=True, redirect_stdouts=False, loglevel="info", **options)
        # It would write to stdout and change the levels of the log.
        self.spinner = None
        self._on_signal = on_signal

    def _schedule_shutdown(self, signal: Any) -> None:
        self._on_signal()
        super()._schedule_shutdown(signal)

    def _setproctitle(self, info: str, *, ident: str = "") -> None:
        """Leave the title alone: processes are known again by their command line."""
