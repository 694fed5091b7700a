"""Numbers are gapless, unique and chronological, however many issue at once, give up, or are killed meanwhile."""

import asyncio
import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from multiprocessing import get_context

import asyncpg
import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from catalog.model import Catalog
from catalog.sql import fetch
from ledger.books import Books, DocumentDraft
from ledger.model import Lot, Purchase, Reversal
from merchants.databases import WRITER_SETTINGS, create_engine, engine_url
from merchants.registry import WORKER_GROUP
from migrations import runner
from receipts.model import verify_series
from schemas.payloads import MerchantConfig
from tests.core import config
from tests.services import Services
from workers import documents

ISSUES = int(os.environ.get("CREDITS_SERIES_ISSUES", "2000"))
PROCESSES = 2
CONNECTIONS = 6
ABORTED_SHARE = 0.1
DOCUMENTS_PER_KILL = 40
SETTINGS = config(tax_regime="vat", vat_rates=[{"country": "*", "rate": "20"}])
AMOUNT = Decimal("10.01")
NAME = "credits-series-test"


class GaveUpError(Exception):
    """A transaction that was to be rolled back."""


@dataclass
class Tally:
    """What the clients of one process saw."""

    numbers: list[str] = field(default_factory=list)
    aborted: int = 0
    killed: int = 0
    unsure: int = 0


def drafts_of(refs: list[str], settings: MerchantConfig, with_note: bool) -> Iterator[DocumentDraft]:
    """Draft the receipts of purchases, and a credit note for the last of them."""
    now = datetime(2026, 3, 1, tzinfo=UTC)
    for ref in refs:
        command = os.urandom(16)
        purchase = Purchase(ref, 1, 1, 100, "P", "card", "AM", AMOUNT, "USD", now, now, now, command)
        lot = Lot(1, 1, 100, 100, "purchase", "P", ref, now, now + timedelta(30))
        shared = {"config": settings, "config_version": 1}
        yield DocumentDraft("receipt", purchase, command, AMOUNT, lot=lot, title="A hundred credits", **shared)
    if with_note:
        command = os.urandom(16)
        reversal = Reversal("refund", f"refund-{ref}", ref, 1, Decimal("3.33"), 33, 33, 2, None, now, command)
        yield DocumentDraft("credit_note", purchase, command, reversal.amount, reversal=reversal, **shared)


async def client(engine: AsyncEngine, refs: list[str], tally: Tally, choice: random.Random) -> None:
    """Issue the documents of all ``refs``, in transactions of a few, until each is committed."""
    settings = MerchantConfig.model_validate(SETTINGS)
    while refs:
        some = refs[-choice.randrange(1, 13) :]
        books = Books(datetime.now(UTC), settings, 1, Catalog())
        books.drafts = list(drafts_of(some, settings, choice.random() < 0.3))
        try:
            async with engine.begin() as connection:
                issued = await documents.issue(connection, books, clock_offset=timedelta(), simulated=False)
                if choice.random() < ABORTED_SHARE:
                    raise GaveUpError
        except GaveUpError:
            tally.aborted += 1
            continue
        except (IntegrityError, asyncpg.UniqueViolationError):
            # The connection was killed after the commit, and before we heard of it.
            tally.unsure += 1
        except (DBAPIError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            tally.killed += 1
            continue
        else:
            tally.numbers += [item.document.number for item in issued]
        del refs[-len(some) :]


def run_clients(url: str, process: int, issues: int) -> Tally:
    """Run one process's clients; called in a process of its own."""

    async def run() -> Tally:
        tally = Tally()
        options = WRITER_SETTINGS | {"application_name": NAME, "lock_timeout": "30s"}
        engine = create_engine(engine_url(url), options, pool_size=CONNECTIONS)
        refs = [f"pay-{process}-{n}" for n in range(issues)]
        async with asyncio.TaskGroup() as group:
            for n in range(CONNECTIONS):
                group.create_task(client(engine, refs[n::CONNECTIONS], tally, random.Random(process * 100 + n)))
        await engine.dispose()
        return tally

    return asyncio.run(run())


async def kill_connections(connection: asyncpg.Connection, kills: list[int]) -> None:
    """Terminate a busy client's session each time so many documents were issued, for as long as the task runs."""
    sql = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE application_name = $1 AND state <> 'idle' ORDER BY random() LIMIT 1
    """
    issued = 0
    while True:
        now_issued = await connection.fetchval("SELECT coalesce(sum(next_number), 0)::bigint FROM document_series")
        if now_issued >= issued + DOCUMENTS_PER_KILL:
            issued = now_issued
            kills += [1 for row in await connection.fetch(sql, NAME) if row[0]]
        await asyncio.sleep(0.02)


@pytest.mark.timeout(3600)
async def test_no_number_is_missing_or_given_twice(services: Services) -> None:
    url = services.database_url(f"series_{os.getpid()}")
    admin_url = str(engine_url(services.postgres_url).render_as_string(hide_password=False))
    await runner.ensure_role(admin_url, WORKER_GROUP)
    await runner.ensure_database(admin_url, f"series_{os.getpid()}")
    await runner.upgrade(engine_url(url).render_as_string(hide_password=False), "merchant")
    killer = await asyncpg.connect(url)
    kills: list[int] = []

    killing = asyncio.create_task(kill_connections(killer, kills))
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        share = -(-ISSUES // PROCESSES)
        tallies = await asyncio.gather(
            *(loop.run_in_executor(pool, run_clients, url, process, share) for process in range(PROCESSES))
        )
    killing.cancel()
    with suppress(asyncio.CancelledError):
        await killing
    await killer.close()

    await check(url, tallies, share * PROCESSES)
    assert sum(tally.aborted for tally in tallies) > ISSUES * ABORTED_SHARE / 20
    assert sum(tally.killed for tally in tallies) > 0
    print(
        f"{share * PROCESSES} receipts, {sum(t.aborted for t in tallies)} transactions given up, "
        f"{len(kills)} sessions killed, {sum(t.unsure for t in tallies)} of them after the commit"
    )


async def check(url: str, tallies: list[Tally], receipts: int) -> None:
    """Check both series from end to end, and that every number handed out is in it."""
    engine = create_engine(engine_url(url), WRITER_SETTINGS, pool_size=1)
    sql = "SELECT number, prefix, year, sequence, issued_at, body, hash FROM documents ORDER BY prefix, sequence"
    async with engine.connect() as connection:
        rows = await fetch(connection, sql)
        series = {row[0]: tuple(row[1:]) for row in await fetch(connection, "SELECT * FROM document_series")}
    await engine.dispose()

    seen = [number for tally in tallies for number in tally.numbers]
    assert len(seen) == len(set(seen))
    assert set(seen) <= {row.number for row in rows}
    assert len([row for row in rows if row.prefix == "R"]) == receipts
    assert {row.prefix for row in rows} == {"R", "C"} == set(series)
    for prefix, (year, next_number, last_issued_at, head) in series.items():
        mine = [row for row in rows if row.prefix == prefix]
        assert {row.year for row in mine} == {year}
        assert [row.sequence for row in mine] == list(range(1, next_number))
        assert [row.number for row in mine] == [f"{prefix}-{year}-{n:04d}" for n in range(1, next_number)]
        times = [row.issued_at for row in mine]
        assert times == sorted(times)
        assert times[-1] == last_issued_at
        assert verify_series([(row.body, row.hash) for row in mine]) is None
        assert mine[-1].hash == head
