"""Lots, entries, first in first out, debt and expiry (spec §3)."""

from datetime import timedelta

import pytest

from ledger.chain import seal
from tests.core import START, Core, admin, give, opening, product, purchase, shop, take, wire_time

LADDER = [
    # credits of the lots, days each lasts; debit; what remains after it; debt
    ([], 40, [], 40),
    ([100], 40, [60], 0),
    ([100], 100, [0], 0),
    ([100, 50], 120, [0, 30], 0),
    ([100, 50], 150, [0, 0], 0),
    ([100, 50, 25], 160, [0, 0, 15], 0),
    ([100, 50, 25], 175, [0, 0, 0], 0),
    ([100, 50, 25], 200, [0, 0, 0], 25),
]


@pytest.mark.parametrize(("lots", "debit", "remaining", "debt"), LADDER)
def test_a_debit_takes_from_the_oldest_lots_and_the_rest_is_debt(
    lots: list[int], debit: int, remaining: list[int], debt: int
) -> None:
    core = shop()
    for credits in lots:
        give(core, credits)
    before = sum(lots)

    result = take(core, debit)

    assert core.remaining("u") == remaining
    assert (result["balance"], result["debt"]) == (before - debit, debt)
    # The next lot pays the debt first, and what it has left is all there is.
    after = give(core, 30)
    assert core.remaining("u") == [*remaining, max(0, 30 - debt)]
    assert after["balance"] == before - debit + 30
    assert after["debt"] == max(0, debt - 30)


def test_the_worked_example_of_the_specification_comes_out_as_told() -> None:
    core = shop()
    give(core, 10, days=30)
    give(core, 100, days=30)

    assert take(core, 50)["balance"] == 60
    assert core.remaining("u") == [0, 60]

    second = take(core, 80)
    assert (second["balance"], second["debt"]) == (-20, 20)
    assert core.remaining("u") == [0, 0]

    assert core.refused("Operation.Open", **opening()) == "insufficient_balance"

    bought = core.applied("Purchase.Settled", **purchase())
    assert bought["effects"]["credits"] == 100
    assert bought["balance"] == 80
    assert core.remaining("u") == [0, 0, 80]

    expired = core.wait(days=30).do("Operation.Open", **opening("op-2"))
    (lot,) = expired["time_effects"]["expired"]
    assert (lot["lot_id"], lot["credits"]) == (bought["effects"]["lot_id"], 80)
    assert expired["balance"] == 0
    assert core.history("u")[-1].amount == -80


def test_lots_are_used_in_the_order_they_were_issued_and_not_in_which_they_expire() -> None:
    core = shop()
    give(core, 10, days=300)
    give(core, 10, days=1)

    take(core, 10)

    assert core.remaining("u") == [0, 10]


def test_a_lot_is_always_issued_at_full_value_whatever_the_debt() -> None:
    core = shop()
    take(core, 500)

    result = core.applied("Purchase.Settled", **purchase())

    assert result["effects"]["credits"] == 100
    assert core.history("u")[-1].amount == 100
    assert core.lots("u")[0].credits == 100
    assert core.figures("u") == (-400, 400)


def test_a_new_lot_pays_the_oldest_debt_first_without_more_entries() -> None:
    core = shop()
    take(core, 30)
    take(core, 50)

    give(core, 40)

    assert len(core.history("u")) == 3
    paid = [(a.entry_seq, a.lot_seq, a.at_seq, a.credits) for a in core.allocations[core.account_id("u")]]
    assert paid == [(1, 3, 3, 30), (2, 3, 3, 10)]
    give(core, 100)
    paid = [(a.entry_seq, a.lot_seq, a.at_seq, a.credits) for a in core.allocations[core.account_id("u")]]
    assert paid[2:] == [(2, 4, 4, 40)]
    assert core.figures("u") == (60, 0)


def test_a_lot_lasts_its_days_of_24_hours_and_not_a_microsecond_longer() -> None:
    core = shop(now=START)
    lot_id = give(core, 10, days=2)["effects"]["lot_id"]
    job = {"user_id": "u", "lot_id": lot_id}

    core.now = START + timedelta(hours=48) - timedelta(microseconds=1)
    assert core.refused("Lot.Expire", **job) == "not_due"
    core.now = START + timedelta(hours=48)
    assert core.applied("Lot.Expire", **job)["effects"]["credits"] == 10
    assert core.figures("u") == (0, 0)


def test_an_expired_lot_pays_nothing_even_when_its_expiry_was_not_written_yet() -> None:
    core = shop()
    give(core, 10, days=1)
    give(core, 100, days=10)
    core.wait(days=1)

    result = take(core, 30)

    assert [lot["credits"] for lot in result["time_effects"]["expired"]] == [10]
    assert core.remaining("u") == [0, 70]
    assert result["balance"] == 70


def test_expiries_are_written_in_the_order_in_which_they_fell_due_then_of_issue() -> None:
    core = shop()
    give(core, 1, days=3)
    give(core, 2, days=1)
    give(core, 4, days=3)
    give(core, 8, days=2)
    core.wait(days=4)

    result = core.do("Operation.Open", **opening())

    assert [lot["credits"] for lot in result["time_effects"]["expired"]] == [2, 8, 1, 4]
    expiries = core.history("u")[4:]
    assert [entry.amount for entry in expiries] == [-2, -8, -1, -4]
    assert {entry.reason for entry in expiries} == {"expiry"}
    assert [entry.effective_at for entry in expiries] == [START + timedelta(days=d) for d in (1, 2, 3, 3)]
    assert {entry.created_at for entry in expiries} == {core.now}


def test_what_was_due_stays_written_when_the_command_is_refused() -> None:
    core = shop()
    give(core, 10, days=1)
    core.wait(days=2)

    result = core.do("Purchase.Settled", **purchase(product_code="nothing"))

    assert result["outcome"] == "rejected"
    assert [lot["credits"] for lot in result["time_effects"]["expired"]] == [10]
    assert (result["user_seq"], result["balance"]) == (2, 0)


def test_a_duplicate_lets_no_time_pass() -> None:
    core = shop()
    message = core.message(
        "Adjustment.Apply", admin(adjustment_id="a", user_id="u", credits_delta=9, access_period_days=1)
    )
    first = core.published([message])
    core.wait(days=2)

    assert core.published([message]) == first
    assert core.figures("u") == (9, 0)


def test_a_lot_with_nothing_left_gets_no_expiry_entry() -> None:
    core = shop()
    lot_id = give(core, 10, days=1)["effects"]["lot_id"]
    take(core, 10)
    core.wait(days=2)

    result = core.applied("Lot.Expire", user_id="u", lot_id=lot_id)

    assert result["effects"] == {"lot_id": lot_id, "credits": 0}
    assert result["user_seq"] == 2


def test_the_expiry_job_answers_the_same_for_a_lot_already_written() -> None:
    core = shop()
    lot_id = give(core, 10, days=1)["effects"]["lot_id"]
    core.wait(days=1)
    first = core.applied("Lot.Expire", user_id="u", lot_id=lot_id)

    again = core.wait(days=1).applied("Lot.Expire", user_id="u", lot_id=lot_id)

    assert again["effects"] == first["effects"]
    assert first["effects"] == {"lot_id": lot_id, "credits": 10, "entry_id": core.name_entry("u", 2)}


@pytest.mark.parametrize("lot_id", ["nothing", "0000000000000001-1"])
def test_the_expiry_job_refuses_a_lot_that_is_not_the_users(lot_id: str) -> None:
    core = shop()
    give(core, 10, days=1)

    assert core.refused("Lot.Expire", user_id="u", lot_id=lot_id) == "unknown_lot"


def test_expiry_makes_no_debt_and_leaves_a_later_lot_alone() -> None:
    core = shop()
    give(core, 10, days=1)
    give(core, 20, days=9)
    core.wait(days=5)

    result = take(core, 25)

    assert (result["balance"], result["debt"]) == (-5, 5)
    assert core.remaining("u") == [0, 0]


def test_entries_that_are_no_operations_say_what_they_are() -> None:
    core = shop(None)
    core.applied(
        "Product.Create", **product("W", credits=5, distribution="grant", grant_policy="apply_on_signup", prices=...)
    )
    core.applied("User.SignedUp", user_id="u")
    core.applied("Purchase.Settled", **purchase(payment_method="idram"))
    core.applied("Grant.Apply", **admin(grant_id="g", user_id="u", credits=7, access_period_days=1))
    give(core, 3, days=60)
    take(core, 2)
    core.applied("Chargeback.Apply", **admin(dispute_id="d", external_ref="pay-1", amount="1.00"))
    core.applied("Chargeback.Reverse", **admin(dispute_id="d"))
    core.applied("Refund.Apply", **admin(refund_id="r", external_ref="pay-1", amount="2.50"))
    core.wait(days=1)
    core.do("Operation.Open", **opening())

    told = [(e.reason, e.operation_type, str(e.resource_amount), e.resource_unit) for e in core.history("u")]

    assert told == [
        ("welcome", "welcome_grant", "5", "CREDIT"),
        ("purchase", "idram", "10", "USD"),
        ("promo", "promo_grant", "7", "CREDIT"),
        ("adjustment", "credit_adjustment", "3", "CREDIT"),
        ("adjustment", "debit_adjustment", "2", "CREDIT"),
        ("chargeback", "chargeback", "1", "USD"),
        ("chargeback", "chargeback_reversal", "1", "USD"),
        ("refund", "refund", "2.5", "USD"),
        ("expiry", "lot_expiry", "7", "CREDIT"),
    ]


def test_every_user_has_a_sequence_of_entries_of_his_own() -> None:
    core = shop()
    for user_id in ("a", "b", "a"):
        give(core, 1, user_id=user_id)

    assert [entry.user_seq for entry in core.history("a")] == [1, 2]
    assert [entry.user_seq for entry in core.history("b")] == [1]


def test_a_change_of_any_entry_lot_or_allocation_breaks_the_chain() -> None:
    core = shop()
    give(core, 10)
    take(core, 4)
    first, second = core.history("u")
    (lot,), (allocation,) = core.lots("u"), core.allocations[core.account_id("u")]

    assert seal(first.hash, second, None, [allocation]) == second.hash
    assert seal(first.hash, second._replace(amount=-3), None, [allocation]) != second.hash
    assert seal(first.hash, second, None, [allocation._replace(credits=3)]) != second.hash
    lot.expires_at += timedelta(days=1)
    assert seal(bytes(32), first, lot, []) != first.hash
    lot.expires_at -= timedelta(days=1)


def test_a_refused_command_makes_no_account() -> None:
    core = shop()

    assert core.refused("Purchase.Settled", **purchase(amount="9.00")) == "price_mismatch"
    assert core.refused("Grant.Apply", **admin(grant_id="g", user_id="u", product_code="nothing")) == "unknown_product"
    assert core.refused("Operation.Open", **opening(operation_code="nothing")) == "unknown_operation_type"

    assert core.books.accounts == {}


def test_now_is_never_before_the_newest_entry_of_the_account() -> None:
    core = shop()
    give(core, 10)
    newest = core.now
    core.wait(seconds=-30)

    result = take(core, 1)

    assert result["applied_at"] == wire_time(newest)


def test_many_commands_of_one_user_in_one_batch_keep_the_sums() -> None:
    core = Core()
    for size in (1, 10, 100):
        batch = []
        for number in range(size):
            key = {"adjustment_id": f"{size}-{number}", "user_id": "u", "access_period_days": 5}
            batch.append(core.message("Adjustment.Apply", admin(**key, credits_delta=3 if number % 2 else -2)))
        core.batch(batch)

    assert core.figures("u")[0] == 3 * 55 - 2 * 56
