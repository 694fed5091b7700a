"""The books of a batch: the loaded part of a merchant's ledger, and the only ways to move it.

Pure: time is an argument, there is no IO and no randomness. Every method that moves credits both records the fact
and changes the state, in one place, so that the two cannot disagree; ``ledger.store`` writes what was recorded.
A decision must check everything before it calls one of them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from itertools import chain
from typing import Any

from catalog.model import Catalog
from ledger.chain import seal
from ledger.model import (
    GENESIS,
    Account,
    Allocation,
    Debt,
    Entry,
    Lot,
    LotsNeeded,
    Operation,
    Purchase,
    Reversal,
    TimeEffects,
    entry_id_of,
)
from schemas.errors import Code, Refusal
from schemas.payloads import MerchantConfig

CREDIT = "CREDIT"
BALANCE_LIMIT = 10**17  # credits; leaves room in 64 bits whatever one entry moves


@dataclass(slots=True)
class DocumentDraft:
    """A receipt, credit note or correction to be numbered when all ledger rows are written (spec §5)."""

    kind: str  # receipt | credit_note | correction
    purchase: Purchase
    command: bytes
    amount: Decimal  # gross money of this document, positive
    credited_before: Decimal = Decimal(0)  # gross money of the standing credit notes before this one
    reversal: Reversal | None = None
    buyer: Any | None = None  # schemas.payloads.Buyer
    tax: Any | None = None  # schemas.payloads.SnapshotTax, as upstream charged it
    lot: Lot | None = None
    title: str = ""
    config: MerchantConfig | None = None
    config_version: int = 0


@dataclass(slots=True)
class Movement:
    """What a posting is about, apart from who, when and how much."""

    reason: str
    operation_type: str
    resource_amount: Decimal
    resource_unit: str = CREDIT
    operation_id: str | None = None
    workflow_id: str | None = None
    note: str | None = None


@dataclass(slots=True)
class NewLot:
    """The terms of a lot to be issued."""

    expires_at: datetime
    product_code: str | None = None
    purchase: str | None = None


@dataclass
class Books:
    """State of the accounts a batch touches, as of ``now``, and the facts recorded so far.

    ``lots`` holds, for each account, unspent lots in issue order: all that are due and at least the oldest ones;
    ``lots_complete`` names the accounts of which every unspent lot is here.
    """

    now: datetime
    config: MerchantConfig
    config_version: int
    catalog: Catalog
    accounts: dict[int, Account] = field(default_factory=dict)
    lots: dict[int, list[Lot]] = field(default_factory=dict)
    lots_complete: set[int] = field(default_factory=set)
    lots_by_id: dict[tuple[int, int], Lot] = field(default_factory=dict)
    debts: dict[int, list[Debt]] = field(default_factory=dict)
    operations: dict[str, Operation] = field(default_factory=dict)
    purchases: dict[str, Purchase] = field(default_factory=dict)
    reversals: dict[tuple[str, str], Reversal] = field(default_factory=dict)
    reversals_of: dict[str, list[Reversal]] = field(default_factory=dict)

    new_accounts: dict[int, Account] = field(default_factory=dict)
    changed_accounts: dict[int, Account] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    allocations: list[Allocation] = field(default_factory=list)
    new_lots: dict[tuple[int, int], Lot] = field(default_factory=dict)
    changed_lots: dict[tuple[int, int], Lot] = field(default_factory=dict)
    changed_debts: dict[tuple[int, int], Debt] = field(default_factory=dict)
    new_operations: dict[str, Operation] = field(default_factory=dict)
    changed_operations: dict[str, Operation] = field(default_factory=dict)
    new_purchases: list[Purchase] = field(default_factory=list)
    new_reversals: dict[tuple[str, str], Reversal] = field(default_factory=dict)
    changed_reversals: dict[tuple[str, str], Reversal] = field(default_factory=dict)
    drafts: list[DocumentDraft] = field(default_factory=list)
    erased: list[Account] = field(default_factory=list)
    _timed: set[int] = field(default_factory=set)

    # Accounts

    def account(self, account_id: int) -> Account | None:
        return self.accounts.get(account_id)

    def open_account(self, account_id: int, user_id: str) -> Account:
        """Return the account of a user, made now if this is the first command applied to it."""
        account = self.accounts.get(account_id)
        if account is None:
            account = Account(account_id, user_id, created_at=self.now, last_entry_at=None)
            self.accounts[account_id] = self.new_accounts[account_id] = account
            self.lots_complete.add(account_id)
        return account

    def touch(self, account: Account) -> None:
        if account.account_id not in self.new_accounts:
            self.changed_accounts[account.account_id] = account

    # Credits

    def credit(self, account: Account, amount: int, what: Movement, terms: NewLot, command: bytes) -> Lot:
        """Post a positive entry that issues a lot of the full amount; the lot then absorbs debt, oldest first."""
        check_balance(account.balance + amount)
        seq = account.last_seq + 1
        lot = Lot(
            account.account_id,
            seq,
            amount,
            amount,
            what.reason,
            terms.product_code,
            terms.purchase,
            self.now,
            terms.expires_at,
        )
        allocations = []
        for debt in self.debts.get(account.account_id, ()):
            take = min(debt.uncovered, lot.remaining)
            if not take:
                break
            debt.uncovered -= take
            lot.remaining -= take
            account.debt -= take
            self.changed_debts[account.account_id, debt.entry_seq] = debt
            allocations.append(Allocation(account.account_id, debt.entry_seq, seq, seq, take, self.now))
        self._drop_paid_debts(account.account_id)
        lot.spent = lot.remaining == 0
        self.new_lots[account.account_id, seq] = self.lots_by_id[account.account_id, seq] = lot
        if not lot.spent and account.account_id in self.lots_complete:
            # Behind lots that are not loaded it has no place in the order yet.
            self.lots.setdefault(account.account_id, []).append(lot)
        self._post(account, amount, what, command, self.now, lot, allocations)
        return lot

    def debit(
        self,
        account: Account,
        amount: int,
        what: Movement,
        command: bytes,
        *,
        first: Iterable[Lot] = (),
        effective_at: datetime | None = None,
    ) -> int:
        """Post a negative entry of ``amount`` credits, paid by the lots ``first``, then in issue order, then as debt.

        Returns the entry's ``user_seq``. Raises LotsNeeded when lots not yet loaded would have to pay.
        """
        check_balance(account.balance - amount)
        account_id = account.account_id
        seq = account.last_seq + 1
        takes, uncovered = self._plan(account, amount, first)
        allocations = []
        for lot, take in takes:
            self._take(lot, take)
            allocations.append(Allocation(account_id, seq, lot.user_seq, seq, take, self.now))
        if uncovered:
            account.debt += uncovered
            debt = Debt(account_id, seq, uncovered)
            self.debts.setdefault(account_id, []).append(debt)
            self.changed_debts[account_id, seq] = debt
        self._drop_spent_lots(account_id)
        self._post(account, -amount, what, command, effective_at or self.now, None, allocations)
        return seq

    def _plan(self, account: Account, amount: int, first: Iterable[Lot]) -> tuple[list[tuple[Lot, int]], int]:
        takes: list[tuple[Lot, int]] = []
        preferred = [lot for lot in first if not lot.spent]
        taken = {lot.user_seq for lot in preferred}
        others = (lot for lot in self.lots.get(account.account_id, ()) if not lot.spent and lot.user_seq not in taken)
        for lot in chain(preferred, others):
            if not amount:
                break
            take = min(amount, lot.remaining)
            takes.append((lot, take))
            amount -= take
        if amount and account.account_id not in self.lots_complete:
            raise LotsNeeded(account.account_id)
        return takes, amount

    def _take(self, lot: Lot, credits: int) -> None:
        lot.remaining -= credits
        lot.spent = lot.remaining == 0
        self.touch_lot(lot)

    def touch_lot(self, lot: Lot) -> None:
        key = (lot.account_id, lot.user_seq)
        if key not in self.new_lots:
            self.changed_lots[key] = lot

    def _drop_spent_lots(self, account_id: int) -> None:
        lots = self.lots.get(account_id)
        while lots and lots[0].spent:
            lots.pop(0)

    def _drop_paid_debts(self, account_id: int) -> None:
        debts = self.debts.get(account_id)
        if debts:
            self.debts[account_id] = [debt for debt in debts if debt.uncovered]

    def _post(
        self,
        account: Account,
        amount: int,
        what: Movement,
        command: bytes,
        effective_at: datetime,
        lot: Lot | None,
        allocations: list[Allocation],
    ) -> None:
        account.last_seq += 1
        account.balance += amount
        account.last_entry_at = self.now
        entry = Entry(
            account.account_id,
            account.last_seq,
            amount,
            what.reason,
            what.operation_type,
            what.resource_amount,
            what.resource_unit,
            what.operation_id,
            what.workflow_id,
            what.note,
            command,
            self.now,
            effective_at,
            account.balance,
            account.debt,
            GENESIS,
        )
        allocations.sort(key=lambda a: (a.entry_seq, a.lot_seq))
        account.head = seal(account.head, entry, lot, allocations)
        self.entries.append(entry._replace(hash=account.head))
        self.allocations.extend(allocations)
        self.touch(account)

    # Time

    def let_time_pass(self, account: Account | None, command: bytes, *, opening: bool = False) -> TimeEffects:
        """Write what is due for an account before its next command: expiries, then an overdue operation's timeout.

        The timeout is due only when the command is an Open: it frees the slot.
        """
        effects = TimeEffects([], [])
        if account is None:
            return effects
        if account.account_id not in self._timed:
            self._timed.add(account.account_id)
            lots = self.lots.get(account.account_id, ())
            due = [lot for lot in lots if lot.expires_at <= self.now and not lot.spent]
            for lot in sorted(due, key=lambda lot: (lot.expires_at, lot.user_seq)):
                effects.expired.append(self.expire(account, lot, command))
        if opening and account.open_operation is not None:
            operation = self.operations[account.open_operation]
            if operation.expires_at <= self.now:
                self.time_out(account, operation)
                effects.timed_out.append(operation.operation_id)
        return effects

    def expire(self, account: Account, lot: Lot, command: bytes) -> dict[str, Any]:
        """Write off what remains of a due lot. Never makes debt: the lot itself pays."""
        credits = lot.remaining
        what = Movement("expiry", "lot_expiry", Decimal(credits))
        lot.expired_credits = credits
        seq = self.debit(account, credits, what, command, first=[lot], effective_at=lot.expires_at)
        lot.expiry_seq = seq
        return {"lot_id": lot.lot_id, "entry_id": entry_id_of(account.account_id, seq), "credits": credits}

    # Operations

    def add_operation(self, operation: Operation) -> None:
        self.operations[operation.operation_id] = self.new_operations[operation.operation_id] = operation

    def open_slot(self, account: Account, operation: Operation) -> None:
        account.open_operation = operation.operation_id
        self.touch(account)

    def end_operation(self, account: Account, operation: Operation, state: str) -> None:
        """Move an operation to a final state and free the account's slot."""
        operation.state = state
        operation.closed_at = self.now
        if operation.operation_id not in self.new_operations:
            self.changed_operations[operation.operation_id] = operation
        if account.open_operation == operation.operation_id:
            account.open_operation = None
        self.touch(account)

    def time_out(self, account: Account, operation: Operation) -> None:
        self.end_operation(account, operation, "timed_out")

    # Purchases and their reversals

    def document(self, draft: DocumentDraft) -> None:
        """Have a document issued, under the configuration of this moment."""
        draft.config, draft.config_version = self.config, self.config_version
        self.drafts.append(draft)

    def add_purchase(self, purchase: Purchase) -> None:
        self.purchases[purchase.external_ref] = purchase
        self.new_purchases.append(purchase)

    def add_reversal(self, reversal: Reversal) -> None:
        key = (reversal.kind, reversal.key)
        self.reversals[key] = self.new_reversals[key] = reversal
        self.reversals_of.setdefault(reversal.external_ref, []).append(reversal)

    def touch_reversal(self, reversal: Reversal) -> None:
        key = (reversal.kind, reversal.key)
        if key not in self.new_reversals:
            self.changed_reversals[key] = reversal

    def lots_of(self, purchase: Purchase) -> list[Lot]:
        """List a purchase's lots: the original, then those given back by won disputes."""
        reversals = self.reversals_of.get(purchase.external_ref, ())
        given_back = sorted(r.given_back_seq for r in reversals if r.given_back_seq is not None)
        return [self.lots_by_id[purchase.account_id, seq] for seq in (purchase.lot_seq, *given_back)]


def check_balance(balance: int) -> None:
    if abs(balance) > BALANCE_LIMIT:
        raise Refusal(Code.LIMIT_EXCEEDED, "the balance would leave the range of the ledger", {"limit": BALANCE_LIMIT})
