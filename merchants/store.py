"""Reads and writes a merchant's state row, configuration versions and roles."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy.ext.asyncio import AsyncConnection

from catalog.sql import delete_keys, fetch_tuples, insert_rows
from merchants import tables
from merchants.decisions import Settings
from schemas.canonical import canonical_json
from schemas.payloads import MerchantConfig

# The calendar ends with the year 9999, and lots live for up to a century.
CLOCK_END = datetime(9000, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class State:
    """The one row of a merchant that tells which versions are in force, and its clock."""

    config_version: int
    catalog_version: int
    clock_offset: timedelta
    suspended: bool
    now: datetime  # the database's clock plus the offset, read in the same statement


_READ_STATE = """
SELECT config_version, catalog_version, clock_offset, suspended, clock_timestamp() + clock_offset FROM merchant_state
"""


async def read_state(connection: AsyncConnection, *, for_update: bool = False) -> State:
    rows = await fetch_tuples(connection, _READ_STATE + ("FOR UPDATE" if for_update else ""))
    return State(*rows[0])


async def set_suspended(connection: AsyncConnection, suspended: bool) -> None:
    """Have every batch refuse to begin, or begin again; batches under way are waited for."""
    await connection.exec_driver_sql("UPDATE merchant_state SET suspended = $1", (suspended,))


async def read_config(connection: AsyncConnection, version: int) -> MerchantConfig:
    rows = await fetch_tuples(connection, "SELECT config::text FROM merchant_config WHERE version = $1", version)
    return MerchantConfig.model_validate(json.loads(rows[0][0]))


async def load_prefixes(connection: AsyncConnection) -> set[tuple[str, str]]:
    """Read the series prefixes of receipts and credit notes, in pairs, of all versions of the configuration."""
    sql = """
    SELECT DISTINCT config ->> 'receipt_series_prefix', config ->> 'credit_note_series_prefix' FROM merchant_config
    """
    return {(row[0], row[1]) for row in await fetch_tuples(connection, sql)}


async def load_roles(connection: AsyncConnection, subjects: Sequence[int]) -> dict[int, str]:
    sql = "SELECT account_id, role FROM user_roles WHERE account_id = ANY($1::bigint[])"
    return {row[0]: row[1] for row in await fetch_tuples(connection, sql, list(subjects))} if subjects else {}


async def add_config(
    connection: AsyncConnection, version: int, config: MerchantConfig, actor: str, command: bytes, now: datetime
) -> None:
    sql = """
    INSERT INTO merchant_config (version, config, actor, command, applied_at)
    VALUES ($1, $2::text::jsonb, $3, $4, $5) ON CONFLICT (version) DO NOTHING
    """
    text = canonical_json(config.model_dump(exclude_none=True)).decode()
    await connection.exec_driver_sql(sql, (version, text, actor, command, now))


async def save_settings(connection: AsyncConnection, settings: Settings, now: datetime) -> None:
    for version, config, actor, command in settings.new_versions:
        await add_config(connection, version, config, actor, command, now)
    assigned = [(subject, role, now) for subject, role in settings.changed_roles.items() if role is not None]
    suffix = "ON CONFLICT (account_id) DO UPDATE SET role = excluded.role, assigned_at = excluded.assigned_at"
    await insert_rows(connection, tables.user_roles, ("account_id", "role", "assigned_at"), assigned, suffix)
    revoked = [(subject,) for subject, role in settings.changed_roles.items() if role is None]
    await delete_keys(connection, tables.user_roles, ("account_id",), revoked)


async def bump_versions(connection: AsyncConnection, *, config_version: int, catalog_changed: bool) -> None:
    sql = "UPDATE merchant_state SET config_version = $1, catalog_version = catalog_version + $2"
    await connection.exec_driver_sql(sql, (config_version, int(catalog_changed)))


async def advances_since(
    connection: AsyncConnection, moment: datetime, clock_offset: timedelta
) -> list[tuple[datetime, timedelta]]:
    """List how far a simulated merchant's clock was moved after a moment of the real one, up to an offset, and when."""
    sql = """
    SELECT advanced_at, make_interval(secs => seconds) FROM clock_advances
    WHERE advanced_at > $1 AND clock_offset <= $2
    """
    return [(row[0], row[1]) for row in await fetch_tuples(connection, sql, moment, clock_offset)]


async def advance_clock(connection: AsyncConnection, seconds: int, command: bytes) -> tuple[timedelta, datetime]:
    """Move a simulated merchant's clock forward, once for each command; returns (offset, now) after it.

    Raises OverflowError beyond ``CLOCK_END``.
    """
    await connection.exec_driver_sql(
        """
        WITH advanced AS (
            INSERT INTO clock_advances (command, seconds, clock_offset, advanced_at)
            SELECT $2, $1::bigint, clock_offset + make_interval(secs => $1::bigint), clock_timestamp()
            FROM merchant_state WHERE clock_timestamp() + clock_offset + make_interval(secs => $1::bigint) < $3
            ON CONFLICT DO NOTHING RETURNING clock_offset
        )
        UPDATE merchant_state s SET clock_offset = a.clock_offset FROM advanced a
        """,
        (seconds, command, CLOCK_END),
    )
    sql = "SELECT clock_offset, advanced_at + clock_offset FROM clock_advances WHERE command = $1"
    rows = await fetch_tuples(connection, sql, command)
    if not rows:
        raise OverflowError(f"a clock goes no further than {CLOCK_END.year}")
    return rows[0][0], rows[0][1]
