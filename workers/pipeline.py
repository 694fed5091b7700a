"""From records to results: decode, apply in one transaction, publish, and only then hand offsets on (spec §9).

Three kinds of failure. A refusal is an answer. Trouble (a lost connection, a deadlock, a race on a key, the broker
away) is nobody's fault: the same batch again, for as long as this worker owns it. A defect of ours is isolated: the
one command is answered ``internal_error``, the rest goes on. If no command is at fault, its merchant waits.
"""

import asyncio
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from hashlib import sha256
from typing import Any

import asyncpg
import structlog
from aiokafka import TopicPartition as TP
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine

import merchants.schema
import merchants.store
from ledger.model import LotsNeeded
from ledger.store import LOTS_AT_FIRST
from merchants.databases import Pools
from merchants.registry import Merchant
from schemas.envelope import DecodeContext, Incoming, Undeliverable, decode
from schemas.errors import Code
from schemas.payloads import MerchantConfig
from schemas.topics import parse_input
from workers import outgoing, positions
from workers.decide import PoisonError
from workers.faults import planted, point
from workers.inbox import Position
from workers.lanes import Lease, Outcome, Record
from workers.logs import die
from workers.positions import REFUSED_WAIT_SECONDS, Claim, LostOwnershipError, Standoff
from workers.publisher import LeaseEndedError, OutMessage, Publisher, PublishTimeoutError
from workers.transaction import (
    Applied,
    Batch,
    Context,
    Message,
    Plan,
    RacedError,
    StaleContextError,
    SuspendedError,
    next_offsets,
    plan,
)

log = structlog.get_logger(__name__)

RETRY_FIRST_SECONDS = 0.05
RETRY_MAX_SECONDS = 5.0
# Less than a transaction may idle.
BEHIND_SECONDS_MAX = 1.0
# A race on a key is settled when the batch is run again; the same violation so often is a defect.
RACES_MAX = 8

DATABASE_IS_LOST = "3D000"
# Trouble of the database by SQLSTATE class or code: connection, role or database lost, resources, operator,
# serialization, locks.
_TROUBLE = ("08", "28", DATABASE_IS_LOST, "53", "57", "58", "40", "55", "25P03", "25P04", "XX")
_RACE = ("23505", "23P01")
# A migration changed what a statement was prepared for.
_OUTDATED = (asyncpg.InvalidCachedStatementError, asyncpg.OutdatedSchemaCacheError)


class DefectError(Exception):
    """A batch cannot be applied for a reason that running it again will not mend."""


class CutError(Exception):
    """A batch has to end with the record before a place in it: what follows is to be read anew."""

    def __init__(self, at: int) -> None:
        super().__init__(at)
        self.at = at


class BehindError(Exception):
    """The batch before is not published yet, so that this one must not be committed."""


@dataclass
class Desk:
    """What a worker remembers of one merchant."""

    merchant: Merchant
    context: Context
    published: dict[TP, int] = field(default_factory=dict)
    noted: dict[TP, int] = field(default_factory=dict)
    known_gaps: set[tuple[TP, int, int]] = field(default_factory=set)
    suspects: set[Position] = field(default_factory=set)  # commands that could not be decided once
    standoff: Standoff = field(default_factory=Standoff)
    publishing: asyncio.Task[bool] | None = None  # of the last batch that was committed


def sqlstate(error: BaseException) -> str:
    return str(getattr(getattr(error, "orig", error), "sqlstate", None) or "")


def is_trouble(error: BaseException) -> bool:
    """Tell whether an exception is the surroundings' fault, so that the same batch may work the next time.

    Most statements go around SQLAlchemy, so that the driver's errors come as they are, and wrapped from the others.
    """
    if isinstance(error, _OUTDATED):
        return True
    if isinstance(error, (DBAPIError, asyncpg.PostgresError)):
        state = sqlstate(error)
        return not state or state.startswith(_TROUBLE) or getattr(error, "connection_invalidated", False)
    if isinstance(error, asyncpg.InterfaceError):
        # One that is a ValueError, too, complains about what we gave it.
        return not isinstance(error, ValueError)
    return isinstance(error, (OSError, TimeoutError, PoolTimeoutError))


def is_race(error: BaseException) -> bool:
    return isinstance(error, (DBAPIError, asyncpg.PostgresError)) and sqlstate(error) in _RACE


class Pipeline:
    """The handler of merchants' lanes.

    Args:
        publisher: of all that the merchants' batches put out.
        pools: of writers, for batches.
        quiet: of fewer writers, for merchants without batches.
        resource_amount_max: the most that one operation may have used.
    """

    def __init__(self, publisher: Publisher, pools: Pools, quiet: Pools, *, resource_amount_max: Decimal) -> None:
        self._publisher = publisher
        self._pools = pools
        self._quiet = quiet
        self._resource_amount_max = resource_amount_max
        self._merchants: dict[str, Merchant] = {}
        self._desks: dict[str, Desk] = {}
        self._replies: set[asyncio.Task[Any]] = set()
        self.observers: list[Any] = []

    def know(self, merchant: Merchant) -> None:
        """Take note of a merchant of the registry, before its lane gets records."""
        self._merchants[merchant.merchant_id] = merchant

    async def process(self, merchant: str, records: list[Record], lease: Lease) -> Outcome:
        """See ``workers.lanes.Handler``."""
        desk = await self._desk(merchant, lease)
        if desk is None:
            return Outcome()
        try:
            parts = await self._apply_all(desk, records, lease, frozenset())
        except LostOwnershipError as lost:
            log.warning("a batch is dropped", merchant=merchant, reason=str(lost))
            desk.standoff.begin(lease, asyncio.get_running_loop().time())
            return await self._read_again(records, lease, desk)
        except SuspendedError:
            # The lane is held as soon as the registry is read again.
            return await self._read_again(records, lease, desk)
        except (DefectError, PoisonError):
            # No command is at fault, but what this merchant's are decided by. Others go on.
            log.exception("a merchant stands still", merchant=merchant)
            return await self._read_again(records, lease, desk)
        desk.standoff.end()
        outcome = Outcome(published=desk.publishing)
        for applied in parts:
            outcome.commit |= applied.next_offsets
            outcome.seek |= applied.seek
        return outcome

    async def _read_again(self, records: Sequence[Record], lease: Lease, desk: Desk) -> Outcome:
        """Drop a batch, and have it read again in a second if the partitions are ours still.

        A worker that woke from a freeze has another owner's partitions; its lease ends within a heartbeat. One that was
        given the partitions meanwhile tries again, and takes them back from an owner that does not go away.
        """
        waited = 0.0
        while lease.alive() and waited < REFUSED_WAIT_SECONDS:
            await asyncio.sleep(0.1)
            waited += 0.1
        starts: dict[TP, int] = {}
        for record in records:
            starts.setdefault(TP(record.topic, record.partition), record.offset)
        if not lease.alive():
            return Outcome(published=desk.publishing)
        lease.first |= starts.keys()
        return Outcome(seek=starts, published=desk.publishing)

    async def idle(self, merchant: str, partitions: set[TP], lease: Lease) -> None:
        """Claim partitions that had no record yet, and note what was published, so that no restart repeats it."""
        unclaimed = partitions & lease.first if lease.alive() else set()
        known = self._merchants[merchant]
        desk = self._desks.get(merchant)
        done = desk.published if desk is not None else {}
        noted = desk.noted if desk is not None else {}
        news = {tp: offset for tp, offset in done.items() if tp in partitions and noted.get(tp) != offset}
        if not (unclaimed or news):
            return
        try:
            # The first assignment of a worker names merchants by the hundred.
            pools = self._pools if self._pools.has(merchant) else self._quiet
            engine = await self._engine(known, pools)
            async with engine.begin() as connection:
                if unclaimed:
                    await positions.take_over(connection, unclaimed, Claim(lease.worker_id, lease.generation))
                await positions.note_published(connection, news, lease.worker_id)
        except LostOwnershipError as lost:
            log.warning("idle partitions are not claimed", merchant=merchant, reason=str(lost))
            return
        except Exception as error:
            # The next batch does both; until then a restart would repeat results that are out already.
            log.warning("positions are not noted", merchant=merchant, error=repr(error)[:500])
            return
        lease.first -= unclaimed
        noted |= news

    async def _engine(self, merchant: Merchant, pools: Pools | None = None) -> AsyncEngine:
        pools = pools or self._pools
        return await pools.engine(merchant.merchant_id, merchant.database_url, merchant.password)

    async def _desk(self, merchant_id: str, lease: Lease) -> Desk | None:
        """Return what is remembered of a merchant, read now if this is its first batch; None if the lease ended."""
        desk = self._desks.get(merchant_id)
        if desk is not None:
            return desk
        merchant = self._merchants[merchant_id]
        backoff = Backoff(merchant_id, lease)
        while True:
            try:
                engine = await self._engine(merchant)
                async with engine.connect() as connection:
                    await merchants.schema.check_merchant(connection)
                    state = await merchants.store.read_state(connection)
                    config = await merchants.store.read_config(connection, state.config_version)
                break
            except Exception as error:
                # Whatever it is, also a schema that is not ours yet: other merchants are served meanwhile.
                if not await backoff.wait(error):
                    return None
        context = Context(merchant_id, merchant.secret, merchant.simulated, state.config_version, config)
        desk = self._desks[merchant_id] = Desk(merchant, context)
        return desk

    # A batch

    async def _apply_all(
        self, desk: Desk, records: Sequence[Record], lease: Lease, condemned: frozenset[Position]
    ) -> list[Applied]:
        """Apply and publish records; a command that changes how others are read is the last one of its transaction."""
        parts: list[Applied] = []
        while True:
            try:
                return parts + await self._apply_or_split(desk, records, lease, condemned)
            except CutError as cut:
                before, records = await self._apply_first(cut.at, desk, records, lease, condemned)
                parts += before
                if not records:
                    return parts

    async def _apply_first(
        self, at: int, desk: Desk, records: Sequence[Record], lease: Lease, condemned: frozenset[Position]
    ) -> tuple[list[Applied], Sequence[Record]]:
        """Apply and publish the records before a place in a batch; returns besides which ones are to follow."""
        parts = await self._apply_all(desk, records[:at], lease, condemned)
        if not parts or not lease.alive():
            return parts, []
        # What is read again comes with all that is behind it.
        sought = {tp for part in parts for tp in part.seek}
        lease.first -= {TP(record.topic, record.partition) for record in records[:at]} - sought
        return parts, [record for record in records[at:] if TP(record.topic, record.partition) not in sought]

    async def _apply_or_split(
        self, desk: Desk, records: Sequence[Record], lease: Lease, condemned: frozenset[Position]
    ) -> list[Applied]:
        """Apply and publish records; after a defect without the command at fault, or in halves until it is found."""
        try:
            applied = await self._apply(desk, records, lease, condemned)
        except PoisonError as poison:
            return await self._without(poison.position, poison, desk, records, lease, condemned)
        except DefectError as defect:
            log.exception("a batch cannot be applied", merchant=desk.merchant.merchant_id, records=len(records))
            if len(records) == 1:
                place = (records[0].topic, records[0].partition, records[0].offset)
                return await self._without(place, defect, desk, records, lease, condemned)
            middle = len(records) // 2
            before, rest = await self._apply_first(middle, desk, records, lease, condemned)
            return before + await self._apply_all(desk, rest, lease, condemned) if rest else before
        if applied is None:
            return []
        desk.publishing = asyncio.create_task(self._publish(desk, applied, lease), name="publish")
        return [applied]

    async def _without(
        self,
        place: Position,
        error: Exception,
        desk: Desk,
        records: Sequence[Record],
        lease: Lease,
        condemned: frozenset[Position],
    ) -> list[Applied]:
        """Apply records again after a defect: with the command at fault once more, then without it."""
        if place in condemned:
            raise error
        if place in desk.suspects:
            log.exception("a command cannot be decided", merchant=desk.merchant.merchant_id, position=place)
            return await self._apply_all(desk, records, lease, condemned | {place})
        # A race that nobody thought of does not repeat; a defect does.
        desk.suspects.add(place)
        log.exception("a command is tried again", merchant=desk.merchant.merchant_id, position=place)
        return await self._apply_all(desk, records, lease, condemned)

    async def _apply(
        self, desk: Desk, records: Sequence[Record], lease: Lease, condemned: frozenset[Position]
    ) -> Applied | None:
        """Apply records in one transaction, again until it is committed; None when they are not ours any more."""
        messages = self._decode(desk.context, records)
        await point("after_decode")
        lots_wanted: dict[int, int] = {}
        backoff = Backoff(desk.merchant.merchant_id, lease)
        races = 0
        while lease.alive():
            try:
                applied = await self._transaction(desk, messages, lease, lots_wanted, condemned)
                await point("after_commit")
                return applied
            except StaleContextError:
                messages = self._decode(desk.context, records)
            except BehindError:
                if desk.publishing is not None:
                    await asyncio.wait({desk.publishing})
            except RacedError as raced:
                if not await backoff.wait(raced):
                    return None
            except LotsNeeded as needed:
                lots_wanted[needed.account_id] = 8 * lots_wanted.get(needed.account_id, LOTS_AT_FIRST)
            except (PoisonError, LostOwnershipError, SuspendedError):
                raise
            except Exception as error:
                if is_race(error):
                    races += 1
                    if races > RACES_MAX:
                        raise DefectError from error
                elif not is_trouble(error):
                    raise DefectError from error
                if not await backoff.wait(error):
                    return None
        return None

    def _decode(self, context: Context, records: Sequence[Record]) -> list[Message]:
        """Decode records; raises CutError behind a command that changes what references those after it may have."""
        assert context.config is not None
        contexts: dict[str, DecodeContext] = {}
        messages: list[Message] = []
        for record in records:
            found = contexts.get(record.topic)
            if found is None:
                merchant_id, channel = parse_input(record.topic)
                found = contexts[record.topic] = DecodeContext(
                    merchant_id,
                    channel,
                    context.secret,
                    context.config.external_ref_patterns,
                    self._resource_amount_max,
                )
            message = decode_safely(record, found)
            if planted("no_inbox") and isinstance(message, Incoming):
                message.identity, message.business_key = os.urandom(16), None
            messages.append(message)
            if len(messages) < len(records) and _changes_references(message, context.config):
                raise CutError(len(messages))
        return messages

    async def _transaction(
        self,
        desk: Desk,
        messages: Sequence[Message],
        lease: Lease,
        lots_wanted: dict[int, int],
        condemned: frozenset[Position],
    ) -> Applied:
        engine = await self._engine(desk.merchant)
        async with engine.begin() as connection:
            await point("after_begin")
            todo: Plan = await plan(
                connection,
                messages,
                claim=desk.standoff.claim(lease, asyncio.get_running_loop().time()),
                first=lease.first,
                published=desk.published,
                known_gaps=desk.known_gaps,
            )
            await point("after_positions")
            batch = Batch(connection, desk.context, lots_wanted, condemned, partial(self._catch_up, desk, lease))
            try:
                applied = await batch.apply(todo)
            finally:
                desk.context = batch.context
            # No further than this batch goes: what comes after it may be applied, and not published yet.
            ends = next_offsets(messages)
            applied.next_offsets = {
                tp: max(row.published_next, min(row.applied_next, ends[tp]))
                for tp, row in todo.rows.items()
                if tp not in todo.seek
            }
            # Before the commit, so that a message that cannot be encoded is a command that cannot be decided.
            applied.messages = messages_of(desk.merchant.merchant_id, applied)
            await point("before_commit")
        desk.context = applied.context
        desk.known_gaps |= todo.gaps
        return applied

    async def _catch_up(self, desk: Desk, lease: Lease) -> Mapping[TP, int]:
        """Wait until the batch before is published: a crash shall find no two batches applied and not published.

        It goes out while this one is decided and saved. A transaction must not stay open for long, so that a broker
        that is away makes a BehindError.
        """
        if desk.publishing is not None:
            await asyncio.wait({desk.publishing}, timeout=BEHIND_SECONDS_MAX)
            if not desk.publishing.done() or not lease.alive():
                raise BehindError
        return desk.published

    async def _publish(self, desk: Desk, applied: Applied, lease: Lease) -> bool:
        """Publish what a committed batch put out; False when the lease ended before all of it was acknowledged."""
        try:
            return await self._publish_applied(desk, applied, lease)
        except Exception as error:
            # Nobody need be waiting for this task.
            die("publishing failed", error, merchant=desk.merchant.merchant_id)

    async def _publish_applied(self, desk: Desk, applied: Applied, lease: Lease) -> bool:
        merchant = desk.merchant.merchant_id
        while True:
            try:
                await self._publisher.publish(applied.messages, lease)
                break
            except LeaseEndedError:
                return False
            except PublishTimeoutError as error:
                log.warning("the broker does not answer", merchant=merchant, error=repr(error))
                if not lease.alive():
                    return False
        await point("after_publish")
        desk.published |= applied.next_offsets
        for observer in self.observers:
            observer(merchant, applied)
        for reply in outgoing.replies(merchant, applied.answers, applied.accounts):
            task = asyncio.create_task(self._publisher.publish_quietly(reply))
            self._replies.add(task)
            task.add_done_callback(self._replies.discard)
        return True


def _changes_references(message: Message, config: MerchantConfig) -> bool:
    if not isinstance(message, Incoming) or message.type != "Merchant.Configure" or message.payload is None:
        return False
    patterns: Mapping[str, str] = message.payload.config.external_ref_patterns
    return patterns != config.external_ref_patterns


def decode_safely(record: Record, context: DecodeContext) -> Message:
    """Decode a record. One that a defect of ours makes unreadable becomes a dead letter, and stops nothing else."""
    try:
        return decode(record, context)
    except Exception:
        log.exception("a message cannot be decoded", topic=record.topic, offset=record.offset)
        return Undeliverable(
            record.topic,
            record.partition,
            record.offset,
            datetime.fromtimestamp(record.timestamp / 1000, UTC),
            Code.INTERNAL_ERROR,
            "the message could not be decoded; the operators know",
            sha256(record.value or b"").digest(),
        )


def messages_of(merchant: str, applied: Applied) -> list[OutMessage]:
    """Make all that a batch publishes: results in order, documents, dead letters."""
    partitions = {answer.row.identity: answer.partition for answer in applied.answers}
    return [
        *outgoing.results(merchant, applied.answers, applied.accounts),
        *outgoing.stored_documents(merchant, applied.republished, partitions),
        *outgoing.issued_documents(merchant, applied.issued, applied.accounts, partitions),
        *outgoing.dead_letters(merchant, applied.letters),
    ]


class Backoff:
    """Waits between two tries of a batch, longer each time, with jitter, as long as the lease is alive."""

    def __init__(self, merchant: str, lease: Lease) -> None:
        self._merchant = merchant
        self._lease = lease
        self._seconds = RETRY_FIRST_SECONDS

    async def wait(self, error: BaseException) -> bool:
        """Wait; False when the lease ended meanwhile."""
        log.warning("trouble, the batch is tried again", merchant=self._merchant, error=repr(error)[:500])
        loop = asyncio.get_running_loop()
        until = loop.time() + self._seconds * random.uniform(0.5, 1.0)
        self._seconds = min(2 * self._seconds, RETRY_MAX_SECONDS)
        while self._lease.alive() and loop.time() < until:
            await asyncio.sleep(min(0.2, max(0.0, until - loop.time())))
        return self._lease.alive()
