"""A stack of its own, and what the measurements do with it: register, suspend, load, wait, read."""

import asyncio
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import orjson
import psutil
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition

from bench import generator
from bench.figures import Answers
from bench.scenarios import CONFIG, ROOT, SOURCE, Scenario, now
from console.processes import StackError
from console.stack import Stack
from merchants.schema import migrate
from schemas.topics import CONTROL, CONTROL_RESULTS, results_topic

Offsets = dict[TopicPartition, int]
Record: TypeAlias = ConsumerRecord[bytes | None, bytes | None]

FOLDER = ROOT / ".credits" / "bench"
POLL_SECONDS = 1.0
CONTROL_SECONDS_MAX = 60
# Workers learn from the registry, every two seconds, that a merchant is suspended.
HOLD_SECONDS = 3.0


def jars() -> Path:
    """Where the downloaded Kafka is: shared with the other stacks of this project."""
    return Path(os.environ.get("CREDITS_JARS") or ROOT / ".credits" / "jars")


class Ground:
    """The stack under test; `start` makes it anew, `stop` leaves nothing behind.

    Args:
        workers: how many worker processes serve a scenario that does not say so itself.
        batch_max: commands of one transaction at most.
    """

    def __init__(self, *, workers: int = 1, batch_max: int = 2000) -> None:
        self.workers = workers
        self.batch_max = batch_max
        for name in ("KAFKA_BOOTSTRAP_SERVERS", "CREDITS_CONTROL_DATABASE_URL"):
            # A stack in use shall not be measured, let alone filled.
            os.environ.pop(name, None)
        self.stack = Stack(FOLDER, jars=jars())
        self.bootstrap_servers = ""
        self.control_url = ""

    async def start(self) -> None:
        """Start an empty stack and make its databases."""
        await asyncio.to_thread(self._clear)
        endpoints = await asyncio.to_thread(self.stack.start)
        self.bootstrap_servers, self.control_url = endpoints.kafka_bootstrap_servers, endpoints.control_database_url
        await migrate(self.control_url)

    async def stop(self) -> None:
        """Stop everything and delete its data."""
        await asyncio.to_thread(self._clear)

    def _clear(self) -> None:
        if self.stack.state.exists():
            self.stack.stop()
            shutil.rmtree(self.stack.state)

    def database_url(self, merchant: str) -> str:
        """Return the superuser's URL of a merchant's database."""
        return self.stack.postgres.url("credits_m_" + merchant.replace("-", "_"))

    # Workers

    def workers_of(self, scenario: Scenario) -> int:
        """Return how many workers serve a scenario."""
        return scenario.workers or self.workers

    @asynccontextmanager
    async def serving(
        self, merchants: Sequence[str], environment: Mapping[str, str] | None = None, *, workers: int | None = None
    ) -> AsyncIterator[None]:
        """Run workers that serve only these merchants; their registration may come later."""
        names = [f"worker-{number + 1}" for number in range(workers or self.workers)]
        env = {
            "CREDITS_MERCHANTS": ",".join(merchants),
            "CREDITS_BATCH_MAX": str(self.batch_max),
            "CREDITS_LOG_LEVEL": "WARNING",
            "CREDITS_WEB_RATE": "0",
            **(environment or {}),
        }
        try:
            for name in names:
                await asyncio.to_thread(self.stack.start_worker, name, env)
            yield
        finally:
            for name in names:
                await asyncio.to_thread(self.stack.stop_worker, name)

    def pids(self) -> dict[str, list[int]]:
        """Return the processes of the stack, with all their children, by what they are."""
        families = {"worker": [], "PostgreSQL": [self.stack.postgres.pid], "Kafka": [self.stack.kafka.pid]}
        families["worker"] = [line.pid for line in self.stack.status() if line.name.startswith("worker")]
        return {name: [pid for parent in parents for pid in _family(parent)] for name, parents in families.items()}

    # Control commands

    async def control(self, command_type: str, messages: Iterable[Mapping[str, Any]]) -> None:
        """Send control commands and wait until all of them were applied."""
        starts = await self.ends([CONTROL_RESULTS], 1)
        count = 0
        producer = AIOKafkaProducer(bootstrap_servers=self.bootstrap_servers, linger_ms=5)
        await producer.start()
        try:
            for members in messages:
                count += 1
                headers = {"ce_specversion": "1.0", "ce_id": str(uuid.uuid4()), "ce_source": SOURCE}
                headers |= {"ce_type": command_type, "ce_time": now(), "content-type": "application/json"}
                value = orjson.dumps({**members, "actor": "bench"})
                key = members["merchant_id"].encode()
                await producer.send(CONTROL, value, key, headers=[(k, v.encode()) for k, v in headers.items()])
            await producer.flush()
        finally:
            await producer.stop()
        ends = await self.wait(starts, count, CONTROL_SECONDS_MAX + count, poll_seconds=0.1)
        async for records in self.read(starts, ends):
            for record in records:
                result = orjson.loads(record.value or b"{}")
                if result["outcome"] != "applied":
                    raise StackError(f"{command_type} was refused: {result['error']}")

    async def register(self, merchants: Sequence[str], partitions: int) -> None:
        """Register merchants."""
        shape = {"config": CONFIG, "partitions": partitions}
        await self.control("Merchant.Register", [{"merchant_id": merchant, **shape} for merchant in merchants])

    async def suspend(self, merchants: Sequence[str]) -> None:
        """Suspend merchants, and give the workers time to hold their lanes."""
        await self.control("Merchant.Suspend", [_justified(merchant) for merchant in merchants])
        await asyncio.sleep(HOLD_SECONDS)

    async def resume(self, merchants: Sequence[str]) -> None:
        """Let suspended merchants go on."""
        await self.control("Merchant.Resume", [_justified(merchant) for merchant in merchants])

    # Load

    async def generate(
        self, scenario: Scenario, merchants: Sequence[str], count: int, run: str, rate: float | None = None
    ) -> float:
        """Send commands from a process of its own; returns the seconds it took."""
        spec = generator.Spec(self.bootstrap_servers, scenario.name, list(merchants), count, run, rate)
        return await asyncio.to_thread(generator.run, spec)

    # Offsets

    async def ends(self, topics: Iterable[str], partitions: int) -> Offsets:
        """Return where the topics end now."""
        tps = [TopicPartition(topic, partition) for topic in topics for partition in range(partitions)]
        async with self._consumer(tps) as consumer:
            return dict(await consumer.end_offsets(tps))

    async def wait(
        self, starts: Offsets, count: int, limit_seconds: float, *, poll_seconds: float = POLL_SECONDS
    ) -> Offsets:
        """Wait until so many records came behind the starts; returns where the partitions end then."""
        deadline = time.monotonic() + limit_seconds
        async with self._consumer(list(starts)) as consumer:
            while True:
                ends = dict(await consumer.end_offsets(list(starts)))
                arrived = sum(ends.values()) - sum(starts.values())
                if arrived >= count:
                    return ends
                if time.monotonic() > deadline:
                    raise StackError(f"{arrived} of {count} records came in {limit_seconds:.0f} seconds")
                await asyncio.sleep(poll_seconds)

    async def read(self, starts: Offsets, ends: Offsets) -> AsyncIterator[list[Record]]:
        """Read the records between two ends."""
        left = {tp: end for tp, end in ends.items() if end > starts[tp]}
        if not left:
            return
        consumer = AIOKafkaConsumer(bootstrap_servers=self.bootstrap_servers, max_partition_fetch_bytes=4 << 20)
        await consumer.start()
        try:
            consumer.assign(list(left))
            for tp in left:
                consumer.seek(tp, starts[tp])
            while left:
                for tp, records in (await consumer.getmany(timeout_ms=1000)).items():
                    yield [record for record in records if record.offset < ends[tp]]
                    if tp in left and records[-1].offset >= ends[tp] - 1:
                        del left[tp]
        finally:
            await consumer.stop()

    @asynccontextmanager
    async def _consumer(self, tps: list[TopicPartition]) -> AsyncIterator[AIOKafkaConsumer]:
        consumer = AIOKafkaConsumer(bootstrap_servers=self.bootstrap_servers)
        await consumer.start()
        try:
            consumer.assign(tps)
            # It only asks where the partitions end; fetching would cost what is being measured.
            consumer.pause(*tps)
            yield consumer
        finally:
            await consumer.stop()

    async def answers(self, starts: Offsets, ends: Offsets) -> Answers:
        """Read results: when each was written, and what it says."""
        times: dict[str, int] = {}
        counts: Counter[str] = Counter()
        refused: Counter[str] = Counter()
        async for records in self.read(starts, ends):
            for record in records:
                result = orjson.loads(record.value or b"{}")
                command = _name(record, result["command_id"])
                counts[command] += 1
                times[command] = record.timestamp
                if result["outcome"] != "applied":
                    refused[result["error"]["code"]] += 1
        return Answers(times, counts, refused)

    async def sent_times(self, starts: Offsets, ends: Offsets) -> dict[str, int]:
        """Read when each command was written."""
        times = {}
        async for records in self.read(starts, ends):
            for record in records:
                times[_name(record, dict(record.headers)["ce_id"].decode())] = record.timestamp
        return times


def results_topics(merchants: Iterable[str]) -> list[str]:
    """Return the topics of the merchants' results."""
    return [results_topic(merchant) for merchant in merchants]


def _name(record: Record, message_id: str) -> str:
    """Name a command: merchants may use the same ids."""
    return f"{record.topic.split('.')[1]}/{message_id}"


def _justified(merchant: str) -> dict[str, str]:
    return {"merchant_id": merchant, "justification": "a measurement"}


def _family(pid: int | None) -> list[int]:
    if pid is None:
        return []
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []
