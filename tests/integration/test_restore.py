"""A lost database comes back from a dump and from what was published since: the same books, to the byte."""

import random
import secrets
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from console.backup import backup
from console.processes import StackError
from console.restore import restore
from merchants.schema import migrate, on_database
from schemas.topics import receipts_topic, results_topic
from tests.core import wire_time
from tests.integration.shop import Shop, open_shop
from tests.services import Services
from workers.audit import verify

QUIET = lambda *_: None  # noqa: E731


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def control_url(services: Services) -> str:
    url = services.database_url(f"restore_control_{secrets.token_hex(3)}")
    await migrate(url)
    return url


@pytest_asyncio.fixture
async def shop(services: Services, control_url: str) -> AsyncIterator[Shop]:
    async with open_shop(services, control_url, f"s{secrets.token_hex(4)}") as shop:
        await shop.stock()
        yield shop


def purchase(user: str, ref: str, **members: Any) -> dict[str, Any]:
    now = wire_time(datetime.now(UTC))
    return {
        "user_id": user, "external_ref": ref, "product_code": "c100", "payment_method": "card", "order_placed_at": now,
        "settled_at": now, "pricing_snapshot": {"country": "AM", "currency": "EUR", "amount": "10.00"},
    } | members  # fmt: skip


def admin(**members: Any) -> dict[str, Any]:
    return {"actor": "ops", "justification": "a test"} | members


async def trade(shop: Shop, seed: int) -> None:
    """Send a busy hour's commands: purchases, operations, refunds, disputes, duplicates, conflicts, early birds."""
    choice = random.Random(seed)
    tag = f"{seed}"
    for number in range(20):
        user = f"user-{choice.randrange(5)}"
        ref = f"pay-{tag}-{number}"
        buyer = {"buyer": {"name": "Ann", "country": "AM"}} if choice.random() < 0.5 else {}
        if choice.random() < 0.2:
            shop.send("Refund.Apply", **admin(refund_id=f"early-{ref}", external_ref=ref, amount="1.00"))
        sent = purchase(user, ref, **buyer)
        bought = shop.send("Purchase.Settled", **sent)
        operation = f"op-{tag}-{number}"
        close = {
            "user_id": user,
            "operation_id": operation,
            "resource_unit": "token",
            "completed_at": sent["settled_at"],
        }
        if choice.random() < 0.3:
            shop.send("Operation.RecordAndClose", **close, resource_amount="7")
        shop.send("Operation.Open", user_id=user, operation_id=operation, operation_code="llm")
        shop.send("Operation.RecordAndClose", **close, resource_amount=str(choice.randrange(1, 300)))
        match choice.randrange(7):
            case 0:
                shop.send("Purchase.Settled", bought, **sent)
            case 1:
                shop.send("Purchase.Settled", **sent)
            case 2:
                shop.send("Purchase.Settled", bought, **sent | {"payment_method": "cash"})
            case 3:
                shop.send("Refund.Apply", **admin(refund_id=f"r-{ref}", external_ref=ref, amount="3.33"))
            case 4:
                shop.send("Chargeback.Apply", **admin(dispute_id=f"d-{ref}", external_ref=ref))
                shop.send("Chargeback.Reverse", **admin(dispute_id=f"d-{ref}"))
            case 5:
                shop.send("Refund.Apply", **admin(refund_id=f"w-{ref}", external_ref=f"never-{ref}"))
            case _:
                shop.send("Purchase.Settled", **purchase(user, f"dear-{ref}", product_code="nothing"))
        if choice.random() < 0.3:
            await shop.work(batch_max=choice.choice((7, 1000)))
    await shop.work(batch_max=50)


async def open_to_everybody(shop: Shop, database: str) -> list[bool]:
    """Tell of a database, if there is one, whether any role may connect to it."""
    sql = "SELECT has_database_privilege('public', oid, 'CONNECT') FROM pg_database WHERE datname = $1"
    return [row[0] for row in await shop.query(sql, database, database="postgres")]


async def test_a_lost_database_comes_back_with_the_same_bytes(shop: Shop, tmp_path: Path) -> None:
    await trade(shop, 1)
    await backup(shop.settings.control_database_url, shop.merchant.merchant_id, tmp_path / "dump")
    await trade(shop, 2)
    shop.send("User.Erase", **admin(request_id="e", user_id="user-1"))
    shop.send("Purchase.Settled", **purchase("user-1", "too-late"))
    await shop.work()
    await trade(shop, 3)
    before = await shop.tables()
    published = [await shop.published(topic(shop.merchant.merchant_id)) for topic in (results_topic, receipts_topic)]
    late = [shop.send("Purchase.Settled", **purchase("user-2", f"late-{n}")) for n in range(3)]
    await shop.flush()

    await shop.suspend()
    await shop.end()
    await shop.query(f"DROP DATABASE {shop.database} WITH (FORCE)", database="postgres")
    restored = await restore(shop.settings, shop.merchant.merchant_id, tmp_path / "dump", QUIET)

    assert restored.report.entries > 40
    assert restored.kept is None
    assert await open_to_everybody(shop, shop.database) == [False]
    assert restored.outcome.commands > 80
    after = await shop.tables()
    for name, rows in before.items():
        assert after[name] == rows, name
    await shop.suspend("active")
    shop.begin()
    assert await shop.work() == len(late)
    again = [await shop.published(topic(shop.merchant.merchant_id)) for topic in (results_topic, receipts_topic)]
    for old, new in zip(published, again, strict=True):
        assert all(message in new for message in old)
        assert len(new) == len(old) + len(late)
    results = await shop.results()
    assert [results[command]["outcome"] for command in late] == ["applied"] * 3
    report = await verify(on_database(shop.settings.control_database_url, shop.database))
    assert report.ok
    numbers = [receipt["number"] for receipt in await shop.receipts()]
    assert len(numbers) == len(set(numbers))


async def test_only_a_suspended_merchant_is_restored_and_only_from_its_own_dump(shop: Shop, tmp_path: Path) -> None:
    await backup(shop.settings.control_database_url, shop.merchant.merchant_id, tmp_path / "dump")
    with pytest.raises(StackError, match="is active"):
        await restore(shop.settings, shop.merchant.merchant_id, tmp_path / "dump", QUIET)
    with pytest.raises(StackError, match="no merchant nobody"):
        await backup(shop.settings.control_database_url, "nobody", tmp_path / "other")
    await shop.suspend()

    await shop.query("UPDATE merchant_state SET merchant_id = 'somebody'")
    await backup(shop.settings.control_database_url, shop.merchant.merchant_id, tmp_path / "dump")
    with pytest.raises(StackError, match="a backup of somebody"):
        await restore(shop.settings, shop.merchant.merchant_id, tmp_path / "dump", QUIET)
    # What was made is left for a look, not for other merchants' roles.
    assert await open_to_everybody(shop, f"{shop.database}_restored") == [False]


async def test_what_cannot_be_reproduced_leaves_the_database_alone(shop: Shop, tmp_path: Path) -> None:
    name = shop.merchant.merchant_id
    grant = {"access_period_days": 9, "user_id": "ann"}
    shop.send("Adjustment.Apply", **admin(adjustment_id="a", credits_delta=5, **grant))
    await shop.work()
    # A dump of other books: the user has a credit more.
    await shop.query("UPDATE accounts SET balance = balance + 1")
    await backup(shop.settings.control_database_url, name, tmp_path / "dump")
    await shop.query("UPDATE accounts SET balance = balance - 1")
    shop.send("Adjustment.Apply", **admin(adjustment_id="b", credits_delta=5, **grant))
    await shop.work()
    await shop.suspend()
    before = await shop.tables()

    with pytest.raises(StackError, match=r"cannot be reproduced.*balance"):
        await restore(shop.settings, name, tmp_path / "dump", QUIET)

    assert await shop.tables() == before


async def test_a_simulated_merchant_comes_back_with_its_own_time(
    services: Services, control_url: str, tmp_path: Path
) -> None:
    async with open_shop(services, control_url, f"s{secrets.token_hex(4)}", simulated=True) as shop:
        await shop.stock()
        await backup(control_url, shop.merchant.merchant_id, tmp_path / "dump")
        shop.send("Purchase.Settled", **purchase("ann", "pay-1"))
        await shop.work()
        await shop.advance(29 * 86_400)
        shop.send("Refund.Apply", **admin(refund_id="r", external_ref="pay-1", amount="2.50"))
        await shop.work()
        await shop.advance(2 * 86_400)
        shop.send("Operation.Open", user_id="ann", operation_id="op", operation_code="llm")
        await shop.work()
        before = await shop.tables()
        await shop.suspend()

        restored = await restore(shop.settings, shop.merchant.merchant_id, tmp_path / "dump", QUIET)

        assert restored.kept is not None
        after = await shop.tables()
        assert after["entries"] == before["entries"]
        assert after["documents"] == before["documents"]
        assert after["inbox"] == before["inbox"]
        assert after["merchant_state"] == before["merchant_state"]
