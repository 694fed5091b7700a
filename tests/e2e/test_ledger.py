"""Lots, FIFO, debt, expiry and operations, seen through results."""

from collections.abc import Callable

import pytest

from tests.e2e.blackbox import Bus, Json, Merchant, name, parse_time

MakeUser = Callable[[], str]
DAY = 86_400


async def test_the_worked_example(simulated: Merchant, user: MakeUser) -> None:
    shop, someone = simulated, user()
    await shop.sellable("c", 100, days=10)
    await shop.grant(someone, 10, days=60)
    await shop.grant(someone, 100, days=60)
    assert (await shop.use(someone, "50"))["balance"] == 60
    debited = await shop.use(someone, "80")
    assert (debited["balance"], debited["debt"]) == (-20, 20)
    opening = {"user_id": someone, "operation_id": name(), "operation_code": "llm"}
    await shop.refused("insufficient_balance", "Operation.Open", opening)
    _, bought = await shop.buy(someone, "c")
    assert (bought["balance"], bought["debt"], bought["effects"]["credits"]) == (80, 0, 100)
    await shop.advance(11 * DAY)
    after = await shop.grant(someone, 1)
    assert after["balance"] == 1
    expired = [one for one in shop.said("results") if one.body["command_type"] == "Lot.Expire"]
    mentioned = [one.body.get("time_effects", {}).get("expired", []) for one in shop.said("results")]
    written = [one.body["effects"] for one in expired] + [lot for lots in mentioned for lot in lots]
    ours = {one["entry_id"]: abs(one["credits"]) for one in written if one.get("lot_id") == bought["effects"]["lot_id"]}
    assert list(ours.values()) == [80]


async def test_debits_take_from_the_oldest_lot_first(simulated: Merchant, user: MakeUser) -> None:
    someone = user()
    await simulated.grant(someone, 10, days=2)
    await simulated.grant(someone, 10, days=1)
    await simulated.use(someone, "13")
    # The first lot is empty, of the second 7 are left: only they expire.
    await simulated.advance(3 * DAY)
    last = await simulated.grant(someone, 1)
    assert last["balance"] == 1


async def test_time_effects_are_told_once_by_the_command_that_wrote_them(simulated: Merchant, user: MakeUser) -> None:
    someone = user()
    granted = await simulated.grant(someone, 10, days=1)
    await simulated.advance(2 * DAY)
    result = await simulated.grant(someone, 5)
    again = await simulated.grant(someone, 5)
    assert (again["balance"], again["user_seq"]) == (10, 4)
    assert "time_effects" not in again
    told = [
        one.body
        for one in simulated.said("results")
        if granted["effects"]["lot_id"]
        in [lot["lot_id"] for lot in one.body.get("time_effects", {}).get("expired", [])]
    ]
    written = [
        one.body
        for one in simulated.said("results")
        if one.body["command_type"] == "Lot.Expire"
        and one.body["effects"].get("lot_id") == granted["effects"]["lot_id"]
    ]
    assert len(told) + len(written) >= 1
    assert len(told) <= 1
    assert result["balance"] == 5


async def test_what_is_due_is_written_even_when_the_command_is_refused(
    bus: Bus, changeable: Merchant, user: MakeUser
) -> None:
    shop = changeable
    await shop.configure()
    for _ in range(10):
        someone = user()
        lot_id = (await shop.grant(someone, 10, days=1))["effects"]["lot_id"]
        operation_id = await shop.open(someone)
        body = await _refused_after_two_days(bus, shop, someone)
        assert body["error"]["code"] == "unknown_operation_type"
        assert (body["balance"], body["user_seq"]) == (0, 2)
        written = (await shop.applied("Lot.Expire", user_id=someone, lot_id=lot_id))["effects"]
        if effects := body.get("time_effects"):
            assert effects["expired"] == [{"lot_id": lot_id, "entry_id": written["entry_id"], "credits": 10}]
            assert effects["timed_out"] == [operation_id]
            return
    # No order is promised between topics: a job may come first, but hardly each time.
    raise AssertionError("a job was always faster")


async def _refused_after_two_days(bus: Bus, shop: Merchant, someone: str) -> Json:
    """Send an Open of an unknown type that is consumed when the user's lot and operation are due."""
    await bus.control("Merchant.Suspend", {"merchant_id": shop.id})
    wrong = {"user_id": someone, "operation_id": name(), "operation_code": "unknown"}
    sent = await shop.send("Operation.Open", wrong)
    await shop.advance(2 * DAY)
    await bus.control("Merchant.Resume", {"merchant_id": shop.id})
    return (await bus.results(sent))[0].body


async def test_an_expired_lot_pays_no_debit_and_expiry_makes_no_debt(simulated: Merchant, user: MakeUser) -> None:
    someone = user()
    await simulated.grant(someone, 10, days=1)
    await simulated.advance(DAY)
    result = await simulated.adjust(someone, -4)
    assert (result["balance"], result["debt"]) == (-4, 4)
    full = await simulated.grant(someone, 3)
    assert (full["effects"]["credits"], full["balance"], full["debt"]) == (3, -1, 1)


async def test_a_lot_with_nothing_left_expires_without_an_entry(simulated: Merchant, user: MakeUser) -> None:
    someone = user()
    granted = await simulated.grant(someone, 10, days=1)
    await simulated.adjust(someone, -10)
    await simulated.advance(2 * DAY)
    result = await simulated.do("Lot.Expire", user_id=someone, lot_id=granted["effects"]["lot_id"])
    assert result["outcome"] == "applied", result
    assert "entry_id" not in result["effects"]
    assert result["effects"]["credits"] == 0
    assert (await simulated.grant(someone, 1))["user_seq"] == 3


async def test_unknown_lots_are_refused(shop: Merchant, user: MakeUser) -> None:
    someone = user()
    mine = await shop.grant(someone, 1)
    await shop.refused("unknown_lot", "Lot.Expire", user_id=someone, lot_id="nothing")
    other = user()
    await shop.grant(other, 1)
    await shop.refused("unknown_lot", "Lot.Expire", user_id=other, lot_id=mine["effects"]["lot_id"])


async def test_an_adjustment_needs_a_period_when_it_gives(shop: Merchant, user: MakeUser) -> None:
    adjustment = {"user_id": user(), "adjustment_id": name()}
    result = await shop.do("Adjustment.Apply", adjustment, credits_delta=5)
    assert result["error"]["code"] == "malformed"
    result = await shop.do("Adjustment.Apply", adjustment, credits_delta=0)
    assert result["error"]["code"] in ("malformed", "limit_exceeded")


async def test_a_grant_is_either_a_product_or_credits_and_days(shop: Merchant, user: MakeUser) -> None:
    grant = {"user_id": user(), "grant_id": name()}
    for members in ({}, {"credits": 5}, {"access_period_days": 5}):
        result = await shop.do("Grant.Apply", grant, **members)
        assert result["error"]["code"] == "malformed", members


@pytest.mark.parametrize(
    ("rate", "minimum", "amount", "credits"),
    [
        ("1", None, "5", 5),
        ("1", None, "5.000001", 6),
        ("0.01", None, "1", 1),
        ("0.01", None, "100", 1),
        ("0.01", None, "100.000001", 2),
        ("0.000001", None, "999999.999999", 1),
        ("0.000001", 7, "1", 7),
        ("0.1", 3, "30", 3),
        ("0.1", 3, "30.1", 4),
        ("2.5", None, "0.000001", 1),
        ("0.3", None, "10", 3),
        ("1.1", None, "10", 11),
    ],
)
async def test_credits_are_rounded_up_exactly(
    shop: Merchant, user: MakeUser, rate: str, minimum: int | None, amount: str, credits: int
) -> None:
    code, someone = name("o"), user()
    await shop.rate(code, rate, **({} if minimum is None else {"minimum_charge": minimum}))
    await shop.grant(someone, 1000)
    result = await shop.use(someone, amount, code)
    assert (abs(result["effects"]["credits"]), result["balance"]) == (credits, 1000 - credits)


async def test_opens_are_refused_in_the_order_of_the_specification(shop: Merchant, user: MakeUser) -> None:
    someone = user()
    running = await shop.open(someone)
    await shop.adjust(someone, -5)
    await shop.applied("Account.Lock", user_id=someone)

    def opening(code: str) -> Json:
        return {"user_id": someone, "operation_id": name(), "operation_code": code}

    await shop.refused("unknown_operation_type", "Operation.Open", opening("none"))
    await shop.refused("account_locked", "Operation.Open", opening("llm"))
    await shop.applied("Account.Unlock", user_id=someone)
    refused = await shop.refused("operation_already_open", "Operation.Open", opening("llm"))
    details = refused["error"]["details"]
    assert (details["operation_id"], details["operation_code"]) == (running, "llm")
    assert 0 < details["seconds_remaining"] <= 900
    parse_time(details["opened_at"])
    await shop.applied("Operation.Cancel", user_id=someone, operation_id=running)
    await shop.refused("insufficient_balance", "Operation.Open", opening("llm"))
    await shop.adjust(someone, 5, access_period_days=1)
    # A balance of zero is enough.
    await shop.applied("Operation.Open", opening("llm"))


async def test_a_refused_command_creates_no_account(shop: Merchant, user: MakeUser) -> None:
    someone = user()
    refused = {"user_id": someone, "operation_id": name(), "operation_code": "none"}
    result = await shop.refused("unknown_operation_type", "Operation.Open", refused)
    assert result.get("user_seq", 0) == 0


async def test_a_lock_stops_opens_only_and_ends_by_itself(simulated: Merchant, user: MakeUser) -> None:
    someone = user()
    await simulated.grant(someone, 100)
    operation_id = await simulated.open(someone)
    await simulated.applied("Account.Lock", user_id=someone, until=simulated.now(3600))
    await simulated.applied("Operation.RecordAndClose", simulated.closing(someone, operation_id, "3"))
    await simulated.buy(someone)
    opening = {"user_id": someone, "operation_id": name(), "operation_code": "llm"}
    await simulated.refused("account_locked", "Operation.Open", opening)
    await simulated.advance(3601)
    await simulated.open(someone)


async def test_closes_are_refused_for_the_right_reason(shop: Merchant, user: MakeUser) -> None:
    someone, other = user(), user()
    await shop.grant(other, 5)
    operation_id = await shop.open(someone, workflow_id="w-1")
    closing = shop.closing(someone, operation_id, "3")
    await shop.refused("operation_not_found", "Operation.RecordAndClose", closing | {"user_id": other})
    await shop.refused("resource_unit_mismatch", "Operation.RecordAndClose", closing | {"resource_unit": "SECOND"})
    await shop.refused("workflow_mismatch", "Operation.RecordAndClose", closing | {"workflow_id": "w-2"})
    both = closing | {"resource_unit": "SECOND", "workflow_id": "w-2"}
    await shop.refused("resource_unit_mismatch", "Operation.RecordAndClose", both)
    closed = await shop.applied("Operation.RecordAndClose", closing)
    assert (closed["balance"], closed["debt"]) == (-3, 3)
    cancel = {"user_id": someone, "operation_id": operation_id}
    await shop.refused("operation_not_open", "Operation.Cancel", cancel)
    await shop.adjust(someone, 10, access_period_days=1)
    second = await shop.open(someone)
    await shop.applied("Operation.Cancel", user_id=someone, operation_id=second)
    await shop.refused("operation_not_open", "Operation.RecordAndClose", shop.closing(someone, second, "3"))
    await shop.refused("operation_not_found", "Operation.Cancel", cancel | {"user_id": other})


@pytest.mark.parametrize("policy", ["refuse", "debit"])
async def test_a_late_close_follows_the_policy(changeable: Merchant, user: MakeUser, policy: str) -> None:
    shop, someone = changeable, user()
    await shop.configure(late_close=policy)
    await shop.grant(someone, 100, days=60)
    operation_id = await shop.open(someone)
    await shop.advance(16 * 60)

    def timed_out() -> bool:
        return any(
            (one.body["command_type"], one.body.get("user_id"), one.body["outcome"])
            == ("Operation.Expire", someone, "applied")
            for one in shop.said("results")
        )

    await shop.bus.until("the timeout by the job", timed_out)
    # The slot is free.
    second = await shop.open(someone)
    late = shop.closing(someone, operation_id, "30")
    if policy == "refuse":
        await shop.refused("operation_timed_out", "Operation.RecordAndClose", late)
        await shop.refused("operation_timed_out", "Operation.RecordAndClose", late)
        balance = 100
    else:
        balance = (await shop.applied("Operation.RecordAndClose", late))["balance"]
        assert balance == 70
    closed = await shop.applied("Operation.RecordAndClose", shop.closing(someone, second, "1"))
    assert closed["balance"] == balance - 1


async def test_users_do_not_wait_for_each_other(shop: Merchant, user: MakeUser) -> None:
    users = [user() for _ in range(50)]
    results = await shop.together(
        ("Operation.Open", {"user_id": one, "operation_id": f"o{one}", "operation_code": "llm"}) for one in users
    )
    assert {one["outcome"] for one in results} == {"applied"}
    results = await shop.together(("Operation.RecordAndClose", shop.closing(one, f"o{one}", "2")) for one in users)
    assert [(one["balance"], one["user_seq"]) for one in results] == [(-2, 1)] * 50


async def test_many_commands_of_one_user_are_numbered_without_holes(shop: Merchant, user: MakeUser) -> None:
    someone = user()
    results = await shop.together(
        ("Grant.Apply", {"grant_id": name(), "user_id": someone, "credits": 1, "access_period_days": 1})
        for _ in range(100)
    )
    assert [(one["user_seq"], one["balance"]) for one in results] == [(n, n) for n in range(1, 101)]
