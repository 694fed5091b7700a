"""Tax on a tax-inclusive amount (spec §5; the algorithm is told in ``receipts/README.md``).

``tax = round_half_up(gross·r / (100 + r))``, ``net = gross − tax``; on credit notes cumulatively, so that any number
of parts sums to the whole. Amounts are exact decimals in the currency's own scale.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import ROUND_HALF_UP, Context, Decimal
from typing import Any

from schemas.codec import format_decimal
from schemas.money import format_amount, from_minor, quantize, to_minor
from schemas.payloads import MerchantConfig, SnapshotTax, VatRate

_WIDE = Context(prec=80)

# What upstream calls a tax, as the categories of EN 16931 (UNCL5305).
_CATEGORIES = {
    "S": "S",
    "VAT": "S",
    "Z": "Z",
    "ZERO": "Z",
    "E": "E",
    "EXEMPT": "E",
    "AE": "AE",
    "REVERSE_CHARGE": "AE",
    "O": "O",
    "OUT_OF_SCOPE": "O",
    "NONE": "O",
}
UNTAXED = frozenset({"Z", "E", "AE", "O"})
# What upstream says where nothing that is contained in the price is taxed. A turnover tax is the seller's own.
_TAXLESS = frozenset({"NONE", "TURNOVER"})


@dataclass(frozen=True, slots=True)
class TaxLine:
    """The tax of one category and rate: ``net + tax = gross``."""

    category: str
    rate: Decimal  # percent
    gross: Decimal
    tax: Decimal
    note: str | None = None

    @property
    def net(self) -> Decimal:
        return self.gross - self.tax

    def as_object(self, currency: str) -> dict[str, Any]:
        shown = {
            "category": self.category,
            "rate": format_decimal(self.rate),
            "net": format_amount(self.net, currency),
            "tax": format_amount(self.tax, currency),
            "gross": format_amount(self.gross, currency),
        }
        return shown | ({"note": self.note} if self.note else {})


def included_tax(gross: Decimal, rate: Decimal, currency: str) -> Decimal:
    """Compute the tax contained in ``gross`` at ``rate`` percent, rounded half up to the currency's minor unit."""
    exact = _WIDE.divide(_WIDE.multiply(gross, rate), 100 + rate)
    return quantize(exact, currency)


def rate_for(config: MerchantConfig, country: str, at: datetime) -> VatRate | None:
    """Find the VAT rate in force for a country: its own, else the one for everywhere else, else the merchant's own."""
    valid = [
        rate
        for rate in config.vat_rates or ()
        if (rate.valid_from is None or rate.valid_from <= at) and (rate.valid_to is None or at < rate.valid_to)
    ]
    for wanted in (country, "*", config.country):
        for rate in valid:
            if rate.country == wanted:
                return rate
    return None


def tax_block(
    config: MerchantConfig, country: str, currency: str, gross: Decimal, upstream: SnapshotTax | None, at: datetime
) -> dict[str, Any]:
    """Build a receipt's ``tax`` block: regime, lines and totals; upstream's own figures win and are flagged if odd."""
    ours = own_line(config, country, currency, gross, at)
    line, source = ours, "merchant"
    # More tax than was paid cannot be: then the merchant's own figure stands, and the document says so.
    if upstream is not None and _tells_tax(upstream) and (upstream.amount is None or upstream.amount <= gross):
        line, source = upstream_line(upstream, currency, gross, ours), "upstream"
    block: dict[str, Any] = {"regime": config.tax_regime, "source": source}
    block |= totals([line] if line else [], gross, currency)
    note = (upstream.note if upstream is not None else None) or config.tax_status_note
    if note:
        block["note"] = note
    odd = {} if upstream is None else flags(upstream, line, ours, currency, gross)
    if odd:
        block["discrepancy"] = odd
    return block


def own_line(config: MerchantConfig, country: str, currency: str, gross: Decimal, at: datetime) -> TaxLine | None:
    """Compute the tax line of the merchant's own regime; turnover and none have no line."""
    if config.tax_regime != "vat":
        return None
    found = rate_for(config, country, at)
    if found is None:
        return TaxLine("Z", Decimal(0), gross, quantize(Decimal(0), currency))
    # S has a rate above zero, whatever the configuration calls it.
    category = "Z" if not found.rate and found.category in (None, "S") else found.category or "S"
    rate = Decimal(0) if category in UNTAXED else found.rate
    return TaxLine(category, rate, gross, included_tax(gross, rate, currency))


def _kind(upstream: SnapshotTax) -> str:
    return upstream.type.upper().replace("-", "_")


def _tells_tax(upstream: SnapshotTax) -> bool:
    """Tell whether upstream says what it charged: "VAT" alone names a kind of tax, and no figure."""
    if upstream.rate is not None or upstream.amount is not None:
        return True
    return _kind(upstream) in _TAXLESS or _CATEGORIES.get(_kind(upstream)) in UNTAXED


def upstream_line(upstream: SnapshotTax, currency: str, gross: Decimal, ours: TaxLine | None) -> TaxLine | None:
    """Read the tax upstream charged; a type without tax (turnover, none) has no line.

    An amount without a rate is told at the merchant's own rate if that gives it, else at the rate it amounts to.
    """
    rate, amount = upstream.rate or Decimal(0), upstream.amount
    if _kind(upstream) == "TURNOVER" or (_kind(upstream) in _TAXLESS and not amount):
        return None
    category = _CATEGORIES.get(_kind(upstream))
    if category is None:
        category = "S" if rate or amount else None
    if category is None:
        return None
    if category in UNTAXED and not amount:
        rate, amount = Decimal(0), Decimal(0)  # a rate that comes with one of these was not charged
    if amount is None:
        amount = included_tax(gross, rate, currency)
    if upstream.rate is None:
        is_ours = ours is not None and ours.tax == amount and (amount or category == "S")
        rate = ours.rate if ours is not None and is_ours else effective_rate(amount, gross)
    if category == "S" and not rate and not amount:
        category = "Z"  # S has a rate above zero
    return TaxLine(category, rate, gross, quantize(amount, currency), upstream.note)


def effective_rate(tax: Decimal, gross: Decimal) -> Decimal:
    """Tell what rate a tax amounts to, in percent with two places; all of the gross as tax is 100."""
    if tax >= gross:
        return Decimal(100)
    return _WIDE.divide(100 * tax, gross - tax).quantize(Decimal("0.01"), ROUND_HALF_UP, _WIDE)


def flags(
    upstream: SnapshotTax, line: TaxLine | None, ours: TaxLine | None, currency: str, gross: Decimal
) -> dict[str, Any]:
    """Name what is odd about upstream's figures: their own arithmetic, and what we would have charged."""
    found: dict[str, Any] = {}
    if line is not None and line.category in UNTAXED and line.tax:
        found["arithmetic"] = {"rate_gives": format_amount(Decimal(0), currency)}
    elif upstream.rate is not None and upstream.amount is not None and (line is None or line.category not in UNTAXED):
        expected = included_tax(gross, upstream.rate, currency)
        if expected != upstream.amount:
            found["arithmetic"] = {"rate_gives": format_amount(expected, currency)}
    if upstream.amount is not None and upstream.amount > gross:
        found["arithmetic"] = {"tax_exceeds": format_amount(gross, currency)}
    charged = line.tax if line else upstream.amount or Decimal(0)
    expected = ours.tax if ours else Decimal(0)
    if charged != expected:
        found["merchant_tax"] = format_amount(expected, currency)
    return found


def totals(lines: Sequence[TaxLine], gross: Decimal, currency: str) -> dict[str, Any]:
    tax = sum((line.tax for line in lines), Decimal(0))
    return {
        "lines": [line.as_object(currency) for line in lines],
        "net": format_amount(gross - tax, currency),
        "tax": format_amount(tax, currency),
        "gross": format_amount(gross, currency),
    }


def credited_tax_block(
    receipt: Mapping[str, Any], earlier: Iterable[Mapping[str, Any]], amount: Decimal
) -> dict[str, Any]:
    """Build the ``tax`` block of a credit note over ``amount``, given the receipt and the notes standing before it.

    The tax of all standing notes together is the receipt's tax in proportion, rounded once: so parts sum exactly.
    """
    currency = receipt["currency"]
    tax = receipt["tax"]
    standing = list(earlier)
    whole = to_minor(Decimal(receipt["amount"]), currency)
    gross_so_far = sum(to_minor(Decimal(note["amount"]), currency) for note in standing) + to_minor(amount, currency)
    lines = []
    for index, line in enumerate(tax["lines"]):
        line_tax = to_minor(Decimal(line["tax"]), currency)
        before = sum(to_minor(Decimal(note["tax"]["lines"][index]["tax"]), currency) for note in standing)
        cumulative = (2 * line_tax * gross_so_far + whole) // (2 * whole)
        # After a correction the standing notes may carry a unit more than their share: it is made up for by later ones.
        part = from_minor(max(0, cumulative - before), currency)
        lines.append(TaxLine(line["category"], Decimal(line["rate"]), amount, part, line.get("note")))
    block: dict[str, Any] = {"regime": tax["regime"], "source": tax["source"]}
    block |= totals(lines, amount, currency)
    return block | ({"note": tax["note"]} if "note" in tax else {})
