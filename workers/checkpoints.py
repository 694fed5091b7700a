"""Checkpoints: what a merchant's books amounted to at a moment, kept outside of its database (spec §6).

A hash chain shows that nothing in it was changed, not that its end is still there. So every minute the number and the
SHA-256 of all heads (of accounts, and of the series of documents) go to `credits.<m>.checkpoints`, a topic that a
database's administrator need not be able to write. Whoever audits the books later compares them with the last one: the
entry counts, heads and document numbers named there must still be found.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from sqlalchemy.ext.asyncio import AsyncConnection

from catalog.sql import fetch
from merchants.databases import Pools
from merchants.registry import Merchant
from schemas.canonical import compact_json, format_time
from schemas.codec import parse_time
from schemas.events import event_headers, own_source
from workers.admin import TopicSpec, ensure_topics, existing_topics
from workers.lanes import TP
from workers.metrics import looks_after
from workers.publisher import OutMessage, Publisher

log = structlog.get_logger(__name__)

EVENT = "Books.Checkpointed"
PERIOD_SECONDS = 60
READ_SECONDS_MAX = 10
STATEMENT_TIMEOUT = "60s"


def checkpoints_topic(merchant: str) -> str:
    """Return the topic of a merchant's checkpoints."""
    return f"credits.{merchant}.checkpoints"


# One partition: the last record is the last checkpoint. Kept for ever; a merchant makes about 200 MB of it a year.
TOPIC = TopicSpec(1, {"retention.ms": "-1", "message.timestamp.type": "LogAppendTime", "segment.bytes": "16777216"})


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The books as of `cut`, a moment of the merchant's clock before which no batch was still under way.

    Attributes:
        entries: how many there were.
        accounts: how many had entries; `accounts_sha256` is over their heads, sorted.
        documents: how many there were; `series_sha256` is over the heads of their series, sorted.
    """

    merchant_id: str
    cut: datetime
    entries: int
    accounts: int
    accounts_sha256: str
    documents: int
    series_sha256: str

    def as_object(self) -> dict[str, Any]:
        """Return the members as published."""
        members = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return members | {"cut": format_time(self.cut)}

    @classmethod
    def from_object(cls, shown: Mapping[str, Any]) -> "Checkpoint":
        """Read what `as_object` made."""
        members = {name: shown[name] for name in cls.__dataclass_fields__}
        return cls(**members | {"cut": parse_time(shown["cut"])})

    def differences(self, found: "Checkpoint") -> list[str]:
        """Say in what the books, recomputed at the same cut, are not what they were."""
        said, now = self.as_object(), found.as_object()
        return [f"{name}: {said[name]} at the checkpoint, {now[name]} now" for name in said if said[name] != now[name]]


# The start of the oldest transaction under way: what is committed later was written later. An advance of a test clock
# may be under way as well, so the offset is that of a minute ago.
_CUT = """
SELECT s.merchant_id, t.start + CASE WHEN s.clock_offset = '0' THEN '0' ELSE coalesce((
    SELECT max(a.clock_offset) FROM clock_advances a WHERE a.advanced_at < t.start - interval '1 minute'), '0') END
FROM merchant_state s, (
    SELECT least(min(xact_start), clock_timestamp()) AS start FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()
) t
"""

# An account that had no entry since the cut has its head in its row; only of the others the history is looked at.
# By first byte, because one value can't hold the heads of a large ledger.
_ACCOUNT_HEADS = """
WITH heads AS (
    SELECT a.head, a.last_seq AS entries FROM accounts a WHERE a.last_entry_at < $1
    UNION ALL
    SELECT e.hash, e.user_seq FROM accounts a CROSS JOIN LATERAL (
        SELECT hash, user_seq FROM entries
        WHERE entries.account_id = a.account_id AND created_at < $1 ORDER BY user_seq DESC LIMIT 1) e
    WHERE a.last_entry_at >= $1
)
SELECT sum(entries)::bigint, count(*), string_agg(head, '' ORDER BY head) FROM heads
GROUP BY substr(head, 1, 1) ORDER BY substr(head, 1, 1)
"""
# Documents are counted up to the heads, for which the index of their numbers is enough.
_SERIES_HEADS = """
WITH heads AS (
    SELECT s.prefix, s.year, s.next_number - 1 AS sequence, s.head FROM document_series s
    WHERE s.last_issued_at < $1 AND s.last_issued_at > '-infinity'
    UNION ALL
    SELECT s.prefix, d.year, d.sequence, d.hash FROM document_series s CROSS JOIN LATERAL (
        SELECT year, sequence, hash FROM documents
        WHERE documents.prefix = s.prefix AND issued_at < $1 ORDER BY year DESC, sequence DESC LIMIT 1) d
    WHERE s.last_issued_at >= $1
)
SELECT h.head, (
    SELECT count(*) FROM documents d WHERE d.prefix = h.prefix AND (d.year, d.sequence) <= (h.year, h.sequence))
FROM heads h ORDER BY h.head
"""


async def take(connection: AsyncConnection) -> Checkpoint:
    """Read a checkpoint of the books as of now, or of when the oldest transaction under way began.

    The connection must be READ COMMITTED: the heads are read after the cut was found.
    """
    merchant_id, cut = (await fetch(connection, _CUT))[0]
    return await recompute(connection, merchant_id, cut)


async def recompute(connection: AsyncConnection, merchant_id: str, cut: datetime) -> Checkpoint:
    """Read what a checkpoint at this cut says if nothing before it was changed or removed since."""
    # Readers are given less; this one reads as long as there are accounts, and nobody waits for it.
    await fetch(connection, "SELECT set_config('statement_timeout', $1, true)", STATEMENT_TIMEOUT)
    entries, accounts, accounts_sha256 = 0, 0, sha256()
    async for posted, count, heads in _rows(connection, _ACCOUNT_HEADS, cut):
        entries, accounts = entries + posted, accounts + count
        accounts_sha256.update(heads)
    series = await fetch(connection, _SERIES_HEADS, cut)
    documents, series_sha256 = sum(row[1] for row in series), sha256(b"".join(row[0] for row in series))
    return Checkpoint(
        merchant_id, cut, entries, accounts, accounts_sha256.hexdigest(), documents, series_sha256.hexdigest()
    )


async def _rows(connection: AsyncConnection, sql: str, *parameters: Any) -> AsyncIterator[Any]:
    """Read large rows one after the other."""
    driver = (await connection.get_raw_connection()).driver_connection
    assert driver is not None
    cursor = await driver.cursor(sql, *parameters)
    while row := await cursor.fetchrow():
        yield row


async def compare(connection: AsyncConnection, checkpoint: Checkpoint) -> list[str]:
    """Say what of the books is not as a checkpoint has it: nothing, if no entry or document before it was touched."""
    return checkpoint.differences(await recompute(connection, checkpoint.merchant_id, checkpoint.cut))


async def last_checkpoint(
    bootstrap_servers: str, merchant: str, security: Mapping[str, Any] | None = None
) -> Checkpoint | None:
    """Return the last checkpoint of a merchant, None before the first one.

    Raises:
        KafkaError: the broker can't be reached.
    """
    partition = TopicPartition(checkpoints_topic(merchant), 0)
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap_servers, enable_auto_commit=False, **(security or {}))
    try:
        await consumer.start()
        if partition.topic not in await consumer.topics():
            return None
        consumer.assign([partition])
        begin = (await consumer.beginning_offsets([partition]))[partition]
        end = (await consumer.end_offsets([partition]))[partition]
        if end <= begin:
            return None
        consumer.seek(partition, end - 1)
        async with asyncio.timeout(READ_SECONDS_MAX):
            record = await consumer.getone(partition)
        return Checkpoint.from_object(json.loads(record.value or b""))
    finally:
        await consumer.stop()


@dataclass
class Checkpointer:
    """Publishes a checkpoint a minute of each merchant; one worker does so for a merchant, like the sampler.

    ``published_at`` tells by `time.monotonic` when the last one was, or when it should have been for the first time.
    """

    readers: Pools
    publisher: Publisher
    bootstrap_servers: str
    security: Mapping[str, Any]
    merchants: Mapping[str, Merchant]
    assigned: Callable[[], Mapping[str, set[TP]]]
    published_at: dict[str, float] = field(default_factory=dict)
    errors: int = 0
    _ensured: set[str] = field(default_factory=set)

    async def run_once(self) -> None:
        """Publish one checkpoint of each of this worker's merchants; trouble with one is logged, not raised."""
        mine = [
            self.merchants[name]
            for name, partitions in sorted(self.assigned().items())
            if name in self.merchants and looks_after(name, partitions)
        ]
        names = {merchant.merchant_id for merchant in mine}
        for name in self.published_at.keys() - names:
            del self.published_at[name]
        for name in names:
            self.published_at.setdefault(name, time.monotonic())
        await self._look_for_topics(mine)
        for merchant in mine:
            try:
                await self.publish(merchant)
                self.published_at[merchant.merchant_id] = time.monotonic()
            except Exception as error:
                self.errors += 1
                log.warning("no checkpoint", merchant=merchant.merchant_id, error=repr(error)[:500])

    async def _look_for_topics(self, mine: Sequence[Merchant]) -> None:
        """Find out in one question which topics exist: the answer names those of all merchants, however it is asked."""
        unknown = {merchant.merchant_id for merchant in mine} - self._ensured
        if unknown:
            try:
                existing = await existing_topics(self.bootstrap_servers, self.security)
            except (KafkaError, OSError, TimeoutError) as error:
                log.warning("the topics are not known", error=repr(error)[:500])
            else:
                self._ensured |= {name for name in unknown if checkpoints_topic(name) in existing}

    async def publish(self, merchant: Merchant) -> Checkpoint:
        """Take and publish a checkpoint of one merchant, whose topic is made first if it does not exist."""
        name = merchant.merchant_id
        topic = checkpoints_topic(name)
        if name not in self._ensured:
            await ensure_topics(self.bootstrap_servers, {topic: TOPIC}, self.security)
            self._ensured.add(name)
        engine = await self.readers.engine(name, merchant.database_url, merchant.password)
        async with engine.connect() as connection:
            checkpoint = await take(connection)
        await self.publisher.publish([message_of(checkpoint)])
        return checkpoint

    async def run(self, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """Publish for ever, at the same moments in all workers."""
        while True:
            await sleep(PERIOD_SECONDS - time.time() % PERIOD_SECONDS)
            await self.run_once()


def message_of(checkpoint: Checkpoint) -> OutMessage:
    """Make the message that publishes a checkpoint."""
    name = checkpoint.merchant_id
    headers = event_headers(EVENT, f"{name}/{format_time(checkpoint.cut)}", own_source(name), checkpoint.cut)
    value = compact_json(checkpoint.as_object())
    return OutMessage(checkpoints_topic(name), name.encode(), value, headers, 0)
