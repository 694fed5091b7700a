"""Databases that are away or slow: a merchant's own paths only, and never the writers."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy.exc import DBAPIError

from catalog.sql import fetch
from merchants.databases import CONTROL_SETTINGS, create_unpooled_engine, engine_url
from tests import builders
from tests.integration.web import Shop, open_shop
from tests.services import Services


@pytest.fixture(scope="module")
async def shop(services: Services) -> AsyncIterator[Shop]:
    async with open_shop(services, "web-trouble") as shop:
        await builders.merchant(shop.control_url, "web-calm")
        yield shop


async def test_a_database_that_is_away_is_a_503_on_its_merchants_paths_only(shop: Shop, services: Services) -> None:
    await shop.clerk.send("User.SignedUp", {"user_id": "ann"})
    await shop.api.get("/users/ann/balance")
    admin = create_unpooled_engine(engine_url(services.postgres_url), CONTROL_SETTINGS, isolation_level="AUTOCOMMIT")
    async with admin.connect() as connection:
        await connection.exec_driver_sql('ALTER DATABASE "credits_m_web_trouble" ALLOW_CONNECTIONS false')
        await fetch(
            connection,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'credits_m_web_trouble'",
        )
        try:
            status, body, headers = await shop.api.ask(f"{shop.api.root}/users/ann/balance")
            assert (status, body["code"], body["retryable"]) == (503, "internal_error", True)
            assert int(headers["Retry-After"]) > 0
            assert (await shop.api.ask("/v1/merchants/web-calm/products"))[0] == 200
            assert (await shop.api.ask("/readyz"))[0] == 200
        finally:
            await connection.exec_driver_sql('ALTER DATABASE "credits_m_web_trouble" ALLOW_CONNECTIONS true')
    await admin.dispose()
    await shop.clerk.engine.dispose()
    async with asyncio.timeout(10):
        while (await shop.api.ask(f"{shop.api.root}/users/ann/balance"))[0] != 200:
            await asyncio.sleep(0.1)


async def test_readers_can_change_nothing(shop: Shop) -> None:
    merchant = shop.clerk.merchant
    engine = await shop.api.wiring.readers.engine(merchant.merchant_id, merchant.database_url, merchant.password)
    async with engine.connect() as connection:
        with pytest.raises(DBAPIError, match="read-only"):
            await connection.exec_driver_sql("UPDATE accounts SET balance = balance + 1")


async def test_queries_do_not_wait_for_a_batch_nor_a_batch_for_queries(shop: Shop) -> None:
    await shop.clerk.send("User.SignedUp", {"user_id": "busy"})
    async with shop.clerk.engine.begin() as writer:
        await fetch(writer, "SELECT * FROM accounts WHERE user_id = 'busy' FOR UPDATE")
        async with asyncio.timeout(2):
            assert (await shop.api.get("/users/busy/balance"))["balance"] == 0
    merchant = shop.clerk.merchant
    engine = await shop.api.wiring.readers.engine(merchant.merchant_id, merchant.database_url, merchant.password)
    async with engine.connect() as reader:
        await fetch(reader, "SELECT * FROM accounts")
        async with asyncio.timeout(2):
            lock = {"user_id": "busy", "justification": "x", "actor": "a"}
            assert (await shop.clerk.send("Account.Lock", lock))["outcome"] == "applied"


async def test_when_all_readers_are_busy_the_rest_is_told_to_come_again(shop: Shop) -> None:
    merchant = shop.clerk.merchant
    engine = await shop.api.wiring.readers.engine(merchant.merchant_id, merchant.database_url, merchant.password)
    async with engine.connect() as first, engine.connect() as second:
        for connection in (first, second):
            # Outside of a transaction, or the server would end them for being idle in one.
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            await fetch(connection, "SELECT 1")
        status, _, headers = await shop.api.ask(f"{shop.api.root}/products")
        assert (status, "Retry-After" in headers) == (503, True)
    assert (await shop.api.ask(f"{shop.api.root}/products"))[0] == 200
