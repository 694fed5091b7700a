"""Makes and upgrades all databases: control, the template of new merchants, and every merchant's own."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context

from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from catalog.sql import fetch
from merchants.databases import CONTROL_SETTINGS, create_unpooled_engine, engine_url, in_a_line
from merchants.registry import TEMPLATE_DATABASE, WORKER_GROUP, all_merchants, close_common_databases, names
from migrations import runner

PARALLEL = 4


class UnknownSchemaError(Exception):
    """A database is at a revision that this version of the service cannot work on."""


def on_database(control_url: str, database: str) -> str:
    """Return the administrative URL of another database of the control database's server."""
    return engine_url(control_url).set(database=database).render_as_string(hide_password=False)


@dataclass(frozen=True, slots=True)
class Step:
    """What became of one database: its revisions before and after, or why it could not be brought forward."""

    database: str
    before: str | None
    after: str | None
    error: str | None = None


class MigrationError(Exception):
    """Some merchants' databases were not brought forward; the others were. ``steps`` has all of them."""

    def __init__(self, steps: list[Step]) -> None:
        self.steps = steps
        failed = [f"{step.database}: {step.error}" for step in steps if step.error is not None]
        super().__init__("; ".join(failed))


async def migrate(control_url: str, progress: Callable[[str], None] = lambda _: None) -> list[Step]:
    """Bring control, template and all merchants' databases to the newest revision; safe to run at any time, twice.

    A merchant's database that cannot be brought forward does not keep the others waiting; running this again goes on
    where it stopped. Raises MigrationError then.
    """
    admin = on_database(control_url, "postgres")
    control = make_url(control_url).database
    assert control is not None
    await runner.ensure_role(admin, WORKER_GROUP)
    await runner.ensure_database(admin, control)
    steps = [await _upgrade(control_url, control, "control")]
    progress(control)
    await runner.ensure_database(admin, TEMPLATE_DATABASE)
    steps.append(await _upgrade(control_url, TEMPLATE_DATABASE, "merchant"))
    progress(TEMPLATE_DATABASE)
    engine = create_unpooled_engine(engine_url(control_url), CONTROL_SETTINGS, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await close_common_databases(connection)
    await engine.dispose()
    databases = [names(merchant)[1] for merchant in await merchant_ids(control_url)]
    # Processes are made when there is something for them to do.
    with ProcessPoolExecutor(PARALLEL, mp_context=get_context("spawn")) as processes:
        slots = asyncio.Semaphore(PARALLEL)

        async def one(database: str) -> Step:
            async with slots:
                step = await _upgrade_merchant(on_database(control_url, database), database, processes)
            progress(database)
            return step

        steps += await asyncio.gather(*map(one, databases))
    if any(step.error is not None for step in steps):
        raise MigrationError(steps)
    return steps


async def _upgrade(control_url: str, database: str, lineage: str) -> Step:
    url = on_database(control_url, database)
    before = await runner.current(url)
    if before != runner.head(lineage):
        await runner.upgrade(url, lineage)
    return Step(database, before, await runner.current(url))


async def _upgrade_merchant(url: str, database: str, processes: ProcessPoolExecutor) -> Step:
    loop = asyncio.get_running_loop()
    before = None
    try:
        before = after = await runner.current(url)
        if before != runner.head("merchant"):
            error = await loop.run_in_executor(processes, runner.upgrade_alone, url, "merchant")
            if error is not None:
                return Step(database, before, before, error)
            after = await runner.current(url)
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        return Step(database, before, None, in_a_line(error))
    return Step(database, before, after)


async def versions(control_url: str) -> list[Step]:
    """Tell at which revision each database is, without changing any; ``after`` is the newest one."""
    control = make_url(control_url).database
    assert control is not None
    merchants = [names(merchant)[1] for merchant in await merchant_ids(control_url)]
    lineages = {control: "control"} | dict.fromkeys([TEMPLATE_DATABASE, *merchants], "merchant")
    slots = asyncio.Semaphore(PARALLEL)

    async def one(database: str, lineage: str) -> Step:
        async with slots:
            try:
                found = await runner.current(on_database(control_url, database))
            except (SQLAlchemyError, OSError, TimeoutError) as error:
                return Step(database, None, runner.head(lineage), in_a_line(error))
            return Step(database, found, runner.head(lineage))

    return list(await asyncio.gather(*(one(database, lineage) for database, lineage in lineages.items())))


async def merchant_ids(control_url: str) -> list[str]:
    engine = create_unpooled_engine(engine_url(control_url), CONTROL_SETTINGS)
    try:
        async with engine.connect() as connection:
            return [m.merchant_id for m in await all_merchants(connection) if m.state != "provisioning"]
    finally:
        await engine.dispose()


async def check(control_url: str) -> None:
    """Raise UnknownSchemaError unless control database and template are at the revisions this version was made for.

    The template stands for all merchants' databases: a migration begins with it.
    """
    control = make_url(control_url).database
    assert control is not None
    for database, lineage in ((control, "control"), (TEMPLATE_DATABASE, "merchant")):
        found, known = await runner.current(on_database(control_url, database)), runner.revisions(lineage)
        if found != known[0]:
            advice = "run credits migrate" if found in (None, *known) else "a newer version has migrated it, run that"
            raise UnknownSchemaError(f"the database {database} is at {found}, this version needs {known[0]}: {advice}")


async def check_merchant(connection: AsyncConnection) -> None:
    """Raise UnknownSchemaError if a merchant's database is behind this version.

    One that is ahead was migrated while this worker ran, and those migrations only add: it is worked for, so that
    nobody waits while workers are replaced one after the other.
    """
    rows = await fetch(connection, "SELECT version_num FROM alembic_version")
    newest, *older = merchant_revisions()
    found = rows[0][0] if rows else None
    if found in (None, *older):
        raise UnknownSchemaError(f"the database is at {found}, this version needs {newest}: run credits migrate")


@cache
def merchant_revisions() -> list[str]:
    return runner.revisions("merchant")
