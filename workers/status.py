"""How all merchants are doing, asked of the registry, the broker and each merchant's database, whoever works for them.

`credits status` and the operator page show it. Lag is what lies in the input topics behind what is applied.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiokafka import AIOKafkaConsumer
from aiokafka import TopicPartition as TP
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupCoordinatorNotAvailableError
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

import merchants.registry
from catalog.sql import fetch
from merchants.databases import Pools, in_a_line
from merchants.registry import Merchant
from schemas.topics import CHANNELS, CONTROL, input_topic
from workers.metrics import read_gauges
from workers.publisher import connect_admin

PARALLEL = 8


@dataclass(frozen=True, slots=True)
class MerchantStatus:
    """One merchant: commands applied so far, commands that wait, and the gauges of its database.

    ``error`` says why the database did not answer; then only its state and the end of its topics are known.
    """

    merchant_id: str
    state: str
    simulated: bool
    applied: int = 0
    lag: int = 0
    jobs_lag: int = 0
    gauges: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Status:
    """All merchants at one moment. ``at`` counts seconds of no particular clock; ``workers`` are hosts of the group."""

    at: float
    workers: Sequence[str]
    control_lag: int
    merchants: Sequence[MerchantStatus]


class Lookout:
    """Asks again and again over the same connections.

    Args:
        bootstrap_servers: of the cluster.
        security: further arguments of every client of it.
        group: the workers' consumer group.
        control: the control database.
        readers: pools for the merchants' databases.
    """

    def __init__(
        self, bootstrap_servers: str, security: Mapping[str, Any], group: str, control: AsyncEngine, readers: Pools
    ) -> None:
        self._servers = bootstrap_servers
        self._security = dict(security)
        self._group = group
        self._control = control
        self._readers = readers
        self._consumer: AIOKafkaConsumer | None = None
        self._admin: AIOKafkaAdminClient | None = None
        self._lock = asyncio.Lock()

    async def close(self) -> None:
        """Let go of the broker."""
        if self._consumer is not None:
            await self._consumer.stop()
        if self._admin is not None:
            await self._admin.close()

    async def look(self) -> Status:
        """Look once.

        Raises:
            KafkaError: the broker can't be reached.
            SQLAlchemyError, OSError: the control database can't.
        """
        async with self._lock:
            async with self._control.connect() as connection:
                known = await merchants.registry.all_merchants(connection)
                sql = "SELECT applied_next FROM positions WHERE topic = $1"
                control_applied = sum(row[0] for row in await fetch(connection, sql, CONTROL))
            ends = await self._ends(known)
            slots = asyncio.Semaphore(PARALLEL)
            found = await asyncio.gather(*(self._merchant(merchant, ends, slots) for merchant in known))
            lag = max(0, ends.get(TP(CONTROL, 0), 0) - control_applied)
            return Status(time.monotonic(), await self._workers(), lag, found)

    async def _ends(self, known: Sequence[Merchant]) -> dict[TP, int]:
        """Return the end of each input partition."""
        if self._consumer is None:
            consumer = AIOKafkaConsumer(bootstrap_servers=self._servers, enable_auto_commit=False, **self._security)
            try:
                await consumer.start()
            except BaseException:
                await consumer.stop()
                raise
            self._consumer = consumer
        existing = await self._consumer.topics()
        tps = [TP(CONTROL, 0)]
        for merchant in known:
            tps += [TP(input_topic(merchant.merchant_id, c), p) for c in CHANNELS for p in range(merchant.partitions)]
        ends: dict[TP, int] = await self._consumer.end_offsets([tp for tp in tps if tp.topic in existing])
        return ends

    async def _merchant(self, merchant: Merchant, ends: Mapping[TP, int], slots: asyncio.Semaphore) -> MerchantStatus:
        name = merchant.merchant_id
        if merchant.state == "provisioning":
            return MerchantStatus(name, merchant.state, merchant.simulated)
        try:
            async with slots:
                engine = await self._readers.engine(name, merchant.database_url, merchant.password)
                async with engine.connect() as connection:
                    rows = await fetch(connection, "SELECT topic, partition, applied_next FROM positions")
                    gauges = await read_gauges(connection)
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            return MerchantStatus(name, merchant.state, merchant.simulated, error=in_a_line(error))
        applied = {TP(topic, partition): offset for topic, partition, offset in rows}
        own = {input_topic(name, channel) for channel in CHANNELS}
        behind = {tp: max(0, end - applied.get(tp, 0)) for tp, end in ends.items() if tp.topic in own}
        jobs = sum(lag for tp, lag in behind.items() if tp.topic == input_topic(name, "jobs"))
        return MerchantStatus(
            name, merchant.state, merchant.simulated, sum(applied.values()), sum(behind.values()), jobs, gauges
        )

    async def _workers(self) -> list[str]:
        """List the members of the group by their hosts."""
        if self._admin is None:
            self._admin = await connect_admin(self._servers, self._security)
        try:
            described = await self._admin.describe_consumer_groups([self._group])
        except GroupCoordinatorNotAvailableError:
            # On a new cluster there is no group yet.
            return []
        hosts = []
        for response in described:
            for group in response.to_object()["groups"]:
                hosts += [member["client_host"].lstrip("/") for member in group["members"]]
        return sorted(hosts)
