"""Puts a worker together: pipeline, control commands, scheduler and web server around one Faust app."""

import asyncio
import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import structlog
from aiohttp import web
from aiokafka.errors import KafkaError
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

import merchants.registry
import merchants.schema
from merchants.databases import (
    CONTROL_SETTINGS,
    READER_SETTINGS,
    WRITER_SETTINGS,
    Pools,
    create_engine,
    engine_url,
    in_a_line,
)
from merchants.registry import Merchant
from schemas.topics import (
    CHANNELS,
    CONTROL,
    CONTROL_RESULTS,
    all_topics,
    dead_letter_topic,
    input_topic,
    receipts_topic,
)
from workers.admin import TopicMismatchError, TopicSpec, ensure_topics
from workers.app import App, create_app
from workers.checkpoints import Checkpointer
from workers.control import Control
from workers.lanes import Lease, Outcome, Record
from workers.logs import die, die_with
from workers.metrics import Metrics, Sampler
from workers.pipeline import Pipeline
from workers.publisher import Publisher
from workers.scheduler import Scheduler
from workers.settings import WorkerSettings

log = structlog.get_logger(__name__)

CONTROL_LANE = ""
BACKGROUND_SECONDS_MAX = 2
THIRTY_DAYS_MS = str(30 * 86_400_000)


def merchant_topics(merchant_id: str, partitions: int) -> dict[str, TopicSpec]:
    """The topics of a merchant: results and dead letters for 30 days, receipts for ever, times by the broker."""
    specs = {}
    for topic in all_topics(merchant_id):
        retention = "-1" if topic == receipts_topic(merchant_id) else THIRTY_DAYS_MS
        config = {"retention.ms": retention, "message.timestamp.type": "LogAppendTime"}
        specs[topic] = TopicSpec(partitions, config)
    assert dead_letter_topic(merchant_id) in specs
    return specs


CONTROL_TOPICS = {
    name: TopicSpec(1, {"retention.ms": THIRTY_DAYS_MS, "message.timestamp.type": "LogAppendTime"})
    for name in (CONTROL, CONTROL_RESULTS)
}


@contextmanager
def _needed(variable: str) -> Iterator[None]:
    """End the process if what a variable names can't be used at the start: in a line, a traceback tells no more."""
    try:
        yield
    except (SQLAlchemyError, KafkaError, OSError, merchants.schema.UnknownSchemaError, TopicMismatchError) as error:
        die(f"what {variable} names can't be used", reason=in_a_line(error))


class Service:
    """A worker process. Implements ``workers.lanes.Handler``; ``app`` is its Faust app."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.publisher = Publisher(settings.kafka_bootstrap_servers, settings.security_kwargs())
        self.writers = Pools(WRITER_SETTINGS, pool_size=1, merchants_max=settings.merchants_max)
        self.readers = Pools(READER_SETTINGS, pool_size=settings.readers, merchants_max=settings.readers_max)
        self.jobs = Pools(WRITER_SETTINGS, pool_size=1, merchants_max=16)
        self.control_engine: AsyncEngine = create_engine(
            engine_url(settings.control_database_url), CONTROL_SETTINGS, pool_size=2, max_overflow=2
        )
        self.pipeline = Pipeline(
            self.publisher, self.writers, self.jobs, resource_amount_max=Decimal(settings.resource_amount_max)
        )
        self.scheduler = Scheduler(self.control_engine, self.jobs, self.publisher, settings.jobs_seconds)
        self.control = Control(
            self.control_engine,
            settings.control_database_url,
            self.publisher,
            self._ensure_topics,
            self.scheduler.send_due,
        )
        self.merchants: dict[str, Merchant] = {}
        self.metrics = Metrics(
            lambda: self.app.state_of_worker,
            lambda: {
                "scheduler": self.scheduler.errors,
                "sampler": self.sampler.errors,
                "checkpoint": self.checkpointer.errors,
            },
            {"writers": self.writers, "readers": self.readers, "jobs": self.jobs},
        )
        self.sampler = Sampler(self.metrics, self.readers, self.merchants, lambda: self.app.state_of_worker.assigned)
        self.checkpointer = Checkpointer(
            self.readers,
            self.publisher,
            settings.kafka_bootstrap_servers,
            settings.security_kwargs(),
            self.merchants,
            lambda: self.app.state_of_worker.assigned,
            self.metrics.checkpointed_at,
        )
        self.pipeline.observers.append(self.metrics.observe)
        self.pipeline.observers.append(lambda merchant, _: self.scheduler.stir(merchant))
        self.control.observers.append(self.metrics.answered)
        self._tasks: list[asyncio.Task[None]] = []
        self._ending = asyncio.Event()
        self.app: App = create_app(
            settings,
            self,
            merchants=self._topics,
            on_start=self._start,
            on_stop=self._stop,
            web_setup=self._mount,
        )

    # Handler

    async def process(self, merchant: str, records: list[Record], lease: Lease) -> Outcome:
        begun = time.monotonic()
        if merchant == CONTROL_LANE:
            outcome = await self.control.process(records, lease)
        else:
            outcome = await self.pipeline.process(merchant, records, lease)
        if outcome.published is None:
            self.metrics.published(merchant, records, begun)
        else:
            outcome.published.add_done_callback(lambda _: self.metrics.published(merchant, records, begun))
        return outcome

    async def idle(self, merchant: str, partitions: set[Any], lease: Lease) -> None:
        if merchant == CONTROL_LANE:
            await self.control.idle(lease)
        else:
            await self.pipeline.idle(merchant, partitions, lease)

    # Life

    async def _start(self) -> None:
        # A batch makes a hundred thousand objects and no cycles; the default thresholds cost a third of the time.
        gc.freeze()
        gc.set_threshold(200_000, 20, 100)
        with _needed("CREDITS_CONTROL_DATABASE_URL"):
            await merchants.schema.check(self.settings.control_database_url)
        with _needed("KAFKA_BOOTSTRAP_SERVERS"):
            await ensure_topics(self.settings.kafka_bootstrap_servers, CONTROL_TOPICS, self.settings.security_kwargs())
            await self.publisher.start()
        self._tasks = [
            asyncio.create_task(self.scheduler.run(self._sleep), name="scheduler"),
            asyncio.create_task(self._close_idle_pools(), name="idle pools"),
            asyncio.create_task(self.sampler.run(self._sleep), name="sampler"),
            asyncio.create_task(self.checkpointer.run(self._sleep), name="checkpoints"),
        ]
        for task in self._tasks:
            die_with(task)

    async def _stop(self) -> None:
        self._ending.set()
        _, late = await asyncio.wait(self._tasks, timeout=BACKGROUND_SECONDS_MAX) if self._tasks else ((), ())
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        await self.publisher.stop()
        for pools in (self.writers, self.readers, self.jobs):
            await pools.close()
        await self.control_engine.dispose()

    def _mount(self, application: web.Application) -> None:
        from workers.web import mount

        mount(application, self)

    async def _topics(self) -> Mapping[str, list[str]]:
        """Read the registry: what to consume, and which merchants are suspended."""
        async with self.control_engine.connect() as connection:
            known = await merchants.registry.all_merchants(connection)
        topics = {CONTROL_LANE: [CONTROL]}
        for merchant in known:
            if merchant.state == "provisioning" or not self.settings.serves(merchant.merchant_id):
                continue
            self.merchants[merchant.merchant_id] = merchant
            self.pipeline.know(merchant)
            topics[merchant.merchant_id] = [input_topic(merchant.merchant_id, channel) for channel in CHANNELS]
            state = self.app.state_of_worker
            suspended = merchant.state == "suspended"
            (state.hold if suspended else state.release)(merchant.merchant_id)
            self.metrics.suspended[merchant.merchant_id] = suspended
        return topics

    async def _ensure_topics(self, merchant: Merchant) -> None:
        topics = merchant_topics(merchant.merchant_id, merchant.partitions)
        await ensure_topics(self.settings.kafka_bootstrap_servers, topics, self.settings.security_kwargs())

    async def _close_idle_pools(self) -> None:
        while True:
            await self._sleep(self.settings.idle_seconds / 4)
            for pools in (self.writers, self.readers, self.jobs):
                await pools.close_idle(self.settings.idle_seconds)

    async def _sleep(self, seconds: float) -> None:
        """Sleep, and end the task that does so when the process ends: here, and not within a statement."""
        try:
            async with asyncio.timeout(seconds):
                await self._ending.wait()
        except TimeoutError:
            return
        raise asyncio.CancelledError
