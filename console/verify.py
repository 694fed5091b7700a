"""``credits verify``: audits merchants' books and shows what was found."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import asyncpg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sqlalchemy.exc import SQLAlchemyError

from console.merchants import UnknownMerchantError, registered
from console.output import print_whole
from merchants.databases import engine_url, in_a_line
from merchants.registry import Merchant
from workers.audit import Report, verify

# The auditor also reads by the driver itself, whose errors then come as they are.
_UNREADABLE = (SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError)


async def reports(
    control_url: str, merchant_id: str | None, console: Console
) -> tuple[dict[str, Report], dict[str, str]]:
    """Audit one merchant, or all, one after the other; progress is shown while it lasts.

    Returns (reports, errors) by merchant: an error is that of a database that can't be read.
    """
    known = [merchant for merchant in await registered(control_url) if merchant.state != "provisioning"]
    chosen = [merchant for merchant in known if merchant_id in (None, merchant.merchant_id)]
    if merchant_id is not None and not chosen:
        raise UnknownMerchantError(merchant_id)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    found: dict[str, Report] = {}
    errors: dict[str, str] = {}
    with Progress(*columns, TextColumn("{task.fields[what]}"), console=console, transient=True) as progress:
        for merchant in chosen:
            try:
                found[merchant.merchant_id] = await _report(merchant, progress)
            except _UNREADABLE as error:
                errors[merchant.merchant_id] = in_a_line(error)
    return found, errors


async def _report(merchant: Merchant, progress: Progress) -> Report:
    task = progress.add_task(merchant.merchant_id, total=None, what="")

    def tell(what: str, done: int, total: int) -> None:
        progress.update(task, completed=done, total=total, what=what)

    return await verify(engine_url(merchant.database_url, password=merchant.password), tell)


def as_table(found: Mapping[str, Report]) -> Table:
    """Lay out what was checked: a row an identity, a column a merchant."""
    table = Table("identity", box=None, header_style="bold")
    for merchant_id in found:
        table.add_column(merchant_id, justify="right", no_wrap=True)
    for findings in zip(*(report.findings for report in found.values()), strict=True):
        cells = [
            f"[red]{finding.violations:,} broken[/red]"
            if finding.violations
            else f"{finding.checked:,} [green]✓[/green]"
            for finding in findings
        ]
        table.add_row(findings[0].name, *cells)
    return table


def show(found: Mapping[str, Report], console: Console, errors: Mapping[str, str] = MappingProxyType({})) -> None:
    """Print the table, the first break of each broken identity, the rate, and why a merchant's books can't be read."""
    if found:
        _show_reports(found, console)
    elif not errors:
        console.print("There is no merchant.")
    for merchant_id, error in errors.items():
        line = f"{merchant_id} can't be verified: {error}"
        console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)


def _show_reports(found: Mapping[str, Report], console: Console) -> None:
    print_whole(console, as_table(found))
    for line in breaks(found):
        console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    entries = sum(report.entries for report in found.values())
    seconds = sum(report.seconds for report in found.values())
    verdict = "every identity holds" if all(report.ok for report in found.values()) else "THE BOOKS ARE BROKEN"
    console.print(f"{entries:,} entries in {seconds:.1f} s ({entries / seconds:,.0f} a second): {verdict}")


def breaks(found: Mapping[str, Report]) -> Sequence[str]:
    """Name the first break of every identity that does not hold."""
    return [
        f"{merchant_id}, {finding.name}: {finding.first}"
        for merchant_id, report in found.items()
        for finding in report.broken
    ]
