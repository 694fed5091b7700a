"""Locks a merchant's document series and saves what was issued: the last thing a batch does before its inbox rows."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from catalog.sql import fetch_tuples, insert_objects, update_objects
from receipts import tables
from receipts.model import GENESIS, Archive, BuyerBlock, Document, Series

_LOCK_SERIES = """
INSERT INTO document_series AS s (prefix, year, next_number, last_issued_at, head)
SELECT prefix, 0, 1, '-infinity', $2 FROM unnest($1::text[]) AS v (prefix) ORDER BY 1
ON CONFLICT (prefix) DO UPDATE SET next_number = s.next_number
RETURNING prefix, year, next_number, nullif(last_issued_at, '-infinity'), head
"""
LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


async def lock_series(connection: AsyncConnection, prefixes: Iterable[str]) -> dict[str, Series]:
    """Lock series by prefix, in order, making those that are new."""
    rows = await fetch_tuples(connection, _LOCK_SERIES, sorted(set(prefixes)), GENESIS)
    return {row[0]: Series(row[0], row[1], row[2], row[3] or LONG_AGO, row[4]) for row in rows}


async def read_clock(connection: AsyncConnection) -> datetime:
    """Read the database's clock; for a document only after its series is locked."""
    at: datetime = (await fetch_tuples(connection, "SELECT clock_timestamp()"))[0][0]
    return at


async def load_archive(connection: AsyncConnection, external_refs: Sequence[str]) -> Archive:
    """Read the documents already issued for these purchases, in order of issue."""
    archive = Archive()
    sql = "SELECT body FROM documents WHERE external_ref = ANY($1::text[]) ORDER BY issued_at, prefix, sequence"
    for row in await fetch_tuples(connection, sql, list(external_refs)) if external_refs else ():
        archive.add(json.loads(row[0]))
    return archive


async def load_buyers(connection: AsyncConnection, external_refs: Sequence[str]) -> dict[str, str]:
    """Read the buyer blocks of purchases, by external_ref; those that were erased are not there."""
    sql = """
    SELECT d.external_ref, b.block FROM documents d JOIN buyers b USING (number)
    WHERE d.external_ref = ANY($1::text[]) AND d.kind = 'receipt'
    """
    rows = await fetch_tuples(connection, sql, list(external_refs)) if external_refs else ()
    return {row[0]: row[1] for row in rows}


async def save(
    connection: AsyncConnection, series: Iterable[Series], documents: Sequence[Document], buyers: Sequence[BuyerBlock]
) -> None:
    def names(table: Any) -> tuple[str, ...]:
        return tuple(column.name for column in table.columns)

    await insert_objects(connection, tables.documents, names(tables.documents), documents)
    await insert_objects(connection, tables.buyers, names(tables.buyers), buyers)
    state = ("year", "next_number", "last_issued_at", "head")
    await update_objects(connection, tables.document_series, ("prefix",), state, series)


async def erase_buyers(connection: AsyncConnection, account_ids: Sequence[int]) -> None:
    """Delete the buyer blocks and salts of erased accounts; the documents' digests stay, and tell nothing any more."""
    await connection.exec_driver_sql("DELETE FROM buyers WHERE account_id = ANY($1::bigint[])", (list(account_ids),))


async def delete_old_buyers(connection: AsyncConnection, since: datetime, until: datetime) -> None:
    """Delete the buyer blocks and salts of receipts issued after ``since``, until ``until``; the documents stay."""
    sql = """
    DELETE FROM buyers b USING documents d
    WHERE d.number = b.number AND d.issued_at > $1 AND d.issued_at <= $2
    """
    await connection.exec_driver_sql(sql, (since, until))


async def existing_numbers(connection: AsyncConnection, numbers: Sequence[str]) -> set[str]:
    sql = "SELECT number FROM documents WHERE number = ANY($1::text[])"
    return {row[0] for row in await fetch_tuples(connection, sql, list(numbers))}


@dataclass(frozen=True, slots=True)
class Stored:
    """A document as it lies in the database, with what is kept beside it."""

    number: str
    kind: str
    issued_at: datetime
    body: str
    hash: bytes
    command: bytes
    user_id: str
    buyer: str | None


# The buyer block of a purchase is kept once, beside its receipt.
SELECT_STORED = """
SELECT d.number, d.kind, d.issued_at, d.body, d.hash, d.command, a.user_id, b.block
FROM documents d JOIN accounts a USING (account_id) LEFT JOIN purchases p USING (external_ref)
    LEFT JOIN buyers b ON b.number = p.receipt_number AND d.body::json ->> 'buyer_digest' IS NOT NULL
"""


async def documents_of(connection: AsyncConnection, commands: Sequence[bytes]) -> list[Stored]:
    """Read the documents that these commands had issued, in order of issue."""
    if not commands:
        return []
    sql = f"{SELECT_STORED} WHERE d.command = ANY($1::bytea[]) ORDER BY d.issued_at, d.prefix, d.sequence"
    return [Stored(*row) for row in await fetch_tuples(connection, sql, list(commands))]
