"""How the demo shows what happened: tables, a receipt and a chart, in a terminal."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from console.client import Result

BLOCKS = " ▁▂▃▄▅▆▇█"
CHART_COLUMNS = 73
CHART_ROWS = 9


def outcomes(commands: Iterable[tuple[str, str, Result | None]]) -> Table:
    """Count (merchant, command type, result) by outcome; without a result a command still waits."""
    applied: Counter[tuple[str, str]] = Counter()
    refused: dict[tuple[str, str], Counter[str]] = {}
    for merchant, command_type, result in commands:
        key = (merchant, command_type)
        refused.setdefault(key, Counter())
        if result is None:
            refused[key]["waits for its purchase"] += 1
        elif result["outcome"] == "applied":
            applied[key] += 1
        else:
            refused[key][result["error"]["code"]] += 1
    table = Table("merchant", "command", "applied", "not applied, by reason", box=None, header_style="bold")
    table.columns[2].justify = "right"
    for key, reasons in refused.items():
        told = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
        table.add_row(*key, f"{applied[key]:,}", told)
    return table


def balances(users: Iterable[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]], int]]) -> Table:
    """Lay out (balance, lots, calls) of users as the queries answer them."""
    table = Table(box=None, header_style="bold")
    for name in ("user", "calls", "balance", "spendable", "debt", "lots: remaining of credits"):
        table.add_column(name, justify="left" if name in ("user", "lots: remaining of credits") else "right")
    for balance, lots, calls in users:
        shown = [f"{lot['remaining']:,}/{lot['credits']:,}" for lot in lots if lot["remaining"]]
        spent = sum(1 for lot in lots if not lot["remaining"])
        told = "  ".join([*shown, *([f"{spent} spent"] if spent else [])])
        debt = f"[red]{balance['debt']:,}[/red]" if balance["debt"] else "0"
        figures = (f"{calls:,}", f"{balance['balance']:,}", f"{balance['spendable']:,}", debt)
        table.add_row(balance["user_id"], *figures, told)
    return table


def receipt(document: Mapping[str, Any]) -> Panel:
    """Show a receipt as its buyer may read it."""
    merchant, product = document["merchant"], document["product"]
    grid = Table.grid(padding=(0, 3))
    grid.add_column()
    grid.add_column(justify="right")
    grid.add_row(product["title"], f"{document['amount']} {document['currency']}")
    for line in document["tax"].get("lines", ()):
        grid.add_row(f"included: VAT {line['rate']} % on {line['net']}", line["tax"])
    grid.add_row(f"{product['credits']:,} credits until {product['expires_at'][:10]}", "")
    grid.add_row(f"payment {document['external_ref']}, {document['payment_method']}", document["issued_at"][:19])
    grid.add_row(Text(f"sha256 {document['hash'][:32]}…", style="dim"), "")
    title = f"{merchant['legal_name']}, {merchant['registered_address']['city']}: receipt {document['receipt_number']}"
    return Panel(grid, title=title, title_align="left", expand=False)


def chart(
    points: Sequence[tuple[datetime, int]], start: datetime, end: datetime, marks: Mapping[str, datetime]
) -> Text:
    """Draw a balance over time, with marks under it; red where it is below zero.

    Args:
        points: (moment, balance from then on), in order.
        start: the left end.
        end: the right end.
        marks: one character each, and where it stands.
    """
    columns = [_value_at(points, start + (end - start) * n / (CHART_COLUMNS - 1)) for n in range(CHART_COLUMNS)]
    top, bottom = max(1, *columns), min(0, *columns)
    width = max(len(f"{top:,}"), len(f"{bottom:,}"))
    text = Text()
    for row in range(CHART_ROWS, 0, -1):
        label = f"{top:,}" if row == CHART_ROWS else "0" if row == 1 else ""
        text.append(f"{label:>{width}} ┤", style="dim")
        for value in columns:
            eighths = -(-max(0, value) * CHART_ROWS * 8 // top) - (row - 1) * 8
            text.append(BLOCKS[max(0, min(8, eighths))], style="green")
        text.append("\n")
    if bottom < 0:
        text.append(f"{bottom:>{width},} ┤", style="dim")
        for value in columns:
            text.append("█" if value < 0 else " ", style="red")
        text.append("\n")
    line = [" "] * CHART_COLUMNS
    for mark, at in marks.items():
        place = min(CHART_COLUMNS - 1, int((at - start) / (end - start) * (CHART_COLUMNS - 1)))
        while line[place] != " " and place < CHART_COLUMNS - 1:
            place += 1
        line[place] = mark
    text.append(" " * (width + 2) + "".join(line), style="bold")
    return text


def _value_at(points: Sequence[tuple[datetime, int]], at: datetime) -> int:
    value = 0
    for moment, balance in points:
        if moment > at:
            break
        value = balance
    return value
