"""Finds what is due and sends it as commands to the jobs topics; it decides nothing (spec §3, §4, §9.5).

Running it twice, on two workers, or never for a day changes nothing in the end: a job's command says what time has
done already, and its id makes a repetition a duplicate.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

import ledger.store
import merchants.registry
import merchants.store
import receipts.store
from catalog.sql import fetch
from ledger.model import entry_id_of
from merchants.databases import Pools
from merchants.registry import Merchant
from schemas.canonical import compact_json
from schemas.envelope import message_identity
from schemas.events import command_headers
from schemas.topics import input_topic
from workers.publisher import OutMessage, Publisher

log = structlog.get_logger(__name__)

SOURCE = "/credits/scheduler"
LOCK_KEY = 7_203_155_002
PAGE = 1_000
MERCHANTS_A_SECOND = 5
LOOK_SECONDS_MAX = 15.0
INSTANT = timedelta(microseconds=1)
LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)

_DUE_LOTS = """
SELECT l.expires_at, l.account_id, l.user_seq, a.user_id FROM lots l JOIN accounts a USING (account_id)
WHERE (l.expires_at, l.account_id, l.user_seq) > ($1, $2::bigint, $3::bigint) AND l.expires_at <= $4 AND NOT l.spent
ORDER BY l.expires_at, l.account_id, l.user_seq LIMIT $5
"""
_OVERDUE_OPERATIONS = """
SELECT o.expires_at, o.operation_id, a.user_id FROM operations o JOIN accounts a USING (account_id)
WHERE (o.expires_at, o.operation_id) > ($1, $2::text) AND o.expires_at <= $3 AND o.state = 'open'
ORDER BY o.expires_at, o.operation_id LIMIT $4
"""
# Parked commands whose time is over, or whose dependency is there without having released them: what a race left.
_TO_RESOLVE = """
SELECT p.source, p.id, CASE WHEN p.due_at <= $1 THEN 'over' ELSE 'there' END FROM parked p
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
    """Passes over all merchants, by one process at a time (an advisory lock in the control database).

    A merchant is looked at every ``period`` seconds, less and less often while nothing is found, with many merchants
    at most five a second: connections are dear.
    """

    control: AsyncEngine
    pools: Pools
    publisher: Publisher
    period: float = 2.0
    errors: int = 0
    _looks: dict[str, "Look"] = field(default_factory=dict)
    _sent: dict[str, tuple[str, set[str]]] = field(default_factory=dict)
    _done_daily: dict[str, date] = field(default_factory=dict)

    async def run(self, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """Send what is due, for ever."""
        while True:
            merchants_seen = 0
            try:
                merchants_seen = await self.run_once()
            except Exception as error:
                # The control database may be away; the next pass does what this one missed.
                self.errors += 1
                log.warning("a pass of the scheduler failed", error=repr(error)[:500])
            await sleep(max(self.period, merchants_seen / MERCHANTS_A_SECOND))

    async def run_once(self) -> int:
        """Send what is due for every active merchant, unless another process is doing so; returns their number."""
        async with self.control.connect() as connection:
            if not (await fetch(connection, "SELECT pg_try_advisory_xact_lock($1)", LOCK_KEY))[0][0]:
                return 0
            known = await merchants.registry.all_merchants(connection)
            looked = 0
            for merchant in known:
                look = self._looks.setdefault(merchant.merchant_id, Look())
                if merchant.state == "active" and look.is_due():
                    look.found(await self._try(merchant) > 0, self.period)
                    looked += 1
            return looked

    def stir(self, merchant_id: str) -> None:
        """Look at a merchant soon: something happened there."""
        self._looks.pop(merchant_id, None)

    async def _try(self, merchant: Merchant) -> int:
        try:
            return await self.send_due(merchant)
        except Exception as error:
            # One merchant's trouble must not keep the others' jobs waiting; the next pass tries again.
            self.errors += 1
            log.warning("jobs are not sent", merchant=merchant.merchant_id, error=repr(error)[:500])
            return 0

    async def send_due(self, merchant: Merchant) -> int:
        """Send all that is due for one merchant, and do what is due daily; returns how many commands were sent."""
        engine = await self.pools.engine(merchant.merchant_id, merchant.database_url, merchant.password)
        sent = 0
        async with engine.begin() as connection:
            state = await merchants.store.read_state(connection)
            now = state.now
            search = Search(connection, merchant.merchant_id, now)
            if self._done_daily.get(merchant.merchant_id) != now.date():
                await search.delete_old_buyers(state.config_version)
                # Last: a new one locks its table until the end.
                await search.make_partitions()
            async for jobs in search.pages():
                fresh = self._not_sent(merchant.merchant_id, now, jobs)
                await self.publisher.publish([job.message(merchant.merchant_id, now) for job in fresh])
                self._sent[merchant.merchant_id][1].update(job.name for job in fresh)
                sent += len(fresh)
            # A test clock jumps: a batch that read it before the jump may still commit what is long due after it.
            if not merchant.simulated:
                await save_marks(connection, search.marks)
        # Not sooner: what fails before the end is undone, and has to be done again.
        self._done_daily[merchant.merchant_id] = now.date()
        return sent

    def _not_sent(self, merchant_id: str, now: datetime, jobs: Sequence["Job"]) -> list["Job"]:
        """Leave out what this process has sent in the same hour: it would only be a duplicate."""
        period, sent = self._sent.get(merchant_id, ("", set()))
        if period != hour(now):
            self._sent[merchant_id] = (hour(now), sent := set())
        return [job for job in jobs if job.name not in sent]


@dataclass(slots=True)
class Look:
    """When a merchant is looked at next, by the event loop's clock."""

    at: float = 0.0
    pause: float = 0.0

    def is_due(self) -> bool:
        return asyncio.get_running_loop().time() >= self.at

    def found(self, anything: bool, period: float) -> None:
        self.pause = period if anything else min(max(2 * self.pause, period), LOOK_SECONDS_MAX)
        self.at = asyncio.get_running_loop().time() + self.pause


@dataclass(frozen=True, slots=True)
class Job:
    """A command of the system's own: it says what time has done already, or what may be looked at again."""

    type: str
    name: str
    payload: dict[str, Any]
    key: str

    def message(self, merchant_id: str, now: datetime) -> OutMessage:
        headers = command_headers(self.type, self.name, SOURCE, now)
        return OutMessage(input_topic(merchant_id, "jobs"), self.key.encode(), compact_json(self.payload), headers)


@dataclass
class Search:
    """Finds a merchant's due jobs, a page at a time; ``marks`` tell afterwards before which there are none."""

    connection: AsyncConnection
    merchant_id: str
    now: datetime
    marks: dict[str, datetime] = field(default_factory=dict)

    async def make_partitions(self) -> None:
        for months in (0, 1, 2):
            await ledger.store.due_partition_month(self.connection, self.now + timedelta(days=31 * months))

    async def delete_old_buyers(self, config_version: int) -> None:
        """Delete the buyer blocks that were kept for the merchant's ``retention_years``."""
        config = await merchants.store.read_config(self.connection, config_version)
        sql = "SELECT $1::timestamptz - make_interval(years => $2)"
        ((until,),) = await fetch(self.connection, sql, self.now, config.retention_years)
        since = (await self._known_marks()).get("buyers", LONG_AGO)
        await receipts.store.delete_old_buyers(self.connection, since, until)
        self.marks["buyers"] = until

    async def _known_marks(self) -> dict[str, datetime]:
        return {row[0]: row[1] for row in await fetch(self.connection, "SELECT job, watermark FROM job_state")}

    async def pages(self) -> AsyncIterator[list[Job]]:
        known = await self._known_marks()
        async for jobs in self._lots(known.get("lots", LONG_AGO)):
            yield jobs
        async for jobs in self._operations(known.get("operations", LONG_AGO)):
            yield jobs
        yield [
            Job(
                "Command.Resolve",
                self._name(message_identity(source, id_).hex(), over),
                {"source": source, "id": id_},
                id_,
            )
            for source, id_, over in await fetch(self.connection, _TO_RESOLVE, self.now, PAGE)
        ]

    async def _lots(self, mark: datetime) -> AsyncIterator[list[Job]]:
        after: tuple[datetime, int, int] = (mark, 0, 0)
        first: datetime | None = None
        while rows := await fetch(self.connection, _DUE_LOTS, *after, self.now, PAGE):
            first = first or rows[0][0]
            jobs = []
            for expires_at, account_id, user_seq, user_id in rows:
                lot_id = entry_id_of(account_id, user_seq)
                jobs.append(Job("Lot.Expire", self._name(lot_id), {"user_id": user_id, "lot_id": lot_id}, user_id))
                after = (expires_at, account_id, user_seq)
            yield jobs
        # A lot that a won dispute gave back may be due at once, in a transaction that began before this search.
        self._mark("lots", first, timedelta(minutes=10))

    async def _operations(self, mark: datetime) -> AsyncIterator[list[Job]]:
        after: tuple[datetime, str] = (mark, "")
        first: datetime | None = None
        while rows := await fetch(self.connection, _OVERDUE_OPERATIONS, *after, self.now, PAGE):
            first = first or rows[0][0]
            jobs = []
            for expires_at, operation_id, user_id in rows:
                payload = {"user_id": user_id, "operation_id": operation_id}
                # An operation's id may be as long as a job's name.
                subject = message_identity("Operation.Expire", operation_id).hex()
                jobs.append(Job("Operation.Expire", self._name(subject), payload, user_id))
                after = (expires_at, operation_id)
            yield jobs
        # An operation is open for a minute at least, longer than any transaction takes.
        self._mark("operations", first, timedelta(0))

    def _mark(self, job: str, first: datetime | None, margin: timedelta) -> None:
        """Begin the next search at the first thing found (it is sent, not done), else a margin before now."""
        self.marks[job] = self.now - margin if first is None else min(first - INSTANT, self.now - margin)

    def _name(self, subject: str, *details: str) -> str:
        """Name a job after its subject and the hour: it is sent again in the next one if it came to nothing."""
        return "/".join((subject, *details, hour(self.now)))


def hour(now: datetime) -> str:
    return now.strftime("%Y%m%d%H")


async def save_marks(connection: AsyncConnection, marks: dict[str, datetime]) -> None:
    sql = """
    INSERT INTO job_state (job, watermark) SELECT * FROM unnest($1::text[], $2::timestamptz[])
    ON CONFLICT (job) DO UPDATE SET watermark = excluded.watermark
    """
    rows: Sequence[tuple[str, datetime]] = sorted(marks.items())
    await connection.exec_driver_sql(sql, tuple(map(list, zip(*rows, strict=True))))
