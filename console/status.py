"""`credits status`: workers, merchants, lag, rate, errors and jobs on one screen."""

import asyncio
from collections.abc import Mapping

from rich.console import Console, Group, JustifyMethod
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from console.output import print_whole
from merchants.databases import CONTROL_SETTINGS, READER_SETTINGS, Pools, create_unpooled_engine, engine_url
from workers.settings import WorkerSettings
from workers.status import Lookout, MerchantStatus, Status

WATCH_SECONDS = 2.0
# The summary, the names of the columns, and how many merchants are left out.
LINES_AROUND = 3


async def run(settings: WorkerSettings, console: Console, *, watch: bool = False) -> None:
    """Show the status once, or again every two seconds until interrupted."""
    control = create_unpooled_engine(engine_url(settings.control_database_url), CONTROL_SETTINGS)
    readers = Pools(READER_SETTINGS, pool_size=1, merchants_max=settings.merchants_max)
    lookout = Lookout(settings.kafka_bootstrap_servers, settings.security_kwargs(), settings.group, control, readers)
    try:
        if not watch:
            # Two looks, for the rate.
            before = await lookout.look()
            await asyncio.sleep(1)
            print_whole(console, screen(await lookout.look(), before))
            return
        status = await lookout.look()
        with Live(screen(status, lines=console.height), console=console, auto_refresh=False) as live:
            while True:
                await asyncio.sleep(WATCH_SECONDS)
                status, before = await lookout.look(), status
                live.update(screen(status, before, lines=console.height), refresh=True)
    finally:
        await lookout.close()
        await readers.close()
        await control.dispose()


def rates(status: Status, before: Status | None) -> Mapping[str, float]:
    """Return the commands applied in a second by merchant, between two looks."""
    if before is None or status.at <= before.at:
        return {}
    applied = {merchant.merchant_id: merchant.applied for merchant in before.merchants}
    seconds = status.at - before.at
    return {
        merchant.merchant_id: (merchant.applied - applied[merchant.merchant_id]) / seconds
        for merchant in status.merchants
        if merchant.merchant_id in applied and merchant.error is None
    }


def screen(status: Status, before: Status | None = None, *, lines: int | None = None) -> Group:
    """Lay a status out; with fewer ``lines`` than merchants, show those that most need to be looked at."""
    found = rates(status, before)
    workers = f"{len(status.workers)} workers" if status.workers else "[red]no worker[/red]"
    head = Text.from_markup(
        f"[bold]{workers}[/bold]   {len(status.merchants)} merchants   "
        f"{sum(found.values()):,.0f} commands/s   control lag {status.control_lag}"
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("merchant", "state", "lag", "per s", "applied", "open", "parked", "dead", "attention", "jobs", "gaps"):
        justify: JustifyMethod = "left" if name in ("merchant", "state") else "right"
        table.add_column(name, justify=justify, no_wrap=name == "merchant", overflow="fold")
    shown = status.merchants
    if lines is not None and len(shown) > lines - LINES_AROUND:
        shown = sorted(shown, key=_urgent_first)[: max(lines - LINES_AROUND, 1)]
    for merchant in shown:
        table.add_row(*_cells(merchant, found.get(merchant.merchant_id)))
    hidden = len(status.merchants) - len(shown)
    return Group(head, table, *([Text(f"and {hidden} more, with less to look at", style="dim")] if hidden else []))


def _urgent_first(merchant: MerchantStatus) -> tuple[bool, bool, int]:
    """Order merchants: those in trouble, those with something for an operator, then by lag."""
    troubles = ("dead_letters_open", "purchases_needing_attention", "receipts_gaps")
    return merchant.error is None, not any(merchant.gauges.get(name, 0) for name in troubles), -merchant.lag


def _cells(merchant: MerchantStatus, rate: float | None) -> list[str]:
    name = merchant.merchant_id + (" (simulated)" if merchant.simulated else "")
    if merchant.error is not None:
        return [name, f"[red]{escape(merchant.error)}[/red]"]
    gauges = {gauge: int(value) for gauge, value in merchant.gauges.items()}
    state = merchant.state if merchant.state == "active" else f"[yellow]{merchant.state}[/yellow]"
    if not gauges:
        return [name, state]
    return [
        name,
        state,
        _alarming(merchant.lag, above=10_000),
        "–" if rate is None else f"{rate:,.0f}",
        f"{merchant.applied:,}",
        f"{gauges['open_operations']:,}",
        f"{gauges['parked_commands']:,}",
        _alarming(gauges["dead_letters_open"]),
        _alarming(gauges["purchases_needing_attention"]),
        f"{merchant.jobs_lag:,}",
        _alarming(gauges["receipts_gaps"]),
    ]


def _alarming(number: int, *, above: int = 0) -> str:
    return f"[red]{number:,}[/red]" if number > above else f"{number:,}"
