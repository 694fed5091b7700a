"""The inbox: every message's identity, fingerprint and stored answer; parked commands; dead-letter pointers.

The same tables are in each merchant's database and in the control database (without parked commands).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
)
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.ext.asyncio import AsyncConnection

from catalog.sql import delete_keys, fetch_tuples, insert_objects, update_objects
from schemas.canonical import canonical_json, compact_json
from schemas.codec import Encoding
from schemas.envelope import Incoming, Undeliverable, business_key_digest, message_identity
from schemas.payloads import COMMANDS

metadata = MetaData()
TIME = TIMESTAMP(timezone=True)

inbox = Table(
    "inbox",
    metadata,
    Column("identity", LargeBinary, primary_key=True),
    Column("fingerprint", LargeBinary, nullable=False),
    Column("digests", LargeBinary, nullable=False),
    Column("business_key", LargeBinary),
    Column("type", Text, nullable=False),
    Column("topic", Text, nullable=False),
    Column("partition", Integer, nullable=False),
    Column("kafka_offset", BigInteger, nullable=False),
    Column("encoding", SmallInteger, nullable=False),
    Column("account_id", BigInteger),
    Column("actor", Text),
    Column("outcome", Text),
    Column("code", Text),
    Column("decided_at", TIME),
    Column("result", Text),
    Column("released", LargeBinary),
)

parked = Table(
    "parked",
    metadata,
    Column("identity", LargeBinary, primary_key=True),
    Column("dependency_kind", Text, nullable=False),
    Column("dependency_key", Text, nullable=False),
    Column("account_id", BigInteger),
    Column("parked_at", TIME, nullable=False),
    Column("due_at", TIME, nullable=False),
    Column("record_time", TIME, nullable=False),
    Column("source", Text, nullable=False),
    Column("id", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("payload", Text, nullable=False),
    Column("reply_to", Text),
    Column("traceparent", Text),
    Column("waiting", Integer, nullable=False),
)

dead_letters = Table(
    "dead_letters",
    metadata,
    Column("topic", Text, primary_key=True),
    Column("partition", Integer, primary_key=True),
    Column("kafka_offset", BigInteger, primary_key=True),
    Column("sha256", LargeBinary, nullable=False),
    Column("code", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("noted_at", TIME, nullable=False),
)

IDENTITY_SIZE = 16

Position = tuple[str, int, int]  # topic, partition, offset


@dataclass(slots=True)
class Row:
    """One message's row. Without a ``result`` its command is parked.

    ``result`` is the JSON published, but for the caller's id, which is completed from the account at that moment.
    """

    identity: bytes
    fingerprint: bytes
    digests: bytes
    business_key: bytes | None
    type: str
    topic: str
    partition: int
    kafka_offset: int
    encoding: int
    account_id: int | None
    actor: str | None
    outcome: str | None = None
    code: str | None = None
    decided_at: datetime | None = None
    result: str | None = None
    released: bytes | None = None  # identities of the commands it released, once for each answer
    user_id: str | None = None  # of the account, as read with the row
    body: dict[str, Any] = field(default_factory=dict)  # the result while it is being made

    @property
    def position(self) -> Position:
        return self.topic, self.partition, self.kafka_offset

    def applied_at(self) -> str:
        """When the outcome came about: for a repeated business key that of the first message."""
        at: str = (self.body or self.stored_result())["applied_at"]
        return at

    def released_identities(self) -> list[bytes]:
        names = self.released or b""
        return [names[at : at + IDENTITY_SIZE] for at in range(0, len(names), IDENTITY_SIZE)]

    def stored_result(self) -> dict[str, Any]:
        assert self.result is not None
        result: dict[str, Any] = json.loads(self.result)
        return result


@dataclass(slots=True)
class Parked:
    """A command that waits for the one it depends on, decoded and redacted."""

    identity: bytes
    dependency_kind: str
    dependency_key: str
    account_id: int | None
    parked_at: datetime
    due_at: datetime
    record_time: datetime
    source: str
    id: str
    type: str
    payload: str
    reply_to: str | None
    traceparent: str | None
    waiting: int  # deliveries to be answered
    arrived: int = 0  # given by the database, in order of arrival

    def names(self) -> dict[str, str]:
        return {"command_source": self.source, "command_id": self.id}


@dataclass(slots=True)
class DeadLetter:
    """A pointer to a message that could not be read or decided; never a copy of it."""

    topic: str
    partition: int
    kafka_offset: int
    sha256: bytes
    code: str
    message: str
    noted_at: datetime | None = None


COLUMNS = tuple(column.name for column in inbox.columns)
PARKED = tuple(column.name for column in parked.columns)
DEAD_LETTERS = tuple(column.name for column in dead_letters.columns)

_SELECT = f"""
SELECT {", ".join("i." + name for name in COLUMNS)}, a.user_id FROM inbox i LEFT JOIN accounts a USING (account_id)
"""
_SELECT_CONTROL = f"SELECT {', '.join(COLUMNS)}, NULL FROM inbox i"


async def load(
    connection: AsyncConnection, identities: Sequence[bytes], keys: Sequence[bytes], *, control: bool = False
) -> list[Row]:
    """Read the rows of messages seen before, by identity or by business key."""
    select = _SELECT_CONTROL if control else _SELECT
    sql = f"{select} WHERE i.identity = ANY($1::bytea[])"
    if keys:
        sql += f" UNION ALL {select} WHERE i.business_key = ANY($2::bytea[])"
        return [Row(*row) for row in await fetch_tuples(connection, sql, list(identities), list(keys))]
    return [Row(*row) for row in await fetch_tuples(connection, sql, list(identities))]


async def save(connection: AsyncConnection, new: Sequence[Row], resolved: Sequence[Row]) -> None:
    """Insert the rows of new messages and fill in those of parked commands that were decided now."""
    await insert_objects(connection, inbox, COLUMNS, new)
    state = ("business_key", "account_id", "outcome", "code", "decided_at", "result", "released")
    updated = await update_objects(connection, inbox, ("identity",), state, resolved)
    assert updated == len(resolved), "a parked command's row is gone"


async def parked_for(
    connection: AsyncConnection,
    dependencies: Iterable[tuple[str, str]],
    accounts: Sequence[int] = (),
    identities: Sequence[bytes] = (),
    *,
    lock: bool = False,
) -> list[Parked]:
    """Read the commands parked for these dependencies, of these accounts or by identity, in order of arrival."""
    kinds, keys = (list(column) for column in zip(*dependencies, strict=True)) if dependencies else ([], [])
    sql = f"""
    SELECT {", ".join(PARKED)}, arrived FROM parked
    WHERE (dependency_kind, dependency_key) IN (SELECT * FROM unnest($1::text[], $2::text[]))
       OR account_id = ANY($3::bigint[]) OR identity = ANY($4::bytea[])
    ORDER BY arrived {"FOR UPDATE" if lock else ""}
    """
    return [Parked(*row) for row in await fetch_tuples(connection, sql, kinds, keys, list(accounts), list(identities))]


async def save_parked(
    connection: AsyncConnection, new: Sequence[Parked], changed: Sequence[Parked], gone: Sequence[bytes]
) -> None:
    await insert_objects(connection, parked, PARKED, new)
    await update_objects(connection, parked, ("identity",), ("waiting",), changed)
    await delete_keys(connection, parked, ("identity",), [(identity,) for identity in gone])


async def save_dead_letters(connection: AsyncConnection, letters: Sequence[DeadLetter]) -> None:
    await insert_objects(connection, dead_letters, DEAD_LETTERS, letters, "ON CONFLICT DO NOTHING")


async def load_dead_letters(connection: AsyncConnection, positions: Sequence[Position]) -> list[DeadLetter]:
    sql = f"""
    SELECT {", ".join("d." + name for name in DEAD_LETTERS)}
    FROM unnest($1::text[], $2::integer[], $3::bigint[]) AS k (topic, partition, kafka_offset)
    JOIN dead_letters d USING (topic, partition, kafka_offset)
    """
    columns = [list(column) for column in zip(*positions, strict=True)]
    return [DeadLetter(*row) for row in await fetch_tuples(connection, sql, *columns)] if positions else []


def result_text(row: Row) -> str:
    """Write down the result a row was given."""
    return compact_json(row.body).decode()


def letter_of(message: Undeliverable, now: datetime) -> DeadLetter:
    return DeadLetter(
        message.topic, message.partition, message.offset, message.sha256, message.code, message.message, now
    )


def payload_text(incoming: Incoming) -> str:
    return canonical_json(incoming.payload.model_dump(exclude_none=True)).decode()


def incoming_of(waiting: Parked, row: Row, secret: bytes) -> Incoming:
    """Rebuild a parked command as it came in."""
    spec = COMMANDS[waiting.type]
    payload = spec.model.model_validate(json.loads(waiting.payload))
    key = spec.business_key(payload)
    return Incoming(
        topic=row.topic,
        partition=row.partition,
        offset=row.kafka_offset,
        record_time=waiting.record_time,
        source=waiting.source,
        id=waiting.id,
        type=waiting.type,
        identity=waiting.identity,
        fingerprint=row.fingerprint,
        digests=row.digests,
        business_key=None if key is None else business_key_digest(waiting.type, key, secret),
        payload=payload,
        error=None,
        encoding=Encoding(row.encoding),
        reply_to=waiting.reply_to,
        traceparent=waiting.traceparent,
        key=None,
        value=None,
    )


def conflict_identity(incoming: Incoming) -> bytes:
    """Name the row of a message that repeats an identity with other content."""
    return message_identity(incoming.source, f"{incoming.id}\n{incoming.fingerprint.hex()}")
