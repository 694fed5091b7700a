"""Set-based statements over the declared tables, shared by every store.

One statement writes any number of rows: new ones travel by COPY, changes as arrays through ``unnest``.

SQLAlchemy's share of a statement is 46 of 78 µs in this process, and a small batch is little but statements. So what
every batch does goes to the driver, once the transaction is open: SQLAlchemy begins it with a statement of its own.
"""

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from functools import cache
from operator import attrgetter
from typing import Any, TypeVar, cast

import asyncpg
from sqlalchemy import Table
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection

T = TypeVar("T")

_DIALECT = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it so


def _array(table: Table, column: str, position: int) -> str:
    return f"${position}::{table.c[column].type.compile(_DIALECT)}[]"


@cache
def insert_sql(table: Table, columns: tuple[str, ...], suffix: str = "") -> str:
    arrays = ", ".join(_array(table, column, n) for n, column in enumerate(columns, 1))
    return f"INSERT INTO {table.name} ({', '.join(columns)}) SELECT * FROM unnest({arrays}) {suffix}"


@cache
def update_sql(table: Table, keys: tuple[str, ...], columns: tuple[str, ...]) -> str:
    names = keys + columns
    arrays = ", ".join(_array(table, column, n) for n, column in enumerate(names, 1))
    assignments = ", ".join(f"{column} = v.{column}" for column in columns)
    matches = " AND ".join(f"t.{key} = v.{key}" for key in keys)
    return f"UPDATE {table.name} t SET {assignments} FROM unnest({arrays}) AS v ({', '.join(names)}) WHERE {matches}"


@cache
def delete_sql(table: Table, keys: tuple[str, ...]) -> str:
    arrays = ", ".join(_array(table, key, n) for n, key in enumerate(keys, 1))
    matches = " AND ".join(f"t.{key} = v.{key}" for key in keys)
    return f"DELETE FROM {table.name} t USING unnest({arrays}) AS v ({', '.join(keys)}) WHERE {matches}"


def _columns_of(rows: Iterable[Sequence[Any]]) -> tuple[list[Any], ...]:
    return tuple(map(list, zip(*rows, strict=True)))


async def insert_rows(
    connection: AsyncConnection, table: Table, columns: tuple[str, ...], rows: Sequence[Sequence[Any]], suffix: str = ""
) -> None:
    """Insert rows given as tuples in the order of ``columns``; nothing for no rows.

    They travel by COPY where they can: it takes two thirds of the time for two rows, and less the more there are.
    """
    if not rows:
        return
    driver = _driver_in_transaction(connection)
    if driver is not None and not suffix:
        await _answered(connection, driver.copy_records_to_table(table.name, records=rows, columns=columns))
    else:
        await execute(connection, insert_sql(table, columns, suffix), *_columns_of(rows))


async def insert_objects(
    connection: AsyncConnection, table: Table, columns: tuple[str, ...], objects: Iterable[Any], suffix: str = ""
) -> None:
    """Insert objects whose attributes carry the names of the columns."""
    read = attrgetter(*columns)
    await insert_rows(connection, table, columns, [read(item) for item in objects], suffix)


async def update_objects(
    connection: AsyncConnection, table: Table, keys: tuple[str, ...], columns: tuple[str, ...], objects: Iterable[Any]
) -> int:
    """Write ``columns`` of objects found by ``keys``; returns how many rows were changed."""
    read = attrgetter(*keys, *columns)
    rows = [read(item) for item in objects]
    if not rows:
        return 0
    return await execute(connection, update_sql(table, keys, columns), *_columns_of(rows))


async def delete_keys(
    connection: AsyncConnection, table: Table, keys: tuple[str, ...], rows: Sequence[Sequence[Any]]
) -> None:
    if rows:
        await execute(connection, delete_sql(table, keys), *_columns_of(rows))


async def execute(connection: AsyncConnection, sql: str, *parameters: Any) -> int:
    """Run one statement of ours that changes rows; returns how many."""
    driver = _driver_in_transaction(connection)
    if driver is None:
        return (await connection.exec_driver_sql(sql, parameters)).rowcount
    # "UPDATE 7", "INSERT 0 7"
    return int((await _answered(connection, driver.execute(sql, *parameters))).rpartition(" ")[2])


async def fetch(connection: AsyncConnection, sql: str, *parameters: Any) -> Sequence[Any]:
    """Run one statement of ours with ``$1`` parameters; returns all rows."""
    return (await connection.exec_driver_sql(sql, parameters)).all()


async def fetch_tuples(connection: AsyncConnection, sql: str, *parameters: Any) -> Sequence[Sequence[Any]]:
    """As ``fetch``, for what every batch reads: the members of a row have no names, only places."""
    driver = _driver_in_transaction(connection)
    if driver is None:
        return await fetch(connection, sql, *parameters)
    return cast(Sequence[Sequence[Any]], await _answered(connection, driver.fetch(sql, *parameters)))


def _driver_in_transaction(connection: AsyncConnection) -> asyncpg.Connection | None:
    """Return the driver's own connection if a transaction is open on it."""
    assert connection.sync_connection is not None
    driver = connection.sync_connection.connection.driver_connection
    is_open = driver is not None and not driver.is_closed() and driver.is_in_transaction()
    return driver if is_open else None


async def _answered(connection: AsyncConnection, statement: Awaitable[T]) -> T:
    """Wait for the driver. A connection that was given up waiting for is dropped, as SQLAlchemy does with its own.

    The rollback would wait for the same server once more, and end in its own error instead of this one.
    """
    try:
        return await statement
    except (TimeoutError, asyncio.CancelledError):
        await connection.invalidate()
        raise
