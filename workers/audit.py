"""The auditor: checks every identity of a merchant's books, in one snapshot of its database (spec §3, §5, §6).

Tests and operators share it. Sums are compared by the database; chains are recomputed here meanwhile from rows that are
streamed, so that memory does not grow with the ledger. It only reads, and may run beside any number of workers.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

import catalog.audit
import ledger.audit
import receipts.audit
from catalog.audit import Check, Finding
from catalog.sql import fetch
from merchants.databases import engine_url
from schemas.envelope import UUID7

AUDITOR_SETTINGS = {
    "application_name": "credits-auditor",
    "default_transaction_read_only": "on",
    "cursor_tuple_fraction": "1",
    "work_mem": "64MB",
    "timezone": "UTC",
    "jit": "off",
}
CHECK_SETTINGS = ("enable_nestloop", "enable_mergejoin")
"""Plans that the checks go without: each compares whole tables, which hashing does in a tenth of the time."""

ROWS = 5_000
"""So many rows are read at a time; while they are worked on, the database makes the next ones."""

Progress = Callable[[str, int, int], None]
"""Is told (what is being checked, entries done, entries in all)."""


def _identity(message_id: str) -> str:
    """Return SQL for ``schemas.envelope.message_identity``."""
    framed = " || ".join(
        f"int4send(octet_length({x})) || convert_to({x}, 'UTF8')" for x in ("command_source", message_id)
    )
    time = f"CASE WHEN {message_id} ~ '^{UUID7}$' THEN decode(left(replace({message_id}, '-', ''), 12), 'hex') END"
    return f"substr(coalesce({time}, '') || sha256({framed}), 1, 16)"


DELIVERY: Sequence[Check] = (
    Check(
        "an entry was caused by an applied command",
        "entries",
        """
        SELECT lpad(to_hex(e.account_id), 16, '0') || '-' || user_seq,
            format('command %s, %s', encode(command, 'hex'), coalesce(outcome, 'unknown'))
        FROM entries e LEFT JOIN inbox ON identity = command
        -- Time passes for an account before its next command is decided, so a refused one may cause an expiry.
        WHERE outcome IS NULL OR outcome <> 'applied' AND reason <> 'expiry'
        """,
    ),
    Check(
        "an applied command that moves credits has its entry",
        """
        inbox WHERE outcome = 'applied' AND business_key IS NOT NULL
            AND type IN ('Purchase.Settled', 'Grant.Apply', 'Adjustment.Apply', 'Operation.RecordAndClose')
        """,
        """
        SELECT format('%s %s %s', topic, partition, kafka_offset), type || ' without an entry'
        FROM inbox WHERE outcome = 'applied' AND business_key IS NOT NULL
            AND type IN ('Purchase.Settled', 'Grant.Apply', 'Adjustment.Apply', 'Operation.RecordAndClose')
            AND NOT EXISTS (SELECT FROM entries WHERE command = identity)
        """,
    ),
    Check(
        "a command has a result or is parked, never both",
        "inbox",
        """
        SELECT format('%s %s %s', topic, partition, kafka_offset), format('outcome %s', outcome)
        FROM inbox FULL JOIN (SELECT identity, true AS waits FROM parked) p USING (identity)
        WHERE type IS NULL OR (result IS NULL) <> (waits IS NOT NULL) OR (result IS NULL) <> (outcome IS NULL)
        """,
    ),
    Check(
        "a result is its command's and says what the ledger says",
        "inbox WHERE result IS NOT NULL",
        f"""
        WITH told AS (
            SELECT topic, partition, kafka_offset, account_id, said.outcome AS said, user_seq, balance, debt,
                (said.outcome, error ->> 'code') IS NOT DISTINCT FROM (i.outcome, i.code)
                -- A message that repeats an identity with other content is kept under its fingerprint, too.
                AND (identity = {_identity("command_id")}
                     OR identity = {_identity("command_id || chr(10) || encode(fingerprint, 'hex')")}) AS is_its_own
            FROM inbox i LEFT JOIN LATERAL json_to_record(CASE WHEN result IS JSON OBJECT THEN result::json END) AS said
                (command_source text, command_id text, outcome text, error json, user_seq bigint, balance bigint,
                 debt bigint) ON true
            WHERE result IS NOT NULL
        )
        SELECT format('%s %s %s', topic, partition, kafka_offset),
            format('%s with balance %s, debt %s at %s', said, balance, debt, user_seq)
        FROM told LEFT JOIN entries USING (account_id, user_seq)
        WHERE is_its_own IS NOT TRUE OR (balance, debt) IS DISTINCT FROM
            (CASE WHEN user_seq = 0 THEN 0 ELSE balance_after END, CASE WHEN user_seq = 0 THEN 0 ELSE debt_after END)
        """,
    ),
)

CHECKS = (*ledger.audit.CHECKS, *receipts.audit.CHECKS, *DELIVERY, *catalog.audit.CHECKS)


@dataclass(frozen=True, slots=True)
class Report:
    """What an audit found: one finding an identity, how many entries there were and how long it took."""

    findings: Sequence[Finding]
    entries: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every identity holds."""
        return not self.broken

    @property
    def broken(self) -> list[Finding]:
        """The identities that do not hold."""
        return [finding for finding in self.findings if finding.violations]

    def as_object(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        names = ("name", "checked", "violations", "first")
        return {
            "ok": self.ok,
            "entries": self.entries,
            "seconds": round(self.seconds, 3),
            "findings": [{name: getattr(finding, name) for name in names} for finding in self.findings],
        }


async def verify(database: AsyncEngine | URL | str, progress: Progress | None = None) -> Report:
    """Audit a merchant's database in one snapshot.

    Args:
        database: where it is; a role that may read all tables is enough.
        progress: is told how far it is.
    """
    url = database.url if isinstance(database, AsyncEngine) else database
    engine = create_async_engine(
        engine_url(url),
        poolclass=NullPool,
        isolation_level="REPEATABLE READ",
        connect_args={"server_settings": AUDITOR_SETTINGS, "timeout": 10},
    )
    try:
        async with engine.connect() as connection, engine.connect() as beside:
            snapshot = (await fetch(connection, "SELECT pg_export_snapshot()"))[0][0]
            await beside.exec_driver_sql(f"SET TRANSACTION SNAPSHOT '{snapshot}'")
            for setting in CHECK_SETTINGS:
                await beside.exec_driver_sql(f"SET LOCAL {setting} = off")
            return await audit(connection, progress, beside)
    finally:
        await engine.dispose()


async def audit(
    connection: AsyncConnection, progress: Progress | None = None, beside: AsyncConnection | None = None
) -> Report:
    """Audit what a transaction sees; with a second one that sees the same, sums are compared beside the chains."""
    tell = progress or (lambda *_: None)
    started = time.monotonic()
    tell("counting", 0, 0)
    total = (await fetch(connection, "SELECT count(*) FROM entries"))[0][0]
    histories = ledger.audit.Histories()

    def at(what: str) -> None:
        tell(what, histories.chain.checked, total)

    if beside is None:
        chains, checks = await _chains(connection, histories, at), await _checks(connection, at)
    else:
        checking = asyncio.create_task(_checks(beside, at))
        try:
            chains, checks = await _chains(connection, histories, at), await checking
        finally:
            checking.cancel()
    return Report([*chains, *checks], total, time.monotonic() - started)


async def _chains(
    connection: AsyncConnection, histories: ledger.audit.Histories, at: Callable[[str], None]
) -> Sequence[Finding]:
    at("chains of accounts")
    async for rows in _stream(connection, ledger.audit.HISTORY):
        for row in rows:
            histories.add(row)
        at("chains of accounts")
    archives = receipts.audit.Archives()
    at("chains of documents")
    async for rows in _stream(connection, receipts.audit.DOCUMENTS):
        for row in rows:
            archives.add(row)
    archives.end(await fetch(connection, receipts.audit.SERIES))
    return [*histories.findings, *archives.findings]


async def _checks(connection: AsyncConnection, at: Callable[[str], None]) -> Sequence[Finding]:
    findings = []
    for check in CHECKS:
        at(check.name)
        findings.append(await catalog.audit.run(connection, check))
    return findings


async def _stream(connection: AsyncConnection, sql: str) -> AsyncIterator[Sequence[Any]]:
    """Read rows in parts; the next part is under way while the caller works on one."""
    driver = (await connection.get_raw_connection()).driver_connection
    assert driver is not None
    cursor = await driver.cursor(sql)
    following = asyncio.create_task(cursor.fetch(ROWS))
    while rows := await following:
        following = asyncio.create_task(cursor.fetch(ROWS))
        await asyncio.sleep(0)  # It is sent now: the caller will not let go of the loop.
        yield rows
