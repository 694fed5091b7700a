"""Makes and upgrades all databases: control, the template of new merchants, and every merchant's own."""

import asyncio
from collections.abc import Callable

from sqlalchemy import make_url

from catalog.sql import fetch
from merchants.databases import CONTROL_SETTINGS, create_unpooled_engine, engine_url
from merchants.registry import TEMPLATE_DATABASE, WORKER_GROUP, all_merchants, names
from migrations import runner

PARALLEL = 4


class UnknownSchemaError(Exception):
    """A database is at a revision that this version of the service does not know."""


def on_database(control_url: str, database: str) -> str:
    """Return the administrative URL of another database of the control database's server."""
    return engine_url(control_url).set(database=database).render_as_string(hide_password=False)


async def migrate(control_url: str, progress: Callable[[str], None] = lambda _: None) -> None:
    """Bring control, template and all merchants' databases to the newest revision; safe to run at any time, twice."""
    admin = on_database(control_url, "postgres")
    control = make_url(control_url).database
    assert control is not None
    await runner.ensure_role(admin, WORKER_GROUP)
    await runner.ensure_database(admin, control)
    await runner.upgrade(on_database(control_url, control), "control")
    progress(control)
    await runner.ensure_database(admin, TEMPLATE_DATABASE)
    await runner.upgrade(on_database(control_url, TEMPLATE_DATABASE), "merchant")
    progress(TEMPLATE_DATABASE)
    slots = asyncio.Semaphore(PARALLEL)

    async def one(database: str) -> None:
        async with slots:
            await runner.upgrade(on_database(control_url, database), "merchant")
            progress(database)

    async with asyncio.TaskGroup() as group:
        for merchant in await merchant_ids(control_url):
            group.create_task(one(names(merchant)[1]))


async def merchant_ids(control_url: str) -> list[str]:
    engine = create_unpooled_engine(engine_url(control_url), CONTROL_SETTINGS)
    try:
        async with engine.connect() as connection:
            return [m.merchant_id for m in await all_merchants(connection) if m.state != "provisioning"]
    finally:
        await engine.dispose()


async def check(control_url: str) -> None:
    """Raise UnknownSchemaError unless the control database is at the revision this version was made for."""
    engine = create_unpooled_engine(engine_url(control_url), CONTROL_SETTINGS)
    try:
        async with engine.connect() as connection:
            rows = await fetch(connection, "SELECT version_num FROM alembic_version")
    finally:
        await engine.dispose()
    expected, found = runner.head("control"), rows[0][0] if rows else None
    if found != expected:
        raise UnknownSchemaError(f"the control database is at {found}, this version needs {expected}: run migrate")
