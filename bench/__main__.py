"""The command ``python -m bench``."""

import asyncio
import logging
import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.status import Status

from bench import limits, machine, report, service
from bench.ground import Ground
from bench.scenarios import SCENARIOS, Scenario

# Narrower, the table can't be read.
console = Console(width=max(Console().width, 120))
PLAIN_COMMANDS = 3_000
PLAIN_TASKS = 4
ENTRIES_SHOWN_MIN = 1_000_000


def main(
    quick: Annotated[bool, typer.Option(help="One repetition of half the commands.")] = False,
    only: Annotated[str, typer.Option(help="Scenarios, separated by commas.")] = ",".join(SCENARIOS),
    workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Commands of one transaction at most.")] = 2000,
    compare: Annotated[bool, typer.Option(help="Measure the plain worker and PostgreSQL alone, too.")] = True,
    growth: Annotated[bool, typer.Option(help="Only how figures change while the ledger grows.")] = False,
    entries: Annotated[int, typer.Option(min=100_000, help="Entries that the ledger grows to.")] = 1_000_000,
    startup: Annotated[bool, typer.Option(help="Only how long it takes to be ready.")] = False,
) -> None:
    """Measure the service on a stack of its own: about 12 minutes, with --quick 6."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    extent = service.QUICK if quick else service.FULL
    if unknown := set(only.split(",")) - set(SCENARIOS):
        raise typer.BadParameter(f"no such scenario: {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    asyncio.run(
        _measure(
            Ground(workers=workers, batch_max=batch),
            only.split(","),
            extent,
            compare=compare,
            growth=entries if growth else 0,
            startup=startup,
        )
    )


async def _measure(
    ground: Ground, names: list[str], extent: service.Extent, *, compare: bool, growth: int, startup: bool
) -> None:
    began = time.monotonic()
    try:
        with console.status("Starting a stack") as status:
            await ground.start()
            if growth:
                await _growth(ground, growth, status)
            elif startup:
                await _startup(ground, status)
            else:
                await _scenarios(ground, [SCENARIOS[name] for name in names], extent, status, compare=compare)
    finally:
        await ground.stop()
    console.print(f"{(time.monotonic() - began) / 60:.1f} minutes; the figures are in {report.FILE}", highlight=False)


async def _scenarios(
    ground: Ground, scenarios: list[Scenario], extent: service.Extent, status: Status, *, compare: bool
) -> None:
    document: dict[str, Any] = {"machine": await machine.facts(ground)}
    lines: dict[str, report.Line] = {}
    idle = None
    for number, scenario in enumerate(scenarios, 1):
        title = f"{scenario.title} ({number}/{len(scenarios)}): "

        def say(what: str, title: str = title) -> None:
            status.update(title + what)

        served = await service.measure(ground, scenario, extent, say)
        plain = parallel = limit = None
        if compare:
            say("plain worker")
            plain = await limits.plain(ground, scenario, PLAIN_COMMANDS, 1)
            parallel = await limits.plain(ground, scenario, PLAIN_COMMANDS, PLAIN_TASKS)
            if ground.workers_of(scenario) == 1:
                # It writes a merchant's batches one after the other, which is no limit for two workers.
                say("PostgreSQL alone")
                limit = await limits.bare(ground, scenario, f"d{extent.repetitions - 1}")
            if idle is None:
                say("Faust without work")
                idle = await limits.idle_faust(ground, scenario, "bench-idle")
        lines[scenario.name] = report.line(served, plain, parallel, limit)
        document |= {"scenarios": lines, "faust_without_work_per_second": idle and round(idle)}
        report.save(document)
        console.print(f"{scenario.title}: {served.commands_per_second:,.0f} commands/s, p99 {served.p99_ms} ms")
    report.show(console, lines, idle)
    if extent is service.FULL and compare and len(scenarios) == len(SCENARIOS):
        report.chart(lines)
        report.document()


async def _growth(ground: Ground, entries: int, status: Status) -> None:
    from bench import growth

    measured = await growth.measure(ground, entries, status.update, console)
    report.save({"growth": measured})
    if entries >= ENTRIES_SHOWN_MIN:
        report.growth_chart(measured["points"])
        report.document()


async def _startup(ground: Ground, status: Status) -> None:
    from bench import startup

    report.save({"startup": await startup.measure(ground, status.update, console)})
    report.document()


if __name__ == "__main__":
    typer.run(main)
