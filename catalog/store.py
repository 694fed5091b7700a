"""Loads and saves a merchant's catalogue."""

from collections.abc import Iterable

from sqlalchemy import Table, select
from sqlalchemy.ext.asyncio import AsyncConnection

from catalog.decisions import Row
from catalog.model import Catalog, OperationType, Price, Product
from catalog.sql import insert_objects
from catalog.tables import operation_types, product_prices, products

_TABLES: dict[type, Table] = {Product: products, Price: product_prices, OperationType: operation_types}


async def load(connection: AsyncConnection, version: int) -> Catalog:
    """Read the whole catalogue, as of the version row read in the same transaction."""
    return Catalog.of(
        version,
        [Product(*row) for row in await connection.execute(select(products))],
        [Price(*row) for row in await connection.execute(select(product_prices))],
        [OperationType(*row) for row in await connection.execute(select(operation_types))],
    )


async def save(connection: AsyncConnection, changed: Iterable[Row]) -> None:
    """Write the final state of each row that was created or whose end was moved."""
    latest: dict[type, dict[object, Row]] = {kind: {} for kind in _TABLES}
    for row in changed:
        latest[type(row)][_key(row)] = row
    for kind, table in _TABLES.items():
        names = tuple(column.name for column in table.columns)
        key = ", ".join(column.name for column in table.primary_key)
        suffix = f"ON CONFLICT ({key}) DO UPDATE SET archived_at = excluded.archived_at"
        await insert_objects(connection, table, names, latest[kind].values(), suffix)


def _key(row: Row) -> object:
    match row:
        case Product():
            return row.product_code
        case Price():
            return row.product_code, row.country, row.currency, row.version
        case OperationType():
            return row.operation_code, row.version
