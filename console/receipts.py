"""``credits receipts``: documents for bookkeeping."""

from datetime import date
from pathlib import Path
from typing import Any

import merchants.store
from console.merchants import registered_as
from merchants.databases import READER_SETTINGS, create_unpooled_engine, engine_url
from receipts.export import export_period


async def export(control_url: str, merchant_id: str, first: date, last: date, folder: Path) -> dict[str, Any]:
    """Write a merchant's documents of a period into a folder (see ``receipts.export``); returns the summary."""
    merchant = await registered_as(control_url, merchant_id)
    url = engine_url(merchant.database_url, password=merchant.password)
    engine = create_unpooled_engine(url, READER_SETTINGS, isolation_level="REPEATABLE READ")
    try:
        async with engine.connect() as connection:
            state = await merchants.store.read_state(connection)
            config = await merchants.store.read_config(connection, state.config_version)
            return await export_period(connection, folder, merchant_id, config.time_zone, first, last)
    finally:
        await engine.dispose()
