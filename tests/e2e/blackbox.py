"""A plain client of the service. It knows the wire contract alone and imports nothing of the product."""

import asyncio
import hashlib
import json
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import fastavro
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.structs import ConsumerRecord

Json = dict[str, Any]

WAIT_SECONDS_MAX = 30.0
JSON = "application/json"
STRUCTURED = "application/cloudevents+json"
AVRO = "application/avro"
SOURCE = "urn:shop"
CONTROL = "credits.control"
CONTROL_RESULTS = "credits.control.results"

_ADMIN = {
    "Grant.Apply", "Adjustment.Apply", "Refund.Apply", "Chargeback.Apply", "Chargeback.Reverse", "Product.Create",
    "Product.Archive", "ProductPrice.Create", "ProductPrice.Archive", "OperationType.CreateWithArchival",
    "OperationType.Archive", "Merchant.Configure", "UserRole.Assign", "UserRole.Revoke", "Account.Lock",
    "Account.Unlock", "User.Erase", "Receipt.AttachFiscal",
}  # fmt: skip
_CONTROL = {"Merchant.Register", "Merchant.Suspend", "Merchant.Resume", "Clock.Advance"}
_JUSTIFIED = {
    "Grant.Apply", "Adjustment.Apply", "Refund.Apply", "Chargeback.Apply", "Chargeback.Reverse", "Account.Lock",
    "Account.Unlock", "User.Erase", "Merchant.Suspend", "Merchant.Resume",
}  # fmt: skip
CHANNELS = (
    dict.fromkeys(_ADMIN, "admin")
    | {"Purchase.Settled": "purchases", "User.SignedUp": "users"}
    | dict.fromkeys(("Operation.Open", "Operation.RecordAndClose", "Operation.Cancel"), "operations")
    | dict.fromkeys(("Lot.Expire", "Operation.Expire", "Command.Resolve"), "jobs")
)
# The record key is the user where the command has one, else the business key or code.
_KEYS = (
    "user_id", "external_ref", "refund_id", "dispute_id", "product_code", "operation_code", "receipt_number", "subject",
    "merchant_id", "id",
)  # fmt: skip

CONFIG: Json = {
    "legal_name": "Acme LLC",
    "registered_address": {"lines": ["1 Main Street"], "city": "Yerevan", "postal_code": "0001", "country": "AM"},
    "country": "AM",
    "time_zone": "Asia/Yerevan",
    "locale": "en",
    "contact_email": "books@acme.example",
    "tax_regime": "vat",
    "vat_rates": [{"country": "*", "rate": "20"}],
    "receipt_series_prefix": "R",
    "credit_note_series_prefix": "CN",
    "retention_years": 5,
    "operation_timeout_minutes": 15,
    "late_close": "refuse",
    "refund_policy": {"shortfall": "debit"},
    "chargeback_policy": {"shortfall": "debit", "credit_note": "never"},
}


def _load_schemas() -> tuple[dict[str, Any], dict[bytes, Any]]:
    folder = Path(__file__).parents[2] / "schemas" / "avro"
    by_type: dict[str, Any] = {}
    by_fingerprint: dict[bytes, Any] = {}
    for file in sorted(folder.glob("*.avsc")):
        raw = json.loads(file.read_text())
        canonical = fastavro.schema.to_parsing_canonical_form(raw)
        by_type[file.stem] = fastavro.parse_schema(raw)
        by_fingerprint[rabin(canonical.encode())] = by_type[file.stem]
    return by_type, by_fingerprint


def rabin(data: bytes) -> bytes:
    """Return the CRC-64-AVRO fingerprint of the Avro specification, as the 8 little-endian bytes of an envelope."""
    empty = 0xC15D213AA4D7A795
    value = empty
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (empty if value & 1 else 0)
    return value.to_bytes(8, "little")


SCHEMAS, _SCHEMAS_BY_FINGERPRINT = _load_schemas()
_FINGERPRINTS = {id(schema): fingerprint for fingerprint, schema in _SCHEMAS_BY_FINGERPRINT.items()}


def encode_avro(type_: str, payload: Json) -> bytes:
    """Encode in Avro single-object encoding."""
    out = BytesIO()
    fastavro.schemaless_writer(out, SCHEMAS[type_], payload)
    return b"\xc3\x01" + _FINGERPRINTS[id(SCHEMAS[type_])] + out.getvalue()


def decode_avro(value: bytes) -> Json:
    """Decode Avro single-object encoding; nulls are the same as absent."""
    assert value[:2] == b"\xc3\x01"
    decoded = fastavro.schemaless_reader(BytesIO(value[10:]), _SCHEMAS_BY_FINGERPRINT[value[2:10]], None)
    without: Json = without_nulls(decoded)
    return without


def without_nulls(value: Any) -> Any:
    """Return the value without null members, at any depth."""
    if isinstance(value, dict):
        return {name: without_nulls(member) for name, member in value.items() if member is not None}
    if isinstance(value, list):
        return [without_nulls(member) for member in value]
    return value


def rfc3339(moment: datetime) -> str:
    """Format a moment as the wire does."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def parse_time(text: str) -> datetime:
    """Parse a moment of the wire; it must be UTC with microseconds."""
    assert text.endswith("Z"), text
    assert len(text) == len("2026-01-01T00:00:00.000000Z"), text
    return datetime.fromisoformat(text)


def name(prefix: str = "x") -> str:
    """Return an id nobody used before."""
    return f"{prefix}-{uuid.uuid4().hex[:12]}"


def traced() -> str:
    """Return a new W3C trace context."""
    return f"00-{uuid.uuid4().hex}-{uuid.uuid4().hex[:16]}-01"


def result_id(merchant: str, source: str, id_: str, fingerprint_hex: str) -> str:
    """Return the ce_id that a result must have."""
    namespace = uuid.uuid5(uuid.NAMESPACE_URL, f"credits:{merchant}")
    return str(uuid.uuid5(namespace, f"{source}\n{id_}\n{fingerprint_hex}"))


@dataclass(frozen=True)
class Sent:
    """A message as the broker took it."""

    topic: str
    partition: int
    offset: int
    source: str
    id: str
    value: bytes | None
    key: bytes | None

    @property
    def merchant(self) -> str:
        return self.topic.split(".")[1]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.value or b"").hexdigest()


@dataclass(frozen=True)
class Received:
    """A message of an output topic."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes
    headers: dict[str, str]
    body: Json = field(repr=False)

    @classmethod
    def of(cls, record: ConsumerRecord) -> "Received":
        headers = {header: value.decode() for header, value in record.headers}
        body = decode_avro(record.value) if headers.get("content-type") == AVRO else json.loads(record.value)
        return cls(
            record.topic, record.partition, record.offset, record.timestamp, record.key, record.value, headers, body
        )


class Bus:
    """Sends commands and remembers everything that the watched output topics said."""

    def __init__(self, bootstrap_servers: str) -> None:
        self._bootstrap_servers = bootstrap_servers
        self.topics: dict[str, list[Received]] = defaultdict(list)
        self._results: dict[tuple[str, str, str], list[Received]] = defaultdict(list)
        self._wanted: dict[str, int] = {}
        self._news = asyncio.Condition()
        self._watched = asyncio.Event()

    async def start(self) -> None:
        """Connect."""
        self.producer = AIOKafkaProducer(
            bootstrap_servers=self._bootstrap_servers, max_request_size=2**21, metadata_max_age_ms=5_000
        )
        self.consumer = AIOKafkaConsumer(
            bootstrap_servers=self._bootstrap_servers,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            max_partition_fetch_bytes=2**22,
        )
        await self.producer.start()
        await self.consumer.start()
        self._task = asyncio.create_task(self._listen())

    async def stop(self) -> None:
        """Disconnect."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self.consumer.stop()
        await self.producer.stop()

    async def watch(self, *topics: str, partitions: int) -> None:
        """Listen to topics that exist, from their beginning."""
        self._wanted |= dict.fromkeys(topics, partitions)
        self._watched.clear()
        await asyncio.wait_for(self._watched.wait(), WAIT_SECONDS_MAX)

    def _assign(self) -> None:
        partitions = [TopicPartition(topic, number) for topic, n in self._wanted.items() for number in range(n)]
        self.consumer.assign(partitions)
        # A new assignment forgets where we were.
        for partition in partitions:
            self.consumer.seek(partition, self._next.get(partition, 0))

    async def _listen(self) -> None:
        self._next: dict[TopicPartition, int] = {}
        while True:
            if not self._watched.is_set():
                self._assign()
                self._watched.set()
            if not self.consumer.assignment():
                await asyncio.sleep(0.01)
                continue
            fetched = await self.consumer.getmany(timeout_ms=50)
            for partition, records in fetched.items():
                self._next[partition] = records[-1].offset + 1
                for record in records:
                    self._remember(Received.of(record))
            if fetched:
                async with self._news:
                    self._news.notify_all()

    def _remember(self, message: Received) -> None:
        self.topics[message.topic].append(message)
        if message.headers.get("ce_type") == "Command.Result":
            body = message.body
            self._results[message.topic, body["command_source"], body["command_id"]].append(message)

    async def until(self, what: str, condition: Callable[[], Any], seconds: float = WAIT_SECONDS_MAX) -> Any:
        """Wait until news make the condition true, and return what it returned."""
        try:
            async with asyncio.timeout(seconds):
                async with self._news:
                    while not (answer := condition()):
                        await self._news.wait()
                    return answer
        except TimeoutError:
            self._task.done() and self._task.result()
            raise AssertionError(f"Nothing heard within {seconds} s: {what}") from None

    async def send(
        self,
        topic: str,
        type_: str | None,
        payload: Json | bytes | str | None,
        *,
        key: str | None = None,
        id: str | None = None,  # noqa: A002
        source: str = SOURCE,
        encoding: str = JSON,
        headers: Mapping[str, str | bytes | None] | None = None,
        partition: int | None = None,
    ) -> Sent:
        """Send one message and return it when the broker has it.

        Args:
            topic: the topic.
            type_: the ce_type.
            payload: members, or the bytes themselves.
            key: the record's key.
            id: the ce_id; default a new one.
            source: the ce_source.
            encoding: the content type.
            headers: further headers; None leaves a header out.
            partition: default by the key.
        """
        sending = await self.post(
            topic,
            type_,
            payload,
            key=key,
            id=id,
            source=source,
            encoding=encoding,
            headers=headers,
            partition=partition,
        )
        sent: Sent = await sending()
        return sent

    async def post(
        self,
        topic: str,
        type_: str | None,
        payload: Json | bytes | str | None,
        *,
        key: str | None = None,
        id: str | None = None,  # noqa: A002
        source: str = SOURCE,
        encoding: str = JSON,
        headers: Mapping[str, str | bytes | None] | None = None,
        partition: int | None = None,
    ) -> Callable[[], Any]:
        """Hand one message to the producer; the returned function waits for the broker."""
        id_ = id or str(uuid.uuid4())
        attributes: Json = {"specversion": "1.0", "id": id_, "source": source, "type": type_}
        attributes["time"] = rfc3339(datetime.now(UTC))
        extra = dict(headers or {})
        if encoding == STRUCTURED:
            assert isinstance(payload, dict)
            extensions = {header.removeprefix("ce_"): text for header, text in extra.items() if header[:3] == "ce_"}
            document = attributes | extensions | {"datacontenttype": JSON, "data": payload}
            value: bytes | None = json.dumps(document).encode()
            named: dict[str, Any] = {"content-type": STRUCTURED}
            named |= {header: text for header, text in extra.items() if header[:3] != "ce_"}
        else:
            value = _encoded(type_, payload, encoding)
            named = {f"ce_{attribute}": text for attribute, text in attributes.items()} | {"content-type": encoding}
            named |= extra
        wire = [
            (header, text if isinstance(text, bytes) else text.encode())
            for header, text in named.items()
            if text is not None
        ]
        raw_key = None if key is None else key.encode()
        future = await self.producer.send(topic, value, key=raw_key, headers=wire, partition=partition)

        async def acknowledged() -> Sent:
            taken = await future
            return Sent(topic, taken.partition, taken.offset, source, id_, value, raw_key)

        return acknowledged

    async def results(self, sent: Sent, count: int = 1, seconds: float = WAIT_SECONDS_MAX) -> list[Received]:
        """Wait for so many results of a message."""
        topic = CONTROL_RESULTS if sent.topic == CONTROL else f"credits.{sent.merchant}.results"
        found = self._results[topic, sent.source, sent.id]
        await self.until(f"{count} results of {sent.id} in {sent.topic}", lambda: len(found) >= count, seconds)
        return list(found)

    def heard(self, sent: Sent) -> list[Received]:
        """Return the results of a message that came so far."""
        topic = CONTROL_RESULTS if sent.topic == CONTROL else f"credits.{sent.merchant}.results"
        return list(self._results[topic, sent.source, sent.id])

    async def control(self, type_: str, payload: Json, **options: Any) -> Json:
        """Send a command of the control topic and return its result."""
        sent = await self.send(CONTROL, type_, completed(type_, payload), key=payload["merchant_id"], **options)
        return (await self.results(sent))[-1].body

    async def register(self, *, simulated: bool = False, partitions: int | None = 1, **config: Any) -> "Merchant":
        """Register a new merchant and listen to its topics."""
        merchant_id = "m" + uuid.uuid4().hex[:10]
        merchant = Merchant(self, merchant_id, CONFIG | config, partitions or 4)
        payload: Json = {"merchant_id": merchant_id, "config": merchant.config}
        if partitions is not None:
            payload["partitions"] = partitions
        if simulated:
            payload["simulated"] = True
        result = await self.control("Merchant.Register", payload)
        assert result["outcome"] == "applied", result
        await merchant.watch()
        return merchant


def _encoded(type_: str | None, payload: Json | bytes | str | None, encoding: str) -> bytes | None:
    if isinstance(payload, dict):
        return encode_avro(type_ or "", payload) if encoding == AVRO else json.dumps(payload).encode()
    return payload.encode() if isinstance(payload, str) else payload


def completed(type_: str, payload: Json) -> Json:
    """Add what every administrative command must carry."""
    extra: Json = {"actor": "ops@acme.example"} if type_ in _ADMIN | _CONTROL else {}
    if type_ in _JUSTIFIED:
        extra["justification"] = "as agreed"
    return extra | payload


class Merchant:
    """One merchant, seen from outside."""

    def __init__(self, bus: Bus, merchant_id: str, config: Json, partitions: int) -> None:
        self.bus = bus
        self.partitions = partitions
        self.id = merchant_id
        self.config = config
        self.ahead = timedelta()

    def topic(self, channel: str) -> str:
        """Return the name of one of its topics."""
        return f"credits.{self.id}.{channel}"

    async def watch(self) -> None:
        """Listen to its output topics."""
        await self.bus.watch(*map(self.topic, ("results", "receipts", "dead-letter")), partitions=self.partitions)

    def now(self, seconds: float = 0) -> str:
        """Return the merchant's time, some seconds later or earlier."""
        return rfc3339(datetime.now(UTC) + self.ahead + timedelta(seconds=seconds))

    async def send(self, type_: str, payload: Json, **options: Any) -> Sent:
        """Send a command to its topic."""
        channel = options.pop("channel", None) or CHANNELS[type_]
        payload = completed(type_, payload) if options.pop("complete", True) else payload
        key = options.pop("key", None) or record_key(payload)
        return await self.bus.send(self.topic(channel), type_, payload, key=key, **options)

    async def do(self, type_: str, payload: Json | None = None, /, **members: Any) -> Json:
        """Send a command and return its result."""
        return (await self.bus.results(await self.send(type_, (payload or {}) | members)))[-1].body

    async def applied(self, type_: str, payload: Json | None = None, /, **members: Any) -> Json:
        """Send a command, check that it was applied, and return its result."""
        result = await self.do(type_, payload, **members)
        assert result["outcome"] == "applied", result
        assert "error" not in result
        return result

    async def refused(self, code: str, type_: str, payload: Json | None = None, /, **members: Any) -> Json:
        """Send a command, check that it was refused for this reason, and return its result."""
        result = await self.do(type_, payload, **members)
        assert (result["outcome"], result.get("error", {}).get("code")) == ("rejected", code), result
        return result

    async def together(self, commands: Iterable[tuple[str, Json]]) -> list[Json]:
        """Send commands without waiting between them, and return all results in the same order."""
        sent = [await self.send(type_, payload) for type_, payload in commands]
        return [(await self.bus.results(one))[-1].body for one in sent]

    async def stock(self) -> None:
        """Create a product `pack` (100 credits, USD 10.00) and an operation type `llm` (1 credit a TOKEN)."""
        await self.sellable("pack")
        await self.rate("llm")

    async def configure(self, **changes: Any) -> None:
        """Put a configuration in force that differs from the usual one in these members."""
        config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
        await self.applied("Merchant.Configure", config=config)

    async def sellable(self, code: str, credits: int = 100, amount: str = "10.00", days: int = 30, **more: Any) -> Json:
        """Create a sellable product with one price, for everywhere, in USD."""
        prices = [{"country": "*", "currency": "USD", "amount": amount}]
        members: Json = {"product_code": code, "title": code, "credits": credits, "access_period_days": days}
        return await self.applied("Product.Create", members | {"distribution": "sellable", "prices": prices} | more)

    async def rate(self, code: str, credits_per_unit: str = "1", **more: Any) -> Json:
        """Create a version of an operation type."""
        members = {"operation_code": code, "display_name": code, "resource_unit": "TOKEN"}
        members["credits_per_unit"] = credits_per_unit
        return await self.applied("OperationType.CreateWithArchival", members | more)

    def purchase(self, user: str, product: str = "pack", amount: str = "10.00", **more: Any) -> Json:
        """Return the members of a purchase."""
        snapshot = {"country": more.pop("country", "AM"), "amount": amount, "currency": more.pop("currency", "USD")}
        return {
            "user_id": user,
            "external_ref": name("ch"),
            "product_code": product,
            "payment_method": "card",
            "order_placed_at": self.now(),
            "settled_at": self.now(),
            "pricing_snapshot": snapshot,
        } | more

    async def buy(self, user: str, product: str = "pack", amount: str = "10.00", **more: Any) -> tuple[str, Json]:
        """Settle a purchase; return its external_ref and the result."""
        members = self.purchase(user, product, amount, **more)
        return members["external_ref"], await self.applied("Purchase.Settled", members)

    async def grant(self, user: str, credits: int, days: int = 30) -> Json:
        """Give credits."""
        return await self.applied(
            "Grant.Apply", grant_id=name("g"), user_id=user, credits=credits, access_period_days=days
        )

    async def adjust(self, user: str, delta: int, **more: Any) -> Json:
        """Adjust a balance."""
        return await self.applied(
            "Adjustment.Apply", adjustment_id=name("a"), user_id=user, credits_delta=delta, **more
        )

    async def open(self, user: str, code: str = "llm", **more: Any) -> str:
        """Open an operation and return its id."""
        operation_id: str = more.pop("operation_id", None) or name("op")
        await self.applied("Operation.Open", user_id=user, operation_id=operation_id, operation_code=code, **more)
        return operation_id

    def closing(self, user: str, operation_id: str, amount: str, **more: Any) -> Json:
        """Return the members of a RecordAndClose."""
        return {
            "user_id": user,
            "operation_id": operation_id,
            "resource_amount": amount,
            "resource_unit": "TOKEN",
            "completed_at": self.now(),
        } | more

    async def use(self, user: str, amount: str, code: str = "llm") -> Json:
        """Open an operation and close it."""
        operation_id = await self.open(user, code)
        return await self.applied("Operation.RecordAndClose", self.closing(user, operation_id, amount))

    async def advance(self, seconds: int) -> Json:
        """Move the clock of a simulated merchant forward."""
        result = await self.bus.control("Clock.Advance", {"merchant_id": self.id, "seconds": seconds})
        assert result["outcome"] == "applied", result
        self.ahead += timedelta(seconds=seconds)
        return result

    def said(self, channel: str) -> list[Received]:
        """Return what one of its output topics said so far."""
        return list(self.bus.topics[self.topic(channel)])

    async def document(self, number: str) -> Received:
        """Wait for a document of the receipts topic by its number, its own or, for receipts, receipt_number."""

        def found() -> Received | None:
            return next((one for one in self.said("receipts") if own_number(one) == number), None)

        document: Received = await self.bus.until(f"the document {number}", found)
        return document

    async def dead_letter(self, sent: Sent) -> Received:
        """Wait for the pointer at a message."""
        place = (sent.topic, sent.partition, sent.offset)

        def found() -> Received | None:
            letters = self.said("dead-letter")
            return next(
                (one for one in letters if tuple(one.body[n] for n in ("topic", "partition", "offset")) == place), None
            )

        letter: Received = await self.bus.until(f"a dead letter for {place}", found)
        return letter


def own_number(document: Received) -> str:
    """Return the number of a receipt, a credit note or a correction."""
    body = document.body
    return str(body.get("credit_note_number") or body.get("number") or body["receipt_number"])


def record_key(payload: Json) -> str:
    """Return the key of a command's record."""
    keys = [str(payload[member]) for member in _KEYS if payload.get(member) is not None]
    return keys[0] if keys else next((str(value) for key, value in payload.items() if key.endswith("_id")), "key")
