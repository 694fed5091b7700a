"""The load, made by a process of its own: ``python -m bench.generator`` reads a Spec from stdin.

Batches are built here and handed to the broker whole, which costs a tenth of sending messages one by one: so the
generator takes little of what it is to measure.
"""

import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.partitioner import murmur2

from bench.scenarios import ALL, SOURCE, Command, now, setup

TICK_SECONDS = 0.005
BATCH_BYTES = 64 * 1024


@dataclass(frozen=True)
class Spec:
    """What to send.

    Attributes:
        count: commands of all merchants together; 0 stands for the scenario's setup.
        run: makes the ids of this load different from those of others.
        rate: commands a second, None for as fast as it goes.
    """

    bootstrap_servers: str
    scenario: str
    merchants: list[str]
    count: int
    run: str
    rate: float | None = None


Sendable = tuple[str, int, Command]  # topic, partition, command


def load(spec: Spec) -> Iterator[Sendable]:
    """Return the commands, a pair of each merchant's in turn."""
    scenario = ALL[spec.scenario]
    sources = [setup(scenario) if not spec.count else scenario.make(scenario, spec.run, 0) for _ in spec.merchants]
    names = dict(enumerate(spec.merchants))
    left = spec.count or sys.maxsize
    while names and left > 0:
        for index, merchant in list(names.items()):
            some = list(itertools.islice(sources[index], min(2, left)))
            left -= len(some)
            if not some:
                del names[index]
            for command in some:
                topic = f"credits.{merchant}.{command.channel}"
                yield topic, (murmur2(command.key.encode()) & 0x7FFFFFFF) % scenario.partitions, command


class Sender:
    """Fills a batch for each partition, and sends those that are full, or all at a flush."""

    def __init__(self, producer: AIOKafkaProducer) -> None:
        self._producer = producer
        self._batches: dict[tuple[str, int], Any] = {}
        self._sent: list[asyncio.Future[object]] = []

    async def add(self, topic: str, partition: int, command: Command) -> None:
        """Put a command into its partition's batch."""
        headers = [
            ("ce_specversion", b"1.0"),
            ("ce_id", command.id.encode()),
            ("ce_source", SOURCE.encode()),
            ("ce_type", command.type.encode()),
            ("ce_time", now().encode()),
            ("content-type", b"application/json"),
        ]
        place, key = (topic, partition), command.key.encode()
        batch = self._batches.get(place) or self._producer.create_batch()
        if batch.append(key=key, value=command.value, timestamp=None, headers=headers) is None:
            await self._send(place, batch)
            batch = self._producer.create_batch()
            assert batch.append(key=key, value=command.value, timestamp=None, headers=headers) is not None
        self._batches[place] = batch

    async def _send(self, place: tuple[str, int], batch: Any) -> None:
        topic, partition = place
        self._sent.append(await self._producer.send_batch(batch, topic, partition=partition))

    async def flush(self) -> None:
        """Send what is there; it need not have arrived yet."""
        batches, self._batches = self._batches, {}
        for place, batch in batches.items():
            await self._send(place, batch)

    async def finish(self) -> None:
        """Send what is there and wait until the broker has everything."""
        await self.flush()
        await asyncio.gather(*self._sent)


async def produce(spec: Spec) -> float:
    """Send everything; returns the seconds it took."""
    ready = list(load(spec)) if spec.rate is not None else None
    producer = AIOKafkaProducer(
        bootstrap_servers=spec.bootstrap_servers, acks="all", max_batch_size=BATCH_BYTES, enable_idempotence=True
    )
    await producer.start()
    sender = Sender(producer)
    began = time.perf_counter()
    try:
        if ready is None or spec.rate is None:
            for item in load(spec):
                await sender.add(*item)
        else:
            await _pace(sender, ready, spec.rate, began)
        await sender.finish()
    finally:
        await producer.stop()
    return time.perf_counter() - began


async def _pace(sender: Sender, ready: list[Sendable], rate: float, began: float) -> None:
    """Send at each tick what is due by then; a generator that was held up sends what it missed at once."""
    done = 0
    while done < len(ready):
        due = min(len(ready), int((time.perf_counter() - began) * rate) + 1)
        for item in ready[done:due]:
            await sender.add(*item)
        await sender.flush()
        done = due
        await asyncio.sleep(TICK_SECONDS)


def run(spec: Spec) -> float:
    """Run a generator process to its end; returns the seconds it took, from the first command on. Blocks.

    Raises:
        subprocess.CalledProcessError: it failed; its stderr is ours.
    """
    done = subprocess.run(
        [sys.executable, "-m", "bench.generator"],
        input=json.dumps(asdict(spec)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    seconds: float = json.loads(done.stdout)["seconds"]
    return seconds


def main() -> None:
    spec = Spec(**json.loads(sys.stdin.read()))
    print(json.dumps({"seconds": asyncio.run(produce(spec))}))


if __name__ == "__main__":
    main()
