"""The pipeline against a real database and broker: what it does when the fault is its own."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
import pytest_asyncio
from aiokafka import TopicPartition as TP

import catalog.store
from console.restore import _read
from merchants.schema import migrate
from schemas.canonical import format_time
from tests import builders
from tests.integration.shop import Shop, open_shop
from tests.services import Services
from workers import faults
from workers.lanes import Lease, Record


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


async def records_from(shop: Shop, offsets: dict[TP, int]) -> list[Record]:
    """Return what lies behind the offsets, by time."""
    async with shop.consumer() as consumer:
        found = await _read(consumer, offsets)
    return sorted((record for part in found.values() for record in part), key=lambda record: record.timestamp)


async def test_what_follows_a_cut_is_applied_though_a_partition_before_it_is_read_again(shop: Shop) -> None:
    before = await shop.positions()
    shop.send("User.SignedUp", user_id="seen")
    await shop.work()
    starts = await shop.positions()
    (users,) = {tp for tp, next_offset in starts.items() if next_offset != before[tp]}
    # The worker before was killed when the broker had its last result.
    sql = "UPDATE positions SET published_next = published_next - 1 WHERE topic = $1 AND partition = $2"
    await shop.query(sql, *users)
    await shop.end()
    shop.begin()
    for send in (
        partial(shop.send, "User.SignedUp", user_id="seen"),
        partial(
            shop.send,
            "Merchant.Configure",
            config=builders.config(external_ref_patterns={"cut": "[0-9]{16}"}),
            actor="ops",
        ),
    ):
        send()
        await shop.flush()
        await asyncio.sleep(0.01)
    opened = shop.send("Operation.Open", user_id="seen", operation_id="behind", operation_code="unknown")
    await shop.flush()
    batch = await records_from(shop, starts)
    lease = Lease(2, "the tests", list(starts), object())

    outcome = await shop.pipeline.process(shop.merchant.merchant_id, batch, lease)

    assert outcome.published is None or await outcome.published
    assert outcome.seek == {users: starts[users] - 1}
    assert users in lease.first
    assert opened in await shop.results()


@pytest.mark.parametrize("fault", [None, "after_positions:raise"])
async def test_a_gap_is_read_again_though_the_first_try_to_find_it_failed(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, fault: str | None
) -> None:
    await shop.work()
    starts = await shop.positions()
    for number in range(3):
        shop.send("Operation.Open", user_id="gap", operation_id=f"{fault} {number}", operation_code="unknown")
    await shop.flush()
    missing, *batch = await records_from(shop, starts)
    monkeypatch.setattr(faults, "_fault", faults._Fault(fault) if fault else None)

    outcome = await shop.pipeline.process(
        shop.merchant.merchant_id, batch, Lease(3, "the tests", list(starts), object())
    )

    assert outcome.published is None or await outcome.published
    assert outcome.seek == {TP(missing.topic, missing.partition): missing.offset}
