"""Reads of the catalogue for HTTP: products with their prices, and versions of operation types (spec §1, §4, §8)."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from catalog import tables
from catalog.model import ANYWHERE, OperationType, Price, Product, is_active, is_withdrawn
from catalog.sql import fetch

Shown = dict[str, Any]


def _names(table: Any) -> str:
    return ", ".join(column.name for column in table.columns)


async def products(
    connection: AsyncConnection,
    now: datetime,
    *,
    country: str | None,
    distribution: str | None,
    active_at: datetime | None,
    after: str | None,
    limit: int,
) -> list[Shown]:
    """Show products by code, archived and future ones too, each with its state at ``now``.

    With a country: the sellable products that are for sale there at ``active_at`` (default now), with the prices that
    apply there: the country's own, else those for everywhere else. With ``active_at`` alone: products active then.
    """
    at = active_at or (now if country is not None else None)
    sql = f"""
    SELECT {_names(tables.products)} FROM products
    WHERE ($1::text IS NULL OR product_code > $1) AND ($2::text IS NULL OR distribution = $2)
        AND ($3::timestamptz IS NULL OR (effective_at <= $3 AND (archived_at IS NULL OR archived_at > $3)))
        AND ($4::text IS NULL OR EXISTS (SELECT FROM product_prices p
            WHERE p.product_code = products.product_code AND p.country IN ($4, '{ANYWHERE}')
                AND p.effective_at <= $3 AND (p.archived_at IS NULL OR p.archived_at > $3)))
    ORDER BY product_code LIMIT $5
    """
    found = [Product(*row) for row in await fetch(connection, sql, after, distribution, at, country, limit)]
    prices = await _prices(connection, [product.product_code for product in found])
    shown = []
    for product in found:
        rows = [price for price in prices if price.product_code == product.product_code]
        if at is not None:
            rows = [price for price in rows if is_active(price, at)]
        if country is not None:
            rows = [p for p in rows if p.country == country] or [p for p in rows if p.country == ANYWHERE]
        shown.append(product.as_object(rows) | {"state": state_of(product, now)})
    return shown


async def _prices(connection: AsyncConnection, codes: Sequence[str]) -> list[Price]:
    sql = f"""
    SELECT {_names(tables.product_prices)} FROM product_prices WHERE product_code = ANY($1::text[])
    ORDER BY product_code, country, currency, version
    """
    return [Price(*row) for row in await fetch(connection, sql, list(codes))]


async def operation_types(
    connection: AsyncConnection,
    now: datetime,
    *,
    operation_code: str | None = None,
    active_at: datetime | None = None,
    state: str | None = None,
    after: tuple[str, int] | None = None,
    limit: int,
) -> list[Shown]:
    """Show versions of operation types by (operation_code, version), each with its state at ``now``."""
    sql = f"""
    SELECT {_names(tables.operation_types)} FROM operation_types
    WHERE ($1::text IS NULL OR operation_code = $1)
        AND ($2::timestamptz IS NULL OR (effective_at <= $2 AND (archived_at IS NULL OR archived_at > $2)))
        AND ($3::text IS NULL OR (operation_code, version) > ($3, $4::integer))
        AND ($5::text IS NULL OR $5 = CASE WHEN archived_at <= effective_at THEN 'withdrawn'
            WHEN effective_at > $6 THEN 'scheduled' WHEN archived_at <= $6 THEN 'archived' ELSE 'active' END)
    ORDER BY operation_code, version LIMIT $7
    """
    values = (operation_code, active_at, *(after or (None, None)), state, now, limit)
    found = [OperationType(*row) for row in await fetch(connection, sql, *values)]
    return [kind.as_object() | {"version": kind.version, "state": state_of(kind, now)} for kind in found]


def state_of(period: Any, now: datetime) -> str:
    """Tell where a period stands: scheduled, active, archived, or withdrawn before it began."""
    if is_withdrawn(period):
        return "withdrawn"
    if period.effective_at > now:
        return "scheduled"
    return "active" if is_active(period, now) else "archived"
