"""The command line ``credits``."""

import asyncio
import os
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Credit management service.", rich_markup_mode=None)
ROOT = Path(os.environ.get("CREDITS_ROOT") or Path(__file__).resolve().parent.parent)
console = Console()


def control_url() -> str:
    """Return where the control database is: as told by the environment, else of the running local stack."""
    from console.local import stack_environment

    url = os.environ.get("CREDITS_CONTROL_DATABASE_URL") or stack_environment(ROOT).get("CREDITS_CONTROL_DATABASE_URL")
    if not url:
        console.print("CREDITS_CONTROL_DATABASE_URL is not set and no local stack runs here (make up)", style="red")
        raise typer.Exit(2)
    return url


@app.command()
def worker() -> None:
    """Run a worker in the foreground until SIGTERM."""
    from workers.app import run_worker
    from workers.logs import configure_logging
    from workers.service import Service
    from workers.settings import SettingsError, WorkerSettings

    try:
        settings = WorkerSettings.from_env()
    except SettingsError as error:
        console.print(str(error), style="red")
        raise typer.Exit(2) from None
    configure_logging(settings.log_level)
    run_worker(Service(settings).app)


@app.command()
def migrate() -> None:
    """Bring all databases to the newest schema."""
    from merchants.schema import migrate as migrate_all

    asyncio.run(migrate_all(control_url(), lambda name: console.print(f"{name}: up to date")))


@app.command()
def up() -> None:
    """Start the local stack: Kafka, PostgreSQL and a worker."""
    from console.local import prepare
    from console.stack import up as start

    raise typer.Exit(start(ROOT, console, prepare))


@app.command()
def down() -> None:
    """Stop the local stack; its data stay."""
    from console.stack import down as stop

    raise typer.Exit(stop(ROOT, console))


@app.command()
def demo(
    keep: Annotated[bool, typer.Option(help="Leave the stack running afterwards.")] = False,
) -> None:
    """Run the main job end to end on real input."""
    from console.demo import run

    raise typer.Exit(run(ROOT, console, keep=keep))


receipts_app = typer.Typer(no_args_is_help=True, help="Receipts, credit notes and corrections.")
app.add_typer(receipts_app, name="receipts")


@receipts_app.command("export")
def export_receipts(
    merchant: Annotated[str, typer.Argument(help="The merchant's id.")],
    first: Annotated[datetime, typer.Option("--from", formats=["%Y-%m-%d"], help="The first day.")],
    last: Annotated[datetime, typer.Option("--to", formats=["%Y-%m-%d"], help="The last day, included.")],
    out: Annotated[Path | None, typer.Option(help="The folder to write; receipts-<merchant>-<from>-<to>.")] = None,
) -> None:
    """Write a period's documents as CSV and JSON Lines, with totals per rate; days are the merchant's."""
    from console.receipts import UnknownMerchantError, export

    folder = out or Path(f"receipts-{merchant}-{first:%Y-%m-%d}-{last:%Y-%m-%d}")
    try:
        summary = asyncio.run(export(control_url(), merchant, first.date(), last.date(), folder))
    except UnknownMerchantError:
        console.print(f"there is no merchant {merchant}", style="red")
        raise typer.Exit(2) from None
    console.print(f"{summary['documents']} documents in {folder}")
    for row in summary["by_rate"]:
        line = f"{row['currency']} {row['regime']} {row['category']} {row['rate']}"
        console.print(f"{line}: net {row['net']}, tax {row['tax']}, gross {row['gross']}")


if __name__ == "__main__":
    app()
