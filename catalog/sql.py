"""Set-based statements over the declared tables, shared by every store.

One statement writes any number of rows: columns travel as arrays through ``unnest``.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from operator import attrgetter
from typing import Any

from sqlalchemy import Table
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection

COPY_ROWS_MIN = 32

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

    Many rows travel by COPY, which costs a third of what encoding arrays does.
    """
    if len(rows) >= COPY_ROWS_MIN and not suffix:
        raw = await connection.get_raw_connection()
        driver = raw.driver_connection
        assert driver is not None
        await driver.copy_records_to_table(table.name, records=rows, columns=columns)
    elif rows:
        await connection.exec_driver_sql(insert_sql(table, columns, suffix), _columns_of(rows))


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
    result = await connection.exec_driver_sql(update_sql(table, keys, columns), _columns_of(rows))
    return result.rowcount


async def delete_keys(
    connection: AsyncConnection, table: Table, keys: tuple[str, ...], rows: Sequence[Sequence[Any]]
) -> None:
    if rows:
        await connection.exec_driver_sql(delete_sql(table, keys), _columns_of(rows))


async def fetch(connection: AsyncConnection, sql: str, *parameters: Any) -> Sequence[Any]:
    """Run one statement of ours with ``$1`` parameters; returns all rows."""
    return (await connection.exec_driver_sql(sql, parameters)).all()
