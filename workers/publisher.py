"""The way out: one idempotent producer for all that a worker publishes."""

import asyncio
import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from aiokafka.partitioner import murmur2

from workers.lanes import Lease

log = structlog.get_logger(__name__)

PUBLISH_SECONDS_MAX = 60
RETRY_SECONDS = 0.5
# So often at most the broker is asked which topics there are.
TOPICS_SECONDS = 0.5


class PublishTimeoutError(Exception):
    """The broker did not acknowledge everything in a minute."""


class LeaseEndedError(Exception):
    """The lease ended before the broker had acknowledged everything; the records are delivered to their next owner."""


@dataclass(frozen=True, slots=True)
class OutMessage:
    """A message to be published; without a partition the key decides, as Kafka's own clients do."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]] = ()
    partition: int | None = None


@lru_cache(maxsize=65536)
def key_hash(key: bytes) -> int:
    """Return the hash of a key, as Kafka's default partitioner has it; it costs 7 µs, so that it is remembered."""
    return int(murmur2(key)) & 0x7FFFFFFF


class Publisher:
    """Publishes messages and waits for the broker's acknowledgement.

    Args:
        bootstrap_servers: of the cluster.
        security: further arguments of every client, see `WorkerSettings.security_kwargs`.
    """

    def __init__(self, bootstrap_servers: str, security: Mapping[str, Any] | None = None) -> None:
        self._servers = bootstrap_servers
        self._security = dict(security or {})
        self._producer: AIOKafkaProducer | None = None
        self._renewing = asyncio.Lock()
        self._admin: AIOKafkaAdminClient | None = None
        self._looking_up = asyncio.Lock()
        self._topics: frozenset[str] = frozenset()
        self._topics_at = float("-inf")

    async def start(self) -> None:
        """Connect.

        Raises:
            KafkaError: the broker can't be reached.
        """
        self._producer = await self._connect()

    async def stop(self) -> None:
        """Disconnect; what was not acknowledged yet is given a moment."""
        producer, self._producer = self._producer, None
        admin, self._admin = self._admin, None
        for client, method in ((producer, "stop"), (admin, "close")):
            if client is not None:
                with contextlib.suppress(TimeoutError, KafkaError):
                    async with asyncio.timeout(5):
                        await getattr(client, method)()

    async def _connect(self) -> AIOKafkaProducer:
        producer = AIOKafkaProducer(
            bootstrap_servers=self._servers,
            client_id="credits-worker",
            enable_idempotence=True,
            acks="all",
            linger_ms=2,
            max_batch_size=256 * 1024,
            request_timeout_ms=30_000,
            metadata_max_age_ms=60_000,
            compression_type=_compression(),
            **self._security,
        )
        try:
            await producer.start()
        except BaseException:
            await producer.stop()
            raise
        return producer

    async def publish(self, messages: Sequence[OutMessage], lease: Lease | None = None) -> None:
        """Publish all messages and wait until the broker has them all, trying again as long as the lease is alive.

        The order in each partition is that of `messages`. A message may be published twice, never reordered with the
        ones after it: when one fails, it and all after it in its partition are sent again.

        Raises:
            PublishTimeoutError: the broker did not acknowledge everything in a minute.
            LeaseEndedError: the lease ended meanwhile; some of the messages may have been published.
        """
        if not messages:
            return
        work = asyncio.create_task(self._publish_until_done(messages))
        try:
            # Counted, not measured: a process that was frozen for an hour shall have its minute afterwards.
            for _ in range(PUBLISH_SECONDS_MAX):
                if (await asyncio.wait({work}, timeout=1.0))[0]:
                    work.result()
                    return
                if lease is not None and not lease.alive():
                    raise LeaseEndedError
            raise PublishTimeoutError(f"{len(messages)} messages not acknowledged in {PUBLISH_SECONDS_MAX} seconds")
        finally:
            if not work.done():
                work.cancel()
                await asyncio.wait({work}, timeout=1.0)

    async def _publish_until_done(self, messages: Sequence[OutMessage]) -> None:
        while messages:
            producer = self._producer
            failure = None
            try:
                if producer is None:
                    raise KafkaError("not connected")
                messages = await self._send_all(producer, messages)
            except KafkaError as error:
                failure = error
            if messages:
                log.warning("publishing failed, trying again", messages=len(messages), error=repr(failure))
                await asyncio.sleep(RETRY_SECONDS)
                # An idempotent producer does not survive every error, and does not say so.
                await self._renew(producer)

    async def _send_all(self, producer: AIOKafkaProducer, messages: Sequence[OutMessage]) -> list[OutMessage]:
        """Send messages; return those that the broker did not acknowledge, and the ones behind them."""
        counts = {topic: len(await producer.partitions_for(topic)) for topic in {m.topic for m in messages}}
        queues: dict[tuple[str, int], list[OutMessage]] = {}
        for message in messages:
            partition = message.partition
            if partition is None:
                partition = key_hash(message.key or b"") % counts[message.topic]
            queues.setdefault((message.topic, partition), []).append(message)
        left = await asyncio.gather(*[_send_queue(producer, *place, queue) for place, queue in queues.items()])
        return list(itertools.chain.from_iterable(left))

    async def _renew(self, failed: AIOKafkaProducer | None) -> None:
        """Replace the producer that failed, unless another caller has done so."""
        async with self._renewing:
            if self._producer is not failed:
                return
            try:
                self._producer = await self._connect()
            except KafkaError as error:
                log.warning("the producer can't be renewed", error=repr(error))
                return
            if failed is not None:
                with contextlib.suppress(TimeoutError, KafkaError):
                    async with asyncio.timeout(2):
                        await failed.stop()

    async def publish_quietly(self, message: OutMessage, limit: float = 2.0) -> bool:
        """Try to publish one message to a topic that may not exist; never create it, never raise for trouble.

        Returns:
            Whether the broker has it.
        """
        try:
            async with asyncio.timeout(limit):
                if self._producer is None or not await self._exists(message.topic):
                    return False
                return not await self._send_all(self._producer, [message])
        except (TimeoutError, KafkaError) as error:
            log.warning("a reply was not published", topic=message.topic, error=repr(error))
            return False

    async def _exists(self, topic: str) -> bool:
        # A question for all topics: one for a topic by name would create it, where the broker allows that.
        if topic in self._topics:
            return True
        clock = asyncio.get_running_loop().time
        asked_at = clock()
        async with self._looking_up:
            # Only a list made after the question tells that a topic, which may be a moment old, is not there.
            if self._topics_at < asked_at:
                await asyncio.sleep(self._topics_at + TOPICS_SECONDS - clock())
                if self._admin is None:
                    self._admin = await connect_admin(self._servers, self._security)
                began = clock()
                self._topics = frozenset(await self._admin.list_topics())
                self._topics_at = began
            return topic in self._topics


async def _send_queue(
    producer: AIOKafkaProducer, topic: str, partition: int, messages: list[OutMessage]
) -> list[OutMessage]:
    """Send messages of one partition in batches of our own making: one future a batch costs less than one a message.

    Returns:
        The first one that the broker did not acknowledge, and all behind it.
    """
    starts: list[int] = []
    sent: list[asyncio.Future[Any]] = []
    start = 0
    try:
        while start < len(messages):
            batch = producer.create_batch()
            end = start
            while end < len(messages) and _append(batch, messages[end]):
                end += 1
            batch.close()
            sent.append(await producer.send_batch(batch, topic, partition=partition))
            starts.append(start)
            start = end
    except KafkaError as error:
        log.warning("messages were not accepted", topic=topic, error=repr(error))
    results = await asyncio.gather(*sent, return_exceptions=True)
    failed = (at for at, result in zip(starts, results, strict=True) if isinstance(result, BaseException))
    return messages[next(failed, start) :]


def _append(batch: Any, message: OutMessage) -> bool:
    """Put a message into a batch; False when it is full. The first one always has its place."""
    headers = list(message.headers)
    return batch.append(key=message.key, value=message.value, timestamp=None, headers=headers) is not None


async def connect_admin(bootstrap_servers: str, security: Mapping[str, Any]) -> AIOKafkaAdminClient:
    """Return a connected admin client.

    Raises:
        KafkaError: the broker can't be reached.
    """
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers, client_id="credits-admin", **security)
    try:
        await admin.start()
    except BaseException:
        await admin.close()
        raise
    return admin


def _compression() -> str | None:
    """Return lz4 if the library for it is installed, else no compression."""
    from aiokafka.codec import has_lz4

    return "lz4" if has_lz4() else None
