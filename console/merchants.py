"""``credits merchants`` and ``credits clock``: an operator's part, over the same topics as everybody."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from console.client import Client, Result
from merchants.databases import CONTROL_SETTINGS, create_unpooled_engine, engine_url
from merchants.registry import Merchant, all_merchants
from workers.settings import WorkerSettings

ACTOR = "console"


async def create(
    settings: WorkerSettings, merchant_id: str, config: Mapping[str, Any], *, simulated: bool, partitions: int
) -> Result:
    """Register a merchant and return the result, once it may be used."""
    payload = {"merchant_id": merchant_id, "config": config, "simulated": simulated, "partitions": partitions}
    return await control(settings, "Merchant.Register", payload)


async def advance(settings: WorkerSettings, merchant_id: str, seconds: int) -> Result:
    """Move the clock of a simulated merchant forward."""
    return await control(settings, "Clock.Advance", {"merchant_id": merchant_id, "seconds": seconds})


async def control(settings: WorkerSettings, command_type: str, payload: Mapping[str, Any]) -> Result:
    """Send a command of the control topic and wait for its result."""
    async with Client(settings.kafka_bootstrap_servers, settings.security_kwargs()) as client:
        await client.watch(None, 1, from_start=False)
        return await client.call(None, command_type, {**payload, "actor": ACTOR})


async def registered(control_url: str) -> list[Merchant]:
    """Read the registry."""
    engine = create_unpooled_engine(engine_url(control_url), CONTROL_SETTINGS)
    try:
        async with engine.connect() as connection:
            return await all_merchants(connection)
    finally:
        await engine.dispose()


def as_table(merchants: list[Merchant]) -> Table:
    """Lay the registry out for a terminal."""
    table = Table("merchant", "state", "partitions", "simulated", box=None, header_style="bold")
    for merchant in merchants:
        simulated = "yes" if merchant.simulated else ""
        table.add_row(merchant.merchant_id, merchant.state, str(merchant.partitions), simulated)
    return table
