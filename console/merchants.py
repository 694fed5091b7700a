"""``credits merchants``, ``clock`` and ``send``: an operator's part, over the same topics as everybody."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from catalog.sql import fetch
from console.client import RESULT_SECONDS_MAX, Client, NoResultError, Result
from console.processes import StackError
from merchants.databases import CONTROL_SETTINGS, READER_SETTINGS, create_unpooled_engine, engine_url
from merchants.registry import Merchant, all_merchants, find
from schemas.payloads import COMMANDS
from schemas.topics import CONTROL_CHANNEL
from workers.settings import WorkerSettings

ACTOR = "console"


class UnknownMerchantError(StackError):
    """There is no merchant of this name."""

    def __init__(self, merchant_id: str) -> None:
        super().__init__(f"There is no merchant {merchant_id}.")


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
        return await client.call(None, command_type, {"actor": ACTOR, **payload})


async def command(
    settings: WorkerSettings,
    merchant_id: str,
    command_type: str,
    payload: Mapping[str, Any],
    seconds: float = RESULT_SECONDS_MAX,
) -> Result:
    """Send a command about a merchant to its topic and wait for its result.

    Raises:
        StackError: there is no such merchant, or no such command for people to send, or its result did not come; the
            message says what the command waits for, if that is another one.
    """
    spec = COMMANDS.get(command_type)
    if spec is None or spec.channel == "jobs":
        raise StackError(f"There is no command {command_type}.")
    if spec.channel == CONTROL_CHANNEL:
        return await control(settings, command_type, {"merchant_id": merchant_id, **payload})
    merchant = await registered_as(settings.control_database_url, merchant_id)
    by = {"actor": ACTOR} if "actor" in spec.model.model_fields else {}
    async with Client(settings.kafka_bootstrap_servers, settings.security_kwargs()) as client:
        await client.watch(merchant_id, merchant.partitions, from_start=False)
        try:
            return await client.call(merchant_id, command_type, {**by, **payload}, seconds)
        except NoResultError:
            (message_id,) = client.sent
            waits = await _waits_for(merchant, client.source, message_id)
            if waits is None:
                raise
        raise NoResultError(f"No result within {seconds:.0f} s of {client.source} {message_id}: it waits for {waits}.")


async def _waits_for(merchant: Merchant, source: str, message_id: str) -> str | None:
    """Say for what a command is parked and until when; None if it is not."""
    url = engine_url(merchant.database_url, password=merchant.password)
    engine = create_unpooled_engine(url, READER_SETTINGS)
    try:
        async with engine.connect() as connection:
            sql = "SELECT dependency_kind, dependency_key, due_at FROM parked WHERE source = $1 AND id = $2"
            rows = await fetch(connection, sql, source, message_id)
    finally:
        await engine.dispose()
    return f"{rows[0][0]} {rows[0][1]} until {rows[0][2]:%Y-%m-%d %H:%M:%S} UTC" if rows else None


async def registered(control_url: str) -> list[Merchant]:
    """Read the registry."""
    engine = create_unpooled_engine(engine_url(control_url), CONTROL_SETTINGS)
    try:
        async with engine.connect() as connection:
            return await all_merchants(connection)
    finally:
        await engine.dispose()


async def registered_as(control_url: str, merchant_id: str) -> Merchant:
    """Read one merchant from the registry. Raises UnknownMerchantError."""
    engine = create_unpooled_engine(engine_url(control_url), CONTROL_SETTINGS)
    try:
        async with engine.connect() as connection:
            merchant = await find(connection, merchant_id)
    finally:
        await engine.dispose()
    if merchant is None:
        raise UnknownMerchantError(merchant_id)
    return merchant


def as_table(merchants: list[Merchant]) -> Table:
    """Lay the registry out for a terminal."""
    table = Table(box=None, header_style="bold")
    for name in ("merchant", "state", "partitions", "simulated"):
        table.add_column(name, no_wrap=name == "merchant")
    for merchant in merchants:
        simulated = "yes" if merchant.simulated else ""
        table.add_row(merchant.merchant_id, merchant.state, str(merchant.partitions), simulated)
    return table
