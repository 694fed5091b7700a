"""The shapes of answers. Identifiers, times, money, rates and resource amounts are strings, credits are integers."""

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from schemas.documents import CreditNoteIssued, ReceiptIssued
from schemas.effects import CommandResult

Reason = Literal["purchase", "debit", "expiry", "welcome", "promo", "refund", "chargeback", "adjustment"]
PeriodState = Annotated[
    Literal["scheduled", "active", "archived", "withdrawn"], "Where its period stands; withdrawn before it began."
]
OperationState = Annotated[
    Literal["open", "closed", "cancelled", "timed_out", "refused"], "Where the operation stands."
]


class AsOf(TypedDict):
    """The point in a user's history that an answer shows."""

    user_seq: Annotated[int, "The user's newest entry then; 0 before the first."]
    at: Annotated[str, "date-time", "What the merchant's clock showed."]


class NextExpiry(TypedDict):
    """What expires next."""

    at: Annotated[str, "date-time", "When."]
    credits: Annotated[int, "How many credits, if they are not spent before."]


class CommandRef(TypedDict):
    """The command that caused something."""

    source: Annotated[str, "Its ce_source."]
    id: Annotated[str, "Its ce_id."]
    type: Annotated[str, "Its ce_type."]
    actor: NotRequired[Annotated[str, "Who gave it."]]


class Allocation(TypedDict):
    """How much of a negative entry one lot paid."""

    lot_id: str
    credits: int
    at_seq: Annotated[int, "The user_seq at which it was paid; later than the entry's own if it had been debt."]


class Entry(TypedDict):
    """One immutable movement of credits."""

    entry_id: str
    user_seq: Annotated[int, "The place in the user's history: 1, 2, 3… without holes."]
    amount: Annotated[int, "Credits, signed, never 0."]
    reason: Annotated[Reason, "Why."]
    lot_id: NotRequired[Annotated[str, "The lot this entry issued."]]
    operation_type: Annotated[str, "The operation code, or what else it was."]
    resource_amount: str
    resource_unit: Annotated[str, "What is counted; a currency, or CREDIT."]
    operation_id: NotRequired[str]
    workflow_id: NotRequired[str]
    note: NotRequired[Annotated[str, "Why, in words."]]
    command: NotRequired[Annotated[CommandRef, "The command that caused it."]]
    created_at: Annotated[str, "date-time", "When it was written."]
    effective_at: Annotated[str, "date-time", "When it took effect: for an expiry the lot's end."]
    balance_after: Annotated[int, "The balance right after it."]
    debt_after: Annotated[int, "The debt right after it."]
    allocations: NotRequired[Annotated[list[Allocation], "The lots that paid a negative entry so far."]]


class Lot(TypedDict):
    """Credits issued at full value by one entry."""

    lot_id: str
    user_seq: Annotated[int, "The issuing entry's, and so the place in the order of spending."]
    credits: Annotated[int, "Issued."]
    remaining: Annotated[int, "Not spent, not expired by an entry."]
    expired_credits: NotRequired[Annotated[int, "Written off when it expired."]]
    reason: Annotated[Reason, "Why it was issued."]
    product_code: NotRequired[str]
    external_ref: NotRequired[Annotated[str, "The purchase it belongs to."]]
    issued_at: Annotated[str, "date-time", "When it was issued."]
    expires_at: Annotated[str, "date-time", "From when it can't be spent."]
    state: Annotated[Literal["active", "spent", "expired"], "Whether it can be spent."]


class Debt(TypedDict):
    """What of a negative entry no lot has paid yet."""

    entry_id: str
    reason: Annotated[Reason, "Why."]
    operation_type: Annotated[str, "The operation code, or what else it was."]
    operation_id: NotRequired[str]
    created_at: Annotated[str, "date-time", "When it was written."]
    uncovered: Annotated[int, "Credits no lot has paid."]


class Operation(TypedDict):
    """One consumption, with the rate it captured when it was opened."""

    operation_id: str
    user_id: NotRequired[str]
    operation_code: str
    state: OperationState
    resource_unit: NotRequired[str]
    credits_per_unit: NotRequired[str]
    minimum_charge: NotRequired[int]
    rate_effective_at: NotRequired[Annotated[str, "date-time", "Names the version of the operation type."]]
    workflow_id: NotRequired[str]
    opened_at: Annotated[str, "date-time", "When it was opened."]
    expires_at: Annotated[str, "date-time", "When it times out."]
    closed_at: NotRequired[Annotated[str, "date-time", "When it ended."]]
    completed_at: NotRequired[Annotated[str, "date-time", "When the work was completed, as the close said."]]
    resource_amount: NotRequired[str]
    credits: NotRequired[Annotated[int, "What it cost."]]
    entry_id: NotRequired[Annotated[str, "Its debit."]]
    note: NotRequired[Annotated[str, "Why it was cancelled."]]


class Balance(TypedDict):
    """What a user has."""

    user_id: str
    balance: Annotated[int, "The sum of all entries."]
    debt: Annotated[int, "Debits that no lot has covered."]
    spendable: Annotated[int, "Unexpired remaining credits less the debt."]
    next_expiry: NotRequired[NextExpiry]
    locked: NotRequired[Annotated[bool, "Whether operations can't be opened; only in the present."]]
    locked_until: NotRequired[Annotated[str, "date-time", "When the lock ends by itself."]]
    open_operation: NotRequired[Annotated[Operation, "The one operation that is open; only in the present."]]
    lots: NotRequired[Annotated[list[Lot], "explain=true: the lots with something remaining."]]
    debts: NotRequired[Annotated[list[Debt], "explain=true: the entries that are not paid."]]
    as_of: AsOf


class LotSource(TypedDict):
    """A lot that paid, and where it came from."""

    lot: Lot
    credits: Annotated[int, "How much it paid."]
    at_seq: Annotated[int, "The user_seq at which it paid."]
    command: NotRequired[Annotated[CommandRef, "The command that issued it."]]
    receipt_number: NotRequired[Annotated[str, "The receipt of its purchase."]]


class LotUse(TypedDict):
    """A negative entry that a lot paid for."""

    entry_id: str
    reason: Annotated[Reason, "Why."]
    operation_type: Annotated[str, "The operation code, or what else it was."]
    operation_id: NotRequired[str]
    credits: Annotated[int, "How much the lot paid."]
    at_seq: Annotated[int, "The user_seq at which it paid."]


class Purchase(TypedDict):
    """A paid order, settled; or one that needs attention."""

    external_ref: str
    user_id: str
    status: Annotated[Literal["paid", "partially_reversed", "reversed"], "What became of the money."]
    product_code: str
    credits: int
    lot_id: str
    payment_method: str
    country: str
    amount: str
    currency: str
    amount_left: Annotated[str, "Money not refunded or charged back."]
    order_placed_at: Annotated[str, "date-time", "The moment its price was checked for."]
    settled_at: Annotated[str, "date-time", "When the money was captured."]
    applied_at: Annotated[str, "date-time", "When the lot was issued."]
    receipt_number: str
    reversals: "list[Reversal]"


class Reversal(TypedDict):
    """A refund or a chargeback."""

    kind: Annotated[Literal["refund", "chargeback"], "Which of the two."]
    refund_id: NotRequired[str]
    dispute_id: NotRequired[str]
    amount: Annotated[str, "The money, a decimal string."]
    credits_due: int
    credits_taken: int
    entry_id: NotRequired[str]
    category: NotRequired[Annotated[str, "The dispute's category, as the provider calls it."]]
    applied_at: Annotated[str, "date-time", "When it was applied."]
    credit_note_number: NotRequired[str]
    won_at: NotRequired[Annotated[str, "date-time", "When the dispute was won."]]
    given_back_lot_id: NotRequired[Annotated[str, "The lot that gave the credits back."]]
    correction_number: NotRequired[str]


class RefusalShown(TypedDict):
    """Why an order was refused."""

    code: str
    message: str


class MessagePlace(TypedDict):
    """Where a message lies."""

    topic: Annotated[str, "The topic."]
    partition: Annotated[int, "The partition."]
    offset: Annotated[int, "The offset."]


class PurchaseNeedingAttention(TypedDict):
    """A paid order that was refused and not applied since, or an unreadable message of the purchases topic."""

    external_ref: NotRequired[str]
    status: Annotated[Literal["refused", "dead_lettered"], "Whether it could be read at all."]
    error: RefusalShown
    refused_at: Annotated[str, "date-time", "When it was refused last."]
    first_refused_at: Annotated[str, "date-time", "When it was refused first."]
    times: Annotated[int, "How many messages were refused."]
    command: NotRequired[Annotated[CommandRef, "The message that was refused last."]]
    message: Annotated[MessagePlace, "Where the message lies."]
    sha256: NotRequired[Annotated[str, "SHA-256 of the message's value, if it is a dead letter."]]


class Explanation(TypedDict):
    """Where an entry came from, and where its credits came from or went."""

    entry: Entry
    command: NotRequired[CommandRef]
    operation: NotRequired[Annotated[Operation, "The operation a debit closed, with the rate it was charged by."]]
    purchase: NotRequired[Annotated[Purchase, "The purchase an entry belongs to."]]
    receipt_number: NotRequired[str]
    lot: NotRequired[Annotated[Lot, "The lot a positive entry issued, or the one that expired."]]
    paid_by: NotRequired[Annotated[list[LotSource], "The lots that paid a negative entry."]]
    uncovered: NotRequired[Annotated[int, "What of a negative entry is still debt."]]
    spent_on: NotRequired[Annotated[list[LotUse], "What the lot of a positive entry has paid for: the first 200."]]
    as_of: AsOf


class UsageRow(TypedDict):
    """What operations cost, summed up."""

    day: NotRequired[Annotated[str, "date", "The day in the merchant's time zone."]]
    workflow_id: NotRequired[str]
    operation_code: NotRequired[str]
    resource_unit: str
    operations: Annotated[int, "How many."]
    credits: Annotated[int, "What they cost."]
    resource_amount: str


class SecondsOpen(TypedDict):
    """How many seconds closed operations were open, as decimal strings."""

    median: Annotated[str, "Half of them took no longer."]
    p95: Annotated[str, "19 of 20 took no longer."]


class OperationMetrics(TypedDict):
    """How the operations of one code went."""

    operation_code: str
    resource_unit: str
    opened: Annotated[int, "All that were asked for."]
    open: Annotated[int, "Open now."]
    overdue: Annotated[int, "Open now and past their deadline."]
    closed: Annotated[int, "Closed with a debit."]
    cancelled: Annotated[int, "Cancelled."]
    timed_out: Annotated[int, "Timed out."]
    refused: Annotated[int, "Whose Open was refused."]
    credits: Annotated[int, "What they cost."]
    resource_amount: str
    seconds_open: NotRequired[SecondsOpen]


class Price(TypedDict):
    """A price row."""

    country: Annotated[str, "ISO 3166-1 alpha-2 code, or * for everywhere else."]
    currency: str
    amount: str
    effective_at: Annotated[str, "date-time", "From when it holds."]
    archived_at: NotRequired[Annotated[str, "date-time", "Until just before when it holds."]]


class Product(TypedDict):
    """A lot template, with its prices if it is sellable."""

    product_code: str
    title: str
    credits: int
    access_period_days: int
    distribution: Annotated[Literal["sellable", "grant"], "How it is given out."]
    grant_policy: NotRequired[Annotated[Literal["apply_on_signup", "manual_grant"], "When a grant is given."]]
    effective_at: Annotated[str, "date-time", "From when it is active."]
    archived_at: NotRequired[Annotated[str, "date-time", "Until just before when it is active."]]
    prices: NotRequired[list[Price]]
    state: PeriodState


class OperationType(TypedDict):
    """A version of a resource-to-credit rate."""

    operation_code: str
    display_name: str
    resource_unit: str
    credits_per_unit: str
    minimum_charge: int
    workflow_type: NotRequired[str]
    version: Annotated[int, "Counts the versions of the code, in the order they were made."]
    effective_at: Annotated[str, "date-time", "From when it is active."]
    archived_at: NotRequired[Annotated[str, "date-time", "Until just before when it is active."]]
    state: PeriodState


class OperationTypeHistory(TypedDict):
    """An operation type: the version in force, and all there are."""

    operation_code: str
    active: NotRequired[Annotated[OperationType, "The version in force."]]
    versions: Annotated[list[OperationType], "All versions, in the order they were made."]


class FiscalReceipt(TypedDict):
    """What an authority issued for a document."""

    receipt_number: str
    kind: Annotated[Literal["sale", "prepayment", "return"], "What it is for."]
    fiscal_number: str
    authority: str
    register_number: NotRequired[str]
    qr_url: NotRequired[str]
    fiscal_at: Annotated[str, "date-time", "When it was issued."]


class Receipt(ReceiptIssued):
    """A receipt as published, with what became of it."""

    status: Annotated[Literal["paid", "partially_credited", "credited"], "What became of it."]
    fiscal_receipts: NotRequired[list[FiscalReceipt]]


class CreditNote(CreditNoteIssued):
    """A credit note or a correction as published."""

    fiscal_receipts: NotRequired[list[FiscalReceipt]]


class DocumentRef(TypedDict):
    """A document of the same purchase."""

    number: str
    kind: Annotated[Literal["receipt", "credit_note", "correction"], "What it is."]
    issued_at: Annotated[str, "date-time", "When it was issued."]
    amount: Annotated[str, "Its money, a decimal string."]


class DocumentStatus(TypedDict):
    """What became of a document."""

    number: str
    kind: Annotated[Literal["receipt", "credit_note", "correction"], "What it is."]
    receipt_number: str
    status: Annotated[Literal["paid", "partially_credited", "credited"], "What became of the receipt."]
    credited: Annotated[str, "Money credited by standing credit notes."]
    currency: str
    documents: Annotated[list[DocumentRef], "All documents of the purchase, in order of issue."]
    fiscal_receipts: list[FiscalReceipt]


class ParkedCommand(TypedDict):
    """A command that waits for the one it depends on."""

    command_source: str
    command_id: str
    command_type: str
    waits_for: Annotated[dict[str, str], "What it waits for: kind and key."]
    parked_at: Annotated[str, "date-time", "Since when."]
    due_at: Annotated[str, "date-time", "When it is given up."]


class Overview(TypedDict):
    """A user at a glance: figures, what is active, what was last."""

    user_id: str
    since: Annotated[str, "date-time", "When the account was opened."]
    balance: Balance
    active_lots: Annotated[list[Lot], "In the order they are spent: the first 20."]
    latest_entries: Annotated[list[Entry], "Newest first: 20."]
    latest_operations: Annotated[list[Operation], "Newest first: 20."]
    latest_documents: Annotated[list[ReceiptIssued | CreditNoteIssued], "Newest first: 20."]
    parked_commands: list[ParkedCommand]
    as_of: AsOf


class AccountShown(TypedDict):
    """An account as it is kept."""

    account_id: str
    created_at: Annotated[str, "date-time", "When it was opened."]
    locked: bool
    locked_until: NotRequired[Annotated[str, "date-time", "When the lock ends by itself."]]
    erased_at: NotRequired[str]
    role: NotRequired[str]


class Export(TypedDict):
    """Everything about one user."""

    merchant_id: str
    user_id: str
    exported_at: Annotated[str, "date-time", "When it was made."]
    account: AccountShown
    balance: Balance
    lots: list[Lot]
    entries: list[Entry]
    operations: list[Operation]
    purchases: list[Purchase]
    documents: Annotated[list[Receipt | CreditNote], "All documents, in order of issue."]
    commands: Annotated[list[dict[str, Any]], "The results of the commands that made all this."]
    parked_commands: list[ParkedCommand]
    as_of: AsOf


class Problem(TypedDict):
    """An error (RFC 9457)."""

    type: Annotated[str, "Where the code is explained."]
    title: Annotated[str, "What the code means."]
    status: Annotated[int, "The HTTP status."]
    detail: Annotated[str, "What was the matter this time."]
    code: str
    retryable: Annotated[bool, "Whether the same request may succeed later."]
    details: NotRequired[Annotated[dict[str, Any], "What a program may want to know."]]


__all__ = ["CommandResult", "CreditNoteIssued", "ReceiptIssued"]
