"""The Faust shell on a real Kafka: worker processes with a trivial handler, see helpers/transport_worker.py."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from rich.console import Console

from console.kafka import Kafka
from console.processes import free_port
from workers.admin import TopicMismatchError, TopicSpec, ensure_topics
from workers.lanes import Lease
from workers.publisher import LeaseEndedError, OutMessage, Publisher

ROOT = Path(__file__).parents[2]
PARTITIONS = 4


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    state = tmp_path_factory.mktemp("transport") / ".credits"
    for name in ("data", "run", "logs"):
        (state / name).mkdir(parents=True)
    jars = Path(os.environ.get("CREDITS_JARS", ROOT / ".credits" / "jars"))
    broker = Kafka(state, jars, Console(stderr=True))
    broker.start()
    yield broker
    broker.kill()


class Cluster:
    """Some merchants' topics, their producer, and worker processes of one consumer group."""

    def __init__(self, kafka: str, folder: Path) -> None:
        self.kafka = kafka  # its address
        self.folder = folder
        self.group = f"test-{folder.name}-{time.monotonic_ns()}"
        self.merchants: dict[str, list[str]] = {}
        self.sent: dict[str, dict[tuple[str, int], list[int]]] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.ports: dict[str, int] = {}
        self.publisher = Publisher(kafka)

    def topic(self, merchant: str, name: str = "in") -> str:
        return f"{self.group}.{merchant or 'control'}.{name}"

    async def add(self, *merchants: str, names: tuple[str, ...] = ("in",)) -> None:
        """Make topics first, tell the workers of them then, as a registration does."""
        topics = {merchant: [self.topic(merchant, name) for name in names] for merchant in merchants}
        await ensure_topics(self.kafka, {name: TopicSpec(PARTITIONS) for made in topics.values() for name in made})
        self.merchants |= topics
        part = self.folder / "merchants.json.part"
        part.write_text(json.dumps(self.merchants))
        part.replace(self.folder / "merchants.json")

    async def send(self, merchant: str, count: int, first: int = 0) -> None:
        """Send numbered messages over all partitions of all topics of a merchant."""
        topics = self.merchants[merchant]
        await self.publisher.publish(
            [
                OutMessage(topics[i % len(topics)], str(i).encode(), str(i).encode(), partition=i % PARTITIONS)
                for i in range(first, first + count)
            ]
        )

    def start(self, name: str, **env: str) -> None:
        self.ports[name] = free_port()
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "error::RuntimeWarning",
            "KAFKA_BOOTSTRAP_SERVERS": self.kafka,
            "CREDITS_CONTROL_DATABASE_URL": "unused",
            "CREDITS_GROUP": self.group,
            "CREDITS_SESSION_TIMEOUT": "6",
            "CREDITS_WEB_PORT": str(self.ports[name]),
            "TEST_FOLDER": str(self.folder),
            "TEST_NAME": name,
            **env,
        }
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, str(Path(__file__).parent / "helpers" / "transport_worker.py")],
                env=environment,
                stdout=log,
                stderr=log,
            )

    def get(self, name: str, path: str = "/state", method: str = "GET") -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self.ports[name]}{path}", method=method)
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return json.load(answer)
        except OSError:
            return {"ready": False, "lag": -1, "assigned": {}, "counters": {"records": 0}}

    async def until(self, condition: Callable[[], Any], limit: float, what: str) -> float:
        """Wait for a condition and return how many seconds it took."""
        began = time.monotonic()
        while not await asyncio.to_thread(condition):
            for name, process in self.processes.items():
                if process.poll() not in (None, 0, -signal.SIGKILL):
                    pytest.fail(f"{name} ended with {process.returncode}\n{self.log(name)}")
            if time.monotonic() - began > limit:
                states = {name: self.get(name) for name in self.processes}
                pytest.fail(f"not in {limit} s: {what}\n{states}\n" + "\n".join(map(self.log, self.processes)))
            await asyncio.sleep(0.02)
        return time.monotonic() - began

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-5000:]

    async def ready(self, *names: str) -> float:
        """Wait until these workers own all partitions of all merchants between them."""
        total = sum(len(topics) for topics in self.merchants.values()) * PARTITIONS

        def complete() -> bool:
            states = [self.get(name) for name in names]
            return all(s["ready"] for s in states) and sum(sum(s["assigned"].values()) for s in states) == total

        return await self.until(complete, 40, "all partitions assigned")

    def lines(self, merchant: str) -> list[dict[str, Any]]:
        keys = ("merchant", "generation", "batch", "topic", "partition", "offset", "value", "timestamp", "worker")
        found = []
        for file in sorted(self.folder.glob("*.records")):
            # The last line of a killed worker may be half written.
            entries = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("]")]
            found += [dict(zip(keys, [*entry, file.stem], strict=True)) for entry in entries if entry[0] == merchant]
        return found

    def seen(self, merchant: str) -> set[int]:
        return {int(line["value"]) for line in self.lines(merchant)}

    async def all_seen(self, merchant: str, count: int, limit: float = 30) -> float:
        return await self.until(
            lambda: self.seen(merchant) >= set(range(count)), limit, f"{count} records of {merchant} seen"
        )

    async def no_lag(self, *names: str, limit: float = 15) -> float:
        return await self.until(lambda: sum(self.get(name)["lag"] for name in names) == 0, limit, "no lag")

    def assert_order_kept(self, merchant: str) -> None:
        """In each worker and generation each partition's records come in order, from the first on without repeats."""
        last: dict[tuple[Any, ...], int] = {}
        for line in self.lines(merchant):
            key = (line["worker"], line["generation"], line["topic"], line["partition"])
            assert line["offset"] > last.get(key, -1), f"{line} after {last[key]}"
            last[key] = line["offset"]

    async def stop(self, name: str, sent: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """Send a signal and return the exit code and how long the end took."""
        began = time.monotonic()
        process = self.processes.pop(name)
        process.send_signal(sent)
        return await asyncio.to_thread(process.wait, 40), time.monotonic() - began


@pytest.fixture
async def cluster(kafka: Kafka, tmp_path: Path) -> AsyncIterator[Cluster]:
    it = Cluster(kafka.bootstrap_servers, tmp_path)
    await it.publisher.start()
    yield it
    for process in it.processes.values():
        process.kill()
        process.wait()
    await it.publisher.stop()


async def together(*work: Awaitable[Any]) -> None:
    await asyncio.gather(*work)


async def test_all_records_are_delivered_in_partition_order_by_two_workers_that_share_them(cluster: Cluster) -> None:
    await cluster.add("", "a", "b", names=("x", "y"))
    await cluster.send("a", 4000)
    cluster.start("one")
    cluster.start("two")
    await cluster.ready("one", "two")

    await together(cluster.send("b", 4000), cluster.send("a", 4000, first=4000), cluster.send("", 100))

    await together(cluster.all_seen("a", 8000), cluster.all_seen("b", 4000), cluster.all_seen("", 100))
    await cluster.no_lag("one", "two")
    for merchant in ("", "a", "b"):
        cluster.assert_order_kept(merchant)
    assert {line["worker"] for line in cluster.lines("b")} == {"one", "two"}


async def test_a_topic_added_at_run_time_is_served_within_ten_seconds(cluster: Cluster) -> None:
    await cluster.add("", "a")
    cluster.start("one")
    cluster.start("two")
    await cluster.ready("one", "two")

    began = time.monotonic()
    await cluster.add("new", "newer")
    await together(cluster.send("new", 100), cluster.send("newer", 100), cluster.send("a", 1000))
    await together(*[cluster.all_seen(merchant, 100, 10) for merchant in ("new", "newer")], cluster.all_seen("a", 1000))

    print(f"served {time.monotonic() - began:.1f} s after registration")
    assert time.monotonic() - began < 10
    cluster.assert_order_kept("new")


async def test_a_killed_worker_loses_nothing(cluster: Cluster) -> None:
    await cluster.add("", "a", "b")
    cluster.start("one")
    cluster.start("two")
    await cluster.ready("one", "two")

    await together(cluster.send("a", 5000), cluster.send("b", 5000))
    await cluster.until(lambda: len(cluster.lines("a")) > 1000, 20, "some records")
    cluster.processes["one"].kill()
    await together(cluster.send("a", 5000, first=5000), cluster.send("b", 5000, first=5000))

    seconds = await cluster.all_seen("a", 10_000, 40)
    await cluster.all_seen("b", 10_000)
    await cluster.no_lag("two")
    print(f"the other worker had everything {seconds:.1f} s after the kill")
    for merchant in ("a", "b"):
        cluster.assert_order_kept(merchant)


async def test_sigterm_finishes_what_is_under_way_and_exits_with_zero(cluster: Cluster) -> None:
    await cluster.add("", "drain")
    cluster.start("one")
    await cluster.ready("one")
    await cluster.send("drain", 400)
    await cluster.until(lambda: cluster.get("one")["lag"] > 0, 10, "records fetched")

    code, seconds = await cluster.stop("one")

    assert code == 0, cluster.log("one")
    assert seconds < 20
    under_way = cluster.lines("drain")
    assert under_way
    idle = [json.loads(line) for line in (cluster.folder / "one.idle").read_text().splitlines()]
    assert idle[-1]["idle"] == "drain"
    cluster.start("two")
    await cluster.all_seen("drain", 400)
    await cluster.no_lag("two")
    # What was finished was committed, so that nobody got it again.
    offsets = [(line["partition"], line["offset"]) for line in cluster.lines("drain")]
    assert len(offsets) == len(set(offsets))


async def test_after_a_seek_records_come_again_exactly_from_there(cluster: Cluster) -> None:
    await cluster.add("", "seek")
    cluster.start("one", CREDITS_BATCH_MAX="50")
    await cluster.ready("one")

    await together(*[cluster.send("seek", 200, first=200 * i) for i in range(10)])

    await cluster.all_seen("seek", 2000)
    await cluster.no_lag("one")
    for partition in range(PARTITIONS):
        offsets = [line["offset"] for line in cluster.lines("seek") if line["partition"] == partition]
        breaks = [i for i in range(1, len(offsets)) if offsets[i] != offsets[i - 1] + 1]
        assert len(breaks) == 1, (partition, [offsets[i] for i in breaks])
        assert offsets[breaks[0]] == 5
        assert offsets[-1] == 499


async def test_aborted_transactions_are_not_delivered_and_lag_reaches_zero(cluster: Cluster) -> None:
    await cluster.add("", "a")
    cluster.start("one")
    await cluster.ready("one")
    producer = AIOKafkaProducer(bootstrap_servers=cluster.kafka, transactional_id=cluster.group)
    await producer.start()

    committed = set()
    for i in range(30):
        await producer.begin_transaction()
        for j in range(3):
            await producer.send(cluster.topic("a"), str(i).encode(), partition=(i + j) % PARTITIONS)
        if i % 3 == 1:
            await producer.abort_transaction()
        else:
            committed.add(i)
            await producer.commit_transaction()
    await producer.stop()

    await cluster.until(lambda: cluster.seen("a") >= committed, 20, "committed records seen")
    await cluster.no_lag("one")
    assert cluster.seen("a") == committed
    cluster.assert_order_kept("a")
    # Committed as well: another worker has nothing to do.
    count = len(cluster.lines("a"))
    code, _ = await cluster.stop("one")
    assert code == 0
    cluster.start("two")
    await cluster.ready("two")
    await cluster.no_lag("two")
    assert len(cluster.lines("a")) == count


async def test_a_blocked_merchant_does_not_delay_another(cluster: Cluster) -> None:
    slow = [f"slow{i}" for i in range(5)]
    await cluster.add("", "a", *slow)
    cluster.start("one", TEST_BLOCK_SECONDS="15", CREDITS_BATCH_MAX="100")
    await cluster.ready("one")
    for merchant in slow:
        await cluster.publisher.publish([OutMessage(cluster.topic(merchant), b"k", b"block")])

    worst = 0.0
    for i in range(10):
        await together(*[cluster.send(merchant, 200, first=200 * i) for merchant in slow])
        began = time.monotonic()
        await cluster.send("a", 1, first=i)
        await cluster.until(partial(lambda i: i in cluster.seen("a"), i), 10, "the other merchant's record")
        worst = max(worst, time.monotonic() - began)

    print(f"longest wait of the other merchant {worst * 1000:.0f} ms")
    assert worst < 1.2
    assert not cluster.lines("slow0")
    await cluster.until(lambda: len(cluster.lines("slow0")) == 2001, 30, "the blocked merchant catches up")


async def test_a_held_merchant_is_not_worked_on_until_it_is_released(cluster: Cluster) -> None:
    await cluster.add("", "a", "b")
    (cluster.folder / "held.json").write_text('["a"]')
    cluster.start("one", CREDITS_BATCH_MAX="50")
    await cluster.ready("one")

    await together(cluster.send("a", 3000), cluster.send("b", 3000))
    await cluster.all_seen("b", 3000)
    cluster.start("two", CREDITS_BATCH_MAX="50")
    await cluster.ready("one", "two")
    await cluster.send("b", 3000, first=3000)
    await cluster.all_seen("b", 6000)
    await cluster.stop("two")
    await cluster.ready("one")

    assert not cluster.lines("a")
    (cluster.folder / "held.json").write_text("[]")
    await cluster.all_seen("a", 3000)
    await cluster.no_lag("one")
    cluster.assert_order_kept("a")


async def test_a_lone_record_is_worked_on_at_once(cluster: Cluster) -> None:
    await cluster.add("", "a")
    cluster.start("one")
    await cluster.ready("one")
    await cluster.send("a", 10)
    await cluster.all_seen("a", 10)

    waits = []
    for i in range(10, 40):
        began = time.monotonic()
        await cluster.send("a", 1, first=i)
        while i not in cluster.seen("a"):
            await asyncio.sleep(0.001)
        waits.append(time.monotonic() - began)

    waits.sort()
    print(f"send to handled: median {waits[15] * 1000:.1f} ms, longest {waits[-1] * 1000:.1f} ms")
    assert waits[15] < 0.05


async def test_thousands_of_records_a_second_pass_through(cluster: Cluster) -> None:
    merchants = [f"fast{i}" for i in range(4)]
    await cluster.add("", *merchants)
    for merchant in merchants:
        messages = [
            OutMessage(cluster.topic(merchant), None, b"x" * 300, partition=i % PARTITIONS) for i in range(50_000)
        ]
        await cluster.publisher.publish(messages)

    cluster.start("one", CREDITS_LOG_LEVEL="WARNING")
    await cluster.until(lambda: cluster.get("one")["counters"]["records"] > 0, 30, "the first record")
    began = time.monotonic()
    already = cluster.get("one")["counters"]["records"]
    await cluster.until(lambda: cluster.get("one")["counters"]["records"] == 200_000, 60, "200,000 records")
    seconds = time.monotonic() - began

    counters = cluster.get("one")["counters"]
    print(f"{(200_000 - already) / seconds:,.0f} records/s, {200_000 / counters['batches']:,.0f} a batch, {counters}")
    assert counters["stale_drops"] == 0
    await cluster.no_lag("one")


async def test_a_topic_that_is_missing_stops_nobody_and_is_served_once_it_exists(cluster: Cluster) -> None:
    await cluster.add("", "a")
    listed = cluster.merchants | {"ghost": [cluster.topic("ghost")]}
    (cluster.folder / "merchants.json").write_text(json.dumps(listed))
    cluster.start("one")
    await cluster.ready("one")
    await cluster.send("a", 100)
    await cluster.all_seen("a", 100)

    await cluster.add("ghost")
    await cluster.send("ghost", 100)

    # As soon as the metadata are asked for again.
    await cluster.all_seen("ghost", 100, 45)


async def test_the_web_server_is_ours_alone(cluster: Cluster) -> None:
    await cluster.add("")
    cluster.start("one")
    await cluster.ready("one")

    for path in ("/router", "/table", "/stats", "/graph", "/performance", "/performance/"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            await asyncio.to_thread(urllib.request.urlopen, f"http://127.0.0.1:{cluster.ports['one']}{path}")


async def test_a_broker_that_was_away_is_waited_for_by_worker_and_publisher(cluster: Cluster, kafka: Kafka) -> None:
    await cluster.add("", "a")
    cluster.start("one")
    await cluster.ready("one")
    await cluster.send("a", 100)
    await cluster.all_seen("a", 100)
    lease = Lease(1, "test", (), object())

    await asyncio.to_thread(kafka.kill)
    published = asyncio.create_task(cluster.send("a", 100, first=100))
    given_up = asyncio.create_task(
        cluster.publisher.publish([OutMessage(cluster.topic("a"), b"k", b"7")], lease), name="given up"
    )
    await cluster.until(lambda: not cluster.get("one")["ready"], 20, "not ready without the broker")
    lease.end()
    with pytest.raises(LeaseEndedError):
        await given_up
    assert not published.done()
    await asyncio.to_thread(kafka.start)

    await published
    await cluster.all_seen("a", 200, 40)
    await cluster.ready("one")
    await cluster.no_lag("one")
    assert cluster.processes["one"].poll() is None


async def test_topics_are_made_once_and_never_with_another_number_of_partitions(cluster: Cluster) -> None:
    topic = cluster.topic("made")
    await ensure_topics(cluster.kafka, {topic: TopicSpec(2, {"message.timestamp.type": "LogAppendTime"})})
    await ensure_topics(cluster.kafka, {topic: TopicSpec(2)})

    with pytest.raises(TopicMismatchError):
        await ensure_topics(cluster.kafka, {topic: TopicSpec(3)})


async def test_a_reply_to_a_topic_that_does_not_exist_is_dropped_and_makes_no_topic(cluster: Cluster) -> None:
    replies = cluster.topic("a", "replies")
    began = time.monotonic()

    assert not await cluster.publisher.publish_quietly(OutMessage(replies, b"k", b"v"))

    assert time.monotonic() - began < 3
    await ensure_topics(cluster.kafka, {replies: TopicSpec(1)})
    # That it did not exist is believed for some seconds.
    while not await cluster.publisher.publish_quietly(OutMessage(replies, b"k", b"v")):
        assert time.monotonic() - began < 10
        await asyncio.sleep(0.1)
