"""`credits migrate`: all databases to the newest schema, with progress, and a report of who is at which version."""

from collections.abc import Sequence

from rich.console import Console, Group
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from console.output import print_whole
from merchants.schema import MigrationError, Step, migrate, versions
from migrations import runner


async def run(control_url: str, console: Console, *, check: bool = False) -> int:
    """Migrate, or only look; return the exit code: 1 if a database is not at the newest revision."""
    if check:
        steps = await versions(control_url)
        print_whole(console, report(steps, changed=False))
        return int(any(step.error or step.before != step.after for step in steps))
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("Migrating")

        def done(database: str) -> None:
            progress.update(task, advance=1, description=database)

        try:
            steps = await migrate(control_url, done)
        except MigrationError as error:
            steps = error.steps
    print_whole(console, report(steps, changed=True))
    return int(any(step.error for step in steps))


def report(steps: Sequence[Step], *, changed: bool) -> Group:
    """Show the databases that were changed, failed or are behind, and how many are where they should be."""
    table = Table(box=None, header_style="bold")
    for name in ("database", "was at", "is at" if changed else "newest", ""):
        table.add_column(name, no_wrap=name == "database", overflow="fold")
    fine = 0
    for step in steps:
        if step.error is None and step.before == step.after:
            fine += 1
            continue
        state = (
            f"[red]{escape(step.error)}[/red]" if step.error else ("migrated" if changed else "[yellow]behind[/yellow]")
        )
        table.add_row(step.database, step.before or "–", step.after or "–", state)
    heads = f"control {runner.head('control')}, merchants {runner.head('merchant')}"
    summary = f"{fine} of {len(steps)} databases {'were' if changed else 'are'} up to date ({heads})"
    return Group(table, summary) if table.row_count else Group(summary)
