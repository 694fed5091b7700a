"""What a document says, in the words, numbers and times of a locale: the texts that every rendering lays out.

The JSON document is the record; a sheet holds nothing but finished strings taken from it, so that HTML and PDF cannot
say different things. Amounts keep the digits that ISO 4217 gives their currency, whatever the locale data think.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from babel import Locale, UnknownLocaleError
from babel.dates import format_date
from babel.numbers import NumberPattern, format_decimal, parse_pattern

from schemas.money import exponent, quantize

TEMPLATES = Path(__file__).parent / "templates"
LABELS: Mapping[str, Mapping[str, str]] = json.loads((TEMPLATES / "labels.json").read_text(encoding="utf-8"))
DEFAULT_LOCALE = "en"
# Where paper is Letter (CLDR's measurement data, which babel leaves out); elsewhere it is A4.
LETTER = frozenset({"BZ", "CA", "CL", "CO", "CR", "GT", "MX", "NI", "PA", "PH", "PR", "SV", "US", "VE"})
CITY_FIRST = frozenset({"AU", "CA", "GB", "IE", "IN", "NZ", "US"})
RATE_DIGITS_MAX = 6
# Symbols that end in a letter (AMD, Kč) are set apart, as CLDR wants and babel does not do.
_LETTER_AT_DIGIT = re.compile(r"(?<=[^\W\d_])(?=\d)|(?<=\d)(?=[^\W\d_])")


def choose_locale(document: Mapping[str, Any], requested: str | None = None) -> Locale:
    """Choose the locale of a rendering: as requested, else the buyer's, else the merchant's, else English.

    One that does not exist, or whose language has no labels here, is passed over.
    """
    wishes = (requested, document.get("buyer", {}).get("locale"), document["merchant"]["locale"], DEFAULT_LOCALE)
    return next(locale for locale in map(_locale, wishes) if locale is not None)


@lru_cache(maxsize=256)
def _locale(tag: str | None) -> Locale | None:
    try:
        locale = Locale.parse((tag or "").replace("-", "_"))
    except (ValueError, UnknownLocaleError):
        return None
    return locale if locale.language in LABELS else None


def show_money(amount: str, currency: str, locale: Locale) -> str:
    """Write an amount as the locale does, with its currency and exactly the currency's digits."""
    pattern = _pattern(locale.currency_formats["standard"], exponent(currency), exponent(currency))
    # With currency_digits the locale data's own idea of a currency's digits would win.
    text: str = pattern.apply(quantize(Decimal(amount), currency), locale, currency=currency, currency_digits=False)
    return _LETTER_AT_DIGIT.sub("\N{NO-BREAK SPACE}", text)


def show_amount(amount: str, currency: str, locale: Locale) -> str:
    """Write an amount as the locale does, without its currency."""
    digits = exponent(currency)
    text: str = _pattern(locale.decimal_formats[None], digits, digits).apply(Decimal(amount), locale)
    return text


def show_rate(percent: str, locale: Locale) -> str:
    text: str = _pattern(locale.percent_formats[None], 0, RATE_DIGITS_MAX).apply(Decimal(percent).scaleb(-2), locale)
    return text


def show_count(count: int, locale: Locale) -> str:
    return format_decimal(count, locale=locale)


def show_time(time: str | datetime, zone: str, locale: Locale) -> str:
    """Write a moment in the merchant's time zone, the offset named."""
    moment = datetime.fromisoformat(time) if isinstance(time, str) else time
    local = moment.astimezone(ZoneInfo(zone))
    offset = local.strftime("%z")
    return f"{format_date(local, 'long', locale)}, {local:%H:%M} (UTC{offset[:3]}:{offset[3:5]})"


def _pattern(pattern: NumberPattern, least: int, most: int) -> NumberPattern:
    # The locale's own pattern is shared: a copy takes the digits wanted here.
    copy = parse_pattern(pattern.pattern)
    copy.frac_prec = (least, most)
    return copy


class _Writer:
    """Writes one document in one locale."""

    def __init__(self, document: Mapping[str, Any], locale: Locale) -> None:
        self.document = document
        self.locale = locale
        self.label = LABELS[locale.language]
        self.currency: str = document["currency"]
        self.zone: str = document["merchant"]["time_zone"]

    def money(self, amount: str) -> str:
        return show_money(amount, self.currency, self.locale)

    def amount(self, amount: str) -> str:
        return show_amount(amount, self.currency, self.locale)

    def time(self, time: str | datetime) -> str:
        return show_time(time, self.zone, self.locale)

    def country(self, code: str) -> str:
        return str(self.locale.territories.get(code, code))

    def seller(self) -> list[str]:
        merchant = self.document["merchant"]
        address = merchant["registered_address"]
        place = [address.get("postal_code", ""), address["city"]]
        if address["country"] in CITY_FIRST:
            place.reverse()
        lines = [
            *address["lines"],
            " ".join(place).strip(),
            self.country(address["country"]),
            merchant["contact_email"],
        ]
        return [line for line in lines if line]

    def buyer(self) -> dict[str, Any] | None:
        """The buyer's block; that it was erased; None where there never was one."""
        buyer = self.document.get("buyer")
        if buyer is None:
            return {"erased": self.label["buyer_erased"]} if "buyer_digest" in self.document else None
        lines = [buyer.get("email"), self.country(buyer["country"]) if "country" in buyer else None]
        if "vat_id" in buyer:
            lines.append(f"{self.label['vat_id']}: {buyer['vat_id']}")
        return {"name": buyer.get("name", ""), "lines": [line for line in lines if line]}

    def facts(self) -> list[tuple[str, str]]:
        """The references: what happened when, and under which number elsewhere."""
        document = self.document
        shown = [("issued", self.time(document["issued_at"]))]
        shown += [
            (label, self.time(document[name]))
            for label, name in (("paid_at", "settled_at"), ("ordered", "order_placed_at"))
            if name in document
        ]
        named = {"for_receipt": "receipt_number"} if document["kind"] != "receipt" else {}
        named |= {"corrects": "corrects", "refund_id": "refund_id", "dispute_id": "dispute_id"}
        named |= {"payment_method": "payment_method", "payment_reference": "external_ref", "account": "user_id"}
        shown += [(label, document[name]) for label, name in named.items() if name in document]
        return [(self.label[label], value) for label, value in shown]

    def items(self) -> dict[str, Any]:
        """The table of what was bought or reversed: ``head`` and one ``row``; all but the first cell are figures."""
        document, label = self.document, self.label
        money = f"{label['amount']}, {self.currency}"
        amount = self.amount(document["amount"])
        if document["kind"] == "receipt":
            product = document["product"]
            credits, until = show_count(product["credits"], self.locale), self.time(product["expires_at"])
            return {
                "head": [label["description"], label["credits"], label["valid_until"], money],
                "row": [product["title"], credits, until, amount],
                "detail": product["product_code"],
            }
        restored = document["kind"] == "correction"
        moved = label["credits_restored" if restored else "credits_withdrawn"]
        return {
            "head": [label["description"], moved, money],
            "row": [
                label["dispute_won" if restored else document["reversal"]],
                show_count(document["credits_taken"], self.locale),
                amount,
            ],
            "detail": f"{label['for_receipt']} {document['receipt_number']}",
        }

    def tax(self) -> dict[str, Any] | None:
        """The tax table, for documents that have tax lines."""
        lines = self.document["tax"]["lines"]
        if not lines:
            return None
        columns = ("net", "tax", "gross")
        rows = [
            [
                self.label[line["category"]],
                show_rate(line["rate"], self.locale),
                *(self.amount(line[c]) for c in columns),
            ]
            for line in lines
        ]
        head = [f"{self.label['tax_summary']}, {self.currency}", self.label["rate"], *(self.label[c] for c in columns)]
        return {"head": head, "rows": rows}

    def totals(self) -> list[tuple[str, str]]:
        """The sums, the last one being what was paid or paid back."""
        tax, label = self.document["tax"], self.label
        parts = [(label[name], self.money(tax[name])) for name in ("net", "tax")] if tax["lines"] else []
        return [*parts, (label[f"total_{self.document['kind']}"], self.money(self.document["amount"]))]

    def notes(self) -> list[str]:
        tax = self.document["tax"]
        return list(dict.fromkeys(filter(None, [tax.get("note"), *(line.get("note") for line in tax["lines"])])))

    def fiscal(self, attached: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
        rows = []
        for receipt in attached:
            named = [
                ("authority", "authority"),
                ("fiscal_number", "fiscal_number"),
                ("register_number", "register_number"),
            ]
            values = [f"{self.label[label]}: {receipt[name]}" for label, name in named if receipt.get(name)]
            head = f"{self.label.get(receipt['kind'], receipt['kind'])} · {self.time(receipt['fiscal_at'])}"
            rows.append({"head": head, "text": " · ".join(values), "url": receipt.get("qr_url") or ""})
        return rows


def write_sheet(
    document: Mapping[str, Any],
    locale: Locale,
    fiscal: Sequence[Mapping[str, Any]] = (),
    status: str | None = None,
) -> dict[str, Any]:
    """Write a published document as a sheet: strings, and lists and dicts of them.

    ``fiscal`` are rows of attached fiscal receipts, ``status`` is ``paid``, ``partially_credited`` or ``credited``.
    """
    writer = _Writer(document, locale)
    label, merchant = writer.label, document["merchant"]
    return {
        "language": locale.language,
        "paper": "us-letter" if merchant["registered_address"]["country"] in LETTER else "a4",
        "kind": document["kind"],
        "title": label[document["kind"]],
        "number": document["number"],
        "simulation": label["simulation"] if "simulation" in document else "",
        "status": {"code": status, "text": label[status]} if status else None,
        "seller": {"label": label["seller"], "name": merchant["legal_name"], "lines": writer.seller()},
        "initial": _initial(merchant["legal_name"]),
        "buyer": (block := writer.buyer()) and {"label": label["buyer"], **block},
        "facts": writer.facts(),
        "items": writer.items(),
        "tax": writer.tax(),
        "totals": writer.totals(),
        "notes": writer.notes(),
        "fiscal": {"label": label["fiscal"], "verify": label["verify"], "rows": writer.fiscal(fiscal)}
        if fiscal
        else None,
        "hash": {"label": label["hash"], "value": document["hash"]} if "hash" in document else None,
        "contact": f"{label['contact']}: {merchant['contact_email']}",
        "page": label["page"],
    }


def _initial(name: str) -> str:
    """The letter that stands where a logo would."""
    return next((character.upper() for character in name if character.isalnum()), "")
