"""The program behind `make chaos`."""

import argparse
import asyncio
import json
import logging
import os
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.chaos.campaign import Campaign, Plan, Report
from tests.chaos.cluster import PROJECT, Cluster
from tests.chaos.faults import KINDS
from tests.chaos.points import REVEALING, Points, run_cases
from workers.faults import BUGS

STATE = PROJECT / ".credits"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="make chaos ARGS=…", description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--skip", type=int, default=0, help="begin after so many faults of the seed's sequence")
    parser.add_argument("--minutes", type=float, default=40.0, help="begin no fault after so many minutes")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), default=list(KINDS), metavar="KIND")
    parser.add_argument("--plant", choices=BUGS, help="bring a known bug back; the judge must notice")
    parser.add_argument("--points", type=int, help="run so many of the crash points; default all")
    parser.add_argument("--check", action="store_true", help="plant each known bug, and see that the judge notices")
    parser.add_argument("--keep", action="store_true", help="leave logs and data in .credits/chaos")
    parser.add_argument("--root", type=Path, default=STATE / "chaos")
    parser.add_argument("--jars", type=Path, default=STATE / "jars")
    parser.add_argument("--out", type=Path, default=STATE / "chaos.json")
    return parser.parse_args()


def show(console: Console, figures: dict[str, object], report: Report) -> None:
    """Print the table of kinds, what was found wrong, and the line that matters."""
    table = Table("kind", "faults", "inside a transaction", "recovery median, s", "max, s", box=None)
    times = figures["recovery_seconds"]
    inside = figures["inside_by_kind"]
    assert isinstance(times, dict)
    assert isinstance(inside, dict)
    for kind, count in dict(figures["faults_by_kind"]).items():  # type: ignore[call-overload]
        found = times.get(kind, {})
        table.add_row(kind, str(count), str(inside.get(kind, 0)), str(found.get("median")), str(found.get("max")))
    console.print(table)
    for failure in report.failures:
        console.print(f"[red]{failure}[/red]", highlight=False)
    for verdict in (report.judged, report.points_judged):
        for what, count in verdict.get("findings", {}).items():
            console.print(f"[red]{what}: {count}[/red]", highlight=False)
            for example in verdict["examples"][what]:
                console.print(f"  {example}", highlight=False, markup=False)
    for kind, reason in report.skipped.items():
        console.print(f"skipped: {kind} ({reason})")
    console.print(
        f"{figures['faults']} faults of {figures['kinds']} kinds, {figures['commands']} commands, "
        f"{figures['lost']} lost, {figures['applied_twice']} applied twice, "
        f"{figures['results_repeated']} results repeated",
        style="bold",
    )
    if report.points:
        judged = report.points_judged
        lost = judged["lost"] + judged["unanswered"]
        console.print(
            f"{report.points} crash points, {judged['commands']} commands, {lost} lost, "
            f"{judged['applied_twice']} applied twice, {judged['results_repeated']} results repeated",
            style="bold",
        )
    console.print(
        f"{figures['inside_transaction']} faults struck inside a transaction. None lost or doubled in N faults bounds "
        f"the chance of a fault to do so at 3/N = {figures['bound']} (95 %)."
    )


def check(options: argparse.Namespace, console: Console) -> int:
    """Plant each known bug in turn; return 0 when the judge noticed all of them."""
    missed = []
    for bug in (None, *BUGS):
        findings = asyncio.run(reveal(bug, options.root, options.jars))
        seen = bool(findings) == bool(bug)
        console.print(f"{bug or 'no bug'}: {findings or 'nothing found'}", style="" if seen else "red", markup=False)
        if not seen:
            missed.append(bug or "no bug")
    console.print(f"misjudged: {', '.join(missed)}" if missed else "The judge noticed each planted bug, and no other.")
    return len(missed)


async def reveal(bug: str | None, root: Path, jars: Path) -> list[str]:
    """Run what shows a bug with the bug planted (everything, without one), and return what was found wrong."""
    if bug == "commit_early":
        plan = Plan(4, kinds=("death at a point",), environment={"CREDITS_PLANT": bug}, points=0)
        report = await Campaign(plan, root, jars, lambda _text, _steps: None).run()
        return list(report.judged.get("findings", ()))
    cluster = Cluster(root, jars)
    try:
        await asyncio.to_thread(cluster.start)
        async with Points(cluster.bootstrap_servers, cluster.database_url(), bug=bug) as points:
            cases = [case for name, (some, _) in REVEALING.items() if bug in (None, name) for case in some]
            zombies = [point for name, (_, some) in REVEALING.items() if bug in (None, name) for point in some]
            return list((await run_cases(points, cases, zombies, lambda _: None))["findings"])
    finally:
        await asyncio.to_thread(cluster.stop)


def main() -> int:
    """Run a campaign and return the exit code."""
    options = parse()
    plan = Plan(
        faults=options.faults,
        seed=options.seed,
        minutes=options.minutes,
        workers=options.workers,
        kinds=tuple(options.kinds),
        environment={"CREDITS_PLANT": options.plant} if options.plant else {},
        skip=options.skip,
        points=options.points,
    )
    console = Console()
    if options.check:
        return check(options, console)
    # The clients' complaints about what is broken on purpose.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    for name in ("KAFKA_BOOTSTRAP_SERVERS", "CREDITS_CONTROL_DATABASE_URL", "CREDITS_FAULT"):
        os.environ.pop(name, None)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("chaos", total=plan.faults - plan.skip)

        def say(text: str, steps: int) -> None:
            progress.advance(task, steps)
            progress.console.print(text, highlight=False)

        report = asyncio.run(Campaign(plan, options.root, options.jars, say).run())
    figures = report.as_json(plan)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=2, default=str) + "\n")
    show(console, figures, report)
    if not options.keep and report.ok:
        shutil.rmtree(options.root, ignore_errors=True)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
