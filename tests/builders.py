"""Makes merchants in real databases and writes their history through the real core, without Kafka."""

import itertools
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from aiokafka import TopicPartition as TP
from sqlalchemy.ext.asyncio import AsyncEngine

import merchants.registry
import merchants.store
from ledger.model import LotsNeeded
from ledger.store import LOTS_AT_FIRST
from merchants.databases import CONTROL_SETTINGS, WRITER_SETTINGS, create_engine, create_unpooled_engine, engine_url
from merchants.registry import Merchant
from schemas.canonical import compact_json, format_time
from schemas.envelope import DecodeContext, decode
from schemas.events import command_headers
from schemas.payloads import MerchantConfig
from schemas.topics import ALLOWED, CONTROL, CONTROL_CHANNEL, input_topic, parse_input
from workers.outgoing import result_value, user_of
from workers.positions import Claim
from workers.transaction import Batch, Context, Message, StaleContextError, plan

_ids = itertools.count(1)
_offsets: dict[str, Any] = {}


def config(**changes: Any) -> dict[str, Any]:
    """Return a merchant's configuration as on the wire, with members changed."""
    return {
        "legal_name": "Acme LLC",
        "registered_address": {"lines": ["1 Abovyan Street"], "city": "Yerevan", "country": "AM"},
        "country": "AM",
        "time_zone": "Asia/Yerevan",
        "locale": "en",
        "contact_email": "billing@acme.example",
        "tax_regime": "vat",
        "vat_rates": [{"country": "*", "rate": "20"}],
        "receipt_series_prefix": "R",
        "credit_note_series_prefix": "C",
        "retention_years": 5,
        "operation_timeout_minutes": 15,
        "late_close": "refuse",
        "refund_policy": {"shortfall": "debit"},
        "chargeback_policy": {"shortfall": "debit", "credit_note": "never"},
    } | changes


@dataclass
class Record:
    """A consumed Kafka record, as far as ``schemas.envelope.decode`` reads it."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]


def command(
    command_type: str,
    payload: Mapping[str, Any] | bytes,
    source: str = "test",
    command_id: str | None = None,
    *,
    merchant_id: str = "acme",
    topic: str | None = None,
    at: datetime | None = None,
) -> Record:
    """Return the record of a command on the topic it belongs to, at the next offset of that topic's partition 0."""
    channel = next(channel for channel, types in ALLOWED.items() if command_type in types)
    topic = topic or (CONTROL if channel == CONTROL_CHANNEL else input_topic(merchant_id, channel))
    at = at or datetime.now(UTC)
    value = payload if isinstance(payload, bytes) else compact_json(payload)
    headers = command_headers(command_type, command_id or f"c{next(_ids)}", source, at)
    offset = next(_offsets.setdefault(topic, itertools.count()))
    return Record(topic, 0, offset, int(at.timestamp() * 1000), None, value, headers)


async def merchant(control_url: str, merchant_id: str = "acme", *, simulated: bool = False, **changes: Any) -> Merchant:
    """Register a merchant with a database of its own; the control database must have been migrated."""
    made = create_unpooled_engine(engine_url(control_url), CONTROL_SETTINGS)
    async with made.begin() as connection:
        reserved = await merchants.registry.reserve(
            connection,
            merchant_id,
            database_url=merchants.registry.server_url(control_url),
            partitions=1,
            simulated=simulated,
            command=bytes(16),
            fingerprint=bytes(32),
        )
    await merchants.registry.provision(
        control_url, reserved, MerchantConfig.model_validate(config(**changes)), "the tests"
    )
    async with made.begin() as connection:
        await merchants.registry.set_state(connection, merchant_id, "active")
        found = await merchants.registry.find(connection, merchant_id)
    await made.dispose()
    assert found is not None
    return found


@dataclass
class Clerk:
    """Applies commands to one merchant's database as a worker does, one batch in one transaction each time."""

    merchant: Merchant
    engine: AsyncEngine
    context: Context
    claim: Claim = field(default_factory=lambda: Claim("clerk", 1))
    _seen: set[TP] = field(default_factory=set)

    async def send(self, command_type: str, payload: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        """Apply one command and return its result; a parked one has none."""
        results = await self.apply(command(command_type, payload, merchant_id=self.merchant.merchant_id, **options))
        return results[0] if results else {}

    async def apply(self, *records: Record) -> list[dict[str, Any]]:
        """Apply records as one batch; returns the results published, in order."""
        lots_wanted: dict[int, int] = {}
        while True:
            try:
                return await self._transaction(records, lots_wanted)
            except StaleContextError:
                continue
            except LotsNeeded as needed:
                lots_wanted[needed.account_id] = 8 * lots_wanted.get(needed.account_id, LOTS_AT_FIRST)

    async def _transaction(self, records: Sequence[Record], lots_wanted: dict[int, int]) -> list[dict[str, Any]]:
        messages = [self._decode(record) for record in records]
        first = {TP(record.topic, record.partition) for record in records} - self._seen
        # A test's topics may begin anywhere: what lies before is not missing.
        gaps = {(tp, 0, min(r.offset for r in records if r.topic == tp.topic)) for tp in first}
        async with self.engine.begin() as connection:
            todo = await plan(connection, messages, claim=self.claim, first=first, published={}, known_gaps=gaps)
            batch = Batch(connection, self.context, lots_wanted)
            try:
                applied = await batch.apply(todo)
            finally:
                self.context = batch.context
        self.context = applied.context
        self._seen |= first
        return [
            json.loads(result_value(answer.row, user_of(answer, applied.accounts), answer.payload))
            for answer in applied.answers
        ]

    def _decode(self, record: Record) -> Message:
        assert self.context.config is not None
        merchant_id, channel = parse_input(record.topic)
        secret, patterns = self.context.secret, self.context.config.external_ref_patterns
        return decode(record, DecodeContext(merchant_id, channel, secret, patterns, Decimal(10**9)))


@asynccontextmanager
async def clerk(merchant: Merchant) -> AsyncIterator[Clerk]:
    """Open a merchant's database for writing."""
    url = engine_url(merchant.database_url, password=merchant.password)
    engine = create_engine(url, WRITER_SETTINGS, pool_size=1)
    try:
        async with engine.connect() as connection:
            state = await merchants.store.read_state(connection)
            current = await merchants.store.read_config(connection, state.config_version)
        context = Context(merchant.merchant_id, merchant.secret, merchant.simulated, state.config_version, current)
        yield Clerk(merchant, engine, context)
    finally:
        await engine.dispose()


def purchase(user_id: str, external_ref: str, product_code: str = "pack", **changes: Any) -> dict[str, Any]:
    """Return the payload of a Purchase.Settled that fits the product ``pack`` of ``catalogue``."""
    now = format_time(datetime.now(UTC))
    snapshot = {"country": "AM", "amount": "1200", "currency": "AMD"}
    return {
        "user_id": user_id,
        "external_ref": external_ref,
        "product_code": product_code,
        "payment_method": "card",
        "order_placed_at": now,
        "settled_at": now,
        "pricing_snapshot": snapshot,
    } | changes


async def catalogue(clerk: Clerk) -> None:
    """Create a product for sale, a sign-up grant, a manual grant and an operation type."""
    common = {"credits": 100, "access_period_days": 30, "actor": "the tests"}
    prices = [
        {"country": "*", "currency": "USD", "amount": "3"},
        {"country": "AM", "currency": "AMD", "amount": "1200"},
    ]
    grant = {"distribution": "grant"}
    for payload in (
        {"product_code": "pack", "title": "Pack", "distribution": "sellable", "prices": prices} | common,
        {"product_code": "hello", "title": "Hello", "grant_policy": "apply_on_signup"}
        | grant
        | common
        | {"credits": 10},
        {"product_code": "gift", "title": "Gift", "grant_policy": "manual_grant"} | grant | common,
    ):
        assert (await clerk.send("Product.Create", payload))["outcome"] == "applied"
    rate = {"operation_code": "chat", "display_name": "Chat", "resource_unit": "token", "credits_per_unit": "0.5"}
    result = await clerk.send("OperationType.CreateWithArchival", rate | {"actor": "the tests"})
    assert result["outcome"] == "applied"


async def operation(clerk: Clerk, user_id: str, operation_id: str, amount: str, **options: Any) -> dict[str, Any]:
    """Open and close an operation of the type ``chat``; returns the close's result."""
    opened = {"user_id": user_id, "operation_id": operation_id, "operation_code": "chat"} | options
    assert (await clerk.send("Operation.Open", opened))["outcome"] == "applied"
    closed = {
        "user_id": user_id,
        "operation_id": operation_id,
        "resource_amount": amount,
        "resource_unit": "token",
        "completed_at": format_time(datetime.now(UTC)),
    }
    return await clerk.send("Operation.RecordAndClose", closed)
