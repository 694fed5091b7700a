"""What the catalogue's commands do: pure functions from a catalogue and a command to a new catalogue.

Each returns the new catalogue, the rows that changed and the object shown to the caller.
Setting what is already in force is applied and changes nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from catalog.model import Catalog, OperationType, Price, Product, is_active, is_withdrawn, overlaps
from schemas import payloads
from schemas.codec import format_time
from schemas.errors import Code, Refusal

DELIVERY_DELAY = timedelta(minutes=5)
INSTANT = timedelta(microseconds=1)

Row = Product | Price | OperationType


@dataclass(frozen=True, slots=True)
class CatalogChange:
    """The catalogue after a command, the rows it created or changed, and the object for its result."""

    catalog: Catalog
    changed: tuple[Row, ...]
    shown: dict[str, Any]


def moment(given: datetime | None, now: datetime) -> datetime:
    """Read a date of effect: omitted or a little late means now, long past is refused.

    Raises ``effective_in_past`` for more than five minutes before ``now``.
    """
    if given is None or now - DELIVERY_DELAY <= given <= now:
        return now
    if given < now:
        raise Refusal(
            Code.EFFECTIVE_IN_PAST,
            "a date of effect is now or later",
            {"given": format_time(given), "now": format_time(now)},
        )
    return given


def ends(row: Row, archived_at: datetime | None, now: datetime) -> datetime | None:
    """Tell when a row shall end, or None when it has ended already and nothing is to change.

    Raises ``effective_in_past``, see ``moment``, and ``immutable`` for moving an end that has passed.
    """
    if archived_at is not None and archived_at == row.archived_at:
        return None
    end = moment(archived_at, now)
    if row.archived_at is None or row.archived_at > now:
        # An end before the beginning withdraws what is still to come: an empty period.
        return max(end, row.effective_at)
    if end > now:
        raise Refusal(
            Code.IMMUTABLE, "what has ended stays ended at that moment", {"archived_at": format_time(row.archived_at)}
        )
    return None


def overlap(code: str, effective_at: datetime) -> Refusal:
    return Refusal(
        Code.PERIOD_OVERLAP,
        "the period meets one that is there already",
        {"code": code, "effective_at": format_time(effective_at)},
    )


def create_product(catalog: Catalog, command: payloads.ProductCreate, now: datetime) -> CatalogChange:
    if command.product_code in catalog.products:
        raise Refusal(
            Code.IMMUTABLE, "a product never changes: choose a new code", {"product_code": command.product_code}
        )
    effective_at = moment(command.effective_at, now)
    archived_at = None if command.archived_at is None else moment(command.archived_at, now)
    if archived_at is not None and archived_at <= effective_at:
        raise Refusal(Code.MALFORMED, "archived_at comes after effective_at", {"field": "archived_at"})
    product = Product(
        command.product_code,
        command.title,
        command.credits,
        command.access_period_days,
        command.distribution,
        command.grant_policy,
        effective_at,
        archived_at,
    )
    prices: list[Price] = []
    for given in command.prices or ():
        price = Price(product.product_code, given.country, given.currency, given.amount, effective_at)
        if any(overlaps(price, other) for other in prices if key_of(other) == key_of(price)):
            raise overlap(product.product_code, effective_at)
        prices.append(price)
    changed = catalog.with_product(product)
    for price in prices:
        changed = changed.with_price(price)
    return CatalogChange(changed, (product, *prices), product.as_object(prices))


def archive_product(catalog: Catalog, command: payloads.ProductArchive, now: datetime) -> CatalogChange:
    product = catalog.product(command.product_code)
    archived_at = ends(product, command.archived_at, now)
    rows = catalog.prices.get(product.product_code, ())
    if archived_at is None or archived_at == product.archived_at:
        return CatalogChange(catalog, (), product.as_object(rows))
    product = replace(product, archived_at=archived_at)
    return CatalogChange(catalog.with_product(product), (product,), product.as_object(rows))


def key_of(price: Price) -> tuple[str, str, str]:
    return price.product_code, price.country, price.currency


def create_price(catalog: Catalog, command: payloads.ProductPriceCreate, now: datetime) -> CatalogChange:
    product = catalog.product(command.product_code)
    if product.distribution != "sellable":
        raise Refusal(Code.NOT_FOR_SALE, "a grant product has no prices", {"product_code": product.product_code})
    effective_at = moment(command.effective_at, now)
    price = Price(command.product_code, command.country, command.currency, command.amount, effective_at)
    same_key = [row for row in catalog.prices.get(price.product_code, ()) if key_of(row) == key_of(price)]
    for row in same_key:
        if row.amount == price.amount and row.archived_at is None and is_same_start(row, command.effective_at, now):
            return CatalogChange(catalog, (), row.as_object())
    if any(overlaps(price, row) for row in same_key):
        raise overlap(price.product_code, effective_at)
    price = replace(price, version=len(same_key) + 1)
    return CatalogChange(catalog.with_price(price), (price,), price.as_object())


def latest_moment(versions: Iterable[OperationType], now: datetime) -> datetime:
    """Tell where the newest of the changes made at ``now`` begins.

    The changes of one batch share their moment; each takes effect an instant after the one before.
    """
    starts = {version.effective_at for version in versions}
    while now + INSTANT in starts:
        now += INSTANT
    return now


def is_same_start(row: Price, given: datetime | None, now: datetime) -> bool:
    if given is None or now - DELIVERY_DELAY <= given <= now:
        return is_active(row, now)
    return row.effective_at == given


def archive_price(catalog: Catalog, command: payloads.ProductPriceArchive, now: datetime) -> CatalogChange:
    catalog.product(command.product_code)
    wanted = (command.product_code, command.country, command.currency)
    rows = [row for row in catalog.prices.get(command.product_code, ()) if key_of(row) == wanted]
    price = named(rows, command.effective_at, now)
    if price is None:
        raise Refusal(
            Code.NOT_FOR_SALE,
            "there is no such price",
            {"product_code": command.product_code, "country": command.country, "currency": command.currency},
        )
    archived_at = ends(price, command.archived_at, now)
    if archived_at is None or archived_at == price.archived_at:
        return CatalogChange(catalog, (), price.as_object())
    changed = replace(price, archived_at=archived_at)
    if any(overlaps(changed, row) for row in rows if row is not price):
        raise overlap(price.product_code, price.effective_at)
    return CatalogChange(catalog.with_price(changed, instead_of=price), (changed,), changed.as_object())


def named(rows: list[Any], effective_at: datetime | None, now: datetime) -> Any | None:
    """Find the row a command names by its start; by default the active one, else the one that ended last."""
    if effective_at is not None:
        started_then = [row for row in rows if row.effective_at == effective_at]
        return min(started_then, key=is_withdrawn, default=None)
    active = next((row for row in rows if is_active(row, now)), None)
    ended = [row for row in rows if row.archived_at is not None and row.archived_at <= now and not is_withdrawn(row)]
    return active or max(ended, key=lambda row: row.archived_at, default=None)


def create_operation_type(
    catalog: Catalog, command: payloads.OperationTypeCreateWithArchival, now: datetime
) -> CatalogChange:
    versions = list(catalog.operation_types.get(command.operation_code, ()))
    effective_at = moment(command.effective_at, now)
    is_now = effective_at == now
    if is_now:
        effective_at = latest_moment(versions, now)
    new = OperationType(
        command.operation_code,
        command.display_name,
        command.resource_unit,
        command.credits_per_unit,
        command.minimum_charge,
        command.workflow_type,
        effective_at,
    )
    if is_now and any(v.effective_at == effective_at and not is_same_version(v, new) for v in versions):
        new = replace(new, effective_at=effective_at + INSTANT)
    standing = [version for version in versions if not is_withdrawn(version)]
    scheduled = [v.effective_at for v in standing if v.effective_at > new.effective_at]
    new = replace(new, archived_at=min(scheduled, default=None), version=len(versions) + 1)
    for version in standing:
        starts_so = is_active(version, effective_at) if is_now else version.effective_at == effective_at
        is_in_force = starts_so and version.archived_at == new.archived_at
        if is_in_force and is_same_version(version, new):
            return CatalogChange(catalog, (), version.as_object())
    if any(version.effective_at == new.effective_at for version in standing):
        raise overlap(new.operation_code, new.effective_at)
    changed = [new]
    for index, version in enumerate(versions):
        if is_active(version, new.effective_at):
            versions[index] = replace(version, archived_at=new.effective_at)
            changed.append(versions[index])
    return CatalogChange(
        catalog.with_versions(new.operation_code, [*versions, new]), tuple(reversed(changed)), new.as_object()
    )


def is_same_version(a: OperationType, b: OperationType) -> bool:
    return replace(a, effective_at=b.effective_at, archived_at=b.archived_at, version=b.version) == b


def archive_operation_type(catalog: Catalog, command: payloads.OperationTypeArchive, now: datetime) -> CatalogChange:
    versions = list(catalog.operation_types.get(command.operation_code, ()))
    latest = latest_moment(versions, now)
    version = named(versions, command.effective_at, latest)
    if version is None:
        raise Refusal(
            Code.UNKNOWN_OPERATION_TYPE,
            "there is no such version of this operation type",
            {"operation_code": command.operation_code},
        )
    archived_at = ends(version, command.archived_at, now)
    if archived_at is None or archived_at == version.archived_at:
        return CatalogChange(catalog, (), version.as_object())
    ended = replace(version, archived_at=archived_at)
    changed = [ended]
    versions[versions.index(version)] = ended
    if is_withdrawn(ended) and version.effective_at > latest:
        # The version before a withdrawn one goes on to where the withdrawn one would have ended.
        for index, before in enumerate(versions):
            if before.archived_at == version.effective_at and not is_withdrawn(before) and before is not ended:
                versions[index] = replace(before, archived_at=version.archived_at)
                changed.append(versions[index])
    elif any(overlaps(ended, other) for other in versions if other is not ended):
        raise overlap(version.operation_code, version.effective_at)
    return CatalogChange(catalog.with_versions(version.operation_code, versions), tuple(changed), ended.as_object())


HANDLERS: Mapping[str, Callable[[Catalog, Any, datetime], CatalogChange]] = {
    "Product.Create": create_product,
    "Product.Archive": archive_product,
    "ProductPrice.Create": create_price,
    "ProductPrice.Archive": archive_price,
    "OperationType.CreateWithArchival": create_operation_type,
    "OperationType.Archive": archive_operation_type,
}
