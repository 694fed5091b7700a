"""Values of the ledger: accounts, entries, lots, allocations, operations, purchases, reversals (spec §2–§4)."""

import hmac
import math
from dataclasses import dataclass
from datetime import datetime
from decimal import Context, Decimal
from functools import lru_cache
from hashlib import sha256
from typing import Any, NamedTuple

from schemas.errors import Code, Refusal

GENESIS = bytes(32)
"""The head of an account's hash chain before its first entry."""

_WIDE = Context(prec=80)  # the default context would round a very large product

TOMBSTONE = "erased-"
"""What the user id of an erased account starts with."""


@lru_cache(maxsize=65536)
def account_id_of(user_id: str, secret: bytes) -> int:
    """Compute the account id of a user: 63 bits of an HMAC under the merchant's secret (spec §6)."""
    digest = hmac.digest(secret, b"account\n" + user_id.encode(), sha256)
    return int.from_bytes(digest[:8], "big") >> 1


def entry_id_of(account_id: int, user_seq: int) -> str:
    """Name an entry, and the lot it issues, on the wire."""
    return f"{account_id:016x}-{user_seq}"


def parse_entry_id(entry_id: str) -> tuple[int, int] | None:
    """Read an entry or lot id back into (account_id, user_seq); None if it is not one."""
    account, dash, seq = entry_id.partition("-")
    if len(account) != 16 or not dash or not seq.isascii() or not seq.isdigit() or len(seq) > 18:
        return None
    try:
        account_id = int(account, 16)
    except ValueError:
        return None
    return (account_id, int(seq)) if entry_id_of(account_id, int(seq)) == entry_id else None


@dataclass(slots=True)
class Account:
    """What a user has: the sums of its entries and the head of their chain.

    ``balance = Σ entries = Σ remaining − debt``, in credits; ``last_seq`` counts its entries without holes.
    """

    account_id: int
    user_id: str
    last_seq: int = 0
    balance: int = 0
    debt: int = 0
    head: bytes = GENESIS
    last_entry_at: datetime | None = None
    created_at: datetime | None = None
    locked: bool = False
    locked_until: datetime | None = None
    open_operation: str | None = None
    erased_at: datetime | None = None

    def is_locked(self, now: datetime) -> bool:
        return self.locked and (self.locked_until is None or now < self.locked_until)


class Entry(NamedTuple):
    """One immutable movement of credits. ``amount`` is signed and never 0."""

    account_id: int
    user_seq: int
    amount: int
    reason: str
    operation_type: str
    resource_amount: Decimal
    resource_unit: str
    operation_id: str | None
    workflow_id: str | None
    note: str | None
    command: bytes  # identity of the command that caused it
    created_at: datetime
    effective_at: datetime
    balance_after: int
    debt_after: int
    hash: bytes


class Allocation(NamedTuple):
    """How much of a negative entry one lot paid, and the ``user_seq`` at which it did."""

    account_id: int
    entry_seq: int
    lot_seq: int
    at_seq: int
    credits: int
    created_at: datetime


@dataclass(slots=True)
class Lot:
    """Credits issued by one entry at full value; ``user_seq`` is that entry's, and so the place in the FIFO order."""

    account_id: int
    user_seq: int
    credits: int
    remaining: int
    reason: str
    product_code: str | None
    purchase: str | None  # external_ref of the purchase it belongs to
    issued_at: datetime
    expires_at: datetime
    spent: bool = False  # nothing remains, used up or expired
    expired_credits: int = 0
    expiry_seq: int | None = None  # the entry that wrote off what remained

    @property
    def lot_id(self) -> str:
        return entry_id_of(self.account_id, self.user_seq)


@dataclass(slots=True)
class Debt:
    """The part of a negative entry that no lot has paid yet."""

    account_id: int
    entry_seq: int
    uncovered: int


@dataclass(slots=True)
class Operation:
    """An atomic consumption: opened with a rate, closed with a debit (spec §4).

    ``state`` is one of open, closed, cancelled, timed_out, refused.
    """

    operation_id: str
    account_id: int
    operation_code: str
    resource_unit: str
    credits_per_unit: Decimal
    minimum_charge: int
    type_effective_at: datetime | None
    workflow_id: str | None
    state: str
    opened_at: datetime
    expires_at: datetime
    closed_at: datetime | None = None
    completed_at: datetime | None = None
    resource_amount: Decimal | None = None
    credits: int | None = None
    entry_seq: int | None = None
    note: str | None = None

    def charge(self, resource_amount: Decimal) -> int:
        """Convert a resource amount to credits at the captured rate: rounded up, at least the minimum charge."""
        return max(self.minimum_charge, math.ceil(_WIDE.multiply(resource_amount, self.credits_per_unit)))


@dataclass(slots=True)
class Purchase:
    """A settled purchase; money in whole minor units of its currency."""

    external_ref: str
    account_id: int
    lot_seq: int
    credits: int
    product_code: str
    payment_method: str
    country: str
    amount: Decimal
    currency: str
    order_placed_at: datetime
    settled_at: datetime
    applied_at: datetime
    command: bytes
    receipt_number: str | None = None


@dataclass(slots=True)
class Reversal:
    """A refund or a chargeback of a part of a purchase. It stands until a dispute is won."""

    kind: str  # refund | chargeback
    key: str  # refund_id | dispute_id
    external_ref: str
    account_id: int
    amount: Decimal
    due: int
    taken: int
    entry_seq: int | None
    category: str | None
    applied_at: datetime
    command: bytes
    credit_note_number: str | None = None
    has_credit_note: bool = False
    won_at: datetime | None = None
    given_back_seq: int | None = None
    correction_number: str | None = None

    @property
    def stands(self) -> bool:
        return self.won_at is None


@dataclass(slots=True)
class TimeEffects:
    """What time alone did to an account before a command was decided (spec §3)."""

    expired: list[dict[str, Any]]
    timed_out: list[str]

    def as_object(self) -> dict[str, Any] | None:
        shown: dict[str, Any] = {}
        if self.expired:
            shown["expired"] = self.expired
        if self.timed_out:
            shown["timed_out"] = self.timed_out
        return shown or None


class LotsNeeded(Exception):  # noqa: N818 - a request to the caller, not an error
    """Raised when an account's older lots must be loaded before a command can be decided."""

    def __init__(self, account_id: int) -> None:
        super().__init__(account_id)
        self.account_id = account_id


def unknown(code: Code, what: str, **details: Any) -> Refusal:
    return Refusal(code, f"there is no such {what}", details)
