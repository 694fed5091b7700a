"""A story in commands: what a small merchant and its users do on one day. The examples of all contracts are its parts.

Tests tell it to a real database, so every example is known to be taken as it stands.
"""

from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

from schemas.canonical import format_time

MERCHANT = "acme"
SOURCE = "/acme/shop"
MOMENT = datetime(2026, 3, 1, 12, tzinfo=UTC)
"""When the story is told in the contracts."""

ACTOR = {"actor": "anahit@acme.example"}
TIME_ZONE = "Asia/Yerevan"

CONFIG: dict[str, Any] = {
    "legal_name": "Acme LLC",
    "registered_address": {
        "lines": ["1 Abovyan Street"],
        "city": "Yerevan",
        "postal_code": "0001",
        "country": "AM",
    },
    "country": "AM",
    "time_zone": TIME_ZONE,
    "locale": "en",
    "contact_email": "billing@acme.example",
    "tax_regime": "vat",
    "vat_rates": [{"country": "*", "rate": "20"}],
    "receipt_series_prefix": "R",
    "credit_note_series_prefix": "C",
    "retention_years": 5,
    "operation_timeout_minutes": 15,
    "late_close": "refuse",
    "refund_policy": {"shortfall": "debit"},
    "chargeback_policy": {"shortfall": "debit", "credit_note": "never"},
}

Step = tuple[str, dict[str, Any]]


def story(moment: datetime = MOMENT) -> list[Step]:
    """Tell the story as it happens at a moment: (type, payload) in the order it has to be sent."""
    return [*_catalogue(), *_ada(moment), *_money(moment), *_operators(moment), *_endings()]


def control() -> list[Step]:
    """The commands of the control plane."""
    why = {"justification": "invoice 17 is overdue"}
    return [
        ("Merchant.Register", {"merchant_id": MERCHANT, "config": CONFIG, "partitions": 4, **ACTOR}),
        ("Merchant.Suspend", {"merchant_id": MERCHANT, **why, **ACTOR}),
        ("Merchant.Resume", {"merchant_id": MERCHANT, "justification": "invoice 17 was paid", **ACTOR}),
        ("Clock.Advance", {"merchant_id": MERCHANT, "seconds": 86_400, **ACTOR}),
    ]


def _catalogue() -> list[Step]:
    pack = {
        "product_code": "pack-1000",
        "title": "1,000 credits",
        "credits": 1000,
        "access_period_days": 365,
        "distribution": "sellable",
        "prices": [
            {"country": "AM", "currency": "AMD", "amount": "12000.00"},
            {"country": "*", "currency": "USD", "amount": "30.00"},
        ],
    }
    grant = {"access_period_days": 30, "distribution": "grant"}
    welcome = {"product_code": "welcome", "title": "Welcome", "credits": 50, "grant_policy": "apply_on_signup"}
    thanks = {"product_code": "thanks", "title": "Thank you", "credits": 25, "grant_policy": "manual_grant"}
    german = {"product_code": "pack-1000", "country": "DE", "currency": "EUR"}
    text = {"operation_code": "text.generate", "display_name": "Text", "resource_unit": "token"}
    image = {"operation_code": "image.generate", "display_name": "Image", "resource_unit": "image"}
    return [
        ("Product.Create", pack | ACTOR),
        ("Product.Create", welcome | grant | ACTOR),
        ("Product.Create", thanks | grant | ACTOR),
        ("ProductPrice.Create", german | {"amount": "28.00"} | ACTOR),
        ("ProductPrice.Archive", german | ACTOR),
        ("OperationType.CreateWithArchival", text | {"credits_per_unit": "0.05", "workflow_type": "writing"} | ACTOR),
        ("OperationType.CreateWithArchival", image | {"credits_per_unit": "8", "minimum_charge": 8} | ACTOR),
        ("OperationType.Archive", {"operation_code": "image.generate", **ACTOR}),
    ]


def _ada(moment: datetime) -> list[Step]:
    first = {"user_id": "ada", "operation_id": "op-1"}
    second = {"user_id": "ada", "operation_id": "op-2"}
    return [
        ("User.SignedUp", {"user_id": "ada", "locale": "hy-AM", "country": "AM"}),
        ("Purchase.Settled", _purchase("pay_1001", moment, buyer={"name": "Ada Petrosyan", "country": "AM"})),
        ("Operation.Open", first | {"operation_code": "text.generate", "workflow_id": "novel-1"}),
        (
            "Operation.RecordAndClose",
            first | {"resource_amount": "1250.5", "resource_unit": "token", "completed_at": format_time(moment)},
        ),
        ("Operation.Open", second | {"operation_code": "text.generate"}),
        ("Operation.Cancel", second | {"reason": "the user closed the page"}),
    ]


def _purchase(external_ref: str, moment: datetime, amount: str = "12000.00", **more: Any) -> dict[str, Any]:
    return {
        "user_id": "ada",
        "external_ref": external_ref,
        "product_code": "pack-1000",
        "payment_method": "card",
        "order_placed_at": format_time(moment),
        "settled_at": format_time(moment),
        "pricing_snapshot": {"country": "AM", "amount": amount, "currency": "AMD"},
    } | more


def _money(moment: datetime) -> list[Step]:
    grant = {"grant_id": "grant-1", "user_id": "ada", "product_code": "thanks"}
    adjustment = {"adjustment_id": "adj-1", "user_id": "ada", "credits_delta": -5}
    refund = {"refund_id": "refund-1", "external_ref": "pay_1001", "amount": "3000.00"}
    dispute = {"dispute_id": "dispute-1", "external_ref": "pay_1002", "category": "product_not_received"}
    return [
        ("Grant.Apply", grant | {"justification": "reported a bug"} | ACTOR),
        ("Adjustment.Apply", adjustment | {"justification": "counted twice"} | ACTOR),
        ("Refund.Apply", refund | {"justification": "a quarter was not wanted"} | ACTOR),
        ("Purchase.Settled", _purchase("pay_1002", moment)),
        ("Chargeback.Apply", dispute | {"justification": "the bank took it back"} | ACTOR),
        ("Chargeback.Reverse", {"dispute_id": "dispute-1", "justification": "we won", **ACTOR}),
        # Refused, and so listed as needing attention: the price is another one.
        ("Purchase.Settled", _purchase("pay_1003", moment, "11000.00")),
    ]


def _operators(moment: datetime) -> list[Step]:
    year = moment.astimezone(ZoneInfo(TIME_ZONE)).year
    fiscal = {
        "receipt_number": f"R-{year}-0001",
        "kind": "sale",
        "fiscal_number": "81726354",
        "authority": "SRC",
        "fiscal_at": format_time(moment),
    }
    support = {"subject": "support-7", "role": "support"}
    lock = {"user_id": "ada", "justification": "looks like a stolen account"}
    return [
        ("Receipt.AttachFiscal", fiscal | ACTOR),
        ("UserRole.Assign", support | ACTOR),
        ("UserRole.Revoke", support | ACTOR),
        ("Account.Lock", lock | ACTOR),
        ("Account.Unlock", {"user_id": "ada", "justification": "it was not", **ACTOR}),
        ("Merchant.Configure", {"config": CONFIG | {"operation_timeout_minutes": 30}, **ACTOR}),
        ("Product.Archive", {"product_code": "thanks", **ACTOR}),
    ]


def _endings() -> list[Step]:
    erase = {"request_id": "erase-1", "user_id": "bob", "justification": "bob asked for it"}
    third = {"user_id": "ada", "operation_id": "op-3"}
    return [
        ("User.SignedUp", {"user_id": "bob"}),
        ("User.Erase", erase | ACTOR),
        ("Operation.Open", third | {"operation_code": "text.generate", "workflow_id": "novel-1"}),
        # What the service's own scheduler sends; none of it is due yet.
        ("Lot.Expire", {"user_id": "ada", "lot_id": "00c0ffee00c0ffee-1"}),
        ("Operation.Expire", third),
        ("Command.Resolve", {"source": SOURCE, "id": "no-such-command"}),
    ]
