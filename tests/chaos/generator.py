"""The load: random commands, each sent one to five times, some malformed, some in transactions that are aborted."""

import asyncio
import heapq
import itertools
import json
import random
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError

Json = dict[str, Any]
SOURCE = "urn:chaos"
PARTITIONS = 2
USERS = 300
PRODUCTS = {"pack100": (100, "10.00"), "pack7": (7, "3.33")}
RATES = {"llm": "0.01", "gpu": "2.5"}
UNITS = {"llm": "TOKEN", "gpu": "SECOND"}
CONFIG: Json = {
    "legal_name": "Acme LLC",
    "registered_address": {"lines": ["1 Main Street"], "city": "Yerevan", "country": "AM"},
    "country": "AM",
    "time_zone": "Asia/Yerevan",
    "locale": "en",
    "contact_email": "books@acme.example",
    "tax_regime": "vat",
    "vat_rates": [{"country": "*", "rate": "20"}],
    "receipt_series_prefix": "R",
    "credit_note_series_prefix": "CN",
    "retention_years": 5,
    "operation_timeout_minutes": 1,
}
CHANNELS = {
    "Purchase.Settled": "purchases",
    "User.SignedUp": "users",
    "Operation.Open": "operations",
    "Operation.RecordAndClose": "operations",
    "Operation.Cancel": "operations",
}
SHARES = {
    "purchase": 22,
    "grant": 14,
    "adjustment": 10,
    "operation": 30,
    "refund": 7,
    "chargeback": 4,
    "signup": 4,
    "lock": 1,
    "configure": 0.3,
    "again": 2,  # an earlier command's business key in a new message
    "conflict": 1,  # an earlier message's identity with other content
    "malformed": 1,
}


@dataclass(frozen=True)
class Message:
    """A record to be sent."""

    topic: str
    key: bytes
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]
    partition: int | None = None


def now() -> str:
    """Return the time as the wire has it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def command(merchant: str, type_: str, payload: Json, message_id: str, key: str | None = None) -> Message:
    """Make a command's message."""
    topic = f"credits.{merchant}.{CHANNELS.get(type_, 'admin')}" if merchant else "credits.control"
    headers = {"ce_specversion": "1.0", "ce_id": message_id, "ce_source": SOURCE, "ce_type": type_, "ce_time": now()}
    headers["content-type"] = "application/json"
    wire = tuple((name, text.encode()) for name, text in headers.items())
    key = key or payload.get("user_id") or payload.get("external_ref") or message_id
    return Message(topic, key.encode(), json.dumps(payload).encode(), wire)


@dataclass
class Shop:
    """What the generator remembers of one merchant's commands, to make later ones that refer to them."""

    merchant: str
    rng: random.Random
    refs: deque[str] = field(default_factory=lambda: deque(maxlen=300))
    disputes: deque[str] = field(default_factory=lambda: deque(maxlen=50))
    sent: deque[tuple[str, Json, str]] = field(default_factory=lambda: deque(maxlen=300))
    numbers: Iterable[int] = field(default_factory=itertools.count)

    def name(self, prefix: str) -> str:
        return f"{prefix}-{next(iter(self.numbers))}"

    def user(self) -> str:
        # A few users get most of the commands, so that they meet in one batch.
        return f"user-{int(USERS * self.rng.random() ** 2)}"

    def make(self) -> list[Message]:
        """Make one random command, or two that belong together, in the order they are to be sent."""
        kind = self.rng.choices(list(SHARES), list(SHARES.values()))[0]
        made: list[Message] = getattr(self, kind)()
        return made

    def _command(self, type_: str, payload: Json) -> Message:
        message_id = self.name("c")
        self.sent.append((type_, payload, message_id))
        return command(self.merchant, type_, payload, message_id)

    def _admin(self, type_: str, payload: Json) -> Message:
        return self._command(type_, payload | {"justification": "chaos", "actor": "chaos"})

    def purchase(self) -> list[Message]:
        code = self.rng.choice(list(PRODUCTS))
        amount = PRODUCTS[code][1] if self.rng.random() < 0.97 else "9.99"
        ref = self.name("ch")
        self.refs.append(ref)
        payload = {
            "user_id": self.user(),
            "external_ref": ref,
            "product_code": code,
            "payment_method": "card",
            "order_placed_at": now(),
            "settled_at": now(),
            "pricing_snapshot": {"country": "AM", "amount": amount, "currency": "USD"},
            "buyer": {"name": "Ada", "country": "AM"},
        }
        return [self._command("Purchase.Settled", payload)]

    def grant(self) -> list[Message]:
        credits = self.rng.randint(1, 50)
        payload = {"grant_id": self.name("g"), "user_id": self.user(), "credits": credits, "access_period_days": 30}
        return [self._admin("Grant.Apply", payload)]

    def adjustment(self) -> list[Message]:
        delta = self.rng.choice((-1, 1)) * self.rng.randint(1, 60)
        payload: Json = {"adjustment_id": self.name("a"), "user_id": self.user(), "credits_delta": delta}
        if delta > 0:
            payload["access_period_days"] = 10
        return [self._admin("Adjustment.Apply", payload)]

    def operation(self) -> list[Message]:
        user, operation_id, code = self.user(), self.name("op"), self.rng.choice(list(RATES))
        opened = {"user_id": user, "operation_id": operation_id, "operation_code": code}
        made = [self._command("Operation.Open", opened)]
        fate = self.rng.random()
        if fate < 0.8:
            amount = str(self.rng.randint(1, 5000) if code == "llm" else self.rng.randint(1, 20))
            closed = {"user_id": user, "operation_id": operation_id, "resource_amount": amount}
            closed |= {"resource_unit": UNITS[code], "completed_at": now()}
            made.append(self._command("Operation.RecordAndClose", closed))
        elif fate < 0.95:
            made.append(self._command("Operation.Cancel", {"user_id": user, "operation_id": operation_id}))
        if self.rng.random() < 0.1:
            made.reverse()
        return made

    def refund(self) -> list[Message]:
        if not self.refs:
            return self.purchase()
        payload: Json = {"refund_id": self.name("r"), "external_ref": self.rng.choice(self.refs)}
        if self.rng.random() < 0.7:
            payload["amount"] = f"{self.rng.randint(1, 400) / 100:.2f}"
        return [self._admin("Refund.Apply", payload)]

    def chargeback(self) -> list[Message]:
        if self.disputes and self.rng.random() < 0.3:
            return [self._admin("Chargeback.Reverse", {"dispute_id": self.disputes.popleft()})]
        if not self.refs:
            return self.purchase()
        dispute = self.name("d")
        self.disputes.append(dispute)
        return [self._admin("Chargeback.Apply", {"dispute_id": dispute, "external_ref": self.rng.choice(self.refs)})]

    def signup(self) -> list[Message]:
        return [self._command("User.SignedUp", {"user_id": self.user()})]

    def lock(self) -> list[Message]:
        user = self.user()
        return [self._admin("Account.Lock", {"user_id": user}), self._admin("Account.Unlock", {"user_id": user})]

    def configure(self) -> list[Message]:
        legal_name = f"Acme {self.rng.randint(1, 9)} LLC"
        return [self._command("Merchant.Configure", {"config": CONFIG | {"legal_name": legal_name}, "actor": "chaos"})]

    def again(self) -> list[Message]:
        if not self.sent:
            return self.grant()
        type_, payload, _ = self.rng.choice(self.sent)
        return [command(self.merchant, type_, payload, self.name("again"))]

    def conflict(self) -> list[Message]:
        grants = [one for one in self.sent if one[0] == "Grant.Apply"]
        if not grants:
            return self.grant()
        type_, payload, message_id = self.rng.choice(grants)
        return [command(self.merchant, type_, payload | {"credits": payload["credits"] + 1}, message_id)]

    def malformed(self) -> list[Message]:
        good = self.grant()[0]
        self.sent.pop()
        values = (
            b"",
            None,
            b"{",
            b"\xff\xfe",
            b'{"user_id": NaN}',
            b"[]",
            b'{"a":1,"a":2}',
            b"x" * 70_000,
            b"\xc3\x01",
        )
        broken = replace(good, value=self.rng.choice(values))
        match self.rng.randrange(4):
            case 0:
                return [replace(broken, headers=())]
            case 1:
                return [replace(good, topic=f"credits.{self.merchant}.purchases")]
            case 2:
                kept = tuple(header for header in good.headers if header[0] != "ce_id")
                return [replace(broken, headers=kept)]
            case _:
                return [broken]


class Load:
    """Sends to all shops at changing rates until it is stopped."""

    def __init__(self, bootstrap_servers: str, seed: int) -> None:
        self._servers = bootstrap_servers
        self._rng = random.Random(seed)
        self.shops: list[Shop] = []
        self.sent = self.aborted = self.transactions = 0
        self._later: list[tuple[float, int, Message]] = []
        self._numbers = itertools.count()
        self._pending: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def start_producer(self) -> None:
        self._producer = AIOKafkaProducer(
            bootstrap_servers=self._servers, linger_ms=1, request_timeout_ms=20_000, metadata_max_age_ms=5_000
        )
        await self._producer.start()

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._run_transactions())]

    def add(self, merchant: str) -> None:
        self.shops.append(Shop(merchant, random.Random(self._rng.random())))

    async def stop(self) -> None:
        """Send what was still to be sent, and wait for the broker to have it."""
        self._stopping = True
        await asyncio.gather(*self._tasks)
        while self._later:
            await self.send(heapq.heappop(self._later)[2])
        while self._pending:
            await asyncio.wait(self._pending)
        await self._producer.stop()

    async def send(self, message: Message) -> None:
        """Send one message, again until the broker has it."""
        task = asyncio.create_task(self._send(message))
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)
        if len(self._pending) > 2000:
            await asyncio.wait(self._pending, return_when=asyncio.FIRST_COMPLETED)

    async def _send(self, message: Message) -> None:
        while True:
            try:
                await self._producer.send_and_wait(
                    message.topic,
                    message.value,
                    message.key,
                    partition=message.partition,
                    headers=list(message.headers),
                )
                self.sent += 1
                return
            except KafkaError:
                await asyncio.sleep(0.5)

    def _plan(self, message: Message) -> None:
        """Have a message delivered once more to five times, at once or later, seldom to the other partition."""
        loop = asyncio.get_running_loop()
        for _ in range(self._rng.choices(range(5), (60, 20, 10, 6, 4))[0]):
            delay = self._rng.choice((0.0, 0.0, self._rng.uniform(0, 3), self._rng.uniform(3, 25)))
            other = self._rng.randrange(PARTITIONS) if self._rng.random() < 0.2 else None
            item = (loop.time() + delay, next(self._numbers), replace(message, partition=other))
            heapq.heappush(self._later, item)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        rate, until = 50.0, 0.0
        while not self._stopping:
            if loop.time() > until:
                rate, until = self._rng.choice((5.0, 40.0, 100.0, 250.0)), loop.time() + self._rng.uniform(1, 5)
                burst = 400 if self._rng.random() < 0.2 else 0
            else:
                burst = 0
            for _ in range(max(1, round(rate * 0.1)) + burst):
                for message in self._rng.choice(self.shops).make():
                    await self.send(message)
                    self._plan(message)
            while self._later and self._later[0][0] <= loop.time():
                await self.send(heapq.heappop(self._later)[2])
            await asyncio.sleep(0.1)

    async def _run_transactions(self) -> None:
        producer: AIOKafkaProducer | None = None
        while not self._stopping:
            await asyncio.sleep(self._rng.uniform(0.3, 2))
            try:
                async with asyncio.timeout(20):
                    if producer is None:
                        producer = AIOKafkaProducer(
                            bootstrap_servers=self._servers, transactional_id=f"chaos-{self._rng.random()}"
                        )
                        await producer.start()
                    await self._transaction(producer)
            except (KafkaError, TimeoutError, AssertionError):
                if producer is not None:
                    with suppress(Exception):
                        async with asyncio.timeout(5):
                            await producer.stop()
                producer = None
        if producer is not None:
            await producer.stop()

    async def _transaction(self, producer: AIOKafkaProducer) -> None:
        shop = self._rng.choice(self.shops)
        aborting = self._rng.random() < 0.35
        await producer.begin_transaction()
        for _ in range(self._rng.randint(1, 8)):
            messages = shop.make()
            if aborting:
                # Never sent again by accident: an aborted command must not have any effect.
                messages = [command(shop.merchant, "User.SignedUp", {"user_id": "x"}, shop.name("aborted"))]
            for message in messages:
                await producer.send(message.topic, message.value, message.key, headers=list(message.headers))
        if aborting:
            await producer.abort_transaction()
            self.aborted += 1
        else:
            await producer.commit_transaction()
        self.transactions += 1


class Ear:
    """Listens to results, to know when somebody's probes are answered."""

    def __init__(self, bootstrap_servers: str) -> None:
        self._servers = bootstrap_servers
        self._topics: set[str] = set()
        self._waiting: dict[str, asyncio.Future[Json]] = {}
        self.heard = 0

    async def start(self) -> None:
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=self._servers,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            metadata_max_age_ms=2_000,
        )
        await self._consumer.start()
        self.listen("credits.control.results")
        self._task = asyncio.create_task(self._run())

    def listen(self, topic: str) -> None:
        self._topics.add(topic)
        self._consumer.subscribe(sorted(self._topics))

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._consumer.stop()

    async def end_offsets(self, partitions: list[TopicPartition]) -> dict[TopicPartition, int]:
        ends: dict[TopicPartition, int] = await self._consumer.end_offsets(partitions)
        return ends

    def expect(self, message_id: str) -> asyncio.Future[Json]:
        """Return a future of the next result of a message."""
        future: asyncio.Future[Json] = asyncio.get_running_loop().create_future()
        self._waiting[message_id] = future
        return future

    async def _run(self) -> None:
        while True:
            try:
                fetched = await self._consumer.getmany(timeout_ms=100)
            except KafkaError:
                await asyncio.sleep(0.2)
                continue
            for records in fetched.values():
                for record in records:
                    self.heard += 1
                    if self._waiting:
                        self._answer(json.loads(record.value))

    def _answer(self, body: Json) -> None:
        future = self._waiting.pop(body["command_id"], None)
        if future is not None and not future.done():
            future.set_result(body)
