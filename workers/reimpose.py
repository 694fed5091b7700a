"""Brings a restored database forward to what the lost one had published: the same outcomes, times, numbers and bytes.

A dump is older than the database it was taken of. The commands since are still in their topics; decided afresh they
could come out otherwise, at another time, with other receipt numbers. So what was published is imposed: commands are
grouped into the batches that decided them (all results of a batch carry its moment, `applied_at`), each batch is run
again by the same code while the database's clock stands still at that moment, and is kept only if every byte it puts
out was published already. Commands without a published result are left to the workers.
"""

import heapq
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from graphlib import TopologicalSorter
from itertools import pairwise, product
from operator import itemgetter
from typing import Any

from aiokafka import TopicPartition as TP
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

import merchants.store
from catalog.sql import fetch
from ledger.model import Account, LotsNeeded
from ledger.store import LOTS_AT_FIRST
from merchants.registry import Merchant
from receipts.model import Document
from schemas.canonical import compact_json, format_time
from schemas.codec import decode_result, parse_time
from schemas.envelope import DecodeContext, Incoming, decode
from schemas.errors import Code
from schemas.events import result_id
from schemas.topics import parse_input
from workers import outgoing
from workers.decide import Desk
from workers.documents import Issued
from workers.inbox import Position as Place
from workers.lanes import Record
from workers.positions import Position
from workers.transaction import Applied, Batch, Context, Message, Plan, StaleContextError, Wanted

OWNER = "restore"
SCHEMA = "credits_restore"
# Numbers by which document effects name what was issued.
_NUMBERS = ("receipt_number", "credit_note_number")

LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)

# The one clock of the service is the database's; found before the built-in one, this stands still where it is put.
_CLOCK = (
    f"CREATE SCHEMA {SCHEMA}",
    f"""
    CREATE FUNCTION {SCHEMA}.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE
    AS $$ SELECT current_setting('credits.now')::timestamptz $$
    """,
)
SEARCH_PATH = f"{SCHEMA}, pg_catalog, public"


class NotReproducedError(Exception):
    """What was published cannot be reproduced from the dump and the topics; the message says what differs first."""


class _DiffersError(Exception):
    """A batch put out other bytes than were published: it is not its turn yet, or it never will be."""


@dataclass(frozen=True, slots=True)
class Published:
    """A result as it is in its topic."""

    event_id: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes
    body: Mapping[str, Any]

    @classmethod
    def of(cls, record: Record) -> "Published":
        """Read a record of the results topic."""
        event_id = dict(record.headers)["ce_id"].decode()
        value = record.value or b""
        return cls(event_id, record.partition, record.offset, record.key, value, decode_result(value))

    @property
    def command(self) -> tuple[str, str]:
        """Return (source, id) of the command."""
        return self.body["command_source"], self.body["command_id"]

    @property
    def parked_at(self) -> datetime | None:
        """When the command was parked, if it then waited in vain: such a result tells."""
        error = self.body.get("error") or {}
        return parse_time(error["details"]["parked_at"]) if error.get("code") == Code.DEPENDENCY_TIMEOUT else None


@dataclass(slots=True)
class Delivery:
    """A command's record, the result that was published for it, and the moment it was decided."""

    record: Record
    identity: tuple[str, str] | None  # source and id
    result: Published | None = None
    at: datetime | None = None
    time: int = 0  # record time, never less than that of the record before it in its partition
    repeats: bool = False  # an outcome that came about before

    @property
    def place(self) -> Place:
        """Return topic, partition and offset."""
        return self.record.topic, self.record.partition, self.record.offset

    def told(self, name: str) -> Any:
        """Return a member of the result, None if there is none."""
        return None if self.result is None else self.result.body.get(name)


@dataclass
class History:
    """What the topics tell: the commands since the dump by partition, and what was published since.

    Attributes:
        offsets: (command's moment on the merchant's clock, offset of that clock), in order, of a simulated merchant.
    """

    commands: Mapping[TP, Sequence[Record]]
    results: Sequence[Published]
    documents: Mapping[str, Mapping[str, Any]]
    offsets: Sequence[tuple[datetime, timedelta]] = ()

    def offset_at(self, at: datetime) -> timedelta:
        """Return how far the merchant's clock was ahead of the database's at one of its moments."""
        return max((offset for since, offset in self.offsets if since <= at), default=timedelta(0))


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        commands: how many deliveries were imposed.
        batches: how many batches they were.
        documents: how many documents were issued again under their numbers.
        salts_lost: numbers of documents whose buyer block can't be checked any more.
        next_offsets: what the workers go on with, by partition.
    """

    commands: int = 0
    batches: int = 0
    documents: int = 0
    salts_lost: list[str] = field(default_factory=list)
    next_offsets: dict[TP, int] = field(default_factory=dict)


@dataclass(kw_only=True)
class PinnedBatch(Batch):
    """A batch that sees the clock stand still, and later once more where its documents were issued."""

    documents_at: datetime | None

    async def _desk(self, wanted: Wanted, accounts: dict[int, Account]) -> Desk:
        desk = await super()._desk(wanted, accounts)
        if self.documents_at is not None:
            await _set_clock(self.connection, self.documents_at - desk.clock_offset)
        return desk


@dataclass
class Reimposition:
    """Runs a merchant's published history over a restored database.

    Args:
        engine: of the database, as its owner, with `SEARCH_PATH` as search path.
        merchant: whose it is.
        history: what the topics tell.
        resource_amount_max: as the workers had it.
        progress: is told (deliveries done, deliveries in all).
    """

    engine: AsyncEngine
    merchant: Merchant
    history: History
    resource_amount_max: Decimal
    progress: Callable[[int, int], None] = lambda _done, _all: None
    outcome: Outcome = field(default_factory=Outcome)
    _published: dict[str, list[Published]] = field(default_factory=lambda: defaultdict(list))
    _context: Context | None = None

    async def run(self) -> Outcome:
        """Impose everything.

        Raises:
            NotReproducedError: a batch did not come out as published; the database is of no use then.
        """
        for result in self.history.results:
            self._published[result.event_id].append(result)
        await self._prepare()
        deliveries = self._deliveries()
        pending = batches(deliveries)
        total = sum(map(len, pending))
        while pending:
            index = await self._first_that_fits(pending)
            done = pending.pop(index)
            self.outcome.commands += len(done)
            self.outcome.batches += 1
            self.progress(self.outcome.commands, total)
        await self._finish()
        return self.outcome

    async def _prepare(self) -> None:
        async with self.engine.begin() as connection:
            for statement in _CLOCK:
                await connection.exec_driver_sql(statement)
            # The dump may have been taken of a suspended merchant, whose batches are refused.
            await merchants.store.set_suspended(connection, False)
            await _set_clock(connection, LONG_AGO)
            state = await merchants.store.read_state(connection)
            config = await merchants.store.read_config(connection, state.config_version)
        merchant = self.merchant
        self._context = Context(merchant.merchant_id, merchant.secret, merchant.simulated, state.config_version, config)

    # What belongs together

    def _deliveries(self) -> list[Delivery]:
        """Match commands with results; what has none behind the last one that has is left to the workers."""
        by_command: dict[tuple[str, str], list[Published]] = defaultdict(list)
        for result in self.history.results:
            by_command[result.command].append(result)
        deliveries: list[Delivery] = []
        for tp, records in self.history.commands.items():
            found = [self._delivery(record, by_command) for record in records]
            last = max((index for index, item in enumerate(found) if item.result is not None), default=-1)
            latest = 0
            for item in found[: last + 1]:
                item.time = latest = max(latest, item.record.timestamp)
            deliveries += found[: last + 1]
            if last >= 0:
                self.outcome.next_offsets[tp] = found[last].record.offset + 1
        date(deliveries)
        return deliveries

    def _delivery(self, record: Record, by_command: Mapping[tuple[str, str], list[Published]]) -> Delivery:
        message = self._decode(record)
        if not isinstance(message, Incoming):
            return Delivery(record, None)
        delivery = Delivery(record, (message.source, message.id))
        prints = (message.fingerprint.hex(), message.value_sha256.hex())
        ids = {result_id(self.merchant.merchant_id, message.source, message.id, text) for text in prints}
        candidates = by_command.get((message.source, message.id), [])
        # The configuration decides what can be read, and may have been another one: then the identity must do.
        fitting = [r for r in candidates if r.event_id in ids] or candidates
        if fitting:
            # Each delivery was answered once; copies that a crash left over are never looked for.
            delivery.result = fitting[0]
            if len(fitting) > 1:
                candidates.remove(fitting[0])
        return delivery

    def _decode(self, record: Record) -> Message:
        assert self._context is not None
        assert self._context.config is not None
        merchant_id, channel = parse_input(record.topic)
        patterns = self._context.config.external_ref_patterns
        context = DecodeContext(merchant_id, channel, self.merchant.secret, patterns, self.resource_amount_max)
        return decode(record, context)

    # One batch

    async def _first_that_fits(self, pending: Sequence[Sequence[Delivery]]) -> int:
        """Impose the first batch that comes out as published; batches of two workers may have overtaken each other."""
        reasons = []
        for index, batch in enumerate(pending):
            try:
                await self._impose(batch)
                return index
            except _DiffersError as reason:
                reasons.append(str(reason))
        raise NotReproducedError(reasons[0])

    async def _impose(self, batch: Sequence[Delivery]) -> None:
        lots_wanted: dict[int, int] = {}
        while True:
            assert self._context is not None
            messages = [self._decode(item.record) for item in batch]
            async with self.engine.connect() as connection, connection.begin() as transaction:
                pinned = await self._batch(connection, batch, lots_wanted)
                rows = {TP(*item.place[:2]): Position(OWNER, 0, 0, 0) for item in batch}
                try:
                    applied = await pinned.apply(Plan(rows, fresh=messages))
                    await self._compare(connection, batch, applied)
                except StaleContextError:
                    await transaction.rollback()
                    self._context = pinned.context
                    continue
                except LotsNeeded as needed:
                    await transaction.rollback()
                    lots_wanted[needed.account_id] = 8 * lots_wanted.get(needed.account_id, LOTS_AT_FIRST)
                    continue
            self._context = applied.context
            self.outcome.documents += len(applied.issued)
            return

    async def _batch(
        self, connection: AsyncConnection, batch: Sequence[Delivery], lots_wanted: Mapping[int, int]
    ) -> PinnedBatch:
        assert self._context is not None
        at = batch[0].at
        assert at is not None
        offset = self.history.offset_at(at)
        if self.merchant.simulated:
            await connection.exec_driver_sql("UPDATE merchant_state SET clock_offset = $1", (offset,))
        await _set_clock(connection, at - offset)
        condemned = {item.place for item in batch if item.result and _code(item.result) == Code.INTERNAL_ERROR}
        issued = [parse_time(document["issued_at"]) for document in self._documents_of(batch)]
        return PinnedBatch(
            connection, self._context, lots_wanted, frozenset(condemned), documents_at=min(issued, default=None)
        )

    def _documents_of(self, batch: Sequence[Delivery]) -> Iterable[Mapping[str, Any]]:
        """Find the documents that a batch issued: by number where a result names it, corrections by their dispute."""
        documents = self.history.documents
        for item in batch:
            if item.result is None or item.repeats:
                continue
            effects = item.result.body.get("effects") or {}
            yield from (documents[effects[name]] for name in _NUMBERS if effects.get(name) in documents)
            if item.result.body["command_type"] == "Chargeback.Reverse" and effects:
                message = self._decode(item.record)
                dispute = message.payload.dispute_id if isinstance(message, Incoming) and message.payload else None
                yield from (d for d in documents.values() if d["kind"] == "correction" and d["dispute_id"] == dispute)

    async def _compare(self, connection: AsyncConnection, batch: Sequence[Delivery], applied: Applied) -> None:
        """Make sure that a batch put out nothing but what was published."""
        unanswered = {item.identity for item in batch if item.result is None}
        for answer in applied.answers:
            message = outgoing.results(self.merchant.merchant_id, [answer], applied.accounts)[0]
            published = self._published.get(dict(message.headers)["ce_id"].decode(), [])
            if not published and (answer.source, answer.id) in unanswered:
                raise _DiffersError(f"{answer.row.type} {answer.id} has a result, and none was published")
            if published and all((p.key, p.value) != (message.key, message.value) for p in published):
                raise _DiffersError(_difference(answer.row.type, published[0].value, message.value or b""))
        answered = {(answer.source, answer.id) for answer in applied.answers}
        for item in batch:
            waits = item.result is None or item.result.parked_at is not None
            if item.identity is not None and not waits and item.identity not in answered:
                raise _DiffersError(f"{item.identity[1]} has no result, and one was published")
        await self._compare_documents(connection, applied.issued)

    async def _compare_documents(self, connection: AsyncConnection, issued: Sequence[Issued]) -> None:
        """Compare documents; a digest of a buyer made with a lost salt is written as it was published."""
        to_mend = []
        for item in issued:
            document = item.document
            published = self.history.documents.get(document.number)
            if published is None or published["kind"] != document.kind:
                raise _DiffersError(f"{document.kind} {document.number} was not published")
            body = compact_json({n: m for n, m in published.items() if n not in ("user_id", "buyer", "hash")}).decode()
            if body != document.body:
                made, sealed = _digest_of(document.body), published.get("buyer_digest")
                if made is None or sealed is None or document.body.replace(made, sealed) != body:
                    raise _DiffersError(_difference(document.number, body.encode(), document.body.encode()))
            to_mend.append((document, body, bytes.fromhex(published["hash"])))
        if any((d.body, d.hash) != (body, digest) for d, body, digest in to_mend):
            await _mend(connection, to_mend)

    # The end

    async def _finish(self) -> None:
        """Note how far the database is now, let go of the clock, and make workers forget what they remember of it."""
        offset = max((offset for _, offset in self.history.offsets), default=timedelta(0))
        async with self.engine.begin() as connection:
            for tp, next_offset in sorted(self.outcome.next_offsets.items()):
                await connection.exec_driver_sql(
                    """
                    INSERT INTO positions (topic, partition, owner, generation, applied_next, published_next)
                    VALUES ($1, $2, $3, 0, $4, $4) ON CONFLICT (topic, partition) DO UPDATE SET
                        applied_next = excluded.applied_next, published_next = excluded.published_next
                    """,
                    (tp.topic, tp.partition, OWNER, next_offset),
                )
            await connection.exec_driver_sql("UPDATE positions SET owner = $1, generation = 0", (OWNER,))
            await connection.exec_driver_sql(
                "UPDATE merchant_state SET suspended = true, catalog_version = catalog_version + 1000, "
                "clock_offset = greatest(clock_offset, $1::interval)",
                (offset,),
            )
            lost = await fetch(connection, "SELECT number FROM buyers WHERE salt = '' ORDER BY number")
            self.outcome.salts_lost = [row[0] for row in lost]
            await connection.exec_driver_sql(f"DROP SCHEMA {SCHEMA} CASCADE")


async def _set_clock(connection: AsyncConnection, at: datetime) -> None:
    await fetch(connection, "SELECT set_config('credits.now', $1, true)", format_time(at))


def _code(result: Published) -> str | None:
    code: str | None = (result.body.get("error") or {}).get("code")
    return code


def _difference(what: str, published: bytes, made: bytes) -> str:
    """Say where two texts part, without quoting more of them than is needed to find it."""
    at = next((i for i, (a, b) in enumerate(zip(published, made, strict=False)) if a != b), 0)
    near = slice(max(0, at - 40), at + 40)
    return (
        f"{what}: published …{published[near].decode(errors='replace')}…, made …{made[near].decode(errors='replace')}…"
    )


def _digest_of(body: str) -> str | None:
    digest: str | None = json.loads(body).get("buyer_digest")
    return digest


async def _mend(connection: AsyncConnection, documents: Sequence[tuple[Document, str, bytes]]) -> None:
    """Write bodies and hashes as they were published, in spite of the triggers that keep documents as they are."""
    await connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
    for document, body, digest in documents:
        values = (document.number, body, digest)
        await connection.exec_driver_sql("UPDATE documents SET body = $2, hash = $3 WHERE number = $1", values)
        await connection.exec_driver_sql(
            "UPDATE document_series SET head = $2 WHERE prefix = $1", (document.prefix, digest)
        )
        if body != document.body:
            await connection.exec_driver_sql("UPDATE buyers SET salt = '' WHERE number = $1", (document.number,))
    await connection.exec_driver_sql("SET LOCAL session_replication_role = origin")


# The order of things


def date(deliveries: Sequence[Delivery]) -> None:
    """Find out when each delivery was decided: its result tells, unless it repeats an older one.

    Repetitions, and commands that still wait, came with what was decided before them in their partition.
    """
    told = [(item.result.partition, item.result.offset, item) for item in deliveries if item.result is not None]
    running: dict[int, datetime] = {}
    seen: set[str] = set()
    for partition, _, item in sorted(told, key=itemgetter(0, 1)):
        assert item.result is not None
        at = parse_time(item.result.body["applied_at"])
        item.repeats = item.result.event_id in seen or "replay_of" in item.result.body
        seen.add(item.result.event_id)
        if item.result.parked_at is not None:
            item.at = item.result.parked_at
            continue
        item.at = running.get(partition, at) if item.repeats else at
        running[partition] = max(at, running.get(partition, at))
    first = min((item.at for item in deliveries if item.at is not None), default=None)
    latest: dict[TP, datetime | None] = {}
    for item in deliveries:
        tp = TP(*item.place[:2])
        item.at = latest[tp] = item.at or latest.get(tp, first)


def batches(deliveries: Sequence[Delivery]) -> list[list[Delivery]]:
    """Group deliveries by the moment they were decided, the groups in order of time, each in the order of decision."""
    groups: dict[datetime, list[Delivery]] = defaultdict(list)
    for item in deliveries:
        assert item.at is not None
        groups[item.at].append(item)
    return [in_order(groups[at]) for at in sorted(groups)]


def in_order(batch: Sequence[Delivery]) -> list[Delivery]:
    """Put a batch into the order in which it was decided, as far as its results show it; else by record time."""
    sorter: TopologicalSorter[int] = TopologicalSorter(dict.fromkeys(range(len(batch)), ()))
    for before, after in _precedences(batch):
        sorter.add(after, before)
    sorter.prepare()
    ready: list[tuple[int, Place, int]] = []
    ordered = []
    while sorter.is_active():
        for index in sorter.get_ready():
            heapq.heappush(ready, (batch[index].time, batch[index].place, index))
        _, _, index = heapq.heappop(ready)
        ordered.append(batch[index])
        sorter.done(index)
    return ordered


def _precedences(batch: Sequence[Delivery]) -> Iterator[tuple[int, int]]:
    """Yield pairs of which the first was decided before the second."""
    chains: dict[tuple[str, Any], list[tuple[Any, int]]] = defaultdict(list)
    by_identity: dict[tuple[str, str], int] = {}
    for index, item in enumerate(batch):
        if item.identity is not None:
            by_identity.setdefault(item.identity, index)
        if item.result is None:
            continue
        # Answers are published in the order of decision, a partition's into one partition.
        chains["partition", item.result.partition].append((item.result.offset, index))
        if item.repeats:
            continue
        for name in _NUMBERS:
            number = (item.told("effects") or {}).get(name)
            if number is not None:
                series, _, sequence = number.rpartition("-")
                chains["series", series].append((int(sequence), index))
        if item.told("user_seq") is not None:
            chains["user", item.told("user_id")].append((item.told("user_seq"), index))
    for chain in chains.values():
        levels: dict[Any, list[int]] = defaultdict(list)
        for value, index in chain:
            levels[value].append(index)
        for low, high in pairwise(sorted(levels)):
            yield from product(levels[low], levels[high])
    yield from _references(batch, by_identity)


def _references(batch: Sequence[Delivery], by_identity: Mapping[tuple[str, str], int]) -> Iterator[tuple[int, int]]:
    """Yield (original, repetition or conflict), and for what has no result the delivery before it in its topic."""
    for index, item in enumerate(batch):
        named = item.told("replay_of") or ((item.told("error") or {}).get("details") or {}).get("first")
        if named:
            original = by_identity.get((named["command_source"], named["command_id"]))
            if original is not None and original != index:
                yield original, index
    places = sorted((item.place, index) for index, item in enumerate(batch))
    for (before, first), (after, second) in pairwise(places):
        if before[:2] == after[:2] and batch[second].result is None:
            yield first, second
