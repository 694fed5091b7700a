"""The declared tables are the migrated ones, and an upgrade of many databases can be stopped, resumed and reported."""

import asyncio
import os
import secrets
import sys
from io import StringIO
from typing import Any

import asyncpg
import pytest
from rich.console import Console
from sqlalchemy import MetaData, Table, make_url
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

import catalog.tables
import console.migrate
import ledger.tables
import merchants.tables
import receipts.tables
import workers.inbox
import workers.positions
from merchants import schema
from merchants.databases import engine_url
from merchants.registry import TEMPLATE_DATABASE, close_common_databases, names
from merchants.schema import MigrationError, UnknownSchemaError, check, check_merchant, migrate, on_database, versions
from migrations import runner
from tests import builders
from tests.services import Services

# Columns that the database fills in, and statements of ours never write or read.
UNDECLARED = {
    "parked.arrived",
    "merchant_state.one",
    "dead_letters.redriven_at",
    "purchase_refusals.settled_at",
}
# Tables without a declaration: they are only touched by statements written out.
BARE = {"clock_advances", "job_state", "alembic_version"}
MERCHANT = (
    catalog.tables.metadata,
    ledger.tables.metadata,
    receipts.tables.metadata,
    merchants.tables.metadata,
    workers.inbox.metadata,
    workers.positions.metadata,
)
CONTROL = (merchants.tables.control_metadata, workers.inbox.metadata, workers.positions.metadata)
# Parked commands exist in merchants' databases only.
NOT_IN_CONTROL = {"parked"}


@pytest.fixture
def control_url(services: Services) -> str:
    return services.database_url(f"migrations_control_{secrets.token_hex(3)}")


async def migrated(url: str) -> dict[str, tuple[str, bool]]:
    """Return (type, nullable) of all columns of a database by `table.column`, partitions left out."""
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        rows = await connection.fetch("""
            SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), NOT a.attnotnull
            FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
            WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition
                AND a.attnum > 0 AND NOT a.attisdropped
        """)
    finally:
        await connection.close()
    return {f"{table}.{column}": (kind, nullable) for table, column, kind, nullable in rows}


def declared(metadatas: tuple[MetaData, ...]) -> dict[str, tuple[str, bool]]:
    dialect = postgresql.dialect()
    found = {}
    tables: list[Table] = [table for metadata in metadatas for table in metadata.sorted_tables]
    for table in tables:
        for column in table.columns:
            kind = str(column.type.compile(dialect)).lower().replace("timestamp with time zone", "timestamptz")
            found[f"{table.name}.{column.name}"] = (kind, bool(column.nullable))
    return found


def comparable(columns: dict[str, tuple[str, bool]], left_out: set[str]) -> dict[str, tuple[str, bool]]:
    return {
        name: (kind.replace("timestamp with time zone", "timestamptz"), nullable)
        for name, (kind, nullable) in columns.items()
        if name not in UNDECLARED and name.partition(".")[0] not in left_out
    }


async def test_the_declared_tables_are_the_migrated_ones(control_url: str) -> None:
    await migrate(control_url)

    template = await migrated(on_database(control_url, TEMPLATE_DATABASE))
    assert comparable(declared(MERCHANT), set()) == comparable(template, BARE)
    control = await migrated(control_url)
    assert comparable(declared(CONTROL), NOT_IN_CONTROL) == comparable(control, BARE)


async def test_a_second_run_changes_nothing_and_says_so(control_url: str) -> None:
    await migrate(control_url)
    merchant = await builders.merchant(control_url, f"m{secrets.token_hex(4)}")
    steps = await migrate(control_url)

    assert {step.database for step in steps} >= {TEMPLATE_DATABASE, f"credits_m_{merchant.merchant_id}"}
    assert all(step.before == step.after and step.error is None for step in steps)
    out = StringIO()
    assert await console.migrate.run(control_url, Console(file=out, width=160), check=True) == 0
    assert "3 of 3 databases are up to date" in out.getvalue()


async def test_one_database_that_cannot_be_migrated_does_not_stop_the_others(
    control_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await migrate(control_url)
    names = [f"m{secrets.token_hex(4)}" for _ in range(3)]
    for name in names:
        await builders.merchant(control_url, name)
    lost, ahead = f"credits_m_{names[0]}", f"credits_m_{names[1]}"
    await run(control_url, "postgres", f'DROP DATABASE "{lost}" WITH (FORCE)')
    await run(control_url, ahead, "UPDATE alembic_version SET version_num = '9999_unknown'")

    with pytest.raises(MigrationError, match=lost) as failure:
        await migrate(control_url)

    errors = {step.database: step.error for step in failure.value.steps}
    assert errors[lost] is not None
    assert "9999_unknown" in str(errors[ahead])
    assert errors[f"credits_m_{names[2]}"] is None
    out = StringIO()
    assert await console.migrate.run(control_url, Console(file=out, width=200)) == 1
    assert lost in out.getvalue()
    assert ahead in out.getvalue()
    behind = {step.database: step for step in await versions(control_url)}
    assert behind[ahead].before == "9999_unknown"
    assert behind[lost].error is not None


async def test_runs_at_the_same_time_wait_for_each_other(control_url: str) -> None:
    environment = os.environ | {"CREDITS_CONTROL_DATABASE_URL": control_url}
    command = [sys.executable, "-m", "console.main", "migrate"]
    pipe = asyncio.subprocess.PIPE
    runs = [await asyncio.create_subprocess_exec(*command, env=environment, stdout=pipe, stderr=pipe) for _ in range(3)]

    for process in runs:
        out, errors = await process.communicate()
        assert process.returncode == 0, out + errors
    assert {step.before for step in await versions(control_url)} == {runner.head("control"), runner.head("merchant")}


async def test_many_databases_are_brought_forward_at_once(control_url: str) -> None:
    await migrate(control_url)
    names = [f"m{secrets.token_hex(4)}" for _ in range(5)]
    for name in names:
        await builders.merchant(control_url, name)
        database = f"credits_m_{name}"
        await run(control_url, database, "DROP SCHEMA public CASCADE")
        await run(control_url, database, "CREATE SCHEMA public")
    seen: list[str] = []

    steps = await migrate(control_url, seen.append)

    migrated_now = {step.database for step in steps if step.before is None and step.after == runner.head("merchant")}
    assert migrated_now == {f"credits_m_{name}" for name in names}
    assert migrated_now <= set(seen)


@pytest.mark.parametrize("lineage", ["control", "merchant"])
async def test_a_worker_does_not_start_on_a_schema_of_another_version(control_url: str, lineage: str) -> None:
    # The template is one a server: it is put right again for the other tests.
    database = "" if lineage == "control" else TEMPLATE_DATABASE
    await migrate(control_url)
    await check(control_url)
    newest = runner.head(lineage)
    try:
        await run(control_url, database, "UPDATE alembic_version SET version_num = '9999_newer'")
        with pytest.raises(UnknownSchemaError, match=f"is at 9999_newer, this version needs {newest}: a newer version"):
            await check(control_url)
        await run(control_url, database, "DELETE FROM alembic_version")
        with pytest.raises(UnknownSchemaError, match=f"is at None, this version needs {newest}: run credits migrate"):
            await check(control_url)
    finally:
        await run(control_url, database, "DELETE FROM alembic_version")
        await run(control_url, database, f"INSERT INTO alembic_version VALUES ('{newest}')")


async def test_a_merchant_behind_is_waited_for_and_one_ahead_is_worked_for(control_url: str) -> None:
    await migrate(control_url)
    merchant = await builders.merchant(control_url, f"m{secrets.token_hex(4)}")
    database = f"credits_m_{merchant.merchant_id}"
    engine = create_async_engine(engine_url(on_database(control_url, database)), poolclass=NullPool)

    async with engine.connect() as connection:
        await check_merchant(connection)
        await connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999_newer'")
        await check_merchant(connection)
        await connection.exec_driver_sql("DELETE FROM alembic_version")
        with pytest.raises(UnknownSchemaError, match=r"is at None, this version needs .*: run credits migrate"):
            await check_merchant(connection)
    await engine.dispose()


async def test_a_merchants_role_can_connect_to_its_own_database_only(control_url: str) -> None:
    await migrate(control_url)
    first, second = [await builders.merchant(control_url, f"m{secrets.token_hex(4)}") for _ in range(2)]
    name = names(first.merchant_id)[1]
    # As an installation of an earlier version is: the next migration closes what was open.
    control = make_url(control_url).database
    await run(control_url, "postgres", f'GRANT CONNECT ON DATABASE "{control}" TO PUBLIC')
    await migrate(control_url)

    own = make_url(first.database_url).set(password=first.password)
    for database in (control, TEMPLATE_DATABASE, "postgres", "template1", names(second.merchant_id)[1]):
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="permission denied for database"):
            await asyncpg.connect(own.set(drivername="postgresql", database=database).render_as_string(False))
    connection = await asyncpg.connect(own.set(drivername="postgresql").render_as_string(False))
    assert await connection.fetchval("SELECT current_database()") == name
    await connection.close()


async def test_installations_on_one_server_close_its_databases_at_the_same_time(
    control_url: str, services: Services
) -> None:
    urls = [control_url, services.database_url("second_control")]
    for url in urls:
        await migrate(url)

    async def close(url: str) -> None:
        engine = create_async_engine(engine_url(url), poolclass=NullPool, isolation_level="AUTOCOMMIT")
        async with engine.connect() as connection:
            await close_common_databases(connection)
        await engine.dispose()

    for _ in range(3):
        for database in ("postgres", "template1", TEMPLATE_DATABASE):
            await run(control_url, "postgres", f"GRANT CONNECT ON DATABASE {database} TO PUBLIC")
        await asyncio.gather(*[close(url) for url in urls * 5])
        connection = await asyncpg.connect(on_database(control_url, "postgres").replace("+asyncpg", ""))
        rights = "SELECT grantee FROM pg_database, aclexplode(datacl) WHERE datname = ANY($1)"
        granted = await connection.fetch(rights, ["postgres", "template1", TEMPLATE_DATABASE])
        await connection.close()
        assert granted
        assert 0 not in [row["grantee"] for row in granted]


async def run(control_url: str, database: str, statement: str) -> Any:
    url = on_database(control_url, database) if database else control_url
    engine = create_async_engine(engine_url(url), poolclass=NullPool, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.exec_driver_sql(statement)
    await engine.dispose()


def test_databases_are_migrated_a_few_at_a_time_with_timeouts() -> None:
    assert schema.PARALLEL > 1
    assert {"lock_timeout", "statement_timeout"} <= runner.SETTINGS.keys()
