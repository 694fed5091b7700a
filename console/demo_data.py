"""Real input as commands: a shop's orders and a trace of LLM calls. Deterministic; only the two files are read."""

import csv
from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any

from babel import Locale

DATA = Path(__file__).parent / "data"
ACTOR = "demo"
USERS = 300

Command = tuple[str, dict[str, Any]]  # type, payload


def config(legal_name: str, country: str, city: str, time_zone: str, **changes: Any) -> dict[str, Any]:
    """Return a merchant's configuration."""
    return {
        "legal_name": legal_name,
        "registered_address": {"lines": ["1 Example Street"], "city": city, "country": country},
        "country": country,
        "time_zone": time_zone,
        "locale": "en",
        "contact_email": "accounts@demo.example",
        "tax_regime": "vat",
        "vat_rates": [{"country": "*", "rate": "20"}],
        "receipt_series_prefix": "R",
        "credit_note_series_prefix": "CN",
        "retention_years": 6,
    } | changes


def justified(reason: str) -> dict[str, str]:
    return {"justification": reason, "actor": ACTOR}


def purchase(user_id: str, ref: str, product: str, price: tuple[str, str, str], at: str) -> Command:
    """Return a paid order; ``price`` is (country, amount, currency)."""
    country, amount, currency = price
    payload = {
        "user_id": user_id,
        "external_ref": ref,
        "product_code": product,
        "payment_method": "card",
        "order_placed_at": at,
        "settled_at": at,
        "pricing_snapshot": {"country": country, "amount": amount, "currency": currency},
        "buyer": {"country": country},
    }
    return "Purchase.Settled", payload


def sellable(code: str, title: str, credits: int, days: int, amount: str, currency: str) -> Command:
    payload = {
        "product_code": code,
        "title": title,
        "credits": credits,
        "access_period_days": days,
        "distribution": "sellable",
        "prices": [{"country": "*", "currency": currency, "amount": amount}],
        "actor": ACTOR,
    }
    return "Product.Create", payload


def welcome(credits: int, days: int) -> Command:
    payload = {
        "product_code": "welcome",
        "title": "Welcome credits",
        "credits": credits,
        "access_period_days": days,
        "distribution": "grant",
        "grant_policy": "apply_on_signup",
        "actor": ACTOR,
    }
    return "Product.Create", payload


def _rows(name: str) -> list[dict[str, str]]:
    with (DATA / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# The shop


@dataclass(frozen=True)
class Order:
    """One invoice of the shop; a cancellation has a negative total."""

    invoice: str
    customer: str
    country: str
    total: Decimal

    @property
    def is_cancellation(self) -> bool:
        return self.invoice.startswith("C")

    @property
    def external_ref(self) -> str:
        return f"invoice-{self.invoice}"

    @property
    def product(self) -> str:
        """The product is defined by the amount: one credit a penny."""
        return f"gbp-{self.pence}"

    @property
    def pence(self) -> int:
        return int(self.total * 100)


@cache
def _country_codes() -> Mapping[str, str]:
    territories = Locale("en").territories
    return {name: code for code, name in territories.items() if len(code) == 2 and code.isalpha()}


def orders() -> list[Order]:
    """Read the shop's invoices, in the order they were written."""
    return [
        Order(
            row["invoice_no"],
            row["customer_id"] and f"customer-{row['customer_id']}",
            _country_codes()[row["country"]],
            Decimal(row["total_gbp"]),
        )
        for row in _rows("retail_orders.csv")
    ]


def shop_catalog(invoices: Iterable[Order]) -> Iterator[Command]:
    """Define a product for each amount that was paid; nothing costs nothing, so there is none for that."""
    for pence in sorted({order.pence for order in invoices if order.total > 0}):
        amount = f"{Decimal(pence).scaleb(-2):.2f}"
        yield sellable(f"gbp-{pence}", f"Shopping credit of {amount} GBP", pence, 365, amount, "GBP")


def shop_sales(sold: Iterable[Order], at: str) -> Iterator[Command]:
    """Turn every sale into a purchase as it stands, also what the service has to refuse.

    The orders' own times are long past, when nothing of this was for sale; they are placed ``at`` instead.
    """
    for order in sold:
        price = (order.country, f"{order.total:.2f}", "GBP")
        yield purchase(order.customer, order.external_ref, order.product, price, at)


def shop_refunds(invoices: list[Order]) -> Iterator[tuple[Command, bool]]:
    """Turn every cancellation into a refund, and tell whether its sale is in the file.

    An invoice does not say which one it cancels: it is taken to be the customer's latest that is large enough.
    Of customers without one the sale is older than the file; their refund waits for it.
    """
    for index, order in enumerate(invoices):
        if not order.is_cancellation:
            continue
        earlier = [
            sale for sale in invoices[:index] if sale.customer == order.customer and sale.total >= -order.total > 0
        ]
        ref = earlier[-1].external_ref if earlier else f"before-{order.invoice}"
        payload = {"refund_id": order.invoice, "external_ref": ref, "amount": f"{-order.total:.2f}"}
        yield ("Refund.Apply", payload | justified("the customer cancelled")), bool(earlier)


# The LLM service

PACKS = (("pack-5000", 5000, "50.00"), ("pack-500", 500, "6.00"))
WELCOME = 100
TOKENS_PER_CREDIT = 100
RATE = "0.01"  # credits per token


@dataclass(frozen=True)
class LlmCall:
    """One row of the trace, and the user it was given to."""

    row: int
    user_id: str
    tokens: int

    @property
    def credits(self) -> int:
        return max(1, -(-self.tokens // TOKENS_PER_CREDIT))


def calls() -> list[LlmCall]:
    """Read the trace. Users are Zipf-distributed by a hash of the row number: the n-th is 1/n as busy as the first."""
    weights = list(accumulate(10**9 // rank for rank in range(1, USERS + 1)))
    result = []
    for number, row in enumerate(_rows("llm_usage_code.csv"), 1):
        draw = int.from_bytes(sha256(str(number).encode()).digest()[:8]) % weights[-1]
        tokens = int(row["ContextTokens"]) + int(row["GeneratedTokens"])
        result.append(LlmCall(number, f"user-{bisect(weights, draw) + 1:03}", tokens))
    return result


def llm_catalog() -> Iterator[Command]:
    """Define packs of credits, a welcome grant and the rate of tokens."""
    yield welcome(WELCOME, 90)
    for code, credits, amount in PACKS:
        yield sellable(code, f"{credits:,} credits", credits, 180, amount, "USD")
    payload = {
        "operation_code": "completion",
        "display_name": "Code completion",
        "resource_unit": "TOKEN",
        "credits_per_unit": RATE,
        "actor": ACTOR,
    }
    yield "OperationType.CreateWithArchival", payload


def llm_customers(trace: Iterable[LlmCall], at: str) -> Iterator[list[Command]]:
    """Give for each user the sign-up and purchases: every other user buys enough, the others a little too little."""
    demand: dict[str, int] = {}
    for call in trace:
        demand[call.user_id] = demand.get(call.user_id, 0) + call.credits
    for number, (user_id, credits) in enumerate(sorted(demand.items())):
        missing = max(0, credits - WELCOME) if number % 2 else max(0, credits - WELCOME) * 9 // 10
        bought: list[Command] = [("User.SignedUp", {"user_id": user_id})]
        for code, size, amount in PACKS:
            count = -(-missing // size) if number % 2 and size == PACKS[-1][1] else missing // size
            missing = max(0, missing - count * size)
            price = ("AM", amount, "USD")
            bought += [purchase(user_id, f"{user_id}-{code}-{n}", code, price, at) for n in range(count)]
        yield bought


def llm_operations(trace: Iterable[LlmCall], at: str) -> Iterator[Command]:
    """Make two commands of each call. One user's share a partition, so none has to wait for another's result."""
    for call in trace:
        names = {"user_id": call.user_id, "operation_id": f"call-{call.row}"}
        yield "Operation.Open", names | {"operation_code": "completion"}
        used = {"resource_amount": str(call.tokens), "resource_unit": "TOKEN", "completed_at": at}
        yield "Operation.RecordAndClose", names | used
