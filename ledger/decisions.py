"""What the ledger's commands do: ``HANDLERS[type](books, command)`` (spec §2–§4).

Pure. A handler checks first, in the order of the error registry, then moves the books, and returns the effects shown
in the result. It raises Refusal (nothing moved) or LotsNeeded (load more, decide again). It is called only when
what the command depends on is there: see ``DEPENDENCIES``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from catalog.decisions import DELIVERY_DELAY
from catalog.model import OperationType, Product, is_active
from ledger.books import Books, DocumentDraft, Movement, NewLot, check_balance
from ledger.model import (
    TOMBSTONE,
    Account,
    Lot,
    Operation,
    Purchase,
    Reversal,
    entry_id_of,
    parse_entry_id,
    unknown,
)
from schemas import payloads
from schemas.codec import format_decimal, format_time
from schemas.errors import Code, Refusal
from schemas.money import exponent, format_amount, to_minor


@dataclass(slots=True)
class Given:
    """A command with what came around it: who it concerns, what caused it, when the broker took it."""

    payload: Any
    identity: bytes
    account_id: int | None
    record_time: datetime  # of the topic record, on the merchant's clock


Effects = dict[str, Any]


def days(count: int) -> timedelta:
    return timedelta(hours=24 * count)


def known_account(books: Books, given: Given) -> Account:
    """Return the account of the command's user, opened now if need be. Call it only when nothing can be refused."""
    assert given.account_id is not None
    return books.open_account(given.account_id, given.payload.user_id)


# Purchases


def settle_purchase(books: Books, given: Given) -> Effects:
    command: payloads.PurchaseSettled = given.payload
    snapshot = command.pricing_snapshot
    if command.order_placed_at > books.now + DELIVERY_DELAY:
        raise Refusal(Code.MALFORMED, "order_placed_at lies in the future", {"field": "order_placed_at"})
    placed_at = min(command.order_placed_at, books.now)
    product = books.catalog.product_for_sale(command.product_code, placed_at)
    price = books.catalog.price_for(product.product_code, snapshot.country, snapshot.currency, placed_at)
    if price is None or price.amount != snapshot.amount:
        raise Refusal(
            Code.PRICE_MISMATCH, "the snapshot is not the price that was in force", _mismatch(price, snapshot)
        )
    account = known_account(books, given)
    expires_at = books.now + days(product.access_period_days)
    what = Movement("purchase", command.payment_method, snapshot.amount, snapshot.currency)
    terms = NewLot(expires_at, product.product_code, command.external_ref)
    lot = books.credit(account, product.credits, what, terms, given.identity)
    purchase = Purchase(
        command.external_ref,
        account.account_id,
        lot.user_seq,
        product.credits,
        product.product_code,
        command.payment_method,
        snapshot.country,
        snapshot.amount,
        snapshot.currency,
        placed_at,
        command.settled_at,
        books.now,
        given.identity,
    )
    books.add_purchase(purchase)
    books.document(
        DocumentDraft(
            "receipt",
            purchase,
            given.identity,
            snapshot.amount,
            buyer=command.buyer,
            tax=snapshot.tax,
            lot=lot,
            title=product.title,
        )
    )
    return lot_effects(lot) | {"expires_at": format_time(expires_at)}


def _mismatch(price: Any, snapshot: payloads.PricingSnapshot) -> dict[str, Any]:
    details = {"country": snapshot.country, "given": f"{format_decimal(snapshot.amount)} {snapshot.currency}"}
    if price is not None:
        details["expected"] = f"{format_amount(price.amount, price.currency)} {price.currency}"
    return details


def lot_effects(lot: Lot) -> Effects:
    return {"lot_id": lot.lot_id, "entry_id": lot.lot_id, "credits": lot.credits}


# Grants and adjustments


def sign_up(books: Books, given: Given) -> Effects:
    account = known_account(books, given)
    products = books.catalog.signup_products(books.now)
    # Before the first grant, because a command that is refused moves nothing.
    check_balance(account.balance + sum(product.credits for product in products))
    grants = []
    for product in products:
        lot = issue_grant(books, account, product, given.identity, "welcome")
        grants.append({"product_code": product.product_code} | lot_effects(lot))
    return {"grants": grants}


def issue_grant(
    books: Books, account: Account, product: Product, identity: bytes, reason: str, note: str | None = None
) -> Lot:
    what = Movement(reason, f"{reason}_grant", Decimal(product.credits), note=note)
    terms = NewLot(books.now + days(product.access_period_days), product.product_code)
    return books.credit(account, product.credits, what, terms, identity)


def apply_grant(books: Books, given: Given) -> Effects:
    command: payloads.GrantApply = given.payload
    if command.product_code is not None:
        product = grantable(books, command.product_code)
        lot = issue_grant(books, known_account(books, given), product, given.identity, "promo", command.justification)
        return lot_effects(lot)
    assert command.credits is not None
    assert command.access_period_days is not None
    what = Movement("promo", "promo_grant", Decimal(command.credits), note=command.justification)
    terms = NewLot(books.now + days(command.access_period_days))
    lot = books.credit(known_account(books, given), command.credits, what, terms, given.identity)
    return lot_effects(lot)


def grantable(books: Books, product_code: str) -> Product:
    product = books.catalog.product(product_code)
    if product.grant_policy != "manual_grant":
        raise Refusal(
            Code.UNKNOWN_PRODUCT, "this is no product for manual grants", {"product_code": product.product_code}
        )
    if not is_active(product, books.now):
        raise Refusal(Code.PRODUCT_NOT_ACTIVE, "the product is not active", {"product_code": product.product_code})
    return product


def apply_adjustment(books: Books, given: Given) -> Effects:
    command: payloads.AdjustmentApply = given.payload
    amount = abs(command.credits_delta)
    if command.credits_delta > 0:
        assert command.access_period_days is not None
        what = Movement("adjustment", "credit_adjustment", Decimal(amount), note=command.justification)
        terms = NewLot(books.now + days(command.access_period_days))
        lot = books.credit(known_account(books, given), amount, what, terms, given.identity)
        return lot_effects(lot)
    what = Movement("adjustment", "debit_adjustment", Decimal(amount), note=command.justification)
    account = known_account(books, given)
    seq = books.debit(account, amount, what, given.identity)
    return {"entry_id": entry_id_of(account.account_id, seq), "credits": amount}


# Operations


def open_operation(books: Books, given: Given) -> Effects:
    command: payloads.OperationOpen = given.payload
    rate = books.catalog.operation_type_at(command.operation_code, books.now)
    assert given.account_id is not None
    check_may_open(books, books.account(given.account_id))
    account = known_account(books, given)
    operation = _operation(books, given, rate, "open")
    books.add_operation(operation)
    books.open_slot(account, operation)
    return {
        "operation_id": operation.operation_id,
        "expires_at": format_time(operation.expires_at),
        "credits_per_unit": format_decimal(operation.credits_per_unit),
        "resource_unit": operation.resource_unit,
    }


def refuse_open(books: Books, given: Given) -> None:
    """Keep a refused Open: the refusal is final for its operation_id, and a close that waits for it must find it."""
    books.add_operation(_operation(books, given, None, "refused"))


def check_may_open(books: Books, account: Account | None) -> None:
    if account is None:
        return
    if account.is_locked(books.now):
        details = {"until": format_time(account.locked_until)} if account.locked_until else {}
        raise Refusal(Code.ACCOUNT_LOCKED, "the account is locked", details)
    if account.open_operation is not None:
        held_by = books.operations[account.open_operation]
        raise Refusal(
            Code.OPERATION_ALREADY_OPEN,
            "another operation of this user is open",
            {
                "operation_id": held_by.operation_id,
                "operation_code": held_by.operation_code,
                "opened_at": format_time(held_by.opened_at),
                "seconds_remaining": max(0, (held_by.expires_at - books.now) // timedelta(seconds=1)),
            },
        )
    if account.balance < 0:
        raise Refusal(Code.INSUFFICIENT_BALANCE, "the balance is below zero", {"balance": account.balance})


def _operation(books: Books, given: Given, rate: OperationType | None, state: str) -> Operation:
    command: payloads.OperationOpen = given.payload
    assert given.account_id is not None
    timeout = timedelta(minutes=books.config.operation_timeout_minutes)
    return Operation(
        operation_id=command.operation_id,
        account_id=given.account_id,
        operation_code=command.operation_code,
        resource_unit=rate.resource_unit if rate else "",
        credits_per_unit=rate.credits_per_unit if rate else Decimal(0),
        minimum_charge=rate.minimum_charge if rate else 0,
        type_effective_at=rate.effective_at if rate else None,
        workflow_id=command.workflow_id,
        state=state,
        opened_at=books.now,
        expires_at=books.now + (timeout if rate else timedelta(0)),
        closed_at=None if rate else books.now,
    )


def existing_operation(books: Books, given: Given) -> Operation:
    """Return the operation a close or cancel names, as far as it still may be ended."""
    operation = books.operations[given.payload.operation_id]
    if operation.account_id != given.account_id:
        raise unknown(Code.OPERATION_NOT_FOUND, "operation", operation_id=given.payload.operation_id)
    if operation.state not in ("open", "timed_out"):
        raise Refusal(
            Code.OPERATION_NOT_OPEN,
            "the operation is not open",
            {"operation_id": operation.operation_id, "state": operation.state},
        )
    return operation


def timed_out(operation: Operation) -> Refusal:
    return Refusal(
        Code.OPERATION_TIMED_OUT,
        "the operation timed out",
        {"operation_id": operation.operation_id, "expires_at": format_time(operation.expires_at)},
    )


def record_and_close(books: Books, given: Given) -> Effects:
    command: payloads.OperationRecordAndClose = given.payload
    operation = existing_operation(books, given)
    in_time = given.record_time <= operation.expires_at
    if operation.state == "timed_out" and not in_time and books.config.late_close == "refuse":
        raise timed_out(operation)
    if command.resource_unit != operation.resource_unit:
        raise Refusal(
            Code.RESOURCE_UNIT_MISMATCH,
            "the operation is counted in another unit",
            {"expected": operation.resource_unit, "given": command.resource_unit},
        )
    workflow_id = operation.workflow_id or command.workflow_id
    if command.workflow_id is not None and command.workflow_id != workflow_id:
        raise Refusal(
            Code.WORKFLOW_MISMATCH,
            "the operation was opened for another workflow",
            {"expected": workflow_id, "given": command.workflow_id},
        )
    account = books.accounts[operation.account_id]
    credits = operation.charge(command.resource_amount)
    what = Movement(
        "debit",
        operation.operation_code,
        command.resource_amount,
        operation.resource_unit,
        operation.operation_id,
        workflow_id,
    )
    seq = books.debit(account, credits, what, given.identity)
    operation.workflow_id = workflow_id
    operation.resource_amount = command.resource_amount
    operation.completed_at = command.completed_at
    operation.credits = credits
    operation.entry_seq = seq
    books.end_operation(account, operation, "closed")
    return {
        "operation_id": operation.operation_id,
        "entry_id": entry_id_of(account.account_id, seq),
        "credits": credits,
    }


def cancel_operation(books: Books, given: Given) -> Effects:
    command: payloads.OperationCancel = given.payload
    operation = existing_operation(books, given)
    if operation.state == "timed_out":
        raise timed_out(operation)
    operation.note = command.reason
    books.end_operation(books.accounts[operation.account_id], operation, "cancelled")
    return {"operation_id": operation.operation_id, "state": operation.state}


# Refunds and chargebacks


def apply_refund(books: Books, given: Given) -> Effects:
    command: payloads.RefundApply = given.payload
    return reverse_purchase(books, given, "refund", command.refund_id, books.config.refund_policy.shortfall, True)


def apply_chargeback(books: Books, given: Given) -> Effects:
    command: payloads.ChargebackApply = given.payload
    policy = books.config.chargeback_policy
    with_note = policy.credit_note == "on_apply"
    return reverse_purchase(books, given, "chargeback", command.dispute_id, policy.shortfall, with_note)


def reverse_purchase(
    books: Books, given: Given, kind: str, key: str, shortfall: str, with_credit_note: bool
) -> Effects:
    """Take back the credits of a part of a purchase's money: ``due = max(0, ⌊C·R/G⌋ − T − E)`` (spec §2)."""
    command = given.payload
    purchase = books.purchases[command.external_ref]
    standing = [r for r in books.reversals_of.get(purchase.external_ref, ()) if r.stands]
    reversed_before = sum((r.amount for r in standing), Decimal(0))
    amount = reversible_amount(purchase, command.amount, reversed_before)
    due = credits_due(books, purchase, standing, reversed_before + amount)
    account = books.accounts[purchase.account_id]
    lots = books.lots_of(purchase)
    available = sum(lot.remaining for lot in lots)
    taken = min(due, available) if shortfall == "forgive" else due
    note = command.justification
    if taken < due:
        note = f"{note} ({due - taken} credits forgiven)"
    seq = None
    if taken:
        what = Movement(kind, kind, amount, purchase.currency, note=note)
        seq = books.debit(account, taken, what, given.identity, first=lots)
    reversal = Reversal(
        kind,
        key,
        purchase.external_ref,
        purchase.account_id,
        amount,
        due,
        taken,
        seq,
        getattr(command, "category", None),
        books.now,
        given.identity,
        has_credit_note=with_credit_note,
    )
    books.add_reversal(reversal)
    if with_credit_note:
        credited_before = sum((r.amount for r in standing if r.has_credit_note), Decimal(0))
        books.document(
            DocumentDraft("credit_note", purchase, given.identity, amount, credited_before, reversal=reversal)
        )
    effects: Effects = {"credits_taken": taken, "credits_due": due}
    if seq is not None:
        effects["entry_id"] = entry_id_of(purchase.account_id, seq)
    return effects


def reversible_amount(purchase: Purchase, asked: Decimal | None, reversed_before: Decimal) -> Decimal:
    """Check the money of a reversal against what is left of the purchase; by default all of it."""
    left = purchase.amount - reversed_before
    details = {"external_ref": purchase.external_ref, "left": format_amount(left, purchase.currency)}
    if asked is not None and asked != round(asked, exponent(purchase.currency)):
        raise Refusal(Code.MALFORMED, "the amount does not fit the purchase's currency", {"field": "amount"})
    if left <= 0:
        raise Refusal(Code.ALREADY_REVERSED, "nothing of the purchase is left to reverse", details)
    if asked is not None and asked > left:
        raise Refusal(Code.AMOUNT_EXCEEDS_PURCHASE, "more than what is left of the purchase", details)
    return left if asked is None else asked


def credits_due(books: Books, purchase: Purchase, standing: list[Reversal], reversed_amount: Decimal) -> int:
    share = purchase.credits * to_minor(reversed_amount, purchase.currency)
    share //= to_minor(purchase.amount, purchase.currency)
    expired = sum(lot.expired_credits for lot in books.lots_of(purchase))
    return max(0, share - sum(r.due for r in standing) - expired)


def reverse_chargeback(books: Books, given: Given) -> Effects:
    """Give back exactly what a chargeback took, in a lot with the access time the purchase had left at that time."""
    command: payloads.ChargebackReverse = given.payload
    reversal = books.reversals["chargeback", command.dispute_id]
    if not reversal.stands:
        raise Refusal(Code.ALREADY_REVERSED, "the dispute was already won", {"dispute_id": command.dispute_id})
    purchase = books.purchases[reversal.external_ref]
    effects: Effects = {"credits": reversal.taken}
    if reversal.taken:
        account = books.accounts[reversal.account_id]
        original = books.lots_by_id[purchase.account_id, purchase.lot_seq]
        access = max(original.expires_at - reversal.applied_at, books.now - reversal.applied_at)
        what = Movement(
            "chargeback", "chargeback_reversal", reversal.amount, purchase.currency, note=command.justification
        )
        # A lot that has no time at all would be due in the instant it is issued.
        terms = NewLot(books.now + max(access, timedelta(microseconds=1)), purchase=purchase.external_ref)
        lot = books.credit(account, reversal.taken, what, terms, given.identity)
        reversal.given_back_seq = lot.user_seq
        effects |= {"entry_id": lot.lot_id, "lot_id": lot.lot_id}
    reversal.won_at = books.now
    books.touch_reversal(reversal)
    if reversal.has_credit_note:
        books.document(DocumentDraft("correction", purchase, given.identity, reversal.amount, reversal=reversal))
    return effects


# Accounts


def lock_account(books: Books, given: Given) -> Effects:
    command: payloads.AccountLock = given.payload
    if command.until is not None and command.until <= books.now:
        raise Refusal(
            Code.EFFECTIVE_IN_PAST, "the lock would have ended already", {"until": format_time(command.until)}
        )
    account = known_account(books, given)
    if not (account.is_locked(books.now) and account.locked_until == command.until):
        account.locked, account.locked_until = True, command.until
        books.touch(account)
    return lock_object(account, books.now)


def unlock_account(books: Books, given: Given) -> Effects:
    assert given.account_id is not None
    account = books.account(given.account_id)
    if account is None:
        return {"locked": False}
    if account.locked:
        account.locked, account.locked_until = False, None
        books.touch(account)
    return lock_object(account, books.now)


def lock_object(account: Account, now: datetime) -> Effects:
    shown: Effects = {"locked": account.is_locked(now)}
    if shown["locked"] and account.locked_until is not None:
        shown["until"] = format_time(account.locked_until)
    return shown


def erase_user(books: Books, given: Given) -> Effects:
    """Replace the caller's id by a tombstone; the store deletes buyer blocks, salts and roles with it."""
    account = known_account(books, given)
    account.user_id = f"{TOMBSTONE}{tombstone_uuid(given.identity)}"
    account.erased_at = books.now
    books.touch(account)
    books.erased.append(account)
    return {"erased_at": format_time(books.now)}


def tombstone_uuid(identity: bytes) -> str:
    text = identity.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


# Jobs


def expire_lot(books: Books, given: Given) -> Effects:
    """Answer what became of a due lot; writing it is what ``let_time_pass`` did just before."""
    command: payloads.LotExpire = given.payload
    key = parse_entry_id(command.lot_id)
    lot = books.lots_by_id.get(key) if key is not None else None
    if lot is None or lot.account_id != given.account_id:
        raise unknown(Code.UNKNOWN_LOT, "lot", lot_id=command.lot_id)
    if lot.expires_at > books.now:
        raise Refusal(Code.NOT_DUE, "the lot has not expired", {"expires_at": format_time(lot.expires_at)})
    effects: Effects = {"lot_id": lot.lot_id, "credits": lot.expired_credits}
    if lot.expiry_seq is not None:
        effects["entry_id"] = entry_id_of(lot.account_id, lot.expiry_seq)
    return effects


def expire_operation(books: Books, given: Given) -> Effects:
    command: payloads.OperationExpire = given.payload
    operation = books.operations.get(command.operation_id)
    if operation is None or operation.account_id != given.account_id:
        raise unknown(Code.OPERATION_NOT_FOUND, "operation", operation_id=command.operation_id)
    if operation.state == "open":
        if operation.expires_at > books.now:
            raise Refusal(Code.NOT_DUE, "the operation is in time", {"expires_at": format_time(operation.expires_at)})
        books.time_out(books.accounts[operation.account_id], operation)
    elif operation.state != "timed_out":
        raise Refusal(
            Code.OPERATION_NOT_OPEN,
            "the operation is not open",
            {"operation_id": operation.operation_id, "state": operation.state},
        )
    return {"operation_id": operation.operation_id}


@dataclass(frozen=True, slots=True)
class Dependency:
    """What a command waits for when it arrives first (spec §9.5)."""

    kind: str  # operation | purchase | dispute | receipt
    key: str


DEPENDENCIES: Mapping[str, Callable[[Any], Dependency]] = {
    "Operation.RecordAndClose": lambda p: Dependency("operation", p.operation_id),
    "Operation.Cancel": lambda p: Dependency("operation", p.operation_id),
    "Refund.Apply": lambda p: Dependency("purchase", p.external_ref),
    "Chargeback.Apply": lambda p: Dependency("purchase", p.external_ref),
    "Chargeback.Reverse": lambda p: Dependency("dispute", p.dispute_id),
    "Receipt.AttachFiscal": lambda p: Dependency("receipt", p.receipt_number),
}

FULFILMENTS: Mapping[str, Callable[[Any], Dependency]] = {
    "Operation.Open": lambda p: Dependency("operation", p.operation_id),
    "Purchase.Settled": lambda p: Dependency("purchase", p.external_ref),
    "Chargeback.Apply": lambda p: Dependency("dispute", p.dispute_id),
}


HANDLERS: Mapping[str, Callable[[Books, Given], Effects]] = {
    "Purchase.Settled": settle_purchase,
    "User.SignedUp": sign_up,
    "Operation.Open": open_operation,
    "Operation.RecordAndClose": record_and_close,
    "Operation.Cancel": cancel_operation,
    "Grant.Apply": apply_grant,
    "Adjustment.Apply": apply_adjustment,
    "Refund.Apply": apply_refund,
    "Chargeback.Apply": apply_chargeback,
    "Chargeback.Reverse": reverse_chargeback,
    "Account.Lock": lock_account,
    "Account.Unlock": unlock_account,
    "User.Erase": erase_user,
    "Lot.Expire": expire_lot,
    "Operation.Expire": expire_operation,
}
