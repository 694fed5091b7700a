"""Merchants come while workers run."""

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from tests.e2e.blackbox import CONFIG, CONTROL, CONTROL_RESULTS, Bus, Merchant, completed, name, parse_time
from tests.e2e.conftest import Overdue


async def test_a_merchant_registered_while_workers_run_is_served_within_ten_seconds(
    bus: Bus, user: Callable[[], str]
) -> None:
    began = time.monotonic()
    merchant = await bus.register()
    await merchant.grant(user(), 5)
    assert time.monotonic() - began < 10


async def test_the_result_of_a_registration_names_the_merchant(bus: Bus) -> None:
    merchant_id = name("m").replace("-", "")
    members = completed("Merchant.Register", {"merchant_id": merchant_id, "config": CONFIG, "partitions": 1})
    sent = await bus.send(CONTROL, "Merchant.Register", members, key=merchant_id)
    (result,) = await bus.results(sent)
    assert result.topic == CONTROL_RESULTS
    assert result.key == merchant_id.encode()
    assert result.body["merchant_id"] == merchant_id
    assert result.body["outcome"] == "applied"
    assert result.body["effects"]["merchant_id"] == merchant_id
    parse_time(result.body["applied_at"])


async def test_a_message_sent_right_after_applied_is_answered_whatever_its_topic(
    bus: Bus, user: Callable[[], str]
) -> None:
    merchant = await bus.register(partitions=None)
    sent = []
    for partition in range(4):
        for type_, channel, members in (
            ("User.SignedUp", "users", {"user_id": user()}),
            ("Operation.Open", "operations", {"user_id": user(), "operation_id": name(), "operation_code": "none"}),
            ("Purchase.Settled", "purchases", merchant.purchase(user())),
            ("Account.Lock", "admin", {"user_id": user()}),
            ("Operation.Expire", "jobs", {"user_id": user(), "operation_id": name()}),
        ):
            sent.append(await merchant.send(type_, members, channel=channel, partition=partition))
    results = [(await bus.results(one))[0] for one in sent]
    assert [(one.partition, one.body["command_id"]) for one in results] == [(one.partition, one.id) for one in sent]


async def test_the_same_registration_again_repeats_the_outcome_and_other_content_is_a_conflict(bus: Bus) -> None:
    merchant = await bus.register()
    members = {"merchant_id": merchant.id, "config": merchant.config, "partitions": 1}
    again = await bus.control("Merchant.Register", members)
    assert again["outcome"] == "applied"
    assert again["replay_of"]["command_source"] == "urn:shop"
    other = await bus.control("Merchant.Register", members | {"config": CONFIG | {"legal_name": "Other Ltd"}})
    assert other["outcome"] == "rejected"
    assert other["error"]["code"] == "idempotency_conflict"
    assert other["error"]["details"]["fields"] == ["config.legal_name"]
    assert other["error"]["details"]["first"] == again["replay_of"]


async def test_a_merchant_id_must_fit_its_pattern(bus: Bus) -> None:
    for merchant_id in ("9shop", "Shop", "a", "shop_1", "s" * 32):
        result = await bus.control("Merchant.Register", {"merchant_id": merchant_id, "config": CONFIG})
        assert result["outcome"] == "rejected", merchant_id
        assert result["error"]["code"] == "malformed", merchant_id


async def test_an_unknown_merchant_can_be_neither_suspended_nor_resumed_nor_moved_in_time(bus: Bus) -> None:
    for type_ in ("Merchant.Suspend", "Merchant.Resume"):
        result = await bus.control(type_, {"merchant_id": "nobody-here"})
        assert result["error"]["code"] == "unknown_merchant", result
    result = await bus.control("Clock.Advance", {"merchant_id": "nobody-here", "seconds": 1})
    assert result["error"]["code"] == "unknown_merchant", result


async def test_the_clock_of_a_real_merchant_does_not_move(bus: Bus, shop: Merchant) -> None:
    result = await bus.control("Clock.Advance", {"merchant_id": shop.id, "seconds": 60})
    assert result["outcome"] == "rejected", result


async def test_a_test_clock_is_not_moved_out_of_the_calendar(bus: Bus, user: Callable[[], str]) -> None:
    merchant, someone = await bus.register(simulated=True), user()
    members = {"merchant_id": merchant.id, "seconds": 100 * 366 * 86_400}
    for _ in range(80):
        result = await bus.control("Clock.Advance", members)
        if result["outcome"] == "rejected":
            break
    assert result["error"]["code"] == "limit_exceeded", result
    # There still is room for the longest access that can be given.
    await merchant.grant(someone, 1, days=36_500)


async def test_five_merchants_registered_at_once_are_all_served(bus: Bus, user: Callable[[], str]) -> None:
    merchants = await asyncio.gather(*(bus.register() for _ in range(5)))
    granted = await asyncio.gather(*(merchant.grant(user(), 7) for merchant in merchants))
    assert [one["balance"] for one in granted] == [7] * 5


async def test_a_suspended_merchant_is_not_consumed_and_nothing_is_lost(bus: Bus, user: Callable[[], str]) -> None:
    merchant, other, someone = await bus.register(), await bus.register(), user()
    await merchant.grant(someone, 1)
    suspended = await bus.control("Merchant.Suspend", {"merchant_id": merchant.id})
    assert suspended["outcome"] == "applied", suspended
    members = {"user_id": someone, "credits": 1, "access_period_days": 1}
    waiting = [await merchant.send("Grant.Apply", members | {"grant_id": name("g")}) for _ in range(5)]
    # Another merchant is served meanwhile, and the control topic as well: the workers are not idle.
    for _ in range(5):
        await other.grant(someone, 1)
    again = await bus.control("Merchant.Suspend", {"merchant_id": merchant.id})
    assert again["outcome"] == "applied", again
    assert [bus.heard(one) for one in waiting] == [[]] * 5
    resumed = await bus.control("Merchant.Resume", {"merchant_id": merchant.id})
    assert resumed["outcome"] == "applied", resumed
    results = [(await bus.results(one))[0].body for one in waiting]
    assert [one["balance"] for one in results] == [2, 3, 4, 5, 6]
    assert [len(bus.heard(one)) for one in waiting] == [1] * 5


async def test_a_close_that_was_in_time_is_debited_however_long_the_queue_was(bus: Bus, overdue: Overdue) -> None:
    async with asyncio.timeout(90):
        while datetime.now(UTC) <= overdue.deadline + timedelta(seconds=1):
            await asyncio.sleep(0.1)
    assert bus.heard(overdue.close) == []
    await bus.control("Merchant.Resume", {"merchant_id": overdue.merchant.id})
    (result,) = await bus.results(overdue.close)
    assert (result.body["outcome"], result.body["balance"]) == ("applied", -5), result.body
    assert parse_time(result.body["applied_at"]) > overdue.deadline


async def test_bad_messages_in_the_control_topic_stop_nothing(bus: Bus) -> None:
    await bus.send(CONTROL, "Merchant.Suspend", b"x", key="k", headers={"ce_id": None})
    await bus.send(CONTROL, None, None, key="k", headers={"ce_type": None, "ce_source": None})
    bad = [
        await bus.send(CONTROL, type_, value, key="k")
        for type_, value in (
            ("Merchant.Suspend", b"\xff"),
            ("Merchant.Suspend", None),
            ("Merchant.Register", b"{}"),
            ("Merchant.Close", b"{}"),
            ("Grant.Apply", b'{"grant_id": "g"}'),
        )
    ]
    answer = await bus.control("Merchant.Suspend", {"merchant_id": "nobody-here"})
    assert answer["error"]["code"] == "unknown_merchant"
    codes = [(await bus.results(one))[0].body["error"]["code"] for one in bad]
    assert codes[:4] == ["malformed", "malformed", "malformed", "unknown_command"]
    assert codes[4] in ("malformed", "wrong_topic")
