"""A merchant with a real database and real topics, whose commands are worked on when the test says so."""

import json
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import asyncpg
from aiokafka import AIOKafkaConsumer
from aiokafka import TopicPartition as TP
from sqlalchemy.ext.asyncio import AsyncEngine

import merchants.registry
import merchants.store
from console.restore import _read
from merchants.databases import CONTROL_SETTINGS, WRITER_SETTINGS, Pools, create_unpooled_engine, engine_url
from merchants.registry import Merchant
from merchants.schema import on_database
from schemas.canonical import compact_json, format_time
from schemas.events import command_headers
from schemas.payloads import COMMANDS, MerchantConfig
from schemas.topics import ALLOWED, CHANNELS, input_topic, receipts_topic, results_topic
from tests import builders
from tests.services import Services
from workers.admin import ensure_topics
from workers.lanes import Lease
from workers.pipeline import Pipeline
from workers.publisher import OutMessage, Publisher
from workers.service import merchant_topics
from workers.settings import WorkerSettings

SOURCE = "/shop"


@dataclass
class Shop:
    """One merchant, a producer for its commands, and a pipeline that works on them."""

    services: Services
    settings: WorkerSettings
    merchant: Merchant
    publisher: Publisher
    control: AsyncEngine
    pipeline: Pipeline = field(init=False)
    pools: Pools = field(init=False)
    quiet: Pools = field(init=False)
    unsent: list[OutMessage] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin like a worker that was just started."""
        self.pools = Pools(WRITER_SETTINGS, pool_size=1, merchants_max=4)
        self.quiet = Pools(WRITER_SETTINGS, pool_size=1, merchants_max=1)
        self.pipeline = Pipeline(self.publisher, self.pools, self.quiet, resource_amount_max=Decimal(10**9))
        self.pipeline.know(self.merchant)

    async def end(self) -> None:
        await self.pools.close()
        await self.quiet.close()

    def send(self, command_type: str, command_id: str | None = None, **payload: Any) -> str:
        """Have a command sent with the next batch of them, and return its id."""
        command_id = command_id or secrets.token_hex(6)
        self.unsent.append(self.message(command_type, command_id, payload))
        return command_id

    async def flush(self) -> None:
        """Send what is to be sent, in one go, so that many records get the same time."""
        unsent, self.unsent = self.unsent, []
        await self.publisher.publish(unsent)

    def message(self, command_type: str, command_id: str, payload: Mapping[str, Any]) -> OutMessage:
        spec = COMMANDS[command_type]
        channel = next(channel for channel, types in ALLOWED.items() if command_type in types)
        key = spec.record_key(spec.model.model_validate(payload)).encode()
        headers = command_headers(command_type, command_id, SOURCE, datetime.now(UTC))
        return OutMessage(input_topic(self.merchant.merchant_id, channel), key, compact_json(payload), headers)

    async def work(self, *, batch_max: int = 1000) -> int:
        """Work on all that was sent, in batches; returns how many records it was."""
        await self.flush()
        tps = [TP(input_topic(self.merchant.merchant_id, c), p) for c in CHANNELS for p in range(2)]
        lease = Lease(1, "the tests", tps, object())
        async with self.consumer() as consumer:
            found = await _read(consumer, await self.positions())
        records = sorted((r for part in found.values() for r in part), key=lambda r: r.timestamp)
        for at in range(0, len(records), batch_max):
            batch = records[at : at + batch_max]
            outcome = await self.pipeline.process(self.merchant.merchant_id, batch, lease)
            assert outcome.published is None or await outcome.published
            lease.first -= {TP(r.topic, r.partition) for r in batch}
        await self.pipeline.idle(self.merchant.merchant_id, set(tps), lease)
        return len(records)

    async def stock(self) -> None:
        """Have a product and an operation type."""
        self.send(
            "Product.Create",
            product_code="c100",
            title="100 credits",
            credits=100,
            access_period_days=30,
            distribution="sellable",
            prices=[{"country": "*", "currency": "EUR", "amount": "10.00"}],
            actor="ops",
        )
        self.send(
            "OperationType.CreateWithArchival",
            operation_code="llm",
            display_name="LLM",
            resource_unit="token",
            credits_per_unit="0.5",
            actor="ops",
        )
        await self.work()

    async def advance(self, seconds: int) -> None:
        """Move a simulated merchant's clock as `Clock.Advance` does, its stored result included."""
        url = engine_url(self.merchant.database_url, password=self.merchant.password)
        engine = create_unpooled_engine(url, WRITER_SETTINGS)
        identity = secrets.token_bytes(16)
        async with engine.begin() as connection:
            offset, now = await merchants.store.advance_clock(connection, seconds, identity)
        await engine.dispose()
        effects = {
            "merchant_id": self.merchant.merchant_id,
            "offset_seconds": offset.days * 86_400 + offset.seconds,
            "now": format_time(now),
        }
        sql = """
        INSERT INTO inbox
            (identity, fingerprint, digests, type, topic, partition, kafka_offset, encoding, outcome, result)
        VALUES ($1, '', '', 'Clock.Advance', 'credits.control', 0, 0, 0, 'applied', $2)
        """
        async with self.control.begin() as connection:
            await connection.exec_driver_sql(sql, (identity, compact_json({"effects": effects}).decode()))

    async def positions(self) -> dict[TP, int]:
        """Return the offsets that the database wants next."""
        rows = await self.query("SELECT topic, partition, published_next FROM positions")
        known = {TP(topic, partition): offset for topic, partition, offset in rows}
        wanted = (TP(input_topic(self.merchant.merchant_id, c), p) for c in CHANNELS for p in range(2))
        return {tp: known.get(tp, 0) for tp in wanted}

    @asynccontextmanager
    async def consumer(self) -> AsyncIterator[AIOKafkaConsumer]:
        consumer = AIOKafkaConsumer(bootstrap_servers=self.settings.kafka_bootstrap_servers, enable_auto_commit=False)
        await consumer.start()
        try:
            yield consumer
        finally:
            await consumer.stop()

    async def published(self, topic: str) -> list[tuple[int, str, bytes]]:
        """Return (partition, ce_id, value) of all messages of an output topic."""
        async with self.consumer() as consumer:
            found = await _read(consumer, {TP(topic, partition): 0 for partition in range(2)})
        records = (r for part in found.values() for r in part)
        return [(r.partition, dict(r.headers)["ce_id"].decode(), r.value) for r in records]

    async def results(self) -> dict[str, dict[str, Any]]:
        """Return the last result of each command by its id."""
        found = [json.loads(value) for _, _, value in await self.published(results_topic(self.merchant.merchant_id))]
        return {body["command_id"]: body for body in found}

    async def receipts(self) -> list[dict[str, Any]]:
        topic = receipts_topic(self.merchant.merchant_id)
        return [json.loads(value) for _, _, value in await self.published(topic)]

    @property
    def database(self) -> str:
        return merchants.registry.names(self.merchant.merchant_id)[1]

    async def query(self, sql: str, *values: Any, database: str | None = None) -> list[Any]:
        """Ask as the superuser."""
        url = on_database(self.settings.control_database_url, database or self.database)
        connection = await asyncpg.connect(url.replace("+asyncpg", ""))
        try:
            return list(await connection.fetch(sql, *values))
        finally:
            await connection.close()

    async def suspend(self, state: str = "suspended") -> None:
        """Suspend as `Merchant.Suspend` does."""
        async with self.control.begin() as connection:
            await merchants.registry.set_state(connection, self.merchant.merchant_id, state)
        if await self.query("SELECT 1 FROM pg_database WHERE datname = $1", self.database, database="postgres"):
            await self.query("UPDATE merchant_state SET suspended = $1", state == "suspended")

    async def tables(self) -> dict[str, list[tuple[Any, ...]]]:
        """Return what a merchant's books say: all rows that a restored database must have again."""
        left_out = {
            "positions": ("owner", "generation", "published_next"),
            # A repetition is answered whenever it comes, and what waits may be parked a moment sooner.
            "inbox": ("decided_at", "released"),
            "parked": ("arrived", "parked_at", "due_at"),
            "merchant_state": ("catalog_version", "suspended"),
            "buyers": ("salt",),
            "job_state": ("watermark", "job"),
        }
        names = await self.query(
            "SELECT relname FROM pg_class WHERE relkind IN ('r', 'p') AND NOT relispartition "
            "AND relnamespace = 'public'::regnamespace ORDER BY relname"
        )
        found = {}
        for (name,) in names:
            rows = await self.query(f"SELECT * FROM {name}")
            hidden = left_out.get(name, ())
            found[name] = sorted(
                (tuple(repr(v) for k, v in row.items() if k not in hidden) for row in rows),
            )
        return found


@asynccontextmanager
async def open_shop(
    services: Services, control_url: str, merchant_id: str, *, simulated: bool = False, **changes: Any
) -> AsyncIterator[Shop]:
    """Register a merchant with two partitions a topic; the control database must have been migrated."""
    settings = WorkerSettings(
        kafka_bootstrap_servers=services.kafka_bootstrap_servers, control_database_url=control_url, group=merchant_id
    )
    control = create_unpooled_engine(engine_url(control_url), CONTROL_SETTINGS)
    async with control.begin() as connection:
        reserved = await merchants.registry.reserve(
            connection,
            merchant_id,
            database_url=merchants.registry.server_url(control_url),
            partitions=2,
            simulated=simulated,
            command=bytes(16),
            fingerprint=bytes(32),
        )
    config = MerchantConfig.model_validate(builders.config(**changes))
    await merchants.registry.provision(control_url, reserved, config, "the tests")
    async with control.begin() as connection:
        await merchants.registry.set_state(connection, merchant_id, "active")
    await ensure_topics(services.kafka_bootstrap_servers, merchant_topics(merchant_id, 2))
    publisher = Publisher(services.kafka_bootstrap_servers)
    await publisher.start()
    shop = Shop(services, settings, replace(reserved, state="active"), publisher, control)
    try:
        yield shop
    finally:
        await shop.end()
        await publisher.stop()
        await control.dispose()
