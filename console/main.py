"""The command line ``credits``."""

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import Coroutine
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import typer.core
from rich.console import Console

if TYPE_CHECKING:
    from console.client import Result
    from workers.settings import WorkerSettings

ROOT = Path(os.environ.get("CREDITS_ROOT") or Path(__file__).resolve().parent.parent)
console = Console()


class Commands(typer.core.TyperGroup):
    """The commands; what keeps one from its work is a line on stderr, a defect of ours a traceback."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # Typer's own context
        # What libraries log of a failure is in its error, too; a worker sets up logs of its own.
        logging.getLogger().addHandler(logging.NullHandler())
        try:
            return super().invoke(ctx)
        except Exception as error:
            from console.errors import explain

            said = explain(error)
            if said is None:
                raise
            _fail(said)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    help="Credit management service.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def control_url() -> str:
    """Return where the control database is: as told by the environment, else of the running local stack."""
    from console.checks import check_url
    from console.local import stack_environment
    from workers.settings import read_variable

    url = read_variable({**stack_environment(ROOT), **os.environ}, "CREDITS_CONTROL_DATABASE_URL")
    if not url:
        _fail("CREDITS_CONTROL_DATABASE_URL is not set and no local stack runs here (make up)", exit_code=2)
    return check_url(url)


def settings() -> "WorkerSettings":
    """Return how to reach the services: as told by the environment, else of the running local stack."""
    from console.checks import check
    from console.local import stack_environment
    from workers.settings import SettingsError, WorkerSettings

    try:
        read = WorkerSettings.from_env({**stack_environment(ROOT), **os.environ})
    except SettingsError as error:
        _fail(f"{error}, and no local stack runs here (make up)", exit_code=2)
    return check(read)


@app.command()
def worker() -> None:
    """Run a worker in the foreground until SIGTERM."""
    from console.checks import check_worker
    from workers.app import run_worker
    from workers.logs import configure_logging
    from workers.service import Service
    from workers.settings import SettingsError, WorkerSettings
    from workers.web import WebSettings

    try:
        settings = check_worker(WorkerSettings.from_env())
        # The web server reads them again, when it is too late for a plain word.
        WebSettings.from_env()
    except SettingsError as error:
        _fail(str(error), exit_code=2)
    configure_logging(settings.log_level)
    run_worker(Service(settings).app)


@app.command()
def migrate(
    check: Annotated[
        bool, typer.Option("--check", help="Only tell which databases are behind; exit code 1 if any is.")
    ] = False,
) -> None:
    """Bring all databases to the newest schema, several at a time; safe to run at any time, twice."""
    from console.migrate import run

    raise typer.Exit(asyncio.run(run(control_url(), console, check=check)))


@app.command()
def status(
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every two seconds, until Ctrl-C.")] = False,
) -> None:
    """Show workers, merchants, lag, rates, errors and jobs on one screen."""
    from console.status import run

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run(settings(), console, watch=watch))


@app.command("backup")
def back_up(
    merchant: Annotated[str, typer.Argument(help="The merchant's id, or `control` for the control database.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; <merchant>-<time>.dump.", dir_okay=False)] = None,
) -> None:
    """Write a consistent dump of a merchant's database, while workers go on."""
    from console.backup import backup

    file = out or Path(f"{merchant}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.dump")
    asyncio.run(backup(control_url(), merchant, file))
    console.print(f"{file}: {file.stat().st_size:,} bytes", highlight=False, soft_wrap=True)


@app.command()
def restore(
    merchant: Annotated[str, typer.Argument(help="The id of a suspended merchant.")],
    dump: Annotated[Path, typer.Argument(help="A file made by `credits backup`.", exists=True, dir_okay=False)],
) -> None:
    """Restore a merchant's database, and bring it forward to all that was published since the dump."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from console import restore as restoring

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("")
        done = asyncio.run(
            restoring.restore(
                settings(),
                merchant,
                dump,
                lambda what, at, total: bar.update(task, description=what, completed=at, total=total),
            )
        )
    for line in restoring.lines(done):
        console.print(line, highlight=False, soft_wrap=True)


def _fail(message: str, exit_code: int = 1) -> NoReturn:
    Console(stderr=True).print(message, style="red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(exit_code) from None


tokens_app = typer.Typer(no_args_is_help=True, help="Bearer tokens of services and people.")
app.add_typer(tokens_app, name="tokens")


@tokens_app.command("create")
def create_token(
    role: Annotated[str, typer.Argument(help="user, support, admin, upstream, auditor or metrics.")],
    merchant: Annotated[str | None, typer.Option(help="The only merchant it is good for; all without it.")] = None,
    subject: Annotated[str | None, typer.Option(help="The user id of a user's token.")] = None,
    note: Annotated[str | None, typer.Option(help="What it is for.")] = None,
) -> None:
    """Make a token and show it: the only time it can be seen."""
    from console.tokens import create

    try:
        text = asyncio.run(create(control_url(), role, merchant, subject, note))
    except ValueError as error:
        _fail(str(error))
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@tokens_app.command("list")
def list_tokens() -> None:
    """List all tokens, revoked ones too; a token's text is not kept."""
    from console.output import print_whole
    from console.tokens import table

    print_whole(console, asyncio.run(table(control_url())))


@tokens_app.command("revoke")
def revoke_token(token_id: Annotated[str, typer.Argument(help="As `list` shows it.")]) -> None:
    """End a token; workers forget it within a second."""
    from console.tokens import revoke

    if not asyncio.run(revoke(control_url(), token_id)):
        _fail(f"there is no token {token_id} in force")


letters_app = typer.Typer(no_args_is_help=True, help="Messages that could not be read or decided.")
app.add_typer(letters_app, name="dead-letters")
_Place = Annotated[str, typer.Argument(help="topic/partition/offset, as `list` shows it.")]
_Merchant = Annotated[str, typer.Argument(help="The merchant's id, or `control` for the control topic's.")]


@letters_app.command("list")
def list_dead_letters(
    merchant: _Merchant,
    everything: Annotated[bool, typer.Option("--all", help="Also those that were settled or redriven.")] = False,
) -> None:
    """List the dead letters of a merchant, or of the control topic."""
    from console.deadletters import as_table, list_letters
    from console.output import print_whole

    letters = asyncio.run(list_letters(settings(), merchant, everything=everything))
    print_whole(console, as_table(letters) if letters else "no dead letters")


@letters_app.command("show")
def show_dead_letter(merchant: _Merchant, place: _Place) -> None:
    """Show a dead letter and the headers of its message; never the value, it may hold anything."""
    from console.deadletters import show

    letter, shown = asyncio.run(show(settings(), merchant, place))
    pointer = {"place": letter.place, "code": letter.code, "message": letter.message, "sha256": letter.sha256.hex()}
    console.print_json(json.dumps(pointer | shown))


@letters_app.command("redrive")
def redrive_dead_letters(
    merchant: _Merchant,
    places: Annotated[list[str], typer.Argument(help="topic/partition/offset, as `list` shows it.")],
) -> None:
    """Send messages again, each to its own topic under a new id, so that they are decided afresh."""
    from console.deadletters import redrive

    ids = asyncio.run(redrive(settings(), merchant, places))
    for new_id in ids:
        console.print(f"sent as {new_id}", highlight=False, markup=False, soft_wrap=True)


@letters_app.command("settle")
def settle_dead_letters(
    merchant: _Merchant,
    places: Annotated[list[str], typer.Argument(help="topic/partition/offset, as `list` shows it.")],
) -> None:
    """Take dead letters and refused orders off the lists: the sender has sent a right message, or never will."""
    from console.deadletters import settle

    asyncio.run(settle(settings(), merchant, places))
    console.print(f"{len(places)} settled")


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


@app.command("verify")
def verify_books(
    merchant: Annotated[str | None, typer.Argument(help="The merchant's id.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Verify all merchants.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object by merchant.")] = False,
) -> None:
    """Check every identity of merchants' books; the exit code is 1 if one does not hold or can't be checked."""
    from console.verify import reports, show

    if (merchant is None) != every:
        raise typer.BadParameter("name one merchant, or give --all")
    found, errors = asyncio.run(reports(control_url(), merchant, Console(stderr=True)))
    if as_json:
        shown = {name: report.as_object() for name, report in found.items()}
        console.print_json(data=shown | {name: {"ok": False, "error": error} for name, error in errors.items()})
    else:
        show(found, console, errors)
    raise typer.Exit(0 if not errors and all(report.ok for report in found.values()) else 1)


merchants_app = typer.Typer(no_args_is_help=True, help="The merchants.")
app.add_typer(merchants_app, name="merchants")
clock_app = typer.Typer(no_args_is_help=True, help="The clocks of simulated merchants.")
app.add_typer(clock_app, name="clock")


@merchants_app.command("list")
def list_merchants() -> None:
    """List the registered merchants."""
    from console.merchants import as_table, registered
    from console.output import print_whole

    print_whole(console, as_table(asyncio.run(registered(control_url()))))


@merchants_app.command("create")
def create_merchant(
    merchant: Annotated[str, typer.Argument(help="The new merchant's id.")],
    config: Annotated[Path, typer.Option(help="A JSON file with the configuration.", exists=True, dir_okay=False)],
    partitions: Annotated[int, typer.Option(help="Of each of its topics; can't be changed.", min=1)] = 4,
    simulated: Annotated[bool, typer.Option(help="With a clock that can be moved, for tests.")] = False,
) -> None:
    """Register a merchant; done when it may be used."""
    from console.merchants import create

    content = _parse(config.read_bytes(), str(config))
    _show_result(create(settings(), merchant, content, simulated=simulated, partitions=partitions))


@clock_app.command("advance")
def advance_clock(
    merchant: Annotated[str, typer.Argument(help="The id of a simulated merchant.")],
    seconds: Annotated[int, typer.Argument(help="By how much; clocks only go forward.", min=1)],
) -> None:
    """Move the clock of a simulated merchant; done when everything due by then has been sent."""
    from console.merchants import advance

    _show_result(advance(settings(), merchant, seconds))


@app.command()
def send(
    merchant: Annotated[str, typer.Argument(help="The merchant's id.")],
    command: Annotated[str, typer.Argument(help="Its type, such as User.Erase.")],
    payload: Annotated[str, typer.Argument(help="Its members as a JSON object; `actor` is added if missing.")],
) -> None:
    """Send a command about a merchant and show its result."""
    from console.merchants import command as call

    _show_result(call(settings(), merchant, command, _parse(payload, "PAYLOAD")))


def _parse(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        members = json.loads(text if isinstance(text, str) else text.decode(), parse_float=Decimal)
    except (ValueError, RecursionError) as error:
        _fail(f"{where}: {error}")
    if not isinstance(members, dict):
        raise typer.BadParameter("not a JSON object", param_hint=where)
    return members


def _show_result(call: "Coroutine[Any, Any, Result]") -> None:
    """Wait for a command's result and print it; the exit code is 1 if it was refused or none came."""
    result = asyncio.run(call)
    console.print_json(data=result)
    raise typer.Exit(0 if result["outcome"] == "applied" else 1)


receipts_app = typer.Typer(no_args_is_help=True, help="Receipts, credit notes and corrections.")
app.add_typer(receipts_app, name="receipts")


@receipts_app.command("export")
def export_receipts(
    merchant: Annotated[str, typer.Argument(help="The merchant's id.")],
    first: Annotated[datetime, typer.Option("--from", formats=["%Y-%m-%d"], help="The first day.")],
    last: Annotated[datetime, typer.Option("--to", formats=["%Y-%m-%d"], help="The last day, included.")],
    out: Annotated[
        Path | None, typer.Option(help="The folder to write; receipts-<merchant>-<from>-<to>.", file_okay=False)
    ] = None,
) -> None:
    """Write a period's documents as CSV and JSON Lines, with totals per rate; days are the merchant's."""
    from console.receipts import export

    if last < first:
        raise typer.BadParameter("the last day is before the first", param_hint="--to")
    folder = out or Path(f"receipts-{merchant}-{first:%Y-%m-%d}-{last:%Y-%m-%d}")
    try:
        summary = asyncio.run(export(control_url(), merchant, first.date(), last.date(), folder))
    except OverflowError:
        raise typer.BadParameter("the period reaches beyond the calendar", param_hint="--from, --to") from None
    console.print(f"{summary['documents']} documents in {folder}")
    for row in summary["by_rate"]:
        line = f"{row['currency']} {row['regime']} {row['category']} {row['rate']}"
        console.print(f"{line}: net {row['net']}, tax {row['tax']}, gross {row['gross']}")


if __name__ == "__main__":
    app()
