"""What the local stack needs before its worker starts: schemas, and a token for the administrator of this machine."""

from pathlib import Path

from console.stack import Endpoints
from merchants import tokens
from merchants.databases import CONTROL_SETTINGS, create_unpooled_engine, engine_url
from merchants.schema import migrate


async def prepare(endpoints: Endpoints) -> str:
    """Migrate the databases and return an administrator's token."""
    await migrate(endpoints.control_database_url)
    engine = create_unpooled_engine(engine_url(endpoints.control_database_url), CONTROL_SETTINGS)
    try:
        async with engine.begin() as connection:
            return await tokens.create(connection, "admin", note="made by `credits up`")
    finally:
        await engine.dispose()


def stack_environment(root: Path) -> dict[str, str]:
    """Read the addresses that a running local stack has written; empty when there is none."""
    file = root / ".credits" / "stack.env"
    if not file.exists():
        return {}
    lines = (line.partition("=") for line in file.read_text().splitlines())
    return {name: value for name, _, value in lines}
