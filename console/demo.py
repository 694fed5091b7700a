"""``make demo``: from nothing to a running system on real input, with the auditor's verdict at the end."""

import asyncio
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from catalog.sql import fetch
from console import demo_data, demo_view, demo_year, verify
from console.client import Client, NoResultError, Result
from console.demo_data import Command, LlmCall, Order
from console.local import prepare, stack_environment
from console.merchants import registered
from console.stack import Stack, down, up
from merchants.databases import READER_SETTINGS, create_unpooled_engine, engine_url
from workers.audit import Report
from workers.settings import WorkerSettings

RESULTS_SECONDS_MAX = 150.0
# A second result of a command would follow the first one soon.
QUIET_SECONDS = 1.0


class DemoError(Exception):
    """The demo cannot go on; the message tells why."""


def run(root: Path, console: Console, *, keep: bool) -> int:
    """Show the whole service at work; a stack that runs already is used and left running.

    Returns:
        The exit code: 0 only if every command got exactly one result and the auditor found nothing.
    """
    started = time.monotonic()
    # What a client retries by itself is no news.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    ours = not _runs(root)
    if ours and (code := up(root, console, prepare)):
        return code
    try:
        ok = asyncio.run(_show(root, console))
    except (DemoError, NoResultError, aiohttp.ClientError) as error:
        console.print(f"The demo came to an end: {error}", style="red", markup=False)
        ok = False
    finally:
        if ours and not keep:
            down(root, console)
    console.print(
        f"[bold]{'All is well' if ok else 'Something is wrong'}[/bold] after {time.monotonic() - started:.0f} s."
    )
    if keep or not ours:
        console.print("The stack goes on; `make down` stops it.")
    else:
        console.print("`make up` starts it again with all of this in it; then the addresses above answer.")
    return 0 if ok else 1


def _runs(root: Path) -> bool:
    """Return whether a stack with a worker runs here."""
    if not stack_environment(root):
        return False
    return any(line.pid for line in Stack(root).status() if line.name.startswith("worker"))


@dataclass
class Demo:
    """What the parts of the demo share."""

    console: Console
    client: Client
    web: aiohttp.ClientSession
    url: str
    number: int
    started: dict[str, datetime] = field(default_factory=dict)

    async def register(self, name: str, config: Mapping[str, Any], *, simulated: bool = False) -> str:
        """Register a merchant by command, as any control app would; returns its id."""
        merchant = f"demo-{name}-{self.number}"
        payload = {"merchant_id": merchant, "config": config, "simulated": simulated, "actor": demo_data.ACTOR}
        result = await self.client.call(None, "Merchant.Register", payload)
        if result["outcome"] != "applied":
            raise DemoError(f"{merchant}: {result['error']['message']}")
        await self.client.watch(merchant, result["effects"]["partitions"], from_start=True)
        self.started[merchant] = datetime.fromisoformat(result["applied_at"])
        return merchant

    async def send(self, merchant: str, commands: Iterable[Command]) -> list[str]:
        """Send commands without waiting for results, which are received meanwhile."""
        ids = [await self.client.send(merchant, *command) for command in commands]
        await self.client.flush()
        return ids

    async def stock(self, merchant: str, commands: Iterable[Command]) -> str:
        """Define what is for sale; returns from when on all of it is."""
        results = await self.client.wait(await self.send(merchant, commands))
        return max(str(result["applied_at"]) for result in results)

    async def get(self, merchant: str, path: str) -> Any:
        """Ask a query."""
        async with self.web.get(f"{self.url}/v1/merchants/{merchant}/{path}") as response:
            if response.status != 200:
                raise DemoError(f"{path} answered {response.status}: {await response.text()}")
            return await response.json()


async def _show(root: Path, console: Console) -> bool:
    environment = stack_environment(root)
    settings = WorkerSettings.from_env({**os.environ, **environment})
    control_url = settings.control_database_url
    headers = {"Authorization": f"Bearer {environment['CREDITS_TOKEN']}"}
    async with (
        Client(settings.kafka_bootstrap_servers, settings.security_kwargs(), "urn:credits:demo") as client,
        aiohttp.ClientSession(headers=headers) as web,
    ):
        await client.watch(None, 1, from_start=False)
        demo = Demo(console, client, web, environment["CREDITS_URL"], await _next_number(control_url))
        with console.status("Registering two merchants"):
            shop = await demo.register("shop", demo_data.config("Demo Shop Ltd", "GB", "London", "Europe/London"))
            llm = await demo.register("llm", demo_data.config("Demo LLM LLC", "AM", "Yerevan", "Asia/Yerevan"))
        trade = await _serve_shop(demo, shop)
        trace = await _serve_llm(demo, llm)
        await _summary(demo, shop, llm, trade, trace)
        year = await _serve_year(demo)
        once = await _answered_once(demo, trade.waiting, await _parked(control_url, shop))
    reports = {merchant: await _audit(control_url, merchant, console) for merchant in (shop, llm, year)}
    console.rule("The auditor")
    verify.show(reports, console)
    console.rule("Look further")
    _addresses(console, root, demo, llm, trace)
    return once and all(report.ok for report in reports.values())


async def _next_number(control_url: str) -> int:
    """Number this run after those before it, whose merchants stay."""
    names = [merchant.merchant_id for merchant in await registered(control_url)]
    numbers = [int(last) for name in names if name.startswith("demo-") and (last := name.rpartition("-")[2]).isdigit()]
    return max(numbers, default=0) + 1


# First act


@dataclass
class Trade:
    """The shop's part, by command ids: its sales, and the refunds that wait because their sale is not in the file."""

    sales: dict[str, Order]
    waiting: set[str]


async def _serve_shop(demo: Demo, shop: str) -> Trade:
    """Send a shop's orders and cancellations, as they are."""
    invoices = demo_data.orders()
    with _progress(demo.console) as progress:
        task = progress.add_task(f"{shop}: orders of a shop", total=len(invoices))
        now = await demo.stock(shop, demo_data.shop_catalog(invoices))
        sold = [order for order in invoices if not order.is_cancellation]
        sales = await demo.send(shop, demo_data.shop_sales(sold, now))
        await _follow(demo.client, sales, progress, task)
        refunds = list(demo_data.shop_refunds(invoices))
        ids = await demo.send(shop, (command for command, _ in refunds))
        waiting = {name for name, (_, has_sale) in zip(ids, refunds, strict=True) if not has_sale}
        await _follow(demo.client, [name for name in ids if name not in waiting], progress, task)
        progress.update(task, completed=len(invoices))
    return Trade(dict(zip(sales, sold, strict=True)), waiting)


@dataclass
class Trace:
    """The LLM service's part: its calls, how many commands that were and how long they took."""

    calls: list[LlmCall]
    commands: int
    seconds: float


async def _serve_llm(demo: Demo, llm: str) -> Trace:
    """Sign users up, sell them credits, then send the whole trace at once."""
    calls = demo_data.calls()
    with _progress(demo.console) as progress:
        now = await demo.stock(llm, demo_data.llm_catalog())
        customers = [command for bought in demo_data.llm_customers(calls, now) for command in bought]
        task = progress.add_task(f"{llm}: sign-ups and purchases", total=len(customers))
        await _follow(demo.client, await demo.send(llm, customers), progress, task)
        operations = list(demo_data.llm_operations(calls, now))
        task = progress.add_task(f"{llm}: {len(calls):,} calls of a code-completion LLM", total=len(operations))
        started = time.monotonic()
        ids = [await demo.client.send(llm, *command) for command in operations]
        await _follow(demo.client, ids, progress, task)
        await demo.client.flush()
        return Trace(calls, len(operations), time.monotonic() - started)


async def _follow(client: Client, ids: Iterable[str], progress: Progress, task: Any) -> None:
    """Receive results until all are there, and show how it goes."""
    missing = set(ids)
    until = time.monotonic() + RESULTS_SECONDS_MAX
    while missing:
        if time.monotonic() > until:
            raise NoResultError(f"{len(missing):,} commands got no result in {RESULTS_SECONDS_MAX:.0f} s")
        await client.receive()
        there = missing & client.results.keys()
        missing -= there
        progress.advance(task, len(there))


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield progress


async def _summary(demo: Demo, shop: str, llm: str, trade: Trade, trace: Trace) -> None:
    console, client = demo.console, demo.client
    console.rule("What came of it")
    results: list[tuple[str, str, Result | None]] = [
        (merchant, command_type, client.results[message_id][0] if message_id not in trade.waiting else None)
        for message_id, (merchant, command_type) in client.sent.items()
        if merchant is not None
    ]
    console.print(demo_view.outcomes(results))
    for item in (await demo.get(shop, "purchases?needs_attention=true"))["items"]:
        order = trade.sales[item["command"]["id"]]
        told = f"{order.external_ref} of {order.total} GBP, customer {order.customer or 'unknown'}"
        console.print(f"An order needs attention: {told}: {item['error']['message']}.", highlight=False)
    rate = trace.commands / trace.seconds
    console.print(
        f"The trace: {trace.commands:,} commands in {trace.seconds:.1f} s, [bold]{rate:,.0f} a second[/bold], "
        "from the first one sent to the last result read."
    )
    console.rule("Five users of the LLM service")
    counts: dict[str, int] = {}
    for call in trace.calls:
        counts[call.user_id] = counts.get(call.user_id, 0) + 1
    shown = []
    for user_id in sorted(counts, key=lambda user_id: -counts[user_id])[:5]:
        balance = await demo.get(llm, f"users/{user_id}/balance")
        lots = await demo.get(llm, f"users/{user_id}/lots?limit=200")
        shown.append((balance, lots["items"], counts[user_id]))
    console.print(demo_view.balances(shown))
    console.print(demo_view.receipt(await demo.get(shop, f"receipts/{_a_receipt(client, shop)}")))


def _a_receipt(client: Client, merchant: str) -> str:
    """Name the receipt of the merchant's first purchase."""
    numbers = (
        client.results[message_id][0]["effects"]["receipt_number"]
        for message_id, sent in client.sent.items()
        if sent == (merchant, "Purchase.Settled") and client.results[message_id][0]["outcome"] == "applied"
    )
    return quote(next(numbers), safe="")


# Second act


async def _serve_year(demo: Demo) -> str:
    """Let a year pass for a merchant with a test clock, and draw a user's balance."""
    console = demo.console
    config = demo_data.config("Demo Year Inc", "US", "Portland", "America/Los_Angeles", tax_regime="none", vat_rates=[])
    merchant = await demo.register("year", config, simulated=True)
    with _progress(console) as progress:
        task = progress.add_task(f"{merchant}: a year on a test clock", total=demo_year.STEPS)
        year = await demo_year.live(demo.client, merchant, demo.started[merchant], lambda: progress.advance(task))
    console.rule(f"A year of {demo_year.USER}'s balance")
    entries = (await demo.get(merchant, f"users/{demo_year.USER}/ledger?limit=200"))["items"]
    points = [(datetime.fromisoformat(entry["effective_at"]), entry["balance_after"]) for entry in entries]
    expired = [entry for entry in entries if entry["reason"] == "expiry"]
    console.print(demo_view.chart(points, year.start, year.now, year.marks))
    console.print(", ".join(year.legend))
    lost = -sum(entry["amount"] for entry in expired)
    last = entries[-1]
    console.print(
        f"{len(entries)} entries; {len(expired)} lots expired with {lost:,} credits unspent; "
        f"balance {last['balance_after']:,}."
    )
    return merchant


# The end


async def _parked(control_url: str, merchant_id: str) -> int:
    """Count the commands that wait for another one in a merchant's database."""
    (merchant,) = [m for m in await registered(control_url) if m.merchant_id == merchant_id]
    engine = create_unpooled_engine(engine_url(merchant.database_url, password=merchant.password), READER_SETTINGS)
    try:
        async with engine.connect() as connection:
            count: int = (await fetch(connection, "SELECT count(*) FROM parked"))[0][0]
            return count
    finally:
        await engine.dispose()


async def _answered_once(demo: Demo, waiting: set[str], parked: int) -> bool:
    """Check that every command got exactly one result, but for those that wait, which are parked."""
    client = demo.client
    until = time.monotonic() + QUIET_SECONDS
    while time.monotonic() < until:
        await client.receive()
    wrong = [name for name in client.sent if len(client.results[name]) != (0 if name in waiting else 1)]
    ok = not wrong and parked == len(waiting)
    told = "every one" if ok else f"[red]all but {len(wrong):,}[/red]"
    demo.console.print(
        f"{len(client.sent):,} commands sent: {told} got exactly one result, and {parked} refunds are parked: "
        "their sales are older than the file."
    )
    return ok


async def _audit(control_url: str, merchant_id: str, console: Console) -> Report:
    found, errors = await verify.reports(control_url, merchant_id, console)
    if errors:
        raise DemoError(f"{merchant_id} can't be verified: {errors[merchant_id]}")
    return found[merchant_id]


def _addresses(console: Console, root: Path, demo: Demo, llm: str, trace: Trace) -> None:
    busiest = max({call.user_id for call in trace.calls}, key=[call.user_id for call in trace.calls].count)
    lines = (
        f"set -a; . {root / '.credits' / 'stack.env'}",
        f'curl -H "Authorization: Bearer $CREDITS_TOKEN" "$CREDITS_URL/v1/merchants/{llm}/users/{busiest}/overview"',
        f"all queries: {demo.url}/docs",
    )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
