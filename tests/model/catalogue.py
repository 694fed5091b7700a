"""The model's products, prices and operation types: lists of plain dicts with ``start`` and ``end``."""

from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

LATE = timedelta(minutes=5)


class Refused(Exception):  # noqa: N818 - an answer, not an error
    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def active(row: dict[str, Any], at: datetime) -> bool:
    return bool(row["start"] <= at and (row["end"] is None or at < row["end"]))


def withdrawn(row: dict[str, Any]) -> bool:
    return row["end"] is not None and row["end"] <= row["start"]


def meet(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if withdrawn(a) or withdrawn(b):
        return False
    return (b["end"] is None or a["start"] < b["end"]) and (a["end"] is None or b["start"] < a["end"])


def moment(given: datetime | None, now: datetime) -> datetime:
    """Dates of effect are now or later; up to five minutes late is now."""
    if given is None or now - LATE <= given <= now:
        return now
    if given < now:
        raise Refused("effective_in_past")
    return given


def end_row(row: dict[str, Any], given: datetime | None, now: datetime) -> datetime | None:
    """Tell a row's new end. What has ended stays ended; what is to come ends at the earliest when it begins."""
    end: datetime | None = row["end"]
    if given is not None and given == end:
        return end
    wanted = moment(given, now)
    if end is None or end > now:
        return max(wanted, row["start"])
    if wanted > now:
        raise Refused("immutable")
    return end


def pick(rows: list[dict[str, Any]], start: datetime | None, now: datetime) -> dict[str, Any] | None:
    """Find the row that begins at ``start``; by default the active one, else the one that ended last."""
    if start is not None:
        return min((row for row in rows if row["start"] == start), key=withdrawn, default=None)
    ended = [row for row in rows if row["end"] is not None and row["end"] <= now and not withdrawn(row)]
    return next((row for row in rows if active(row, now)), max(ended, key=lambda row: row["end"], default=None))


class Catalogue:
    def __init__(self) -> None:
        self.products: dict[str, dict[str, Any]] = {}
        self.prices: list[dict[str, Any]] = []
        self.types: list[dict[str, Any]] = []

    # Questions

    def rate(self, code: str, at: datetime) -> dict[str, Any]:
        for row in self.types:
            if row["code"] == code and active(row, at):
                return row
        raise Refused("unknown_operation_type")

    def for_sale(self, code: str, at: datetime) -> dict[str, Any]:
        product = self.product(code)
        if product["distribution"] != "sellable":
            raise Refused("not_for_sale")
        if not active(product, at):
            raise Refused("product_not_active")
        return product

    def product(self, code: str) -> dict[str, Any]:
        if code not in self.products:
            raise Refused("unknown_product")
        return self.products[code]

    def price(self, code: str, country: str, currency: str, at: datetime) -> Decimal | None:
        rows = [row for row in self.prices if row["product"] == code and active(row, at)]
        rows = [row for row in rows if row["country"] == country] or [row for row in rows if row["country"] == "*"]
        if not rows:
            raise Refused("not_for_sale")
        return next((row["amount"] for row in rows if row["currency"] == currency), None)

    def welcome(self, at: datetime) -> list[dict[str, Any]]:
        rows = [p for p in self.products.values() if p["grant_policy"] == "apply_on_signup" and active(p, at)]
        return sorted(rows, key=lambda p: (p["start"], p["code"]))

    # Commands; each returns the row that was created or changed

    def create_product(self, p: dict[str, Any], now: datetime) -> dict[str, Any]:
        if p["product_code"] in self.products:
            raise Refused("immutable")
        start, end = moment(time(p.get("effective_at")), now), time(p.get("archived_at"))
        row = {
            "code": p["product_code"],
            "credits": p["credits"],
            "days": p["access_period_days"],
            "distribution": p["distribution"],
            "grant_policy": p.get("grant_policy"),
            "start": start,
            "end": end and moment(end, now),
        }
        prices = [(price["country"], price["currency"]) for price in p.get("prices", [])]
        if len(set(prices)) < len(prices):
            raise Refused("period_overlap")
        self.products[row["code"]] = row
        for price in p.get("prices", []):
            self.prices.append(self._price(p["product_code"], price, start))
        return row

    def _price(self, code: str, p: dict[str, Any], start: datetime) -> dict[str, Any]:
        amount = Decimal(p["amount"])
        return {
            "product": code,
            "country": p["country"],
            "currency": p["currency"],
            "amount": amount,
            "start": start,
            "end": None,
        }

    def archive_product(self, p: dict[str, Any], now: datetime) -> dict[str, Any]:
        row = self.product(p["product_code"])
        row["end"] = end_row(row, time(p.get("archived_at")), now)
        return row

    def _same_prices(self, p: dict[str, Any]) -> list[dict[str, Any]]:
        key = (p["product_code"], p["country"], p["currency"])
        return [row for row in self.prices if (row["product"], row["country"], row["currency"]) == key]

    def create_price(self, p: dict[str, Any], now: datetime) -> dict[str, Any]:
        if self.product(p["product_code"])["distribution"] != "sellable":
            raise Refused("not_for_sale")
        given = time(p.get("effective_at"))
        row = self._price(p["product_code"], p, moment(given, now))
        for other in self._same_prices(p):
            there = active(other, now) if row["start"] == now else other["start"] == row["start"]
            if there and other["amount"] == row["amount"] and other["end"] is None:
                return other
        if any(meet(row, other) for other in self._same_prices(p)):
            raise Refused("period_overlap")
        self.prices.append(row)
        return row

    def archive_price(self, p: dict[str, Any], now: datetime) -> dict[str, Any]:
        self.product(p["product_code"])
        rows = self._same_prices(p)
        row = pick(rows, time(p.get("effective_at")), now)
        if row is None:
            raise Refused("not_for_sale")
        return self._end(row, rows, time(p.get("archived_at")), now)

    def _end(
        self, row: dict[str, Any], rows: list[dict[str, Any]], given: datetime | None, now: datetime
    ) -> dict[str, Any]:
        ended = row | {"end": end_row(row, given, now)}
        if any(meet(ended, other) for other in rows if other is not row):
            raise Refused("period_overlap")
        row["end"] = ended["end"]
        return row

    def _versions(self, code: str) -> list[dict[str, Any]]:
        return sorted((row for row in self.types if row["code"] == code), key=lambda row: row["start"])

    def create_type(self, p: dict[str, Any], now: datetime) -> dict[str, Any]:
        given = time(p.get("effective_at"))
        start = moment(given, now)
        terms = {
            "code": p["operation_code"],
            "name": p["display_name"],
            "unit": p["resource_unit"],
            "rate": Decimal(p["credits_per_unit"]),
            "minimum": p.get("minimum_charge", 1),
            "workflow_type": p.get("workflow_type"),
        }
        rows = [row for row in self._versions(p["operation_code"]) if not withdrawn(row)]
        end = min((other["start"] for other in rows if other["start"] > start), default=None)
        for other in rows:
            there = active(other, now) if start == now else other["start"] == start
            if there and other["end"] == end and terms.items() <= other.items():
                return other
        if any(other["start"] == start for other in rows):
            raise Refused("period_overlap")
        for other in rows:
            if active(other, start):
                other["end"] = start
        row = terms | {"start": start, "end": end}
        self.types.append(row)
        return row

    def archive_type(self, p: dict[str, Any], now: datetime) -> dict[str, Any]:
        rows = self._versions(p["operation_code"])
        row = pick(rows, time(p.get("effective_at")), now)
        if row is None:
            raise Refused("unknown_operation_type")
        end = row["end"]
        self._end(row, rows, time(p.get("archived_at")), now)
        if withdrawn(row) and row["end"] != end:
            for before in rows:
                if before is not row and before["end"] == row["start"] and not withdrawn(before):
                    before["end"] = end
        return row
