"""Commands that meet: in several partitions, at several workers, at once."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable

import pytest_asyncio

from tests.e2e.blackbox import CONFIG, Bus, Json, Merchant, Sent, name

MakeUser = Callable[[], str]
# What to send, and the number of the partition that gets it.
Placed = tuple[str, Json, int]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shop(bus: Bus) -> Merchant:
    merchant = await bus.register(partitions=4)
    await merchant.stock()
    return merchant


async def at_once(shop: Merchant, commands: Iterable[Placed], **options: str) -> list[Sent]:
    """Send commands to partitions of the sender's choice, without waiting between them."""
    return list(
        await asyncio.gather(
            *(shop.send(type_, members, partition=partition, **options) for type_, members, partition in commands)
        )
    )


async def answers(shop: Merchant, sent: Iterable[Sent]) -> list[Json]:
    """Return the answers; there must be one each."""
    results = [await shop.bus.results(one) for one in sent]
    assert {len(one) for one in results} == {1}
    return [one[0].body for one in results]


async def test_one_users_commands_in_all_partitions_are_numbered_without_holes(shop: Merchant, user: MakeUser) -> None:
    someone = user()
    commands: list[Placed] = []
    for turn in range(100):
        grant = {"grant_id": name(), "user_id": someone, "credits": 2, "access_period_days": 1}
        commands.append(("Grant.Apply", grant, turn % 4))
        adjustment = {"adjustment_id": name(), "user_id": someone, "credits_delta": -1}
        commands.append(("Adjustment.Apply", adjustment, (turn + 1) % 4))
        if turn % 10 == 0:
            commands.append(("Purchase.Settled", shop.purchase(someone), turn // 10 % 4))
    results = await answers(shop, await at_once(shop, commands))
    assert {one["outcome"] for one in results} == {"applied"}
    by_seq = {one["user_seq"]: one for one in results}
    assert sorted(by_seq) == list(range(1, 211))
    balance = 0
    for seq in range(1, 211):
        result = by_seq[seq]
        delta = {"Grant.Apply": 2, "Adjustment.Apply": -1, "Purchase.Settled": 100}[result["command_type"]]
        balance += delta
        assert result["balance"] == balance
        assert result["debt"] == max(0, -balance)


async def test_a_business_key_that_comes_to_all_partitions_at_once_has_one_effect(
    shop: Merchant, user: MakeUser
) -> None:
    users = [user() for _ in range(50)]
    purchases = [shop.purchase(one) for one in users]
    sent = await at_once(shop, [("Purchase.Settled", one, n) for one in purchases for n in range(4)])
    results = await answers(shop, sent)
    for first in range(0, len(results), 4):
        group = results[first : first + 4]
        assert [one["balance"] for one in group] == [100] * 4
        originals = [one for one in group if "replay_of" not in one]
        assert len(originals) == 1
        assert {one["effects"]["receipt_number"] for one in group} == {originals[0]["effects"]["receipt_number"]}
        replays = [one["replay_of"]["command_id"] for one in group if "replay_of" in one]
        assert replays == [originals[0]["command_id"]] * 3


async def test_an_identity_that_comes_to_all_partitions_at_once_has_one_answer(shop: Merchant, user: MakeUser) -> None:
    users = [user() for _ in range(50)]
    ids = [name("id") for _ in users]
    sent = []
    for someone, id_ in zip(users, ids, strict=True):
        members = {"grant_id": name(), "user_id": someone, "credits": 3, "access_period_days": 1}
        sent.append((await at_once(shop, [("Grant.Apply", members, n) for n in range(4)], id=id_))[0])
    for one in sent:
        results = await shop.bus.results(one, 4)
        assert len({(result.value, result.headers["ce_id"]) for result in results}) == 1
        assert results[0].body["balance"] == 3
        assert {result.partition for result in results} == {0, 1, 2, 3}


async def test_a_close_that_races_its_open_is_always_answered(shop: Merchant, user: MakeUser) -> None:
    commands: list[Placed] = []
    for turn in range(200):
        someone, operation_id = user(), name("op")
        opening = {"user_id": someone, "operation_id": operation_id, "operation_code": "llm"}
        pair: list[Placed] = [
            ("Operation.Open", opening, turn % 4),
            ("Operation.RecordAndClose", shop.closing(someone, operation_id, "3"), (turn + 1 + turn // 4) % 4),
        ]
        commands += pair if turn % 2 else reversed(pair)
    results = await answers(shop, await at_once(shop, commands))
    assert Counter(one["outcome"] for one in results) == {"applied": 400}
    closes = [one for one in results if one["command_type"] == "Operation.RecordAndClose"]
    assert {one["balance"] for one in closes} == {-3}


async def test_reversals_that_race_their_purchase_are_always_answered(shop: Merchant, user: MakeUser) -> None:
    commands: list[Placed] = []
    for turn in range(100):
        purchase, dispute = shop.purchase(user()), name("dp")
        ref = {"external_ref": purchase["external_ref"]}
        family: list[Placed] = [
            ("Purchase.Settled", purchase, turn % 4),
            ("Refund.Apply", {"refund_id": name(), "amount": "5.00"} | ref, (turn + 1) % 4),
            ("Chargeback.Apply", {"dispute_id": dispute, "amount": "5.00"} | ref, (turn + 2) % 4),
            ("Chargeback.Reverse", {"dispute_id": dispute}, (turn + 3) % 4),
        ]
        commands += family[turn % 4 :] + family[: turn % 4]
    results = await answers(shop, await at_once(shop, commands))
    assert Counter((one["command_type"], one["outcome"]) for one in results) == {
        (type_, "applied"): 100
        for type_ in ("Purchase.Settled", "Refund.Apply", "Chargeback.Apply", "Chargeback.Reverse")
    }
    last: dict[str, Json] = {}
    for one in results:
        if one["user_seq"] >= last.get(one["user_id"], one)["user_seq"]:
            last[one["user_id"]] = one
    assert {(one["user_seq"], one["balance"]) for one in last.values()} == {(4, 50)}


async def test_two_opens_of_one_user_at_once_leave_one_open(shop: Merchant, user: MakeUser) -> None:
    users = [user() for _ in range(50)]
    commands: list[Placed] = [
        ("Operation.Open", {"user_id": one, "operation_id": name("op"), "operation_code": "llm"}, n)
        for one in users
        for n in range(4)
    ]
    results = await answers(shop, await at_once(shop, commands))
    for first in range(0, len(results), 4):
        group = results[first : first + 4]
        assert Counter(one["outcome"] for one in group) == {"applied": 1, "rejected": 3}
        (winner,) = [one for one in group if one["outcome"] == "applied"]
        for one in group:
            if one is not winner:
                assert one["error"]["code"] == "operation_already_open"
                assert one["error"]["details"]["operation_id"] == winner["effects"]["operation_id"]


async def test_a_merchant_suspended_and_resumed_in_a_flood_answers_everything_once(
    bus: Bus, shop: Merchant, user: MakeUser
) -> None:
    someone = [user() for _ in range(20)]
    sent: list[Sent] = []
    for _ in range(3):
        grants: list[Placed] = [
            ("Grant.Apply", {"grant_id": name(), "user_id": one, "credits": 1, "access_period_days": 1}, n % 4)
            for n, one in enumerate(someone * 10)
        ]
        sent += await at_once(shop, grants)
        for type_ in ("Merchant.Suspend", "Merchant.Resume"):
            assert (await bus.control(type_, {"merchant_id": shop.id}))["outcome"] == "applied"
    results = await answers(shop, sent)
    assert max(one["balance"] for one in results) == 30
    assert Counter(one["user_seq"] for one in results) == dict.fromkeys(range(1, 31), 20)


async def test_a_merchant_registered_twice_at_once_is_one(bus: Bus) -> None:
    merchant = Merchant(bus, "m" + name("").replace("-", ""), {}, 1)
    members: Json = {"merchant_id": merchant.id, "config": CONFIG, "partitions": 1}
    results = await asyncio.gather(*(bus.control("Merchant.Register", members) for _ in range(3)))
    assert [one["outcome"] for one in results] == ["applied"] * 3
    assert len([one for one in results if "replay_of" not in one]) == 1
