"""Loads the part of a ledger that a batch touches, and saves what the books recorded: one statement a table."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from sqlalchemy import Table
from sqlalchemy.ext.asyncio import AsyncConnection

from catalog.sql import delete_keys, fetch_tuples, insert_objects, insert_rows, update_objects
from ledger import tables
from ledger.books import Books
from ledger.model import Account, Debt, Lot, Operation, Purchase, Reversal

LOTS_AT_FIRST = 16
"""How many of an account's oldest unspent lots are loaded; more on demand (LotsNeeded)."""


def _names(table: Table) -> tuple[str, ...]:
    return tuple(column.name for column in table.columns)


def _list(table: Table, alias: str = "") -> str:
    return ", ".join(f"{alias}{name}" for name in _names(table))


ACCOUNTS = _names(tables.accounts)
LOTS = _names(tables.lots)
OPERATIONS = _names(tables.operations)

_LOCK_ACCOUNTS = (
    f"SELECT {_list(tables.accounts)} FROM accounts WHERE account_id = ANY($1::bigint[]) ORDER BY account_id FOR UPDATE"
)
_LOAD_LOTS = f"""
SELECT {_list(tables.lots, "l.")} FROM unnest($1::bigint[], $2::integer[]) AS a (account_id, most),
LATERAL (SELECT * FROM lots WHERE lots.account_id = a.account_id AND NOT spent ORDER BY user_seq LIMIT a.most) l
UNION ALL
SELECT {_list(tables.lots, "l.")} FROM unnest($1::bigint[]) AS a (account_id),
LATERAL (SELECT * FROM lots WHERE lots.account_id = a.account_id AND NOT spent AND expires_at <= $3) l
"""
_LOAD_NAMED_LOTS = f"""
SELECT {_list(tables.lots, "l.")} FROM unnest($1::bigint[], $2::bigint[]) AS k (account_id, user_seq)
JOIN lots l USING (account_id, user_seq)
"""
_LOAD_DEBTS = f"SELECT {_list(tables.debts)} FROM debts WHERE account_id = ANY($1::bigint[]) ORDER BY entry_seq"
_LOAD_OPERATIONS = f"SELECT {_list(tables.operations)} FROM operations WHERE operation_id = ANY($1::text[])"
_LOAD_PURCHASES = f"SELECT {_list(tables.purchases)} FROM purchases WHERE external_ref = ANY($1::text[])"
_LOAD_REVERSALS = f"""
SELECT {_list(tables.reversals)} FROM reversals WHERE external_ref = ANY($1::text[]) ORDER BY applied_at, kind, key
"""


async def accounts_of_purchases(connection: AsyncConnection, external_refs: Sequence[str]) -> dict[str, int]:
    """Whose purchases these are. A purchase never changes hands, so no lock is needed."""
    sql = "SELECT external_ref, account_id FROM purchases WHERE external_ref = ANY($1::text[])"
    return {row[0]: row[1] for row in await fetch_tuples(connection, sql, list(external_refs))} if external_refs else {}


async def purchases_of_disputes(connection: AsyncConnection, dispute_ids: Sequence[str]) -> dict[str, str]:
    sql = "SELECT key, external_ref FROM reversals WHERE kind = 'chargeback' AND key = ANY($1::text[])"
    return {row[0]: row[1] for row in await fetch_tuples(connection, sql, list(dispute_ids))} if dispute_ids else {}


async def accounts_of_tombstones(connection: AsyncConnection, user_ids: Sequence[str]) -> dict[str, int]:
    sql = "SELECT user_id, account_id FROM accounts WHERE user_id = ANY($1::text[]) AND erased_at IS NOT NULL"
    return {row[0]: row[1] for row in await fetch_tuples(connection, sql, list(user_ids))} if user_ids else {}


async def lock_accounts(connection: AsyncConnection, account_ids: Iterable[int]) -> dict[int, Account]:
    """Lock the accounts that exist, in order of their ids, and read them as they are then."""
    wanted = sorted(account_ids)
    rows = await fetch_tuples(connection, _LOCK_ACCOUNTS, wanted) if wanted else ()
    return {row[0]: Account(*row) for row in rows}


async def load(
    connection: AsyncConnection,
    books: Books,
    *,
    operation_ids: Iterable[str],
    external_refs: Iterable[str],
    named_lots: Iterable[tuple[int, int]],
    lots_wanted: Mapping[int, int],
) -> None:
    """Fill the books with what the batch may touch. The accounts are locked and in the books already.

    ``lots_wanted`` raises for single accounts how many of the oldest unspent lots are read.
    """
    accounts = books.accounts
    named = set(named_lots)
    refs = sorted(set(external_refs))
    if refs:
        for row in await fetch_tuples(connection, _LOAD_PURCHASES, refs):
            books.purchases[row[0]] = Purchase(*row)
        for row in await fetch_tuples(connection, _LOAD_REVERSALS, list(books.purchases)):
            reversal = Reversal(*row)
            books.reversals[reversal.kind, reversal.key] = reversal
            books.reversals_of.setdefault(reversal.external_ref, []).append(reversal)
        named |= {(p.account_id, p.lot_seq) for p in books.purchases.values()}
        named |= {(r.account_id, r.given_back_seq) for r in books.reversals.values() if r.given_back_seq is not None}
    if accounts:
        await _load_lots(connection, books, named, lots_wanted)
        in_debt = sorted(a.account_id for a in accounts.values() if a.debt)
        for row in await fetch_tuples(connection, _LOAD_DEBTS, in_debt) if in_debt else ():
            books.debts.setdefault(row[0], []).append(Debt(*row))
    ids = set(operation_ids) | {a.open_operation for a in accounts.values() if a.open_operation is not None}
    if ids:
        for row in await fetch_tuples(connection, _LOAD_OPERATIONS, sorted(ids)):
            books.operations[row[0]] = Operation(*row)


async def _load_lots(
    connection: AsyncConnection, books: Books, named: set[tuple[int, int]], lots_wanted: Mapping[int, int]
) -> None:
    # An account without credits has no unspent lot: balance + debt is what remains in its lots.
    holders = sorted(a.account_id for a in books.accounts.values() if a.balance + a.debt > 0)
    books.lots_complete |= books.accounts.keys() - set(holders)
    most = [lots_wanted.get(account_id, LOTS_AT_FIRST) for account_id in holders]
    if holders:
        for row in await fetch_tuples(connection, _LOAD_LOTS, holders, most, books.now):
            books.lots_by_id[row[0], row[1]] = Lot(*row)
    for lot in sorted(books.lots_by_id.values(), key=lambda lot: lot.user_seq):
        books.lots.setdefault(lot.account_id, []).append(lot)
    for account_id, wanted in zip(holders, most, strict=True):
        account = books.accounts[account_id]
        loaded = books.lots.get(account_id, ())
        if sum(lot.remaining for lot in loaded) == account.balance + account.debt or len(loaded) < wanted:
            books.lots_complete.add(account_id)
    missing = sorted(named - books.lots_by_id.keys())
    if missing:
        columns = [list(column) for column in zip(*missing, strict=True)]
        for row in await fetch_tuples(connection, _LOAD_NAMED_LOTS, *columns):
            # Kept out of the FIFO list even when unspent: that must stay a gapless head of the order.
            books.lots_by_id[row[0], row[1]] = Lot(*row)


async def save_ledger(connection: AsyncConnection, books: Books) -> None:
    """Write accounts, entries, lots, allocations, debts and operations, each object in its final state."""
    new_accounts = [books.new_accounts[account_id] for account_id in sorted(books.new_accounts)]
    await insert_objects(connection, tables.accounts, ACCOUNTS, new_accounts)
    changed = [books.changed_accounts[account_id] for account_id in sorted(books.changed_accounts)]
    await update_objects(connection, tables.accounts, ("account_id",), ACCOUNT_STATE, changed)
    await insert_rows(connection, tables.entries, _names(tables.entries), books.entries)
    await insert_objects(connection, tables.lots, LOTS, books.new_lots.values())
    await update_objects(connection, tables.lots, ("account_id", "user_seq"), LOT_STATE, books.changed_lots.values())
    await insert_rows(connection, tables.allocations, _names(tables.allocations), books.allocations)
    await _save_debts(connection, books)
    operations = books.new_operations
    await insert_objects(connection, tables.operations, OPERATIONS, [operations[key] for key in sorted(operations)])
    await update_objects(
        connection, tables.operations, ("operation_id",), OPERATION_STATE, books.changed_operations.values()
    )


ACCOUNT_STATE = (
    "user_id",
    "last_seq",
    "balance",
    "debt",
    "head",
    "last_entry_at",
    "locked",
    "locked_until",
    "open_operation",
    "erased_at",
)
LOT_STATE = ("remaining", "spent", "expired_credits", "expiry_seq")
OPERATION_STATE = (
    "workflow_id",
    "state",
    "closed_at",
    "completed_at",
    "resource_amount",
    "credits",
    "entry_seq",
    "note",
)


async def _save_debts(connection: AsyncConnection, books: Books) -> None:
    names = _names(tables.debts)
    open_debts = [debt for debt in books.changed_debts.values() if debt.uncovered]
    suffix = "ON CONFLICT (account_id, entry_seq) DO UPDATE SET uncovered = excluded.uncovered"
    await insert_objects(connection, tables.debts, names, open_debts, suffix)
    paid = [key for key, debt in books.changed_debts.items() if not debt.uncovered]
    await delete_keys(connection, tables.debts, ("account_id", "entry_seq"), paid)


async def save_purchases(connection: AsyncConnection, books: Books) -> None:
    """Write purchases and reversals; the numbers of their documents are known by now."""
    await insert_objects(connection, tables.purchases, _names(tables.purchases), books.new_purchases)
    await insert_objects(connection, tables.reversals, _names(tables.reversals), books.new_reversals.values())
    state = ("won_at", "given_back_seq", "correction_number")
    await update_objects(connection, tables.reversals, ("kind", "key"), state, books.changed_reversals.values())


async def save_refusals(connection: AsyncConnection, rows: Sequence[Sequence[object]]) -> None:
    """Note paid orders that were refused: (command, external_ref, code, message, refused_at)."""
    await insert_rows(connection, tables.purchase_refusals, _names(tables.purchase_refusals), rows)


async def due_partition_month(connection: AsyncConnection, at: datetime) -> bool:
    """Make the partitions of the month of ``at``, if they are not there; returns whether any was made."""
    return bool((await fetch_tuples(connection, "SELECT ensure_month($1::timestamptz::date)", at))[0][0])
