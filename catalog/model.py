"""Frozen values of the catalogue, and the questions asked of them (spec §1, §4)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from schemas.codec import format_decimal, format_time
from schemas.errors import Code, Refusal
from schemas.money import format_amount

ANYWHERE = "*"


class Period(Protocol):
    """Something in force from ``effective_at`` until just before ``archived_at``."""

    @property
    def effective_at(self) -> datetime: ...
    @property
    def archived_at(self) -> datetime | None: ...


P = TypeVar("P", bound=Period)


def is_active(period: Period, at: datetime) -> bool:
    return period.effective_at <= at and (period.archived_at is None or at < period.archived_at)


def is_withdrawn(period: Period) -> bool:
    """Tell whether a period was ended before it began: it never is in force."""
    return period.archived_at is not None and period.archived_at <= period.effective_at


def overlaps(a: Period, b: Period) -> bool:
    if is_withdrawn(a) or is_withdrawn(b):
        return False
    return (b.archived_at is None or a.effective_at < b.archived_at) and (
        a.archived_at is None or b.effective_at < a.archived_at
    )


@dataclass(frozen=True, slots=True)
class Product:
    """Immutable lot template; only ``archived_at`` may change, while it is empty or in the future."""

    product_code: str
    title: str
    credits: int
    access_period_days: int
    distribution: str  # sellable | grant
    grant_policy: str | None  # apply_on_signup | manual_grant, for grants
    effective_at: datetime
    archived_at: datetime | None = None

    def as_object(self, prices: Iterable["Price"] = ()) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "product_code": self.product_code,
            "title": self.title,
            "credits": self.credits,
            "access_period_days": self.access_period_days,
            "distribution": self.distribution,
        }
        if self.grant_policy:
            shown["grant_policy"] = self.grant_policy
        shown |= period_object(self)
        if self.distribution == "sellable":
            shown["prices"] = [price.as_object(with_product=False) for price in prices]
        return shown


@dataclass(frozen=True, slots=True)
class Price:
    """What one product costs in one country (or anywhere else, ``*``) in one currency, tax included."""

    product_code: str
    country: str
    currency: str
    amount: Decimal
    effective_at: datetime
    archived_at: datetime | None = None
    version: int = 1  # 1..n within (product, country, currency)

    def as_object(self, *, with_product: bool = True) -> dict[str, Any]:
        shown = {"product_code": self.product_code} if with_product else {}
        return (
            shown
            | {
                "country": self.country,
                "currency": self.currency,
                "amount": format_amount(self.amount, self.currency),
            }
            | period_object(self)
        )


@dataclass(frozen=True, slots=True)
class OperationType:
    """One version of a resource-to-credit rate; the versions of a code never overlap."""

    operation_code: str
    display_name: str
    resource_unit: str
    credits_per_unit: Decimal
    minimum_charge: int
    workflow_type: str | None
    effective_at: datetime
    archived_at: datetime | None = None
    version: int = 1  # 1..n within the operation code

    def as_object(self) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "operation_code": self.operation_code,
            "display_name": self.display_name,
            "resource_unit": self.resource_unit,
            "credits_per_unit": format_decimal(self.credits_per_unit),
            "minimum_charge": self.minimum_charge,
        }
        if self.workflow_type:
            shown["workflow_type"] = self.workflow_type
        return shown | period_object(self)


def period_object(period: Period) -> dict[str, Any]:
    shown = {"effective_at": format_time(period.effective_at)}
    if period.archived_at is not None:
        shown["archived_at"] = format_time(period.archived_at)
    return shown


@dataclass(frozen=True, slots=True)
class Catalog:
    """A merchant's whole catalogue at one version; a change makes a new one.

    Prices are kept by product code, operation type versions by operation code in order of ``effective_at``.
    """

    version: int = 0
    products: Mapping[str, Product] = field(default_factory=lambda: MappingProxyType({}))
    prices: Mapping[str, tuple[Price, ...]] = field(default_factory=lambda: MappingProxyType({}))
    operation_types: Mapping[str, tuple[OperationType, ...]] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def of(
        cls, version: int, products: Iterable[Product], prices: Iterable[Price], types: Iterable[OperationType]
    ) -> "Catalog":
        prices_by_code: dict[str, list[Price]] = {}
        for price in prices:
            prices_by_code.setdefault(price.product_code, []).append(price)
        types_by_code: dict[str, list[OperationType]] = {}
        for kind in sorted(types, key=lambda kind: kind.effective_at):
            types_by_code.setdefault(kind.operation_code, []).append(kind)
        return cls(
            version,
            {product.product_code: product for product in products},
            {code: tuple(rows) for code, rows in prices_by_code.items()},
            {code: tuple(rows) for code, rows in types_by_code.items()},
        )

    def operation_type_at(self, operation_code: str, at: datetime) -> OperationType:
        for version in reversed(self.operation_types.get(operation_code, ())):
            if is_active(version, at):
                return version
        raise Refusal(
            Code.UNKNOWN_OPERATION_TYPE,
            "no version of this operation type is in force",
            {"operation_code": operation_code},
        )

    def product(self, product_code: str) -> Product:
        try:
            return self.products[product_code]
        except KeyError:
            raise Refusal(
                Code.UNKNOWN_PRODUCT, "there is no product with this code", {"product_code": product_code}
            ) from None

    def product_for_sale(self, product_code: str, at: datetime) -> Product:
        product = self.product(product_code)
        if product.distribution != "sellable":
            raise Refusal(Code.NOT_FOR_SALE, "a grant product is never sold", {"product_code": product_code})
        if not is_active(product, at):
            raise Refusal(
                Code.PRODUCT_NOT_ACTIVE,
                "the product was not active when the order was placed",
                {"product_code": product_code, "order_placed_at": format_time(at)} | period_object(product),
            )
        return product

    def price_for(self, product_code: str, country: str, currency: str, at: datetime) -> Price | None:
        """Resolve a price: the country's own rows, else the rows for everywhere else; the currency picks.

        None means rows are in force, but none in this currency. Without any row the product is not for sale.
        """
        active = [row for row in self.prices.get(product_code, ()) if is_active(row, at)]
        own = [row for row in active if row.country == country]
        candidates = own or [row for row in active if row.country == ANYWHERE]
        if not candidates:
            raise Refusal(
                Code.NOT_FOR_SALE,
                "the product has no price in this country",
                {"product_code": product_code, "country": country},
            )
        return next((row for row in candidates if row.currency == currency), None)

    def signup_products(self, at: datetime) -> list[Product]:
        active = (p for p in self.products.values() if p.grant_policy == "apply_on_signup" and is_active(p, at))
        return sorted(active, key=lambda p: (p.effective_at, p.product_code))

    def with_product(self, product: Product) -> "Catalog":
        return replace(self, products={**self.products, product.product_code: product})

    def with_price(self, price: Price, *, instead_of: Price | None = None) -> "Catalog":
        rows = tuple(row for row in self.prices.get(price.product_code, ()) if row is not instead_of)
        return replace(self, prices={**self.prices, price.product_code: (*rows, price)})

    def with_versions(self, operation_code: str, versions: Iterable[OperationType]) -> "Catalog":
        ordered = tuple(sorted(versions, key=lambda version: version.effective_at))
        return replace(self, operation_types={**self.operation_types, operation_code: ordered})
