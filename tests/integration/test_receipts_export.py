"""A period's documents for bookkeeping: all of them, none twice, and sums that match what they are sums of."""

import csv
import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from typer.testing import CliRunner

import merchants.store
from console import main
from console.merchants import UnknownMerchantError
from console.receipts import export
from receipts import export as period
from schemas.codec import parse_time
from tests import builders
from tests.integration.web import Shop, open_shop
from tests.services import Services

ZONE = ZoneInfo("America/Los_Angeles")
ADMIN = {"justification": "a test", "actor": "the tests"}
MERCHANT = "exported"
MONTH = timedelta(days=31)
RATES = [
    {"country": "DE", "rate": "19"},
    {"country": "AM", "rate": "20"},
    {"country": "*", "rate": "0", "category": "O"},
]
SPOILT_NAME = "=1+1"


@dataclass
class Ledgered:
    """The shop, the first day of the exported period, and all documents as the API serves them."""

    shop: Shop
    day: date
    documents: list[dict[str, Any]]


@pytest.fixture(scope="module")
async def ledgered(services: Services) -> AsyncIterator[Ledgered]:
    policy = {"shortfall": "debit", "credit_note": "on_apply"}
    changes: dict[str, Any] = {
        "simulated": True,
        "time_zone": ZONE.key,
        "vat_rates": RATES,
        "chargeback_policy": policy,
    }
    async with open_shop(services, MERCHANT, **changes) as shop:
        await builders.catalogue(shop.clerk)
        await sell(shop)
        await advance(shop, MONTH)
        await shop.clerk.send("Purchase.Settled", builders.purchase("later", "pay-later"))
        users = [*(f"user-{n}" for n in range(12)), "later"]
        found = [item for user in users for item in await shop.api.walk(f"/users/{user}/receipts")]
        found += await shop.api.walk(f"/users/{await tombstone(shop)}/receipts")
        found.sort(key=lambda document: (document["issued_at"], document["number"]))
        yield Ledgered(shop, local_day(found[0]), found)


async def sell(shop: Shop) -> None:
    """Sell in two currencies and four tax situations; refund, dispute, win; erase a buyer."""
    send = shop.clerk.send
    taxes: list[dict[str, Any] | None] = [
        None,
        {"type": "vat", "rate": "19", "amount": "0.48"},
        {"type": "vat", "rate": "7", "amount": "0.20"},
        {"type": "reverse_charge", "note": "Reverse charge"},
    ]
    for n in range(12):
        dollars = {"country": ("DE", "FR")[n // 4 % 2], "amount": "3.00", "currency": "USD", "tax": taxes[n % 4]}
        snapshot = {"pricing_snapshot": dollars} if n % 3 else {}
        buyer = {"name": SPOILT_NAME, "country": "DE"} if n == 1 else {"name": f"Buyer {n}"}
        result = await send("Purchase.Settled", builders.purchase(f"user-{n}", f"pay-{n}", buyer=buyer, **snapshot))
        assert result["outcome"] == "applied", result
    for n, amount in ((0, "399.99"), (0, "400.01"), (1, "1.01"), (4, "3.00")):
        key = {"refund_id": f"re-{n}-{amount}", "external_ref": f"pay-{n}", "amount": amount}
        assert (await send("Refund.Apply", key | ADMIN))["outcome"] == "applied"
    for n in (5, 6):
        await send("Chargeback.Apply", {"dispute_id": f"d-{n}", "external_ref": f"pay-{n}"} | ADMIN)
    assert (await send("Chargeback.Reverse", {"dispute_id": "d-6"} | ADMIN))["outcome"] == "applied"
    await send("Purchase.Settled", builders.purchase("forgotten", "pay-f", buyer={"name": "Eve"}))
    await send("User.Erase", {"request_id": "e", "user_id": "forgotten"} | ADMIN)


async def advance(shop: Shop, duration: timedelta) -> None:
    async with shop.clerk.engine.begin() as connection:
        await merchants.store.advance_clock(connection, int(duration.total_seconds()), os.urandom(16))


async def tombstone(shop: Shop) -> str:
    async with shop.clerk.engine.connect() as connection:
        found = await connection.exec_driver_sql("SELECT user_id FROM accounts WHERE erased_at IS NOT NULL")
        name: str = found.scalar_one()
        return name


def local_day(document: dict[str, Any]) -> date:
    return parse_time(document["issued_at"]).astimezone(ZONE).date()


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "documents.jsonl").read_bytes().splitlines()]


def read_table(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as text:
        return list(csv.DictReader(text))


async def write(ledgered: Ledgered, folder: Path, first: date, last: date) -> dict[str, Any]:
    return await export(ledgered.shop.control_url, MERCHANT, first, last, folder)


async def test_the_record_of_each_document_is_exported_once_in_order_of_issue(
    ledgered: Ledgered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(period, "PAGE", 3)
    summary = await write(ledgered, tmp_path, ledgered.day, ledgered.day + 2 * MONTH)

    lines = read_lines(tmp_path)
    added = ("status", "fiscal_receipts")
    wanted = [{k: v for k, v in document.items() if k not in added} for document in ledgered.documents]
    assert sorted(lines, key=str) == sorted(wanted, key=str)
    assert [line["issued_at"] for line in lines] == sorted(line["issued_at"] for line in lines)
    assert summary["documents"] == len(lines) == 14 + 6 + 1
    runs = {run["series"]: (run["first"], run["last"], run["documents"]) for run in summary["series"]}
    for series, (first, last, documents) in runs.items():
        assert (first, last) == (f"{series}-0001", f"{series}-{documents:04d}")
    assert {series.partition("-")[0] for series in runs} == {"R", "C"}


async def test_sums_match_the_documents_they_are_sums_of(ledgered: Ledgered, tmp_path: Path) -> None:
    summary = await write(ledgered, tmp_path, ledgered.day, ledgered.day + 2 * MONTH)

    for part in ("net", "tax", "gross"):
        for currency in ("AMD", "USD"):
            exact = sum(
                Decimal(document["tax"][part]) * (-1 if document["kind"] == "credit_note" else 1)
                for document in read_lines(tmp_path)
                if document["currency"] == currency
            )
            for rows in (summary["by_rate"], summary["by_kind"], read_table(tmp_path / "totals.csv")):
                assert sum(Decimal(row[part]) for row in rows if row["currency"] == currency) == exact, part
            rows = [row for row in read_table(tmp_path / "documents.csv") if row["currency"] == currency]
            assert sum(Decimal(row[part]) for row in rows) == exact
    rates = {(row["currency"], row["category"], row["rate"]) for row in summary["by_rate"]}
    assert rates == {("AMD", "S", "20"), *(("USD", *r) for r in (("S", "19"), ("S", "7"), ("O", "0"), ("AE", "0")))}
    kinds = {row["kind"]: Decimal(row["gross"]) for row in summary["by_kind"] if row["currency"] == "USD"}
    assert kinds["receipt"] > 0 > kinds["credit_note"]
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8")) == summary


async def test_a_period_is_made_of_the_merchants_days_both_included(ledgered: Ledgered, tmp_path: Path) -> None:
    last_day = local_day(ledgered.documents[-1])
    total = len(ledgered.documents)
    early = sum(local_day(document) < last_day for document in ledgered.documents)

    async def count(first: date, last: date) -> int:
        documents: int = (await write(ledgered, tmp_path, first, last))["documents"]
        return documents

    assert await count(ledgered.day, last_day) == total
    assert await count(ledgered.day, last_day - timedelta(1)) == early < total
    assert await count(last_day, last_day) == total - early
    assert await count(last_day + timedelta(1), last_day + MONTH) == 0
    assert (tmp_path / "documents.jsonl").read_bytes() == b""


async def test_the_same_period_gives_the_same_bytes(ledgered: Ledgered, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        await write(ledgered, tmp_path / folder, ledgered.day, ledgered.day + MONTH)

    for name in ("documents.jsonl", "documents.csv", "totals.csv", "summary.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


async def test_tables_name_erased_buyers_no_more_and_hold_no_formulas(ledgered: Ledgered, tmp_path: Path) -> None:
    await write(ledgered, tmp_path, ledgered.day, ledgered.day + MONTH)

    rows = {row["external_ref"]: row for row in read_table(tmp_path / "documents.csv") if row["kind"] == "receipt"}
    assert rows["pay-1"]["buyer_name"] == f"'{SPOILT_NAME}"
    assert rows["pay-f"]["buyer_name"] == ""
    assert rows["pay-f"]["user_id"].startswith("erased-")
    assert b"Eve" not in (tmp_path / "documents.jsonl").read_bytes()
    assert rows["pay-0"]["issued_on"] == ledgered.day.isoformat()


async def test_a_merchant_that_does_not_exist_has_no_documents(ledgered: Ledgered, tmp_path: Path) -> None:
    with pytest.raises(UnknownMerchantError):
        await export(ledgered.shop.control_url, "nobody", ledgered.day, ledgered.day, tmp_path)


def test_the_command_writes_the_files_and_says_the_sums(
    ledgered: Ledgered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDITS_CONTROL_DATABASE_URL", ledgered.shop.control_url)
    days = ["--from", ledgered.day.isoformat(), "--to", ledgered.day.isoformat()]
    result = CliRunner().invoke(main.app, ["receipts", "export", MERCHANT, *days, "--out", str(tmp_path / "out")])

    assert result.exit_code == 0, result.output
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *("documents.jsonl", "documents.csv", "totals.csv", "summary.json")
    }
    assert CliRunner().invoke(main.app, ["receipts", "export", "nobody", *days]).exit_code == 1
    wrong = ["--from", "2026-12-31", "--to", "2026-01-01", "--out", str(tmp_path / "wrong")]
    assert CliRunner().invoke(main.app, ["receipts", "export", MERCHANT, *wrong]).exit_code == 2
    assert not (tmp_path / "wrong").exists(), "an empty export looks like a period without sales"


# The same documents over HTTP


async def test_a_document_is_served_in_the_form_and_the_language_asked_for(ledgered: Ledgered) -> None:
    api, number = ledgered.shop.api, ledgered.documents[0]["number"]
    path = f"{api.root}/receipts/{number}"

    status, page, headers = await api.ask(path, {"Accept": "text/html,*/*;q=0.8"})
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert b'<html lang="en">' in page
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; style-src 'sha256-")
    _, page, _ = await api.ask(path, {"Accept": "text/html"}, locale="hy")
    assert b'<html lang="hy">' in page
    status, pdf, headers = await api.ask(path, {"Accept": "application/pdf"}, locale="de")
    assert (status, headers["Content-Type"]) == (200, "application/pdf")
    assert pdf.startswith(b"%PDF-1.7")
    assert headers["Content-Disposition"] == f'inline; filename="{number}.pdf"'
    assert (await api.ask(path, {"Accept": "application/pdf"}, locale="de"))[1] == pdf


async def test_a_renderings_tag_changes_with_what_it_shows(ledgered: Ledgered) -> None:
    api, number = ledgered.shop.api, ledgered.documents[-1]["number"]
    path, html = f"{api.root}/receipts/{number}", {"Accept": "text/html"}
    _, _, first = await api.ask(path, html)
    assert (await api.ask(path, html | {"If-None-Match": first["ETag"]}))[0] == 304
    assert (await api.ask(path, {"If-None-Match": first["ETag"]}))[0] == 200

    fiscal = {"receipt_number": number, "kind": "sale", "fiscal_number": "77001", "authority": "SRC", "actor": "a"}
    fiscal["fiscal_at"] = ledgered.documents[-1]["issued_at"]
    assert (await ledgered.shop.clerk.send("Receipt.AttachFiscal", fiscal))["outcome"] == "applied"

    status, page, _ = await api.ask(path, html | {"If-None-Match": first["ETag"]})
    assert status == 200
    assert b"77001" in page
