"""The pipeline against a real database and broker: what it does when the fault is its own."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
import pytest_asyncio

import catalog.store
from merchants.schema import migrate
from schemas.canonical import format_time
from tests import builders
from tests.integration.shop import Shop, open_shop
from tests.services import Services
from workers import faults


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shop(services: Services) -> AsyncIterator[Shop]:
    url = services.database_url("pipeline_control")
    await migrate(url)
    async with open_shop(services, url, "pipeline") as opened:
        yield opened


@pytest.mark.parametrize("point", ["after_begin", "after_lock", "before_decide", "after_decide", "before_commit"])
async def test_a_defect_that_does_not_repeat_refuses_no_command(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    adjustment = {"adjustment_id": point, "user_id": "ann", "credits_delta": 5, "access_period_days": 5}
    command = shop.send("Adjustment.Apply", **adjustment, actor="ops", justification="alone in its batch")
    monkeypatch.setattr(faults, "_fault", faults._Fault(f"{point}:break"))

    await shop.work()

    assert (await shop.results())[command]["outcome"] == "applied"


async def test_a_merchant_whose_catalogue_cannot_be_read_waits_and_loses_nothing(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise TypeError("a defect of ours")

    await shop.stock()
    before = len(await shop.results())
    with monkeypatch.context() as patch:
        patch.setattr(catalog.store, "load", broken)
        await shop.end()
        shop.begin()
        commands = [
            shop.send("User.SignedUp", user_id=user, signed_up_at=format_time(datetime.now(UTC))) for user in "abc"
        ]
        # What is not decided is read again, for as long as it takes; the process goes on with other merchants.
        for _ in range(2):
            await shop.work()
        assert len(await shop.results()) == before

    await shop.work()
    results = await shop.results()
    assert [results[command]["outcome"] for command in commands] == ["applied"] * 3


async def test_references_are_read_by_the_patterns_in_force_before_them_in_the_same_batch(shop: Shop) -> None:
    async def refund(external_ref: str) -> str:
        command = shop.send(
            "Refund.Apply", refund_id=f"for {external_ref}", external_ref=external_ref, actor="ops", justification="x"
        )
        await send_later()
        return command

    async def configure(**changes: Any) -> str:
        command = shop.send("Merchant.Configure", config=builders.config(**changes), actor="ops")
        await send_later()
        return command

    async def send_later() -> None:
        # The order of a batch is that of the records' times, which count milliseconds.
        await shop.flush()
        await asyncio.sleep(0.01)

    refused_before = await refund("4111111111111111")
    allowed = await configure(external_ref_patterns={"card": "[0-9]{16}"})
    parked = await refund("5555555555554444")
    forbidden = await configure()
    refused_after = await refund("4012888888881881")
    await shop.work()

    results = await shop.results()
    assert [results[command]["outcome"] for command in (allowed, forbidden)] == ["applied"] * 2
    for command in (refused_before, refused_after):
        assert results[command]["error"]["code"] == "sensitive_data"
    assert parked not in results
    assert [row["id"] for row in await shop.query("SELECT id FROM parked")] == [parked]


async def test_configurations_that_undo_each_other_in_one_batch_are_all_applied_however_many_they_are(
    shop: Shop,
) -> None:
    commands = [
        shop.send(
            "Merchant.Configure",
            config=builders.config(external_ref_patterns={"card": f"[0-9]{{{13 + number % 2}}}"}),
            actor="ops",
        )
        for number in range(600)
    ]
    await shop.work()

    results = await shop.results()
    assert {results[command]["outcome"] for command in commands} == {"applied"}
