"""`credits tokens`: makes, lists and ends bearer tokens in the control database."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rich.markup import escape
from rich.table import Table
from sqlalchemy.ext.asyncio import AsyncConnection

import merchants.tokens
from console.merchants import registered_as
from merchants.databases import CONTROL_SETTINGS, create_unpooled_engine, engine_url


async def create(control_url: str, role: str, merchant: str | None, subject: str | None, note: str | None) -> str:
    """Make a token and return its text.

    Raises:
        ValueError: the role does not fit the rest.
        UnknownMerchantError: the merchant it is to be bound to is not registered.
    """
    if merchant is not None:
        await registered_as(control_url, merchant)
    async with _control(control_url) as connection:
        return await merchants.tokens.create(connection, role, merchant, subject, note)


async def revoke(control_url: str, token_id: str) -> bool:
    """End a token; return whether there was one in force."""
    async with _control(control_url) as connection:
        return await merchants.tokens.revoke(connection, token_id)


async def table(control_url: str) -> Table:
    """Show all tokens."""
    made = Table(box=None, header_style="bold")
    for name in ("id", "role", "merchant", "subject", "made", "revoked", "note"):
        made.add_column(name, no_wrap=name in ("id", "merchant"), overflow="fold")
    async with _control(control_url) as connection:
        for token in await merchants.tokens.list_all(connection):
            times = (f"{at:%Y-%m-%d %H:%M}" if at else "" for at in (token.created_at, token.revoked_at))
            names = token.token_id, token.role, token.merchant_id or "all", token.subject or ""
            made.add_row(*map(escape, (*names, *times, token.note or "")))
    return made


@asynccontextmanager
async def _control(control_url: str) -> AsyncIterator[AsyncConnection]:
    engine = create_unpooled_engine(engine_url(control_url), CONTROL_SETTINGS)
    try:
        async with engine.begin() as connection:
            yield connection
    finally:
        await engine.dispose()
