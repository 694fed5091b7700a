"""The vectors that ``receipts/README.md`` shows are what the code does."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

import receipts
from receipts.tax import TaxLine, credited_tax_block, included_tax, totals
from schemas.money import EXPONENTS, format_amount

README = (Path(receipts.__file__).parent / "README.md").read_text(encoding="utf-8")


def table(*columns: str) -> list[list[str]]:
    """Return the rows of the table with these columns."""
    lines = iter(README.splitlines())
    next(line for line in lines if cells(line) == list(columns))
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append(cells(line))
    return rows


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


INCLUDED = table("currency", "gross", "rate", "tax", "net")
CREDITED = table("currency", "gross", "tax", "credited", "tax credited")


@pytest.mark.parametrize(("currency", "gross", "rate", "tax", "net"), INCLUDED)
def test_the_tax_included_in_an_amount(currency: str, gross: str, rate: str, tax: str, net: str) -> None:
    found = included_tax(Decimal(gross), Decimal(rate), currency)

    assert (format_amount(found, currency), format_amount(Decimal(gross) - found, currency)) == (tax, net)


@pytest.mark.parametrize(("currency", "gross", "tax", "credited", "tax_credited"), CREDITED)
def test_the_tax_of_credit_notes(currency: str, gross: str, tax: str, credited: str, tax_credited: str) -> None:
    line = TaxLine("S", Decimal(20), Decimal(gross), Decimal(tax))
    block = {"regime": "vat", "source": "merchant"} | totals([line], Decimal(gross), currency)
    receipt = {"currency": currency, "amount": gross, "tax": block}

    notes: list[dict[str, Any]] = []
    for part in credited.split():
        notes.append({"amount": part, "tax": credited_tax_block(receipt, notes, Decimal(part))})

    assert [note["tax"]["tax"] for note in notes] == tax_credited.split()
    if sum(map(Decimal, credited.split())) == Decimal(gross):
        assert sum(Decimal(note["tax"]["tax"]) for note in notes) == Decimal(tax)


def test_the_vectors_cover_ties_and_every_exponent() -> None:
    assert {EXPONENTS[row[0]] for row in INCLUDED} == {0, 2, 3, 4} == set(EXPONENTS.values())
    exact = [Decimal(gross) * Decimal(rate) / (100 + Decimal(rate)) for _, gross, rate, *_ in INCLUDED]
    units = [Decimal(1).scaleb(-EXPONENTS[row[0]]) for row in INCLUDED]
    assert sum(amount % unit == unit / 2 for amount, unit in zip(exact, units, strict=True)) >= 3
    assert len(CREDITED) >= 5
