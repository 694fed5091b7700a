"""Writes a period's documents for bookkeeping: JSON Lines (the record), CSV (a row per tax line) and their sums.

In the CSV files and sums the amounts of credit notes are negative, so that a column adds up to what was earned.
"""

import csv
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from sqlalchemy.ext.asyncio import AsyncConnection

from catalog.sql import fetch
from receipts.model import published
from schemas.canonical import compact_json
from schemas.money import format_amount

PAGE = 1000
COLUMNS = (
    *("number", "kind", "issued_at", "issued_on", "receipt_number", "corrects", "external_ref", "user_id"),
    *("product_code", "title", "credits", "payment_method", "country", "currency", "regime", "category", "rate"),
    *("net", "tax", "gross", "tax_source", "discrepancy", "buyer_name", "buyer_country", "buyer_vat_id", "hash"),
)
MONEY = ("net", "tax", "gross")
BY_RATE = ("currency", "regime", "category", "rate")
BY_KIND = ("kind", "currency")
# A spreadsheet takes a text that begins so for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")

_PERIOD = """
SELECT d.issued_at, d.prefix, d.sequence, d.number, d.body, d.hash, a.user_id, b.block
FROM documents d JOIN accounts a USING (account_id) LEFT JOIN purchases p USING (external_ref)
    LEFT JOIN buyers b ON b.number = p.receipt_number AND d.body::json ->> 'buyer_digest' IS NOT NULL
WHERE d.issued_at >= $1 AND d.issued_at < $2 AND (d.issued_at, d.prefix, d.sequence, d.number) > ($3, $4, $5, $6)
ORDER BY d.issued_at, d.prefix, d.sequence, d.number LIMIT $7
"""


@dataclass(slots=True)
class Sums:
    """Sums of money by some columns of the rows they come from."""

    columns: tuple[str, ...]
    sums: dict[tuple[str, ...], list[Decimal]] = field(default_factory=dict)
    counts: dict[tuple[str, ...], int] = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        key = tuple(row[column] for column in self.columns)
        before = self.sums.setdefault(key, [Decimal(0)] * len(MONEY))
        self.sums[key] = [total + Decimal(row[column]) for total, column in zip(before, MONEY, strict=True)]
        self.counts[key] = self.counts.get(key, 0) + 1

    def rows(self) -> list[dict[str, Any]]:
        """Return the sums in order of their keys, amounts with their currency's digits."""
        rows = []
        for key in sorted(self.sums):
            named = dict(zip(self.columns, key, strict=True))
            amounts = [format_amount(total, named["currency"]) for total in self.sums[key]]
            rows.append(named | {"rows": self.counts[key]} | dict(zip(MONEY, amounts, strict=True)))
        return rows


class PeriodFiles:
    """The files of an export, and the sums of what was written to them."""

    def __init__(self, files: ExitStack, folder: Path, zone: ZoneInfo) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._files, self._folder, self._zone = files, folder, zone
        self._lines = files.enter_context((folder / "documents.jsonl").open("wb"))
        self._table = self._csv("documents.csv", COLUMNS)
        self._by_rate, self._by_kind = Sums(BY_RATE), Sums(BY_KIND)
        self._series: dict[str, dict[str, Any]] = {}

    def add(self, document: dict[str, Any]) -> None:
        """Write a published document."""
        self._lines.write(compact_json(document) + b"\n")
        number: str = document["number"]
        run = self._series.setdefault(number.rpartition("-")[0], {"first": number, "last": number, "documents": 0})
        run |= {"last": number, "documents": run["documents"] + 1}
        for row in tax_rows(document, self._zone):
            self._table.writerow({name: _harmless(name, value) for name, value in row.items()})
            self._by_rate.add(row)
            self._by_kind.add(row)

    def finish(self, about: dict[str, Any]) -> dict[str, Any]:
        """Write the sums, and a summary that begins with what the export is about."""
        self._csv("totals.csv", (*BY_RATE, "rows", *MONEY)).writerows(self._by_rate.rows())
        summary = about | {
            "documents": sum(run["documents"] for run in self._series.values()),
            "series": [{"series": name, **self._series[name]} for name in sorted(self._series)],
            "by_kind": self._by_kind.rows(),
            "by_rate": self._by_rate.rows(),
        }
        text = json.dumps(summary, ensure_ascii=False, indent=2) + "\n"
        (self._folder / "summary.json").write_text(text, encoding="utf-8")
        return summary

    def _csv(self, name: str, columns: tuple[str, ...]) -> "csv.DictWriter[str]":
        file = self._files.enter_context((self._folder / name).open("w", encoding="utf-8", newline=""))
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        return writer


async def export_period(
    connection: AsyncConnection, folder: Path, merchant_id: str, time_zone: str, first: date, last: date
) -> dict[str, Any]:
    """Write the documents issued from ``first`` to ``last``, both included, days of the merchant; return the summary.

    Files: ``documents.jsonl``, ``documents.csv``, ``totals.csv`` (by rate), ``summary.json``. The same documents give
    the same bytes. Call it in a REPEATABLE READ transaction: the documents are read page by page.
    """
    zone = ZoneInfo(time_zone)
    about = {"merchant_id": merchant_id, "time_zone": time_zone, "from": first.isoformat(), "to": last.isoformat()}
    with ExitStack() as files:
        period = PeriodFiles(files, folder, zone)
        async for document in _documents(connection, _midnight(first, zone), _midnight(last + timedelta(1), zone)):
            period.add(document)
        return period.finish(about)


def tax_rows(document: dict[str, Any], zone: ZoneInfo) -> Iterator[dict[str, Any]]:
    """Yield a published document's rows: one for each tax line, or one without category and rate if it has none."""
    tax, product, buyer = document["tax"], document.get("product", {}), document.get("buyer", {})
    sign = -1 if document["kind"] == "credit_note" else 1
    copied = {name: document.get(name, "") for name in COLUMNS}
    copied |= {name: product.get(name, "") for name in ("product_code", "title", "credits")}
    if not product:
        copied["credits"] = document["credits_taken"] * sign
    copied |= {f"buyer_{name}": buyer.get(name, "") for name in ("name", "country", "vat_id")}
    copied["issued_on"] = datetime.fromisoformat(document["issued_at"]).astimezone(zone).date().isoformat()
    copied |= {
        "regime": tax["regime"],
        "tax_source": tax["source"],
        "discrepancy": "yes" if "discrepancy" in tax else "",
    }
    for line in tax["lines"] or [{"category": "", "rate": "", **{name: tax[name] for name in MONEY}}]:
        amounts = {name: format_amount(sign * Decimal(line[name]), document["currency"]) for name in MONEY}
        yield copied | {"category": line["category"], "rate": line["rate"]} | amounts


async def _documents(connection: AsyncConnection, start: datetime, end: datetime) -> AsyncIterator[dict[str, Any]]:
    after: tuple[Any, ...] = (start, "", 0, "")
    while True:
        page = await fetch(connection, _PERIOD, start, end, *after, PAGE)
        for row in page:
            yield published(row.body, row.hash, row.user_id, row.block)
        if len(page) < PAGE:
            return
        last = page[-1]
        after = (last.issued_at, last.prefix, last.sequence, last.number)


def _midnight(day: date, zone: ZoneInfo) -> datetime:
    return datetime.combine(day, time(), zone)


def _harmless(column: str, value: Any) -> Any:
    is_formula = isinstance(value, str) and column not in MONEY and value.startswith(_FORMULA)
    return f"'{value}" if is_formula else value
