"""A checkpoint kept outside the database shows what the chains in it cannot: that their end was cut off."""

import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from hashlib import sha256

import pytest_asyncio
from aiokafka import TopicPartition as TP

from catalog.sql import fetch
from merchants.databases import READER_SETTINGS, WRITER_SETTINGS, Pools, create_unpooled_engine, engine_url
from merchants.schema import migrate, on_database
from schemas.topics import input_topic
from tests.integration.shop import Shop, open_shop
from tests.integration.test_restore import admin, purchase
from tests.services import Services
from workers.checkpoints import Checkpointer, compare, last_checkpoint, take


@pytest_asyncio.fixture
async def shop(services: Services) -> AsyncIterator[Shop]:
    url = services.database_url(f"checkpoints_control_{secrets.token_hex(3)}")
    await migrate(url)
    async with open_shop(services, url, f"s{secrets.token_hex(4)}") as shop:
        await shop.stock()
        yield shop


async def test_a_tail_that_was_cut_off_is_seen(shop: Shop) -> None:
    name, servers = shop.merchant.merchant_id, shop.settings.kafka_bootstrap_servers
    readers = Pools(READER_SETTINGS, pool_size=1, merchants_max=2)
    checkpointer = Checkpointer(readers, shop.publisher, servers, {}, {name: shop.merchant}, dict)
    assert await last_checkpoint(servers, name) is None
    for number in range(3):
        shop.send("Purchase.Settled", **purchase(f"user-{number}", f"pay-{number}"))
    await shop.work()
    await checkpointer.publish(shop.merchant)
    checkpoint = await checkpointer.publish(shop.merchant)

    assert await last_checkpoint(servers, name) == checkpoint
    assert (checkpoint.entries, checkpoint.accounts, checkpoint.documents) == (3, 3, 3)
    # What comes later changes nothing of what was.
    shop.send("Purchase.Settled", **purchase("user-1", "pay-9"))
    shop.send("Refund.Apply", **admin(refund_id="r", external_ref="pay-1"))
    await shop.work()
    engine = create_unpooled_engine(engine_url(on_database(shop.settings.control_database_url, shop.database)), {})
    async with engine.connect() as connection:
        assert await compare(connection, checkpoint) == []
        # Someone who may do anything in the database takes a user's whole history away, rows of all tables.
        await connection.exec_driver_sql("SET session_replication_role = replica")
        for table in ("accounts", "entries", "lots", "allocations"):
            sql = f"DELETE FROM {table} WHERE account_id = (SELECT account_id FROM accounts WHERE user_id = 'user-2')"
            if table == "accounts":
                continue
            await connection.exec_driver_sql(sql)
        await connection.exec_driver_sql("DELETE FROM accounts WHERE user_id = 'user-2'")
        problems = await compare(connection, checkpoint)
        await connection.rollback()
    await engine.dispose()
    assert [problem.partition(":")[0] for problem in problems] == ["entries", "accounts", "accounts_sha256"]
    await readers.close()


async def test_the_worker_with_a_merchants_jobs_publishes_its_checkpoints_by_itself(shop: Shop) -> None:
    name, servers = shop.merchant.merchant_id, shop.settings.kafka_bootstrap_servers
    readers = Pools(READER_SETTINGS, pool_size=1, merchants_max=2)
    partitions: dict[str, set[TP]] = {name: {TP(input_topic(name, "purchases"), 0)}, "unknown": set()}
    cuts = set()
    for process in range(2):
        # The topic is there already for the second one.
        checkpointer = Checkpointer(readers, shop.publisher, servers, {}, {name: shop.merchant}, lambda: partitions)
        if process == 0:
            await checkpointer.run_once()
            assert await last_checkpoint(servers, name) is None
        partitions[name].add(TP(input_topic(name, "jobs"), 0))
        for _ in range(2):
            await checkpointer.run_once()
            checkpoint = await last_checkpoint(servers, name)
            assert checkpoint is not None
            cuts.add(checkpoint.cut)
        assert checkpointer.errors == 0
    assert len(cuts) == 4
    await readers.close()


async def test_the_digest_is_over_the_sorted_heads_however_many_there_are(shop: Shop) -> None:
    # More than there are first bytes, by which they are read.
    for number in range(300):
        shop.send("Purchase.Settled", **purchase(f"user-{number}", f"pay-{number}"))
    await shop.work()
    shop.send("Refund.Apply", **admin(refund_id="r", external_ref="pay-1"))
    await shop.work()
    url = engine_url(on_database(shop.settings.control_database_url, shop.database))
    engine = create_unpooled_engine(url, READER_SETTINGS | {"default_transaction_read_only": "off"})
    async with engine.connect() as connection:
        checkpoint = await take(connection)
        heads = sorted(row[0] for row in await fetch(connection, "SELECT head FROM accounts"))
        series = sorted(
            row[0] for row in await fetch(connection, "SELECT head FROM document_series WHERE next_number > 1")
        )
        assert (checkpoint.entries, checkpoint.accounts, checkpoint.documents) == (301, 300, 301)
        assert checkpoint.accounts_sha256 == sha256(b"".join(heads)).hexdigest()
        assert checkpoint.series_sha256 == sha256(b"".join(series)).hexdigest()
        # A reader's statement may not take as long as this one.
        assert (await fetch(connection, "SHOW statement_timeout"))[0][0] == "1min"
        await connection.exec_driver_sql("SET session_replication_role = replica")
        await connection.exec_driver_sql("DELETE FROM documents WHERE sequence = 2")
        problems = await compare(connection, checkpoint)
        await connection.rollback()
        assert (await fetch(connection, "SHOW statement_timeout"))[0][0] == "5s"
    await engine.dispose()
    assert [problem.partition(":")[0] for problem in problems] == ["documents"]


async def test_the_age_of_the_last_checkpoint_grows_while_there_is_none(shop: Shop) -> None:
    name = shop.merchant.merchant_id
    readers = Pools(READER_SETTINGS, pool_size=1, merchants_max=2)
    partitions = {name: {TP(input_topic(name, "jobs"), 0)}}
    merchants = {name: replace(shop.merchant, database_url=shop.merchant.database_url + "_gone")}
    servers = shop.settings.kafka_bootstrap_servers
    checkpointer = Checkpointer(readers, shop.publisher, servers, {}, merchants, lambda: partitions)
    await checkpointer.run_once()
    begun = checkpointer.published_at[name]
    await checkpointer.run_once()
    assert (checkpointer.errors, checkpointer.published_at) == (2, {name: begun})

    merchants[name] = shop.merchant
    await readers.close()
    await checkpointer.run_once()
    assert checkpointer.published_at[name] > begun
    partitions.clear()
    await checkpointer.run_once()
    assert checkpointer.published_at == {}
    await readers.close()


async def test_what_is_under_way_is_left_to_the_next_checkpoint(shop: Shop) -> None:
    url = engine_url(shop.merchant.database_url, password=shop.merchant.password)
    writer, reader = create_unpooled_engine(url, WRITER_SETTINGS), create_unpooled_engine(url, READER_SETTINGS)
    async with writer.connect() as slow:
        await slow.exec_driver_sql("SELECT 1")
        shop.send("Purchase.Settled", **purchase("ann", "pay-1"))
        await shop.work()
        async with reader.connect() as connection:
            checkpoint = await take(connection)

    assert checkpoint.entries == 0
    async with reader.connect() as connection:
        assert (await take(connection)).entries == 1
        assert await compare(connection, checkpoint) == []
    await writer.dispose()
    await reader.dispose()
