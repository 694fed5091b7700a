"""The command line ``credits``."""

import asyncio
import os
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


if __name__ == "__main__":
    app()
