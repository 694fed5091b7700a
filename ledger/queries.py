"""Reads of the ledger for HTTP: accounts, entries, lots, usage, operations and purchases as they are shown (spec §8).

Every function runs inside the caller's read-only transaction. Lists take the key of the last row seen and return
at most ``limit`` rows after it, in an order that never changes for a row: so a walk meets each row once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from catalog.sql import fetch
from ledger import tables
from ledger.model import TOMBSTONE, Account, Entry, entry_id_of
from schemas.canonical import format_decimal, format_time
from schemas.money import format_amount

Shown = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cut:
    """A point in an account's history: after the entry ``user_seq``, when the merchant's clock showed ``at``."""

    user_seq: int
    at: datetime

    def as_object(self) -> Shown:
        return {"user_seq": self.user_seq, "at": format_time(self.at)}


def _names(table: Any, alias: str = "") -> str:
    return ", ".join(f"{alias}{column.name}" for column in table.columns)


def present(shown: Mapping[str, Any]) -> Shown:
    """Leave out what is absent."""
    return {name: value for name, value in shown.items() if value is not None}


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else format_time(moment)


def _decimal(number: Decimal | None) -> str | None:
    return None if number is None else format_decimal(number)


# Accounts


async def find_account(connection: AsyncConnection, account_id: int, user_id: str) -> Account | None:
    """Return a user's account, found by the tombstone if that is what the id is."""
    sql = f"SELECT {_names(tables.accounts)} FROM accounts WHERE account_id = $1"
    rows = await fetch(connection, sql, account_id)
    if not rows and user_id.startswith(TOMBSTONE):
        rows = await fetch(connection, f"SELECT {_names(tables.accounts)} FROM accounts WHERE user_id = $1", user_id)
    return Account(*rows[0]) if rows else None


async def cut_at(connection: AsyncConnection, account: Account, moment: datetime) -> Cut:
    """Return the cut of a moment: after the last entry written until then."""
    sql = """
    SELECT user_seq FROM entries WHERE account_id = $1 AND created_at <= $2 ORDER BY user_seq DESC LIMIT 1
    """
    rows = await fetch(connection, sql, account.account_id, moment)
    return Cut(rows[0][0] if rows else 0, moment)


async def cut_after(connection: AsyncConnection, account: Account, user_seq: int) -> Cut:
    """Return the cut right after an entry; 0 is before the first one."""
    sql = "SELECT created_at FROM entries WHERE account_id = $1 AND user_seq = $2"
    rows = await fetch(connection, sql, account.account_id, user_seq)
    at = rows[0][0] if rows else account.created_at
    assert at is not None
    return Cut(user_seq, at)


async def balance(connection: AsyncConnection, account: Account, cut: Cut) -> Shown:
    """Show balance, debt and what can be spent at a cut: unexpired remaining credits less the debt."""
    total, owed = account.balance, account.debt
    if cut.user_seq != account.last_seq:
        sql = "SELECT balance_after, debt_after FROM entries WHERE account_id = $1 AND user_seq = $2"
        rows = await fetch(connection, sql, account.account_id, cut.user_seq)
        total, owed = rows[0] if rows else (0, 0)
    sql = f"""
    WITH live AS (
        SELECT expires_at, remaining FROM ({_lots_sql(account, cut)}) l WHERE remaining > 0 AND expires_at > $3
    )
    SELECT coalesce(sum(remaining), 0)::bigint, min(expires_at),
        coalesce(sum(remaining) FILTER (WHERE expires_at = (SELECT min(expires_at) FROM live)), 0)::bigint FROM live
    """
    unexpired, next_at, next_credits = (await fetch(connection, sql, account.account_id, cut.user_seq, cut.at))[0]
    shown = {"balance": total, "debt": owed, "spendable": unexpired - owed}
    return shown | ({"next_expiry": {"at": format_time(next_at), "credits": next_credits}} if next_at else {})


def lock_of(account: Account, now: datetime) -> Shown:
    locked = account.is_locked(now)
    return present({"locked": locked, "locked_until": _time(account.locked_until) if locked else None})


# Entries


async def entries(
    connection: AsyncConnection,
    account: Account,
    *,
    after: int,
    until: int,
    limit: int,
    filters: Mapping[str, Any] | None = None,
) -> list[Entry]:
    """Return entries in order of ``user_seq``, from just behind ``after`` to ``until``.

    Filters: reason, from (inclusive) and to (exclusive) of created_at, workflow_id, operation_id.
    """
    given = filters or {}
    sql = f"""
    SELECT {_names(tables.entries)} FROM entries WHERE account_id = $1 AND user_seq > $2 AND user_seq <= $3
        AND ($4::text IS NULL OR reason = $4)
        AND ($5::timestamptz IS NULL OR created_at >= $5) AND ($6::timestamptz IS NULL OR created_at < $6)
        AND ($7::text IS NULL OR workflow_id = $7) AND ($8::text IS NULL OR operation_id = $8)
    ORDER BY user_seq LIMIT $9
    """
    names = ("reason", "from", "to", "workflow_id", "operation_id")
    values = (given.get(name) for name in names)
    return [Entry(*row) for row in await fetch(connection, sql, account.account_id, after, until, *values, limit)]


async def latest_entries(connection: AsyncConnection, account: Account, limit: int) -> list[Entry]:
    after = max(0, account.last_seq - limit)
    return (await entries(connection, account, after=after, until=account.last_seq, limit=limit))[::-1]


async def entry_objects(connection: AsyncConnection, found: Sequence[Entry], cut: Cut) -> list[Shown]:
    """Show entries of one account with what lots paid for each of them until the cut."""
    if not found:
        return []
    paid: dict[int, list[Shown]] = {}
    debits = [entry.user_seq for entry in found if entry.amount < 0]
    sql = """
    SELECT entry_seq, lot_seq, at_seq, credits FROM allocations
    WHERE account_id = $1 AND entry_seq = ANY($2::bigint[]) AND at_seq <= $3 ORDER BY entry_seq, at_seq, lot_seq
    """
    account_id = found[0].account_id
    for entry_seq, lot_seq, at_seq, credits in await fetch(connection, sql, account_id, debits, cut.user_seq):
        lot_id = entry_id_of(account_id, lot_seq)
        paid.setdefault(entry_seq, []).append({"lot_id": lot_id, "credits": credits, "at_seq": at_seq})
    return [entry_object(entry, paid.get(entry.user_seq, [])) for entry in found]


def entry_object(entry: Entry, allocations: list[Shown]) -> Shown:
    entry_id = entry_id_of(entry.account_id, entry.user_seq)
    return present(
        {
            "entry_id": entry_id,
            "user_seq": entry.user_seq,
            "amount": entry.amount,
            "reason": entry.reason,
            # Every positive entry issues the lot that bears its id.
            "lot_id": entry_id if entry.amount > 0 else None,
            "operation_type": entry.operation_type,
            "resource_amount": format_decimal(entry.resource_amount),
            "resource_unit": entry.resource_unit,
            "operation_id": entry.operation_id,
            "workflow_id": entry.workflow_id,
            "note": entry.note,
            "created_at": format_time(entry.created_at),
            "effective_at": format_time(entry.effective_at),
            "balance_after": entry.balance_after,
            "debt_after": entry.debt_after,
            "allocations": allocations if entry.amount < 0 else None,
        }
    )


async def debts(connection: AsyncConnection, account: Account, cut: Cut) -> list[Shown]:
    """List what of each negative entry no lot had paid at a cut, oldest first."""
    sql = """
    SELECT e.user_seq, e.reason, e.operation_type, e.operation_id, e.created_at,
        (-e.amount - coalesce(sum(a.credits), 0))::bigint
    FROM entries e LEFT JOIN allocations a
        ON a.account_id = e.account_id AND a.entry_seq = e.user_seq AND a.at_seq <= $2
    WHERE e.account_id = $1 AND e.user_seq <= $2 AND e.amount < 0
    GROUP BY e.user_seq, e.reason, e.operation_type, e.operation_id, e.created_at, e.amount
    HAVING -e.amount > coalesce(sum(a.credits), 0) ORDER BY e.user_seq
    """
    return [
        present(
            {
                "entry_id": entry_id_of(account.account_id, seq),
                "reason": reason,
                "operation_type": operation_type,
                "operation_id": operation_id,
                "created_at": format_time(created_at),
                "uncovered": uncovered,
            }
        )
        for seq, reason, operation_type, operation_id, created_at, uncovered in await fetch(
            connection, sql, account.account_id, cut.user_seq
        )
    ]


# Lots

_LOTS_NOW = f"SELECT {_names(tables.lots)} FROM lots WHERE account_id = $1 AND user_seq <= $2"
# One pass over the account's allocations, however many lots it has.
_LOTS_THEN = """
SELECT l.account_id, l.user_seq, l.credits, (l.credits - coalesce(u.credits, 0))::bigint AS remaining, l.reason,
    l.product_code, l.purchase, l.issued_at, l.expires_at, l.credits = coalesce(u.credits, 0) AS spent,
    CASE WHEN l.expiry_seq <= $2 THEN l.expired_credits ELSE 0 END AS expired_credits,
    CASE WHEN l.expiry_seq <= $2 THEN l.expiry_seq END AS expiry_seq
FROM lots l LEFT JOIN (
    SELECT lot_seq, sum(credits) AS credits FROM allocations WHERE account_id = $1 AND at_seq <= $2 GROUP BY lot_seq
) u ON u.lot_seq = l.user_seq
WHERE l.account_id = $1 AND l.user_seq <= $2
"""
_STATE = """
CASE WHEN remaining = 0 AND expiry_seq IS NULL THEN 'spent' WHEN remaining = 0 OR expires_at <= $3 THEN 'expired'
    ELSE 'active' END
"""


def _lots_sql(account: Account, cut: Cut) -> str:
    """Return the statement for an account's lots ($1) at a cut ($2): now from what is kept, else from allocations."""
    return _LOTS_NOW if cut.user_seq == account.last_seq else _LOTS_THEN


async def lots(
    connection: AsyncConnection,
    account: Account,
    cut: Cut,
    *,
    after: int = 0,
    limit: int,
    filters: Mapping[str, Any] | None = None,
) -> list[Shown]:
    """Show lots at a cut in issue order; filters: state, reason, external_ref, product_code."""
    given = filters or {}
    sql = f"""
    SELECT * FROM (SELECT *, {_STATE} AS state FROM ({_lots_sql(account, cut)}) l) s WHERE user_seq > $4
        AND ($5::text IS NULL OR state = $5) AND ($6::text IS NULL OR reason = $6)
        AND ($7::text IS NULL OR purchase = $7) AND ($8::text IS NULL OR product_code = $8)
    ORDER BY user_seq LIMIT $9
    """
    values = (given.get(name) for name in ("state", "reason", "external_ref", "product_code"))
    rows = await fetch(connection, sql, account.account_id, cut.user_seq, cut.at, after, *values, limit)
    return [lot_object(row) for row in rows]


async def lots_named(connection: AsyncConnection, account: Account, cut: Cut, seqs: Sequence[int]) -> list[Shown]:
    sql = f"""
    SELECT *, {_STATE} AS state FROM ({_lots_sql(account, cut)}) l WHERE user_seq = ANY($4::bigint[]) ORDER BY user_seq
    """
    rows = await fetch(connection, sql, account.account_id, cut.user_seq, cut.at, list(seqs))
    return [lot_object(row) for row in rows]


def lot_object(row: Any) -> Shown:
    return present(
        {
            "lot_id": entry_id_of(row.account_id, row.user_seq),
            "user_seq": row.user_seq,
            "credits": row.credits,
            "remaining": row.remaining,
            "expired_credits": row.expired_credits or None,
            "reason": row.reason,
            "product_code": row.product_code,
            "external_ref": row.purchase,
            "issued_at": format_time(row.issued_at),
            "expires_at": format_time(row.expires_at),
            "state": row.state,
        }
    )


async def uses_of_lot(connection: AsyncConnection, account: Account, cut: Cut, lot_seq: int, limit: int) -> list[Shown]:
    """List what a lot has paid for until a cut, oldest first."""
    sql = """
    SELECT a.entry_seq, a.at_seq, a.credits, e.reason, e.operation_type, e.operation_id
    FROM allocations a JOIN entries e ON e.account_id = a.account_id AND e.user_seq = a.entry_seq
    WHERE a.account_id = $1 AND a.lot_seq = $2 AND a.at_seq <= $3 ORDER BY a.at_seq, a.entry_seq LIMIT $4
    """
    return [
        present(
            {
                "entry_id": entry_id_of(account.account_id, entry_seq),
                "reason": reason,
                "operation_type": operation_type,
                "operation_id": operation_id,
                "credits": credits,
                "at_seq": at_seq,
            }
        )
        for entry_seq, at_seq, credits, reason, operation_type, operation_id in await fetch(
            connection, sql, account.account_id, lot_seq, cut.user_seq, limit
        )
    ]


async def commands_of(connection: AsyncConnection, account_id: int, seqs: Sequence[int]) -> dict[int, bytes]:
    """Return the identities of the commands that caused entries, by ``user_seq``."""
    sql = "SELECT user_seq, command FROM entries WHERE account_id = $1 AND user_seq = ANY($2::bigint[])"
    return {row[0]: row[1] for row in await fetch(connection, sql, account_id, list(seqs))}


# Usage

_USAGE = """
SELECT day, workflow_id, operation_code, resource_unit, operations, credits, resource_amount FROM (
    SELECT CASE WHEN 'day' = ANY($7::text[]) THEN (created_at AT TIME ZONE $6)::date::text END AS day,
        CASE WHEN 'workflow_id' = ANY($7::text[]) THEN workflow_id END AS workflow_id,
        CASE WHEN 'operation_code' = ANY($7::text[]) THEN operation_type END AS operation_code,
        resource_unit, count(*) AS operations, -sum(amount)::bigint AS credits,
        sum(resource_amount) AS resource_amount
    FROM entries WHERE account_id = $1 AND user_seq <= $2 AND reason = 'debit'
        AND ($3::timestamptz IS NULL OR created_at >= $3) AND ($4::timestamptz IS NULL OR created_at < $4)
        AND ($5::text IS NULL OR workflow_id = $5) AND ($8::text IS NULL OR operation_type = $8)
        AND ($11::text IS NULL OR operation_id = $11)
    GROUP BY 1, 2, 3, 4
) u
WHERE $9::text[] IS NULL
    OR (coalesce(day, ''), coalesce(workflow_id, ''), coalesce(operation_code, ''), resource_unit)
        > ($9[1], $9[2], $9[3], $9[4])
ORDER BY coalesce(day, ''), coalesce(workflow_id, ''), coalesce(operation_code, ''), resource_unit LIMIT $10
"""


async def usage(
    connection: AsyncConnection,
    account: Account,
    cut: Cut,
    *,
    group_by: Sequence[str],
    time_zone: str,
    after: list[str] | None,
    limit: int,
    filters: Mapping[str, Any],
) -> list[Shown]:
    """Sum up what operations cost until a cut, by any of day (in the time zone), workflow_id and operation_code.

    Rows of different resource units stay apart. Filters: from, to (of created_at), workflow_id, operation_id,
    operation_code.
    """
    rows = await fetch(
        connection,
        _USAGE,
        account.account_id,
        cut.user_seq,
        filters.get("from"),
        filters.get("to"),
        filters.get("workflow_id"),
        time_zone,
        list(group_by),
        filters.get("operation_code"),
        after,
        limit,
        filters.get("operation_id"),
    )
    return [present(dict(row._mapping) | {"resource_amount": format_decimal(row.resource_amount)}) for row in rows]


def usage_key(row: Shown) -> list[str]:
    return [row.get(name, "") for name in ("day", "workflow_id", "operation_code", "resource_unit")]


# Operations

_OPERATIONS = f"""
SELECT {_names(tables.operations, "o.")}, a.user_id FROM operations o LEFT JOIN accounts a USING (account_id)
"""


def operation_object(row: Any) -> Shown:
    """Show an operation; one whose Open was refused captured no rate."""
    has_rate = row.type_effective_at is not None
    return present(
        {
            "operation_id": row.operation_id,
            "user_id": row.user_id,
            "operation_code": row.operation_code,
            "state": row.state,
            "resource_unit": row.resource_unit if has_rate else None,
            "credits_per_unit": format_decimal(row.credits_per_unit) if has_rate else None,
            "minimum_charge": row.minimum_charge if has_rate else None,
            "rate_effective_at": _time(row.type_effective_at),
            "workflow_id": row.workflow_id,
            "opened_at": format_time(row.opened_at),
            "expires_at": format_time(row.expires_at),
            "closed_at": _time(row.closed_at),
            "completed_at": _time(row.completed_at),
            "resource_amount": _decimal(row.resource_amount),
            "credits": row.credits,
            "entry_id": None if row.entry_seq is None else entry_id_of(row.account_id, row.entry_seq),
            "note": row.note,
        }
    )


async def operation(connection: AsyncConnection, operation_id: str) -> tuple[int, Shown] | None:
    """Return (account_id, operation), or None if there is no such operation."""
    rows = await fetch(connection, f"{_OPERATIONS} WHERE o.operation_id = $1", operation_id)
    return (rows[0].account_id, operation_object(rows[0])) if rows else None


async def operations(
    connection: AsyncConnection, *, after: tuple[datetime, str] | None, limit: int, filters: Mapping[str, Any]
) -> list[Shown]:
    """Show operations by (opened_at, operation_id).

    Filters: account_id, state, operation_code, workflow_id, operation_id, from and to (of opened_at).
    """
    sql = f"""
    {_OPERATIONS} WHERE ($1::bigint IS NULL OR o.account_id = $1) AND ($2::text IS NULL OR o.state = $2)
        AND ($3::text IS NULL OR o.operation_code = $3) AND ($4::text IS NULL OR o.workflow_id = $4)
        AND ($5::text IS NULL OR o.operation_id = $5)
        AND ($6::timestamptz IS NULL OR o.opened_at >= $6) AND ($7::timestamptz IS NULL OR o.opened_at < $7)
        AND ($8::timestamptz IS NULL OR (o.opened_at, o.operation_id) > ($8, $9::text))
    ORDER BY o.opened_at, o.operation_id LIMIT $10
    """
    names = ("account_id", "state", "operation_code", "workflow_id", "operation_id", "from", "to")
    values = (filters.get(name) for name in names)
    rows = await fetch(connection, sql, *values, *(after or (None, None)), limit)
    return [operation_object(row) for row in rows]


async def latest_operations(connection: AsyncConnection, account_id: int, limit: int) -> list[Shown]:
    sql = f"{_OPERATIONS} WHERE o.account_id = $1 ORDER BY o.opened_at DESC, o.operation_id DESC LIMIT $2"
    return [operation_object(row) for row in await fetch(connection, sql, account_id, limit)]


_METRICS = """
SELECT operation_code, coalesce(max(nullif(resource_unit, '')), '') AS resource_unit, count(*) AS opened,
    count(*) FILTER (WHERE state = 'open') AS open,
    count(*) FILTER (WHERE state = 'open' AND expires_at <= $4) AS overdue,
    count(*) FILTER (WHERE state = 'closed') AS closed, count(*) FILTER (WHERE state = 'cancelled') AS cancelled,
    count(*) FILTER (WHERE state = 'timed_out') AS timed_out, count(*) FILTER (WHERE state = 'refused') AS refused,
    coalesce(sum(credits), 0)::bigint AS credits, coalesce(sum(resource_amount), 0) AS resource_amount,
    (percentile_disc(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY closed_at - opened_at) FILTER (WHERE state = 'closed'))
        AS durations
FROM operations
WHERE ($1::timestamptz IS NULL OR opened_at >= $1) AND ($2::timestamptz IS NULL OR opened_at < $2)
    AND ($3::text IS NULL OR operation_code = $3) AND ($5::text IS NULL OR operation_code > $5)
GROUP BY operation_code ORDER BY operation_code LIMIT $6
"""


async def operation_metrics(
    connection: AsyncConnection, now: datetime, *, after: str | None, limit: int, filters: Mapping[str, Any]
) -> list[Shown]:
    """Count operations by code and state, with what they cost and how many seconds they took.

    Filters: from and to (of opened_at), operation_code.
    """
    values = (filters.get("from"), filters.get("to"), filters.get("operation_code"))
    shown = []
    for row in await fetch(connection, _METRICS, *values, now, after, limit):
        item = dict(row._mapping) | {"resource_amount": format_decimal(row.resource_amount)}
        durations = item.pop("durations")
        if durations:
            seconds = [
                format_decimal(Decimal(d.days * 86_400 + d.seconds) + Decimal(d.microseconds) / 10**6)
                for d in durations
            ]
            item["seconds_open"] = {"median": seconds[0], "p95": seconds[1]}
        shown.append(item)
    return shown


# Purchases


async def purchases(
    connection: AsyncConnection, *, after: tuple[datetime, str] | None, limit: int, filters: Mapping[str, Any]
) -> list[Shown]:
    """Show settled purchases by (applied_at, external_ref), each with its refunds and chargebacks.

    Filters: external_ref, account_id, from and to (of applied_at).
    """
    sql = f"""
    SELECT {_names(tables.purchases, "p.")}, a.user_id FROM purchases p JOIN accounts a USING (account_id)
    WHERE ($1::text IS NULL OR p.external_ref = $1) AND ($2::bigint IS NULL OR p.account_id = $2)
        AND ($3::timestamptz IS NULL OR p.applied_at >= $3) AND ($4::timestamptz IS NULL OR p.applied_at < $4)
        AND ($5::timestamptz IS NULL OR (p.applied_at, p.external_ref) > ($5, $6::text))
    ORDER BY p.applied_at, p.external_ref LIMIT $7
    """
    values = (filters.get(name) for name in ("external_ref", "account_id", "from", "to"))
    rows = await fetch(connection, sql, *values, *(after or (None, None)), limit)
    reversed_by = await reversals(connection, [row.external_ref for row in rows])
    return [purchase_object(row, reversed_by.get(row.external_ref, [])) for row in rows]


async def reversals(connection: AsyncConnection, external_refs: Sequence[str]) -> dict[str, list[Any]]:
    sql = f"""
    SELECT {_names(tables.reversals, "r.")}, p.currency FROM reversals r JOIN purchases p USING (external_ref)
    WHERE r.external_ref = ANY($1::text[]) ORDER BY r.applied_at, r.kind, r.key
    """
    found: dict[str, list[Any]] = {}
    for row in await fetch(connection, sql, list(external_refs)) if external_refs else ():
        found.setdefault(row.external_ref, []).append(row)
    return found


def purchase_object(row: Any, reversed_by: Sequence[Any]) -> Shown:
    standing = sum((r.amount for r in reversed_by if r.won_at is None), Decimal(0))
    status = "paid" if not standing else "reversed" if standing >= row.amount else "partially_reversed"
    return {
        "external_ref": row.external_ref,
        "user_id": row.user_id,
        "status": status,
        "product_code": row.product_code,
        "credits": row.credits,
        "lot_id": entry_id_of(row.account_id, row.lot_seq),
        "payment_method": row.payment_method,
        "country": row.country,
        "amount": format_amount(row.amount, row.currency),
        "currency": row.currency,
        "amount_left": format_amount(row.amount - standing, row.currency),
        "order_placed_at": format_time(row.order_placed_at),
        "settled_at": format_time(row.settled_at),
        "applied_at": format_time(row.applied_at),
        "receipt_number": row.receipt_number,
        "reversals": [reversal_object(r) for r in reversed_by],
    }


def reversal_object(row: Any) -> Shown:
    return present(
        {
            "kind": row.kind,
            "refund_id" if row.kind == "refund" else "dispute_id": row.key,
            "amount": format_amount(row.amount, row.currency),
            "credits_due": row.due,
            "credits_taken": row.taken,
            "entry_id": None if row.entry_seq is None else entry_id_of(row.account_id, row.entry_seq),
            "category": row.category,
            "applied_at": format_time(row.applied_at),
            "credit_note_number": row.credit_note_number,
            "won_at": _time(row.won_at),
            "given_back_lot_id": None
            if row.given_back_seq is None
            else entry_id_of(row.account_id, row.given_back_seq),
            "correction_number": row.correction_number,
        }
    )


async def purchases_reversed_by(connection: AsyncConnection, account_id: int, entry_seq: int) -> list[str]:
    """Return the external_ref of the purchase whose reversal posted an entry."""
    sql = """
    SELECT r.external_ref FROM purchases p JOIN reversals r USING (external_ref)
    WHERE p.account_id = $1 AND r.account_id = $1 AND r.entry_seq = $2
    """
    return [row[0] for row in await fetch(connection, sql, account_id, entry_seq)]


async def receipt_numbers(connection: AsyncConnection, external_refs: Sequence[str]) -> dict[str, str]:
    """Return the receipts' numbers of purchases."""
    sql = "SELECT external_ref, receipt_number FROM purchases WHERE external_ref = ANY($1::text[])"
    return {row[0]: row[1] for row in await fetch(connection, sql, list(external_refs))} if external_refs else {}
