"""Finds what is due and sends it as commands to the jobs topics; it decides nothing (spec §3, §4, §9.5).

Running it twice, on two workers, or never for a day changes nothing in the end: a job's command says what time has
done already, and its id makes a repetition a duplicate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

import ledger.store
import merchants.registry
import merchants.store
from catalog.sql import fetch
from ledger.model import entry_id_of
from merchants.databases import Pools
from merchants.registry import Merchant
from schemas.canonical import compact_json
from schemas.events import command_headers
from schemas.topics import input_topic
from workers.publisher import OutMessage, Publisher

log = structlog.get_logger(__name__)

SOURCE = "/credits/scheduler"
LOCK_KEY = 7_203_155_002
PAGE = 1_000
LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)

_DUE_LOTS = """
SELECT l.expires_at, l.account_id, l.user_seq, a.user_id FROM lots l JOIN accounts a USING (account_id)
WHERE l.expires_at > $1 AND l.expires_at <= $2 AND NOT l.spent ORDER BY l.expires_at LIMIT $3
"""
_OVERDUE_OPERATIONS = """
SELECT o.expires_at, o.operation_id, a.user_id FROM operations o JOIN accounts a USING (account_id)
WHERE o.expires_at > $1 AND o.expires_at <= $2 AND o.state = 'open' ORDER BY o.expires_at LIMIT $3
"""
# Parked commands whose time is over, or whose dependency is there without having released them: what a race left.
_TO_RESOLVE = """
SELECT p.source, p.id, p.due_at <= $1 FROM parked p
WHERE p.due_at <= $1
   OR (p.dependency_kind = 'operation' AND EXISTS (SELECT FROM operations o WHERE o.operation_id = p.dependency_key))
   OR (p.dependency_kind = 'purchase' AND EXISTS (SELECT FROM purchases s WHERE s.external_ref = p.dependency_key))
   OR (p.dependency_kind = 'dispute' AND EXISTS
        (SELECT FROM reversals r WHERE r.kind = 'chargeback' AND r.key = p.dependency_key))
   OR (p.dependency_kind = 'receipt' AND EXISTS (SELECT FROM documents d WHERE d.number = p.dependency_key))
ORDER BY p.arrived LIMIT $2
"""


@dataclass
class Scheduler:
    """One pass over all merchants at a time, by one process at a time (an advisory lock in the control database)."""

    control: AsyncEngine
    pools: Pools
    publisher: Publisher
    errors: int = 0

    async def run_once(self) -> None:
        """Send what is due for every active merchant, unless another process is doing so."""
        async with self.control.connect() as connection:
            if not (await fetch(connection, "SELECT pg_try_advisory_xact_lock($1)", LOCK_KEY))[0][0]:
                return
            for merchant in await merchants.registry.all_merchants(connection):
                if merchant.state == "active":
                    await self._try(merchant)

    async def _try(self, merchant: Merchant) -> None:
        try:
            await self.send_due(merchant)
        except Exception as error:
            # One merchant's trouble must not keep the others' jobs waiting; the next pass tries again.
            self.errors += 1
            log.warning("jobs are not sent", merchant=merchant.merchant_id, error=repr(error)[:500])

    async def send_due(self, merchant: Merchant) -> int:
        """Send all that is due for one merchant, and make its partitions; returns how many commands were sent."""
        engine = await self.pools.engine(merchant.merchant_id, merchant.database_url, merchant.password)
        sent = 0
        while True:
            async with engine.begin() as connection:
                now = (await merchants.store.read_state(connection)).now
                for months in (0, 1, 2):
                    await ledger.store.due_partition_month(connection, now + timedelta(days=31 * months))
                messages, marks = await due(connection, merchant.merchant_id, now)
            await self.publisher.publish(messages)
            sent += len(messages)
            async with engine.begin() as connection:
                await save_marks(connection, marks)
            if len(messages) < PAGE:
                return sent


async def due(
    connection: AsyncConnection, merchant_id: str, now: datetime
) -> tuple[list[OutMessage], dict[str, datetime]]:
    """Find what is due, and the watermarks up to which there is nothing more to find."""
    marks = {row[0]: row[1] for row in await fetch(connection, "SELECT job, watermark FROM job_state")}
    messages = []
    lots = await fetch(connection, _DUE_LOTS, marks.get("lots", LONG_AGO), now, PAGE)
    for _, account_id, user_seq, user_id in lots:
        lot_id = entry_id_of(account_id, user_seq)
        payload = {"user_id": user_id, "lot_id": lot_id}
        messages.append(job(merchant_id, "Lot.Expire", f"{lot_id}/{hour(now)}", payload, user_id, now))
    operations = await fetch(connection, _OVERDUE_OPERATIONS, marks.get("operations", LONG_AGO), now, PAGE)
    for _, operation_id, user_id in operations:
        payload = {"user_id": user_id, "operation_id": operation_id}
        name = f"{operation_id[:90]}/{hour(now)}"
        messages.append(job(merchant_id, "Operation.Expire", name, payload, user_id, now))
    for source, id_, is_over in await fetch(connection, _TO_RESOLVE, now, PAGE):
        payload = {"source": source, "id": id_}
        name = f"{id_[:80]}/{'over' if is_over else 'there'}/{hour(now)}"
        messages.append(job(merchant_id, "Command.Resolve", name, payload, id_, now))
    return messages, {
        # What was sent may not be done yet: the next pass looks at it again, until nothing is left behind the mark.
        "lots": now if not lots else lots[0][0] - timedelta(microseconds=1),
        "operations": now if not operations else operations[0][0] - timedelta(microseconds=1),
    }


def hour(now: datetime) -> str:
    """Name the hour: a job is sent again in the next one if the first command came to nothing."""
    return now.strftime("%Y%m%d%H")


def job(merchant_id: str, command_type: str, name: str, payload: dict[str, Any], key: str, now: datetime) -> OutMessage:
    headers = command_headers(command_type, name, SOURCE, now)
    return OutMessage(input_topic(merchant_id, "jobs"), key.encode(), compact_json(payload), headers)


async def save_marks(connection: AsyncConnection, marks: dict[str, datetime]) -> None:
    sql = """
    INSERT INTO job_state (job, watermark) SELECT * FROM unnest($1::text[], $2::timestamptz[])
    ON CONFLICT (job) DO UPDATE SET watermark = excluded.watermark
    """
    rows: Sequence[tuple[str, datetime]] = sorted(marks.items())
    await connection.exec_driver_sql(sql, tuple(map(list, zip(*rows, strict=True))))
