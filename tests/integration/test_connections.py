"""Connections to PostgreSQL, which are dear."""

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

import asyncpg
import pytest
from sqlalchemy import BigInteger, Column, MetaData, Table
from sqlalchemy.exc import DBAPIError

from catalog.sql import execute, fetch, fetch_tuples, insert_rows
from merchants.databases import WRITER_SETTINGS, create_engine, engine_url
from merchants.schema import migrate
from tests.chaos.proxy import Proxy
from tests.integration.shop import open_shop
from tests.services import Services
from workers.pipeline import is_trouble

NUMBERS = "SELECT unnest($1::bigint[]), unnest($2::oid[])"


async def test_types_of_postgresql_are_asked_for_once_in_a_process(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sequence[int]] = []
    ask = asyncpg.Connection._introspect_types  # type: ignore[attr-defined]

    async def noted(self: Any, oids: Sequence[int], *limit: Any) -> Any:
        asked.append(oids)
        return await ask(self, oids, *limit)

    monkeypatch.setattr(asyncpg.Connection, "_introspect_types", noted)
    monkeypatch.setattr("merchants.databases._builtin_types", {})
    for _ in range(3):
        engine = create_engine(engine_url(services.database_url("postgres")), WRITER_SETTINGS, pool_size=1)
        async with engine.connect() as connection:
            assert list(await fetch(connection, NUMBERS, [1, 2], [3, 4])) == [(1, 3), (2, 4)]
        await engine.dispose()

    assert len(asked) == 1


async def test_types_made_in_a_database_are_asked_for_on_each_connection(services: Services) -> None:
    for number in range(2):
        engine = create_engine(engine_url(services.database_url("postgres")), WRITER_SETTINGS, pool_size=1)
        async with engine.begin() as connection:
            # Another type of the same name, with another number.
            await connection.exec_driver_sql(f"CREATE TYPE pg_temp.colour AS ENUM ('red', 'shade {number}')")
            rows = await fetch(connection, "SELECT unnest($1::pg_temp.colour[])::text", ["red", f"shade {number}"])
            assert [row[0] for row in rows] == ["red", f"shade {number}"]
        await engine.dispose()


async def test_what_the_first_statement_of_a_transaction_copied_is_undone_with_it(services: Services) -> None:
    url = services.database_url("postgres")
    table = Table(f"copied_{secrets.token_hex(4)}", MetaData(), Column("number", BigInteger))
    engine = create_engine(engine_url(url), WRITER_SETTINGS, pool_size=1)
    async with engine.begin() as connection:
        await connection.exec_driver_sql(f"CREATE TABLE {table.name} (number bigint)")
    rows = [(1,), (2,)]

    async def give_up(statements_before: int) -> None:
        async with engine.begin() as connection:
            for _ in range(statements_before):
                await fetch_tuples(connection, "SELECT 1")
            await insert_rows(connection, table, ("number",), rows)
            raise RuntimeError("undone")

    for statements_before in (0, 1):
        with pytest.raises(RuntimeError, match="undone"):
            await give_up(statements_before)
        async with engine.begin() as connection:
            assert await execute(connection, f"DELETE FROM {table.name}") == 0

    async with engine.begin() as connection:
        await insert_rows(connection, table, ("number",), rows)
        await insert_rows(connection, table, ("number",), rows)
        assert await execute(connection, f"DELETE FROM {table.name}") == 4
        await connection.exec_driver_sql(f"DROP TABLE {table.name}")
    await engine.dispose()


async def test_a_connection_lost_between_two_statements_is_replaced(services: Services) -> None:
    url = services.database_url("postgres")
    engine = create_engine(engine_url(url), WRITER_SETTINGS, pool_size=1)
    pid = "SELECT pg_backend_pid()"
    pids: list[int] = []

    async def lose() -> None:
        async with engine.begin() as connection:
            pids.extend((await fetch_tuples(connection, pid))[0])
            killer = await asyncpg.connect(url)
            await killer.execute("SELECT pg_terminate_backend($1, 5000)", pids[0])
            await killer.close()
            await fetch_tuples(connection, pid)

    with pytest.raises((DBAPIError, asyncpg.PostgresError, asyncpg.InterfaceError)) as lost:
        await lose()
    assert is_trouble(lost.value)

    async with engine.begin() as connection:
        for _ in range(2):
            pids.extend((await fetch_tuples(connection, pid))[0])
    assert pids[0] != pids[1] == pids[2]
    await engine.dispose()


async def test_a_server_that_goes_silent_costs_its_connection_and_no_second_wait(services: Services) -> None:
    url = engine_url(services.database_url("postgres"))
    assert url.port is not None
    proxy = Proxy(url.port)
    engine = create_engine(url.set(host="127.0.0.1", port=proxy.port), WRITER_SETTINGS, pool_size=1)

    async def wait_in_vain() -> None:
        async with engine.begin() as connection:
            await fetch_tuples(connection, "SELECT 1")
            proxy.deafen()
            async with asyncio.timeout(0.2):
                await fetch_tuples(connection, "SELECT 1")

    try:
        # The rollback alone would wait for a minute.
        async with asyncio.timeout(30):
            with pytest.raises(TimeoutError):
                await wait_in_vain()
            async with engine.begin() as connection:
                for _ in range(2):
                    assert [row[0] for row in await fetch_tuples(connection, "SELECT 1")] == [1]
    finally:
        await engine.dispose()
        proxy.close()


async def test_a_merchant_without_batches_costs_no_connection_of_its_own(services: Services) -> None:
    url = services.database_url(f"connections_control_{secrets.token_hex(3)}")
    await migrate(url)
    async with open_shop(services, url, f"c{secrets.token_hex(4)}") as shop:
        name = shop.merchant.merchant_id

        assert await shop.work() == 0
        claimed = await shop.query("SELECT count(*), min(owner) FROM positions")
        assert ([tuple(row) for row in claimed], shop.pools.has(name)) == ([(10, "the tests")], False)

        await shop.stock()
        assert shop.pools.has(name)


@pytest.mark.parametrize("mode", ["disable", "prefer"])
async def test_a_url_says_as_libpq_does_whether_to_encrypt(services: Services, mode: str) -> None:
    url = f"{services.database_url('postgres')}?sslmode={mode}"
    engine = create_engine(engine_url(url), WRITER_SETTINGS, pool_size=1)
    async with engine.connect() as connection:
        assert list(await fetch(connection, "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")) == [(False,)]
    await engine.dispose()


async def test_a_server_without_encryption_is_refused_where_it_is_required(services: Services) -> None:
    engine = create_engine(
        engine_url(f"{services.database_url('postgres')}?sslmode=require"), WRITER_SETTINGS, pool_size=1
    )
    with pytest.raises(OSError, match="SSL"):
        async with engine.connect():
            pass
    await engine.dispose()
