"""The ledger's identities (spec §3, §6): sums by set-based SQL, every account's history by recomputing it.

``CHECKS`` compare what two tables say of the same thing. ``Histories`` walks all entries in order and recomputes
running balances, debts and the hash chain, with the same function that made it.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from catalog.audit import Check, Finding
from ledger.chain import seal
from ledger.model import GENESIS, Allocation, Entry, Lot, entry_id_of


def _named(seq: str) -> str:
    """Return SQL that names an account, or one of its entries, as on the wire."""
    account = "lpad(to_hex(account_id), 16, '0')"
    return f"{account} || '-' || {seq}" if seq else f"'account ' || {account}"


ACCOUNTS: Sequence[Check] = (
    Check(
        "balance = Σ entries",
        "accounts",
        f"""
        SELECT {_named("")}, format('balance %s, entries %s', balance, total)
        FROM accounts FULL JOIN (SELECT account_id, sum(amount) AS total FROM entries GROUP BY 1) e USING (account_id)
        WHERE balance IS DISTINCT FROM coalesce(total, 0)
        """,
    ),
    Check(
        "balance = Σ remaining − debt",
        "accounts",
        f"""
        SELECT {_named("")}, format('balance %s, remaining %s, debt %s', balance, total, debt)
        FROM accounts FULL JOIN (SELECT account_id, sum(remaining) AS total FROM lots GROUP BY 1) l USING (account_id)
        WHERE balance IS DISTINCT FROM coalesce(total, 0) - coalesce(debt, 0)
        """,
    ),
    Check(
        "debt = Σ uncovered",
        "accounts",
        f"""
        SELECT {_named("")}, format('debt %s, uncovered %s', debt, total)
        FROM accounts FULL JOIN (SELECT account_id, sum(uncovered) AS total FROM debts GROUP BY 1) d USING (account_id)
        WHERE debt IS DISTINCT FROM coalesce(total, 0)
        """,
    ),
    Check(
        "an account's row is its last entry",
        "accounts",
        f"""
        SELECT {_named("")}, format('row at %s, entries end at %s', last_seq, e.user_seq)
        FROM accounts
        LEFT JOIN (SELECT account_id, max(user_seq) AS user_seq FROM entries GROUP BY 1) m USING (account_id)
        LEFT JOIN entries e USING (account_id, user_seq)
        WHERE (last_seq, balance, debt, head, last_entry_at) IS DISTINCT FROM
            (coalesce(user_seq, 0), coalesce(balance_after, 0), coalesce(debt_after, 0),
             coalesce(e.hash, '\\x{GENESIS.hex()}'), e.created_at)
        """,
    ),
    Check(
        "debt > 0 ⇒ every unexpired lot is empty",
        "accounts WHERE debt > 0",
        f"""
        SELECT {_named("user_seq")}, format('%s credits remain beside a debt of %s', remaining, debt)
        FROM accounts JOIN lots USING (account_id), merchant_state
        WHERE debt > 0 AND remaining > 0 AND expires_at > clock_timestamp() + clock_offset
        """,
    ),
)

LOTS: Sequence[Check] = (
    Check(
        "a lot is issued at full value by one positive entry",
        "lots",
        f"""
        SELECT {_named("user_seq")}, format('entry %s, lot %s', amount, credits)
        FROM (SELECT * FROM entries WHERE amount > 0) e FULL JOIN lots l USING (account_id, user_seq)
        WHERE (amount, e.reason, created_at) IS DISTINCT FROM (credits, l.reason, issued_at)
        """,
    ),
    Check(
        "Σ allocations of a lot = credits − remaining",
        "lots",
        f"""
        SELECT {_named("user_seq")}, format('credits %s, remaining %s, allocated %s', credits, remaining, paid)
        FROM lots FULL JOIN (
            SELECT account_id, lot_seq AS user_seq, sum(credits) AS paid FROM allocations GROUP BY 1, 2
        ) a USING (account_id, user_seq)
        WHERE credits - remaining IS DISTINCT FROM coalesce(paid, 0) OR spent <> (remaining = 0)
        """,
    ),
    Check(
        "allocations of a negative entry + uncovered = its amount",
        "entries WHERE amount < 0",
        f"""
        SELECT {_named("user_seq")}, format('amount %s, allocated %s, uncovered %s', amount, paid, uncovered)
        FROM (SELECT account_id, user_seq, amount FROM entries WHERE amount < 0) e FULL JOIN (
            SELECT account_id, entry_seq AS user_seq, sum(credits) AS paid FROM allocations GROUP BY 1, 2
        ) a USING (account_id, user_seq) FULL JOIN (
            SELECT account_id, entry_seq AS user_seq, uncovered FROM debts
        ) d USING (account_id, user_seq)
        WHERE -amount IS DISTINCT FROM coalesce(paid, 0) + coalesce(uncovered, 0)
        """,
    ),
    Check(
        "an allocation names a debit, a lot and the later of them",
        "allocations",
        f"""
        SELECT {_named("at_seq")}, format('entry %s, lot %s', entry_seq, lot_seq)
        FROM allocations a
        LEFT JOIN (
            SELECT account_id, user_seq AS entry_seq, amount, created_at AS debited_at FROM entries
        ) e USING (account_id, entry_seq)
        LEFT JOIN (SELECT account_id, user_seq AS lot_seq, issued_at FROM lots) l USING (account_id, lot_seq)
        -- That a lot is issued when its entry is made is a check of its own.
        WHERE (amount < 0 AND issued_at IS NOT NULL AND at_seq = greatest(entry_seq, lot_seq)
               AND created_at = CASE WHEN at_seq = entry_seq THEN debited_at ELSE issued_at END)
            IS NOT TRUE
        """,
    ),
    Check(
        "what expired of a lot is what its expiry entry took",
        "lots WHERE expiry_seq IS NOT NULL",
        f"""
        SELECT {_named("l.user_seq")}, format('expired %s, entry %s of %s', expired_credits, expiry_seq, amount)
        FROM (SELECT * FROM lots WHERE expiry_seq IS NOT NULL OR expired_credits <> 0) l
        FULL JOIN (
            SELECT account_id, user_seq AS expiry_seq, amount, effective_at FROM entries WHERE reason = 'expiry'
        ) e USING (account_id, expiry_seq)
        WHERE (expired_credits, expires_at) IS DISTINCT FROM (-amount, effective_at)
        """,
    ),
)

PURCHASES: Sequence[Check] = (
    Check(
        "a purchase is its entry and the lot it issued",
        "purchases",
        """
        SELECT format('purchase %s', coalesce(p.external_ref, l.purchase)), format('lot %s', lot_seq)
        FROM purchases p
        FULL JOIN (SELECT *, user_seq AS lot_seq FROM lots WHERE reason = 'purchase') l USING (account_id, lot_seq)
        LEFT JOIN entries e ON e.account_id = l.account_id AND e.user_seq = l.user_seq
        WHERE (p.external_ref, p.product_code, p.credits, p.applied_at, p.command, payment_method, p.amount, currency)
            IS DISTINCT FROM (l.purchase, l.product_code, l.credits, issued_at, e.command, operation_type,
                              resource_amount, resource_unit)
        """,
    ),
    Check(
        "taken − given back + expired ≤ credits of a purchase",
        "purchases",
        """
        SELECT format('purchase %s', external_ref),
            format('taken %s, given back %s, expired %s of %s', taken, given_back, expired, credits)
        FROM purchases LEFT JOIN (
            SELECT external_ref, sum(taken) AS taken, coalesce(sum(taken) FILTER (WHERE won_at IS NOT NULL), 0)
                AS given_back FROM reversals GROUP BY 1
        ) r USING (external_ref) LEFT JOIN (
            SELECT purchase AS external_ref, sum(expired_credits) AS expired FROM lots
            WHERE purchase IS NOT NULL GROUP BY 1
        ) l USING (external_ref)
        WHERE coalesce(taken, 0) - coalesce(given_back, 0) + coalesce(expired, 0) > credits
        """,
    ),
    Check(
        "standing reversals ≤ amount of their purchase",
        "reversals",
        """
        SELECT format('purchase %s', external_ref), format('%s reversed of %s', reversed, amount)
        FROM purchases p FULL JOIN (
            SELECT external_ref, account_id, coalesce(sum(amount) FILTER (WHERE won_at IS NULL), 0) AS reversed
            FROM reversals GROUP BY 1, 2
        ) r USING (external_ref, account_id)
        WHERE coalesce(reversed, 0) > coalesce(amount, -1)
        """,
    ),
    Check(
        "a reversal is the entry that took its credits",
        "reversals",
        """
        SELECT format('%s %s', coalesce(kind, reason), key), format('taken %s, entry %s', taken, e.amount)
        FROM reversals r FULL JOIN (
            SELECT *, user_seq AS entry_seq FROM entries WHERE amount < 0 AND reason IN ('refund', 'chargeback')
        ) e USING (account_id, entry_seq)
        WHERE (r.taken, r.amount) IS DISTINCT FROM
                (coalesce(-e.amount, 0), CASE WHEN entry_seq IS NULL THEN r.amount ELSE resource_amount END)
            OR (e.reason, e.command, e.created_at) IS DISTINCT FROM
                (CASE WHEN entry_seq IS NOT NULL THEN kind END, CASE WHEN entry_seq IS NOT NULL THEN r.command END,
                 CASE WHEN entry_seq IS NOT NULL THEN applied_at END)
        """,
    ),
    Check(
        "a won dispute gave back the lot it took",
        "reversals WHERE won_at IS NOT NULL",
        """
        SELECT format('dispute %s', key), format('taken %s, given back %s', taken, credits)
        FROM (SELECT * FROM reversals WHERE given_back_seq IS NOT NULL OR won_at IS NOT NULL AND taken > 0) r
        FULL JOIN (
            SELECT account_id, user_seq AS given_back_seq, purchase, credits, issued_at
            FROM lots WHERE reason = 'chargeback'
        ) l USING (account_id, given_back_seq)
        WHERE (taken, external_ref, won_at) IS DISTINCT FROM (credits, purchase, issued_at)
        """,
    ),
)

OPERATIONS: Sequence[Check] = (
    Check(
        "one open operation at most, that of the account's row",
        "operations WHERE state = 'open'",
        """
        SELECT format('operation %s', operation_id), 'the account and the operation disagree on who is open'
        FROM (SELECT account_id, open_operation AS operation_id FROM accounts WHERE open_operation IS NOT NULL) a
        FULL JOIN (SELECT account_id, operation_id, state FROM operations WHERE state = 'open') o
            USING (account_id, operation_id)
        WHERE a.account_id IS NULL OR o.account_id IS NULL
        """,
    ),
    Check(
        "a closed operation is the debit of its credits at its rate",
        "operations WHERE state = 'closed'",
        f"""
        SELECT {_named("entry_seq")}, format('operation %s, credits %s, entry %s', o.operation_id, credits, amount)
        FROM (
            SELECT * FROM operations
            WHERE state = 'closed' OR entry_seq IS NOT NULL OR credits IS NOT NULL OR resource_amount IS NOT NULL
        ) o FULL JOIN (SELECT *, user_seq AS entry_seq FROM entries WHERE reason = 'debit') e
            USING (account_id, entry_seq)
        WHERE (state, o.operation_id, credits, o.resource_amount, o.resource_unit, operation_code, o.workflow_id,
               closed_at)
            IS DISTINCT FROM ('closed', e.operation_id, -amount, e.resource_amount, e.resource_unit, operation_type,
                              e.workflow_id, created_at)
            OR credits IS DISTINCT FROM greatest(minimum_charge, ceil(o.resource_amount * credits_per_unit))
        """,
    ),
)

CHECKS = (*ACCOUNTS, *LOTS, *PURCHASES, *OPERATIONS)

HISTORY = """
SELECT e.account_id, e.user_seq, e.amount, e.reason, e.operation_type, e.resource_amount, e.resource_unit,
    e.operation_id, e.workflow_id, e.note, e.command, e.created_at, e.effective_at, e.balance_after, e.debt_after,
    e.hash, l.credits, l.remaining, l.reason, l.product_code, l.purchase, l.issued_at, l.expires_at,
    a.paid
FROM entries e
LEFT JOIN lots l USING (account_id, user_seq)
LEFT JOIN (
    SELECT account_id, at_seq AS user_seq,
        array_agg(ARRAY[entry_seq, lot_seq, credits] ORDER BY entry_seq, lot_seq) AS paid
    FROM allocations GROUP BY 1, 2
) a USING (account_id, user_seq)
ORDER BY e.account_id, e.user_seq
"""
"""Every entry with the lot it issued and the allocations it caused, in the order of accounts and their entries."""

_ENTRY = len(Entry._fields)


class Histories:
    """Recomputes all accounts' histories from the rows of ``HISTORY``, given one by one in their order."""

    def __init__(self) -> None:
        self.sequence = Finding("user_seq is 1..n without holes, in order of time")
        self.balance = Finding("balance_after at every user_seq = Σ entries up to it")
        self.debt = Finding("debt_after at every user_seq = what was uncovered then")
        self.chain = Finding("the hash chain of every account")
        self.findings = (self.sequence, self.balance, self.debt, self.chain)
        self._account_id = -1
        self._seq = self._balance = self._debt = 0
        self._at: datetime | None = None
        self._head = GENESIS

    def add(self, row: Sequence[Any]) -> None:
        """Compare one entry with what follows from those before it."""
        entry = Entry(*row[:_ENTRY])
        if entry.account_id != self._account_id:
            self._account_id, self._head, self._at = entry.account_id, GENESIS, None
            self._seq = self._balance = self._debt = 0
        if entry.user_seq != self._seq + 1 or (self._at is not None and entry.created_at < self._at):
            self._note(self.sequence, entry, f"follows {self._seq} of {self._at}")
        self._balance += entry.amount
        if entry.balance_after != self._balance:
            self._note(self.balance, entry, f"says {entry.balance_after}, the sum is {self._balance}")
        allocations = _allocations(entry, row[_ENTRY + 7])
        # A debit adds what no lot paid at once; a new lot takes away what it absorbed.
        self._debt += max(0, -entry.amount) - sum(allocation.credits for allocation in allocations)
        if entry.debt_after != self._debt:
            self._note(self.debt, entry, f"says {entry.debt_after}, uncovered is {self._debt}")
        if seal(self._head, entry, _lot(entry, row[_ENTRY : _ENTRY + 7]), allocations) != entry.hash:
            self._note(self.chain, entry, "its hash does not follow from its content and the entry before")
        # Each break is told once: what follows is compared with what stands there.
        self._seq, self._at, self._head = entry.user_seq, entry.created_at, entry.hash
        self._balance, self._debt = entry.balance_after, entry.debt_after
        for finding in self.findings:
            finding.checked += 1

    def _note(self, finding: Finding, entry: Entry, what: str) -> None:
        finding.note(entry_id_of(entry.account_id, entry.user_seq), what)


def _lot(entry: Entry, values: Sequence[Any]) -> Lot | None:
    return None if values[0] is None else Lot(entry.account_id, entry.user_seq, *values)


def _allocations(entry: Entry, paid: Sequence[Sequence[int]] | None) -> list[Allocation]:
    # Their own moment is not part of the chain; a check compares it with that of the entry.
    return [
        Allocation(entry.account_id, entry_seq, lot_seq, entry.user_seq, credits, entry.created_at)
        for entry_seq, lot_seq, credits in paid or ()
    ]
