"""Runs Alembic's lineages over databases, and makes those that must be there before anything else."""

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, text
from sqlalchemy.exc import IntegrityError, ProgrammingError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

if TYPE_CHECKING:
    # Imported where it is used: it takes longer than all that most commands do.
    from alembic.config import Config

HERE = Path(__file__).parent
SETTINGS = {"lock_timeout": "4s", "statement_timeout": "300s", "application_name": "credits-migrate"}
ADVISORY_LOCK = 7_203_155_001


def lineage(name: str) -> "Config":
    """Return Alembic's configuration of a lineage, ``control`` or ``merchant``."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(HERE / name))
    config.set_main_option("path_separator", "os")
    return config


def revisions(name: str) -> list[str]:
    """Return all revisions of a lineage, the newest first."""
    from alembic.script import ScriptDirectory

    return [script.revision for script in ScriptDirectory.from_config(lineage(name)).walk_revisions()]


def head(name: str) -> str:
    """Return the newest revision of a lineage."""
    return revisions(name)[0]


async def upgrade(url: str, name: str) -> None:
    """Bring one database to the head of a lineage; runs of several processes wait for each other.

    Alembic keeps the migration under way in global variables: no two at the same time in one process.
    """
    engine = create_async_engine(url, poolclass=NullPool, connect_args={"server_settings": SETTINGS})
    try:
        async with engine.connect() as connection:
            # As long as another one works; the timeouts are for what a migration itself waits for.
            await connection.execute(text("SET lock_timeout = 0"))
            await connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": ADVISORY_LOCK})
            await connection.execute(text(f"SET lock_timeout = '{SETTINGS['lock_timeout']}'"))
            await connection.commit()
            await connection.run_sync(_upgrade, name)
            await connection.commit()
    finally:
        await engine.dispose()


def upgrade_alone(url: str, name: str) -> str | None:
    """Bring one database to the head, in a process of its own; return what went wrong."""
    try:
        asyncio.run(upgrade(url, name))
    except Exception as error:
        return str(error).splitlines()[0] if str(error) else repr(error)
    return None


def _upgrade(connection: Connection, name: str) -> None:
    from alembic import command

    config = lineage(name)
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


async def current(url: str) -> str | None:
    """Return the revision a database is at; None before the first one."""
    engine = create_async_engine(url, poolclass=NullPool, connect_args={"server_settings": SETTINGS})
    try:
        async with engine.connect() as connection:
            found = await connection.scalar(text("SELECT to_regclass('alembic_version') IS NOT NULL"))
            return await connection.scalar(text("SELECT version_num FROM alembic_version")) if found else None
    finally:
        await engine.dispose()


def run_script(connection: Connection, path: Path) -> None:
    """Run a file of several SQL statements in the connection's transaction."""
    connection.execute(text("SELECT 1"))  # makes sure that the transaction has begun
    adapted = connection.connection.dbapi_connection
    assert adapted is not None
    script = path.read_text(encoding="utf-8")
    adapted.run_async(lambda driver: driver.execute(script))


async def ensure_database(admin_url: str, name: str) -> None:
    """Make a database of this name, if there is none, on the server of ``admin_url``."""
    engine = create_async_engine(admin_url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    try:
        async with engine.connect() as connection:
            found = await connection.scalar(text("SELECT 1 FROM pg_database WHERE datname = :name"), {"name": name})
            if not found:
                # Another process may be faster.
                with contextlib.suppress(ProgrammingError, IntegrityError):
                    await connection.exec_driver_sql(f'CREATE DATABASE "{name}"')
    finally:
        await engine.dispose()


async def ensure_role(admin_url: str, name: str) -> None:
    """Make a group role that cannot log in, if there is none."""
    engine = create_async_engine(admin_url, poolclass=NullPool)
    async with engine.begin() as connection:
        sql = f"""
        DO $$ BEGIN CREATE ROLE "{name}" NOLOGIN;
        EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$
        """
        await connection.exec_driver_sql(sql)
    await engine.dispose()
