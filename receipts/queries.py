"""Reads of documents for HTTP: the same documents as published (spec §5, §8)."""

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from catalog.sql import fetch
from receipts.model import credited_status, published
from receipts.store import SELECT_STORED, Stored, load_archive
from schemas.canonical import format_time
from schemas.money import format_amount

Shown = dict[str, Any]


def as_published(stored: Stored) -> Shown:
    return published(stored.body, stored.hash, stored.user_id, stored.buyer)


async def document(connection: AsyncConnection, number: str) -> tuple[int, Shown] | None:
    """Return (account_id, document) of a number, or None if there is no such document."""
    sql = "SELECT account_id FROM documents WHERE number = $1"
    owner = await fetch(connection, sql, number)
    rows = await fetch(connection, f"{SELECT_STORED} WHERE d.number = $1", number)
    return (owner[0][0], as_published(Stored(*rows[0]))) if rows else None


async def documents(
    connection: AsyncConnection,
    account_id: int,
    *,
    after: tuple[datetime, str] | None,
    limit: int,
    kind: str | None = None,
    issued_from: datetime | None = None,
    issued_to: datetime | None = None,
) -> list[Shown]:
    """Show an account's documents by (issued_at, number): as published, with status and fiscal receipts added."""
    sql = f"""
    {SELECT_STORED} WHERE d.account_id = $1 AND ($2::timestamptz IS NULL OR (d.issued_at, d.number) > ($2, $3::text))
        AND ($4::text IS NULL OR d.kind = $4)
        AND ($5::timestamptz IS NULL OR d.issued_at >= $5) AND ($6::timestamptz IS NULL OR d.issued_at < $6)
    ORDER BY d.issued_at, d.number LIMIT $7
    """
    values = (account_id, *(after or (None, None)), kind, issued_from, issued_to, limit)
    found = [as_published(Stored(*row)) for row in await fetch(connection, sql, *values)]
    statuses = await status_of(connection, [d["external_ref"] for d in found if d["kind"] == "receipt"])
    fiscal = await fiscal_receipts(connection, [d["number"] for d in found])
    for shown in found:
        if shown["kind"] == "receipt":
            shown["status"] = statuses[shown["external_ref"]]
        if shown["number"] in fiscal:
            shown["fiscal_receipts"] = fiscal[shown["number"]]
    return found


async def latest_documents(connection: AsyncConnection, account_id: int, limit: int) -> list[Shown]:
    sql = f"{SELECT_STORED} WHERE d.account_id = $1 ORDER BY d.issued_at DESC, d.number DESC LIMIT $2"
    return [as_published(Stored(*row)) for row in await fetch(connection, sql, account_id, limit)]


async def status_of(connection: AsyncConnection, external_refs: Sequence[str]) -> dict[str, str]:
    """Derive the receipts' status of purchases: paid, partially_credited or credited."""
    archive = await load_archive(connection, external_refs)
    return {ref: credited_status(bodies) for ref, bodies in archive.bodies.items()}


async def fiscal_receipts(connection: AsyncConnection, numbers: Sequence[str]) -> dict[str, list[Shown]]:
    """Return what authorities issued for documents, by document number, in the order it was attached."""
    sql = """
    SELECT receipt_number, kind, fiscal_number, authority, register_number, qr_url, fiscal_at FROM fiscal_receipts
    WHERE receipt_number = ANY($1::text[]) ORDER BY attached_at, kind, fiscal_number
    """
    found: dict[str, list[Shown]] = {}
    for row in await fetch(connection, sql, list(numbers)) if numbers else ():
        shown = {name: value for name, value in row._mapping.items() if value is not None}
        found.setdefault(row.receipt_number, []).append(shown | {"fiscal_at": format_time(row.fiscal_at)})
    return found


async def standing(connection: AsyncConnection, shown: Shown) -> Shown:
    """Tell what became of a document: its status, the documents of the same purchase, its fiscal receipts."""
    archive = await load_archive(connection, [shown["external_ref"]])
    bodies = archive.bodies[shown["external_ref"]]
    notes = archive.standing_notes(shown["external_ref"])
    credited = sum((Decimal(note["amount"]) for note in notes), Decimal(0))
    fiscal = await fiscal_receipts(connection, [shown["number"]])
    return {
        "number": shown["number"],
        "kind": shown["kind"],
        "receipt_number": shown["receipt_number"],
        "status": credited_status(bodies),
        "credited": format_amount(credited, shown["currency"]),
        "currency": shown["currency"],
        "documents": [{name: body[name] for name in ("number", "kind", "issued_at", "amount")} for body in bodies],
        "fiscal_receipts": fiscal.get(shown["number"], []),
    }
