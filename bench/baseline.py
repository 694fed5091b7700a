"""The plain worker to compare with, as one writes it first: a transaction a message (``python -m bench.baseline``).

It is meant to be good of its kind: prepared statements, no ORM, no statement that is not needed, results sent
without waiting for each one, offsets committed for groups. It checks far less than the service does (no rates, no
timeouts, no hash chain, no debts), so it does less work for each command.
"""

import asyncio
import contextlib
import json
import math
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from hashlib import sha256
from pathlib import Path
from typing import Any

import asyncpg
import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from bench.ground import Record
from ledger.model import account_id_of
from schemas.topics import receipts_topic, results_topic

GROUP_MAX = 50  # messages between two waits for the broker

_LOCK = """
SELECT last_seq, balance, head, clock_timestamp() AS now FROM accounts WHERE account_id = $1 FOR UPDATE
"""
_CLAIM = """
INSERT INTO inbox (identity, fingerprint, digests, business_key, type, topic, partition, kafka_offset, encoding,
    account_id, outcome, decided_at, result)
VALUES ($1, $2, '', $3, $4, $5, $6, $7, 1, $8, 'applied', $9, $10) ON CONFLICT DO NOTHING RETURNING identity
"""
_STORED = "SELECT result FROM inbox WHERE identity = $1 OR business_key = $2"
_OPEN = """
INSERT INTO operations (operation_id, account_id, operation_code, resource_unit, credits_per_unit, minimum_charge,
    workflow_id, state, opened_at, expires_at)
VALUES ($1, $2, $3, 'TOKEN', 0.01, 1, $4, 'open', $5, $6)
"""
_SLOT = "UPDATE accounts SET open_operation = $2 WHERE account_id = $1"
_FIND = "SELECT credits_per_unit, minimum_charge, state, workflow_id FROM operations WHERE operation_id = $1"
_LOTS = """
SELECT user_seq, remaining FROM lots WHERE account_id = $1 AND NOT spent ORDER BY user_seq LIMIT 16
"""
_TAKE = "UPDATE lots SET remaining = remaining - $3, spent = remaining = $3 WHERE account_id = $1 AND user_seq = $2"
_ALLOCATE = """
INSERT INTO allocations (account_id, entry_seq, lot_seq, at_seq, credits, created_at) VALUES ($1, $2, $3, $2, $4, $5)
"""
_ENTRY = """
INSERT INTO entries (account_id, user_seq, amount, reason, operation_type, resource_amount, resource_unit,
    operation_id, workflow_id, command, created_at, effective_at, balance_after, debt_after, hash)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $11, $12, 0, $13)
"""
_ACCOUNT = """
UPDATE accounts SET last_seq = $2, balance = $3, head = $4, last_entry_at = $5, open_operation = NULL
WHERE account_id = $1
"""
_CLOSE = """
UPDATE operations SET state = 'closed', closed_at = $2, completed_at = $2, resource_amount = $3, credits = $4,
    entry_seq = $5 WHERE operation_id = $1
"""
_NEW_ACCOUNT = """
INSERT INTO accounts (account_id, user_id, last_seq, balance, debt, head, created_at)
VALUES ($1, $2, 0, 0, 0, $3, clock_timestamp()) ON CONFLICT DO NOTHING
"""
_LOT = """
INSERT INTO lots (account_id, user_seq, credits, remaining, reason, product_code, purchase, issued_at, expires_at,
    spent)
VALUES ($1, $2, $3, $3, 'purchase', $4, $5, $6, $7, false)
"""
_NUMBER = """
UPDATE document_series SET next_number = next_number + 1 WHERE prefix = 'R' RETURNING year, next_number - 1 AS number
"""
_PURCHASE = """
INSERT INTO purchases (external_ref, account_id, lot_seq, credits, product_code, payment_method, country, amount,
    currency, order_placed_at, settled_at, applied_at, command, receipt_number)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)
"""
_DOCUMENT = """
INSERT INTO documents (number, kind, prefix, year, sequence, issued_at, external_ref, account_id, body, hash, command)
VALUES ($1, 'receipt', 'R', $2, $3, $4, $5, $6, $7, $8, $9)
"""
_BUYER = "INSERT INTO buyers (number, account_id, salt, block) VALUES ($1, $2, $3, $4)"


@dataclass(frozen=True)
class Spec:
    """What to work on.

    Attributes:
        merchants: for each (database URL, secret in hex).
        starts: (topic, partition, offset) to begin at.
        count: messages, then the worker ends.
        tasks: partitions are shared out to so many tasks with a connection each.
    """

    bootstrap_servers: str
    merchants: dict[str, tuple[str, str]]
    starts: list[tuple[str, int, int]]
    count: int
    tasks: int = 1


@dataclass(frozen=True)
class Answer:
    """What is published for a message, after its commit."""

    result: bytes
    receipt: bytes | None = None


async def apply(connection: asyncpg.Connection, record: Record, secret: bytes) -> Answer:
    """Apply one message in one transaction."""
    headers = dict(record.headers)
    assert record.value is not None
    members = orjson.loads(record.value)
    command = sha256(headers["ce_source"] + b"\n" + headers["ce_id"]).digest()[:16]
    account_id = account_id_of(members["user_id"], secret)
    work = _WORK[headers["ce_type"]]
    async with connection.transaction():
        account = await connection.fetchrow(_LOCK, account_id)
        if account is None:
            await connection.execute(_NEW_ACCOUNT, account_id, members["user_id"], bytes(32))
            account = await connection.fetchrow(_LOCK, account_id)
        assert account is not None
        result = {
            "command_id": headers["ce_id"].decode(),
            "command_source": headers["ce_source"].decode(),
            "command_type": headers["ce_type"].decode(),
            "user_id": members["user_id"],
            "outcome": "applied",
            "applied_at": account["now"].isoformat(),
        }
        return await work(connection, record, Given(account_id, account, members, command, result))


@dataclass(frozen=True)
class Given:
    """A message with the account it is about, locked."""

    account_id: int
    account: Any
    members: dict[str, Any]
    command: bytes
    result: dict[str, Any]


async def _claim(connection: asyncpg.Connection, record: Record, given: Given, key: str) -> Answer | None:
    """Write the message down with its result; returns the stored result if it is there already."""
    value = orjson.dumps(given.result)
    kind = given.result["command_type"]
    business_key = sha256(f"{kind}\n{key}".encode()).digest()[:16]
    position = (record.topic, record.partition, record.offset)
    fingerprint = sha256(record.value or b"").digest()
    now = given.account["now"]
    claimed = await connection.fetchval(
        _CLAIM, given.command, fingerprint, business_key, kind, *position, given.account_id, now, value.decode()
    )
    if claimed is None:
        return Answer((await connection.fetchval(_STORED, given.command, business_key)).encode())
    return None


async def _open(connection: asyncpg.Connection, record: Record, given: Given) -> Answer:
    members, now = given.members, given.account["now"]
    expires_at = now + timedelta(minutes=15)
    given.result["effects"] = {"operation_id": members["operation_id"], "expires_at": expires_at.isoformat()}
    given.result["balance"] = given.account["balance"]
    if stored := await _claim(connection, record, given, members["operation_id"]):
        return stored
    values = (given.account_id, members["operation_code"], members.get("workflow_id"), now, expires_at)
    await connection.execute(_OPEN, members["operation_id"], *values)
    await connection.execute(_SLOT, given.account_id, members["operation_id"])
    return Answer(orjson.dumps(given.result))


async def _close(connection: asyncpg.Connection, record: Record, given: Given) -> Answer:
    members, account, now = given.members, given.account, given.account["now"]
    operation = await connection.fetchrow(_FIND, members["operation_id"])
    assert operation is not None
    assert operation["state"] == "open"
    amount = Decimal(members["resource_amount"])
    credits = max(operation["minimum_charge"], math.ceil(amount * operation["credits_per_unit"]))
    seq, balance = account["last_seq"] + 1, account["balance"] - credits
    given.result["effects"] = {"operation_id": members["operation_id"], "credits": credits}
    given.result.update({"user_seq": seq, "balance": balance})
    if stored := await _claim(connection, record, given, members["operation_id"]):
        return stored
    left = credits
    for lot in await connection.fetch(_LOTS, given.account_id):
        take = min(left, lot["remaining"])
        await connection.execute(_ALLOCATE, given.account_id, seq, lot["user_seq"], take, now)
        await connection.execute(_TAKE, given.account_id, lot["user_seq"], take)
        left -= take
        if not left:
            break
    head = sha256(account["head"] + (record.value or b"")).digest()
    what = ("debit", "llm", amount, "TOKEN", members["operation_id"], operation["workflow_id"])
    await connection.execute(_ENTRY, given.account_id, seq, -credits, *what, given.command, now, balance, head)
    await connection.execute(_ACCOUNT, given.account_id, seq, balance, head, now)
    await connection.execute(_CLOSE, members["operation_id"], now, amount, credits, seq)
    return Answer(orjson.dumps(given.result))


async def _settle(connection: asyncpg.Connection, record: Record, given: Given) -> Answer:
    members, account, now = given.members, given.account, given.account["now"]
    price, reference, credits = members["pricing_snapshot"], members["external_ref"], 100
    seq, balance = account["last_seq"] + 1, account["balance"] + credits
    series = await connection.fetchrow(_NUMBER)
    assert series is not None
    number = f"R-{series['year']}-{series['number']:04d}"
    given.result["effects"] = {"credits": credits, "receipt_number": number}
    given.result.update({"user_seq": seq, "balance": balance})
    if stored := await _claim(connection, record, given, reference):
        return stored
    expires_at, amount = now + timedelta(days=90), Decimal(price["amount"])
    await connection.execute(_LOT, given.account_id, seq, credits, members["product_code"], reference, now, expires_at)
    head = sha256(account["head"] + (record.value or b"")).digest()
    what = ("purchase", members["payment_method"], amount, price["currency"], None, None)
    await connection.execute(_ENTRY, given.account_id, seq, credits, *what, given.command, now, balance, head)
    await connection.execute(_ACCOUNT, given.account_id, seq, balance, head, now)
    placed, settled = (datetime.fromisoformat(members[name]) for name in ("order_placed_at", "settled_at"))
    values = (members["product_code"], members["payment_method"], price["country"], amount, price["currency"])
    whose = (given.account_id, seq, credits)
    await connection.execute(_PURCHASE, reference, *whose, *values, placed, settled, now, given.command, number)
    receipt = {"receipt_number": number, "issued_at": now.isoformat(), **members, "tax": _tax(amount)}
    body = orjson.dumps(receipt)
    document = (now, reference, given.account_id, body.decode(), sha256(body).digest(), given.command)
    await connection.execute(_DOCUMENT, number, series["year"], series["number"], *document)
    await connection.execute(_BUYER, number, given.account_id, b"", orjson.dumps(members["buyer"]).decode())
    return Answer(orjson.dumps(given.result), body)


def _tax(gross: Decimal) -> dict[str, str]:
    tax = (gross * 20 / 120).quantize(Decimal("0.01"))
    return {"rate": "20", "tax": str(tax), "net": str(gross - tax)}


_WORK = {
    b"Operation.Open": _open,
    b"Operation.RecordAndClose": _close,
    b"Purchase.Settled": _settle,
}


class Worker:
    """Consumes, applies one by one, publishes."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._connections: dict[tuple[str, int], asyncpg.Connection] = {}
        self._places = {TopicPartition(topic, partition): n for n, (topic, partition, _) in enumerate(spec.starts)}
        self._left = spec.count

    async def run(self) -> None:
        """Work until all messages are done."""
        spec = self._spec
        self._producer = AIOKafkaProducer(
            bootstrap_servers=spec.bootstrap_servers, enable_idempotence=True, acks="all", linger_ms=2
        )
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=spec.bootstrap_servers, group_id="bench-baseline", enable_auto_commit=False
        )
        await self._producer.start()
        await self._consumer.start()
        self._consumer.assign([TopicPartition(topic, partition) for topic, partition, _ in spec.starts])
        for topic, partition, offset in spec.starts:
            self._consumer.seek(TopicPartition(topic, partition), offset)
        try:
            await self._work()
        finally:
            await self._consumer.stop()
            await self._producer.stop()
            for connection in self._connections.values():
                await connection.close()

    async def _work(self) -> None:
        """Share each fetch out to the tasks by partition; a task goes through its part one by one."""
        while self._left:
            fetched = await self._consumer.getmany(timeout_ms=1000, max_records=GROUP_MAX * self._spec.tasks)
            parts: dict[int, list[Record]] = {}
            for tp, records in fetched.items():
                parts.setdefault(self._places[tp] % self._spec.tasks, []).extend(records)
            await asyncio.gather(*(self._group(task, records) for task, records in parts.items()))
            if fetched:
                await self._consumer.commit({tp: records[-1].offset + 1 for tp, records in fetched.items()})
            self._left -= sum(map(len, fetched.values()))

    async def _group(self, task: int, records: list[Record]) -> None:
        acknowledgements = []
        for record in records:
            merchant = record.topic.split(".")[1]
            connection = await self._connection(merchant, task)
            answer = await apply(connection, record, bytes.fromhex(self._spec.merchants[merchant][1]))
            send = self._producer.send
            acknowledgements.append(await send(results_topic(merchant), answer.result, record.key))
            if answer.receipt is not None:
                acknowledgements.append(await send(receipts_topic(merchant), answer.receipt, record.key))
        await asyncio.gather(*acknowledgements)

    async def _connection(self, merchant: str, task: int) -> asyncpg.Connection:
        connection = self._connections.get((merchant, task))
        if connection is None:
            connection = self._connections[merchant, task] = await asyncpg.connect(self._spec.merchants[merchant][0])
        return connection


def run(spec: Spec) -> None:
    """Run the plain worker as a process to its end. Blocks."""
    command = [sys.executable, "-m", "bench.baseline"]
    subprocess.run(command, input=json.dumps(asdict(spec)), text=True, check=True, cwd=Path(__file__).parent.parent)


def main() -> None:
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(Worker(Spec(**json.loads(sys.stdin.read()))).run())


if __name__ == "__main__":
    main()
