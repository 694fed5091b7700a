"""`credits dead-letters`: what could not be read or decided; once the cause is mended, it is sent again.

A dead letter is a pointer. The message itself is read from its topic, as long as that keeps it, and sent there again
with its own key, headers and value, under another `ce_id`: under its own the stored refusal would answer.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRecord
from aiokafka import TopicPartition as TP
from rich.markup import escape
from rich.table import Table
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from catalog.sql import fetch
from console.backup import CONTROL
from console.merchants import registered_as
from console.processes import StackError
from merchants.databases import CONTROL_SETTINGS, WRITER_SETTINGS, create_unpooled_engine, engine_url
from workers.publisher import OutMessage, Publisher
from workers.settings import WorkerSettings

READ_SECONDS_MAX = 10
SUFFIX = "redriven"
_STRUCTURED = b"application/cloudevents+json"


@dataclass(frozen=True, slots=True)
class Letter:
    """A pointer to a message that needed a person."""

    topic: str
    partition: int
    offset: int
    sha256: bytes
    code: str
    message: str
    noted_at: datetime
    # Or settled without being sent again.
    redriven_at: datetime | None

    @property
    def place(self) -> str:
        """Return `topic/partition/offset`, as a dead letter is named on the command line."""
        return f"{self.topic}/{self.partition}/{self.offset}"


_SELECT = """
SELECT topic, partition, kafka_offset, sha256, code, message, noted_at, redriven_at FROM dead_letters
"""
_SETTLE_LETTER = """
UPDATE dead_letters SET redriven_at = clock_timestamp()
WHERE topic = $1 AND partition = $2 AND kafka_offset = $3 AND redriven_at IS NULL
"""
# With all earlier refusals of the same order: the list names the place of the last one only.
_SETTLE_ORDER = """
UPDATE purchase_refusals r SET settled_at = clock_timestamp()
FROM purchase_refusals one JOIN inbox i ON i.identity = one.command
WHERE i.topic = $1 AND i.partition = $2 AND i.kafka_offset = $3
    AND (r.command = one.command OR r.external_ref = one.external_ref) AND r.settled_at IS NULL
    AND r.refused_at <= one.refused_at
"""


async def list_letters(settings: WorkerSettings, merchant_id: str, *, everything: bool = False) -> list[Letter]:
    """List a merchant's dead letters in the order they were noted, without those that were redriven."""
    where = "" if everything else "WHERE redriven_at IS NULL"
    async with _database(settings, merchant_id) as engine, engine.connect() as connection:
        rows = await fetch(connection, f"{_SELECT} {where} ORDER BY noted_at, topic, partition, kafka_offset")
    return [Letter(*row) for row in rows]


def as_table(letters: Sequence[Letter]) -> Table:
    """Lay dead letters out for a terminal; a place is never cut, it is what they are named by."""
    table = Table(box=None, header_style="bold")
    for name in ("place", "code", "noted", "settled", "message"):
        table.add_column(name, no_wrap=name == "place", overflow="fold")
    for letter in letters:
        noted, redriven = (f"{at:%Y-%m-%d %H:%M:%S}" if at else "" for at in (letter.noted_at, letter.redriven_at))
        table.add_row(*map(escape, (letter.place, letter.code, noted, redriven, letter.message)))
    return table


async def show(settings: WorkerSettings, merchant_id: str, place: str) -> tuple[Letter, dict[str, Any]]:
    """Return a dead letter, and of its message what may be shown: headers and size, never the value."""
    letter = await _find(settings, merchant_id, place)
    record = await _read(settings, letter)
    headers = {name: value.decode(errors="replace") for name, value in record.headers}
    shown = {"headers": headers, "bytes": len(record.value or b""), "record_time_ms": record.timestamp}
    return letter, shown


async def redrive(settings: WorkerSettings, merchant_id: str, places: Sequence[str]) -> list[str]:
    """Send messages again, each to its own topic and partition, and note it; returns their new ids.

    Raises:
        StackError: a dead letter is not known, was redriven, or its message is gone from its topic.
    """
    letters = await _open(settings, merchant_id, places)
    records = [await _read(settings, letter) for letter in letters]
    again = [_again(letter, record) for letter, record in zip(letters, records, strict=True)]
    publisher = Publisher(settings.kafka_bootstrap_servers, settings.security_kwargs())
    await publisher.start()
    try:
        async with _database(settings, merchant_id) as engine, engine.begin() as connection:
            await _mark(connection, letters)
            # Before the commit: marked and not sent would be forgotten, sent twice is answered twice with one effect.
            await publisher.publish([message for message, _ in again])
    finally:
        await publisher.stop()
    return [new_id for _, new_id in again]


async def settle(settings: WorkerSettings, merchant_id: str, places: Sequence[str]) -> None:
    """Note that nobody has to look at dead letters and refused orders any more, without sending anything.

    Raises:
        StackError: a place is that of neither, or it was redriven or settled.
    """
    parsed = [_parse(place) for place in places]
    kinds = (_SETTLE_LETTER,) if merchant_id == CONTROL else (_SETTLE_LETTER, _SETTLE_ORDER)
    async with _database(settings, merchant_id) as engine, engine.begin() as connection:
        for name, place in zip(places, parsed, strict=True):
            settled = [(await connection.exec_driver_sql(sql, place)).rowcount for sql in kinds]
            if not any(settled):
                raise StackError(f"{name} is no dead letter or refused order, or was settled or redriven already.")


async def _open(settings: WorkerSettings, merchant_id: str, places: Sequence[str]) -> list[Letter]:
    letters = [await _find(settings, merchant_id, place) for place in places]
    if done := [letter.place for letter in letters if letter.redriven_at is not None]:
        raise StackError(f"{', '.join(done)} was settled or redriven already.")
    return letters


async def _mark(connection: AsyncConnection, letters: Sequence[Letter]) -> None:
    sql = """
    UPDATE dead_letters d SET redriven_at = clock_timestamp()
    FROM unnest($1::text[], $2::integer[], $3::bigint[]) AS k (topic, partition, kafka_offset)
    WHERE (d.topic, d.partition, d.kafka_offset) = (k.topic, k.partition, k.kafka_offset) AND redriven_at IS NULL
    """
    columns = zip(*((letter.topic, letter.partition, letter.offset) for letter in letters), strict=True)
    marked = await connection.exec_driver_sql(sql, tuple(map(list, columns)))
    if marked.rowcount != len(letters):
        raise StackError("Somebody else settles or redrives the same dead letters.")


def _again(letter: Letter, record: ConsumerRecord[bytes | None, bytes | None]) -> tuple[OutMessage, str]:
    """Make the message to be sent: the same but for its id, which is the same for the same dead letter each time."""
    suffix = f"#{SUFFIX}-{letter.partition}-{letter.offset}"
    headers = dict(record.headers)
    value, names = record.value, list(record.headers)
    if headers.get("content-type", b"").startswith(_STRUCTURED):
        event = json.loads(value or b"{}")
        new_id = f"{event.get('id', '')}"[: 128 - len(suffix)] + suffix
        value = json.dumps(event | {"id": new_id}, ensure_ascii=False, separators=(",", ":")).encode()
    else:
        new_id = headers.get("ce_id", b"").decode(errors="replace")[: 128 - len(suffix)] + suffix
        names = [(name, header) for name, header in record.headers if name != "ce_id"] + [("ce_id", new_id.encode())]
    return OutMessage(letter.topic, record.key, value, names, letter.partition), new_id


async def _find(settings: WorkerSettings, merchant_id: str, place: str) -> Letter:
    topic, partition, offset = _parse(place)
    async with _database(settings, merchant_id) as engine, engine.connect() as connection:
        sql = f"{_SELECT} WHERE topic = $1 AND partition = $2 AND kafka_offset = $3"
        rows = await fetch(connection, sql, topic, partition, offset)
    if not rows:
        raise StackError(f"{merchant_id} has no dead letter {place}.")
    return Letter(*rows[0])


def _parse(place: str) -> tuple[str, int, int]:
    # No longer than the columns' integers.
    parts = re.fullmatch(r"([^/]+)/([0-9]{1,9})/([0-9]{1,18})", place)
    if parts is None:
        raise StackError(f"{place} is not topic/partition/offset.")
    return parts[1], int(parts[2]), int(parts[3])


async def _read(settings: WorkerSettings, letter: Letter) -> ConsumerRecord[bytes | None, bytes | None]:
    """Read the message a dead letter points to, and make sure that it is that one."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap_servers, enable_auto_commit=False, **settings.security_kwargs()
    )
    tp = TP(letter.topic, letter.partition)
    await consumer.start()
    try:
        consumer.assign([tp])
        begin, end = (await consumer.beginning_offsets([tp]))[tp], (await consumer.end_offsets([tp]))[tp]
        if not begin <= letter.offset < end:
            raise StackError(f"{letter.place} is gone from its topic.")
        consumer.seek(tp, letter.offset)
        async with asyncio.timeout(READ_SECONDS_MAX):
            record = await consumer.getone(tp)
    finally:
        await consumer.stop()
    if record.offset != letter.offset or sha256(record.value or b"").digest() != letter.sha256:
        raise StackError(f"{letter.place} is another message by now.")
    return record


@asynccontextmanager
async def _database(settings: WorkerSettings, merchant_id: str) -> AsyncIterator[AsyncEngine]:
    if merchant_id == CONTROL:
        # What came in on the topic of no merchant.
        engine = create_unpooled_engine(engine_url(settings.control_database_url), CONTROL_SETTINGS)
    else:
        merchant = await registered_as(settings.control_database_url, merchant_id)
        url = engine_url(merchant.database_url, password=merchant.password)
        engine = create_unpooled_engine(url, WRITER_SETTINGS)
    try:
        yield engine
    finally:
        await engine.dispose()
