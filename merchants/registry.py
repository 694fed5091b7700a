"""The registry of merchants in the control database, and the steps that make one (spec §7, Merchant.Register).

Each step is create-if-absent, under an advisory lock on the merchant: a registration that was cut off anywhere is
simply done again.
"""

import asyncio
import random
import secrets
from dataclasses import dataclass, field

from sqlalchemy import URL, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from catalog.sql import fetch
from merchants.databases import CONTROL_SETTINGS, WRITER_SETTINGS, create_unpooled_engine, engine_url
from merchants.store import add_config
from schemas.payloads import MerchantConfig

TEMPLATE_DATABASE = "credits_template"
WORKER_GROUP = "credits_worker"
CLOSING_TRIES = 10


@dataclass(frozen=True, slots=True)
class Merchant:
    """One merchant: where its database is, and the secret that keys what must not be guessed."""

    merchant_id: str
    state: str  # provisioning | active | suspended
    database_url: str
    password: str = field(repr=False)
    secret: bytes = field(repr=False)
    partitions: int
    simulated: bool
    command: bytes
    fingerprint: bytes


_COLUMNS = "merchant_id, state, database_url, password, secret, partitions, simulated, command, fingerprint"


async def all_merchants(connection: AsyncConnection) -> list[Merchant]:
    rows = await fetch(connection, f"SELECT {_COLUMNS} FROM merchants ORDER BY merchant_id")
    return [Merchant(*row) for row in rows]


async def find(connection: AsyncConnection, merchant_id: str) -> Merchant | None:
    rows = await fetch(connection, f"SELECT {_COLUMNS} FROM merchants WHERE merchant_id = $1", merchant_id)
    return Merchant(*rows[0]) if rows else None


async def set_state(connection: AsyncConnection, merchant_id: str, state: str) -> None:
    await connection.exec_driver_sql("UPDATE merchants SET state = $1 WHERE merchant_id = $2", (state, merchant_id))


async def reserve(
    connection: AsyncConnection,
    merchant_id: str,
    *,
    database_url: URL,
    partitions: int,
    simulated: bool,
    command: bytes,
    fingerprint: bytes,
) -> Merchant:
    """Write the registry row of a merchant to be made, with its secrets, or return the one that is there."""
    sql = f"""
    INSERT INTO merchants ({_COLUMNS}, registered_at)
    VALUES ($1, 'provisioning', $2, $3, $4, $5, $6, $7, $8, clock_timestamp()) ON CONFLICT DO NOTHING
    """
    url = database_url.set(username=names(merchant_id)[0], password=None, database=names(merchant_id)[1])
    values = (
        merchant_id,
        url.render_as_string(),
        secrets.token_urlsafe(24),
        secrets.token_bytes(32),
        partitions,
        simulated,
        command,
        fingerprint,
    )
    await connection.exec_driver_sql(sql, values)
    merchant = await find(connection, merchant_id)
    assert merchant is not None
    return merchant


def names(merchant_id: str) -> tuple[str, str]:
    """The role and the database of a merchant."""
    name = "credits_m_" + merchant_id.replace("-", "_")
    return name, name


def quoted(name: str) -> str:
    assert '"' not in name
    return f'"{name}"'


async def provision(admin_url: str, merchant: Merchant, config: MerchantConfig, actor: str) -> None:
    """Make a merchant's role and database from the template, and write its first configuration."""
    role, database = names(merchant.merchant_id)
    engine = create_unpooled_engine(engine_url(admin_url), CONTROL_SETTINGS, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await fetch(connection, "SELECT pg_advisory_lock(hashtext($1))", f"register {merchant.merchant_id}")
        await make_role(connection, role, merchant.password)
        if not await fetch(connection, "SELECT 1 FROM pg_database WHERE datname = $1", database):
            # Two databases cannot be copied from one template at the same time.
            await fetch(connection, "SELECT pg_advisory_lock(hashtext('credits template'))")
            await connection.exec_driver_sql(f"CREATE DATABASE {quoted(database)} TEMPLATE {TEMPLATE_DATABASE}")
            await fetch(connection, "SELECT pg_advisory_unlock(hashtext('credits template'))")
        await connection.exec_driver_sql(f"REVOKE ALL ON DATABASE {quoted(database)} FROM PUBLIC")
        await connection.exec_driver_sql(f"GRANT CONNECT ON DATABASE {quoted(database)} TO {quoted(role)}")
        await close_common_databases(connection)
    await engine.dispose()
    url = engine_url(merchant.database_url, password=merchant.password)
    await _configure(url, merchant, config, actor)


async def close_common_databases(connection: AsyncConnection) -> None:
    """Let no merchant's role into the control database, which it is connected to, the template, and PostgreSQL's own.

    PostgreSQL opens a new database to all roles. Those that other applications made on the same server are left alone,
    and so is what belongs to another role.
    """
    sql = """
    SELECT datname FROM pg_database
    WHERE (datname = current_database() OR datname = ANY ($1)) AND pg_has_role(datdba, 'USAGE')
        AND EXISTS (SELECT FROM aclexplode(coalesce(datacl, acldefault('d', datdba))) WHERE grantee = 0)
    """
    common = [TEMPLATE_DATABASE, "postgres", "template0", "template1"]
    for tries_left in reversed(range(CLOSING_TRIES)):
        try:
            for (database,) in await fetch(connection, sql, common):
                await connection.exec_driver_sql(f"REVOKE ALL ON DATABASE {quoted(database)} FROM PUBLIC")
            return
        except DBAPIError as error:
            # Two sessions cannot change the rights on one database at the same time, and locks are each database's own.
            if not tries_left or "concurrently updated" not in str(error.orig):
                raise
            await asyncio.sleep(random.uniform(0, 0.1))


async def make_role(connection: AsyncConnection, role: str, password: str) -> None:
    if not await fetch(connection, "SELECT 1 FROM pg_roles WHERE rolname = $1", role):
        await connection.exec_driver_sql(f"CREATE ROLE {quoted(role)} LOGIN IN ROLE {WORKER_GROUP}")
    # The password is made of URL-safe characters, none of which ends a literal.
    assert "'" not in password
    await connection.exec_driver_sql(f"ALTER ROLE {quoted(role)} PASSWORD '{password}'")


async def _configure(url: URL, merchant: Merchant, config: MerchantConfig, actor: str) -> None:
    engine = create_unpooled_engine(url, WRITER_SETTINGS)
    async with engine.begin() as connection:
        now = (await fetch(connection, "SELECT clock_timestamp()"))[0][0]
        await add_config(connection, 1, config, actor, merchant.command, now)
        await connection.exec_driver_sql(
            "UPDATE merchant_state SET merchant_id = $1, config_version = greatest(config_version, 1)",
            (merchant.merchant_id,),
        )
        for months in (0, 1, 2):
            sql = "SELECT ensure_month((now() + make_interval(months => $1))::date)"
            await connection.exec_driver_sql(sql, (months,))
    await engine.dispose()


async def control_secret(connection: AsyncConnection) -> bytes:
    """Return the secret that keys the control inbox's fingerprints, made on first use."""
    sql = "INSERT INTO secrets (name, value) VALUES ('control', $1) ON CONFLICT DO NOTHING"
    await connection.exec_driver_sql(sql, (secrets.token_bytes(32),))
    value: bytes = (await fetch(connection, "SELECT value FROM secrets WHERE name = 'control'"))[0][0]
    return value


def server_url(control_url: str) -> URL:
    """Where new merchants' databases are made: the control database's own server."""
    return make_url(control_url)
