"""What to compare the service with: the plain worker, PostgreSQL alone, and Faust without work."""

import asyncio
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

from bench import baseline
from bench.figures import check, rate
from bench.ground import Ground, results_topics
from bench.scenarios import Scenario, mark
from bench.service import merchants_of
from catalog.sql import update_sql
from console.processes import free_port
from ledger import tables
from ledger.store import ACCOUNT_STATE, LOT_STATE, OPERATION_STATE
from merchants.registry import TEMPLATE_DATABASE, quoted
from schemas.topics import input_topic

BASELINE_SECONDS_MAX = 240
PARALLEL = 2  # merchants written to at once: as many as there are cores


# The plain worker


async def plain(ground: Ground, scenario: Scenario, count: int, tasks: int) -> float:
    """Return the commands a second of the plain worker on the scenario's merchants, which nobody serves now.

    There are as many of it as the scenario has workers here, with a share of the partitions each.
    """
    merchants = merchants_of(scenario)
    channel = "purchases" if scenario.receipts else "operations"
    inputs = [input_topic(merchant, channel) for merchant in merchants]
    begin = await ground.ends(inputs, scenario.partitions)
    starts = await ground.ends(results_topics(merchants), scenario.partitions)
    await ground.generate(scenario, merchants, count, f"plain{tasks}")
    ends = await ground.ends(inputs, scenario.partitions)
    known = {
        merchant: (ground.database_url(merchant), (await secret_of(ground, merchant)).hex()) for merchant in merchants
    }
    workers = ground.workers_of(scenario)
    shares = [list(begin.items())[number::workers] for number in range(workers)]
    specs = [
        baseline.Spec(
            ground.bootstrap_servers,
            known,
            [(tp.topic, tp.partition, offset) for tp, offset in share],
            sum(ends[tp] - offset for tp, offset in share),
            tasks,
        )
        for share in shares
    ]
    async with asyncio.timeout(BASELINE_SECONDS_MAX):
        await asyncio.gather(*(asyncio.to_thread(baseline.run, spec) for spec in specs))
    answers = await ground.answers(starts, await ground.ends(results_topics(merchants), scenario.partitions))
    check(answers, count)
    return rate(answers.times.values())


async def secret_of(ground: Ground, merchant: str) -> bytes:
    """Read a merchant's secret, which account ids are made with."""
    connection = await asyncpg.connect(ground.control_url)
    try:
        secret: bytes = await connection.fetchval("SELECT secret FROM merchants WHERE merchant_id = $1", merchant)
        return secret
    finally:
        await connection.close()


# PostgreSQL alone

# What one batch of the service wrote, by the moment it was decided at.
_COPIES = {
    "inbox": "SELECT * FROM inbox WHERE decided_at = $1",
    "entries": "SELECT * FROM entries WHERE created_at = $1",
    "allocations": "SELECT * FROM allocations WHERE created_at = $1",
    "lots": "SELECT * FROM lots WHERE issued_at = $1",
    "operations": "SELECT * FROM operations WHERE opened_at = $1",
    "purchases": "SELECT * FROM purchases WHERE applied_at = $1",
    "documents": "SELECT d.* FROM documents d JOIN inbox i ON i.identity = d.command WHERE i.decided_at = $1",
    "buyers": "SELECT b.* FROM buyers b JOIN purchases p ON p.receipt_number = b.number WHERE p.applied_at = $1",
}
_ACCOUNTS_AFTER = f"""
SELECT account_id, {", ".join(ACCOUNT_STATE)} FROM accounts
WHERE account_id IN (SELECT account_id FROM inbox WHERE decided_at = $1) ORDER BY account_id
"""
_LOTS_AFTER = f"""
SELECT account_id, user_seq, {", ".join(LOT_STATE)} FROM lots
WHERE (account_id, user_seq) IN (SELECT account_id, lot_seq FROM allocations WHERE created_at = $1)
"""
_OPERATIONS_AFTER = f"""
SELECT operation_id, {", ".join(OPERATION_STATE)} FROM operations WHERE closed_at = $1 AND opened_at <> closed_at
"""
_UPDATES = {
    _ACCOUNTS_AFTER: update_sql(tables.accounts, ("account_id",), ACCOUNT_STATE),
    _LOTS_AFTER: update_sql(tables.lots, ("account_id", "user_seq"), LOT_STATE),
    _OPERATIONS_AFTER: update_sql(tables.operations, ("operation_id",), OPERATION_STATE),
}
# What was there before the first of these batches.
_BEFORE = {
    "accounts": "SELECT * FROM accounts",
    "lots": "SELECT * FROM lots WHERE issued_at < $1",
    "positions": "SELECT * FROM positions",
}


@dataclass(frozen=True)
class Copied:
    """One batch, encoded already: what the server receives is all that is timed."""

    commands: int
    copies: dict[str, bytes]
    updates: list[tuple[str, tuple[list[Any], ...]]]


async def bare(ground: Ground, scenario: Scenario, run: str) -> float:
    """Return the commands a second at which PostgreSQL takes the rows of a drain, in the very same batches."""
    merchants = merchants_of(scenario)
    try:
        work = [(await _copy_database(ground, m, run), await _batches(ground, m, run)) for m in merchants]
        waiting = iter(work)
        began = time.perf_counter()
        await asyncio.gather(*(_write_all(ground, waiting) for _ in range(min(PARALLEL, len(work)))))
        seconds = time.perf_counter() - began
        return sum(batch.commands for _, batches in work for batch in batches) / seconds
    finally:
        admin = await asyncpg.connect(ground.stack.postgres.url("postgres"))
        for merchant in merchants:
            await admin.execute(f"DROP DATABASE IF EXISTS {quoted(_database(merchant))}")
        await admin.close()


def _database(merchant: str) -> str:
    return "limit_" + merchant.replace("-", "_")


async def _moments(source: asyncpg.Connection, run: str) -> list[tuple[Any, int]]:
    """Return the batches of a run: (moment, commands), oldest first."""
    sql = """
    SELECT decided_at, count(*) FROM inbox
    WHERE result::json ->> 'command_id' LIKE '%-' || $1 || '________'
    GROUP BY decided_at ORDER BY decided_at
    """
    return [(row[0], row[1]) for row in await source.fetch(sql, mark(run))]


async def _copy_database(ground: Ground, merchant: str, run: str) -> str:
    """Make a database with what the merchant's had before the run."""
    admin = await asyncpg.connect(ground.stack.postgres.url("postgres"))
    await admin.execute(f"CREATE DATABASE {quoted(_database(merchant))} TEMPLATE {TEMPLATE_DATABASE}")
    await admin.close()
    source = await asyncpg.connect(ground.database_url(merchant))
    target = await asyncpg.connect(ground.stack.postgres.url(_database(merchant)))
    try:
        first = (await _moments(source, run))[0][0]
        await target.execute("SELECT ensure_month(now()::date)")
        for table, sql in _BEFORE.items():
            await target.copy_to_table(table, source=await _read(source, sql, first), format="binary")
        await target.execute("ANALYZE")
    finally:
        await source.close()
        await target.close()
    return _database(merchant)


async def _read(source: asyncpg.Connection, sql: str, moment: Any) -> io.BytesIO:
    data = io.BytesIO()
    arguments = (moment,) if "$1" in sql else ()
    await source.copy_from_query(sql, *arguments, output=data, format="binary")
    data.seek(0)
    return data


async def _batches(ground: Ground, merchant: str, run: str) -> list[Copied]:
    source = await asyncpg.connect(ground.database_url(merchant))
    try:
        # The reads by moment are no part of the measurement, but without these they would take as long as it.
        for table, column in (("inbox", "decided_at"), ("operations", "opened_at"), ("operations", "closed_at")):
            await source.execute(f"CREATE INDEX IF NOT EXISTS bench_{table}_{column} ON {table} ({column})")
        return [await _batch(source, moment, commands) for moment, commands in await _moments(source, run)]
    finally:
        await source.close()


async def _batch(source: asyncpg.Connection, moment: Any, commands: int) -> Copied:
    copies = {}
    for table, sql in _COPIES.items():
        data = (await _read(source, sql, moment)).getvalue()
        if len(data) > _EMPTY_BYTES:
            copies[table] = data
    updates = []
    for sql, update in _UPDATES.items():
        rows = await source.fetch(sql, moment)
        if rows:
            updates.append((update, tuple(map(list, zip(*rows, strict=True)))))
    return Copied(commands, copies, updates)


_EMPTY_BYTES = 21  # the header and the trailer of binary COPY


async def _write_all(ground: Ground, waiting: Any) -> None:
    for database, batches in waiting:
        target = await asyncpg.connect(ground.stack.postgres.url(database))
        for batch in batches:
            async with target.transaction():
                for table, data in batch.copies.items():
                    await target.copy_to_table(table, source=io.BytesIO(data), format="binary")
                for sql, columns in batch.updates:
                    await target.execute(sql, *columns)
        await target.close()


# Faust without work


async def idle_faust(ground: Ground, scenario: Scenario, group: str) -> float:
    """Return the records a second that a worker hands to a handler which does nothing, over the scenario's topics."""
    merchants = merchants_of(scenario)
    inputs = [input_topic(merchant, channel) for merchant in merchants for channel in ("operations", "purchases")]
    ends = await ground.ends(inputs, scenario.partitions)
    spec = {"topics": {m: [t for t in inputs if t.split(".")[1] == m] for m in merchants}, "count": sum(ends.values())}
    environment = {
        **os.environ,
        **ground.stack.endpoints.environment(),
        "CREDITS_GROUP": group,
        "CREDITS_BATCH_MAX": str(ground.batch_max),
        "CREDITS_WEB_PORT": str(free_port()),
    }
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "bench.idle"],
        input=json.dumps(spec),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
        env=environment,
        timeout=120,
    )
    return float(json.loads(done.stdout.splitlines()[-1])["records_per_second"])
