"""Purchases, refunds, chargebacks and won disputes; grants and adjustments (spec §2, §7)."""

import os
from datetime import timedelta
from decimal import Decimal
from itertools import permutations
from typing import Any

import pytest

from tests.core import START, Core, admin, config, give, product, purchase, shop, take, wire_time

FORGIVE = {"refund_policy": {"shortfall": "forgive"}, "chargeback_policy": {"shortfall": "forgive"}}


def bought(settings: dict[str, Any] | None = None, credits: int = 100, amount: str = "10.00", days: int = 30) -> Core:
    core = Core(settings)
    prices = [{"country": "*", "currency": "USD", "amount": amount}]
    core.applied("Product.Create", **product(credits=credits, access_period_days=days, prices=prices))
    core.applied("Purchase.Settled", **purchase(amount=amount))
    return core


def refund(core: Core, refund_id: str, amount: str | None = None, external_ref: str = "pay-1") -> dict[str, Any]:
    return core.do("Refund.Apply", **admin(refund_id=refund_id, external_ref=external_ref, amount=amount))


def chargeback(core: Core, dispute_id: str, amount: str | None = None) -> dict[str, Any]:
    return core.do("Chargeback.Apply", **admin(dispute_id=dispute_id, external_ref="pay-1", amount=amount))


def win(core: Core, dispute_id: str) -> dict[str, Any]:
    return core.do("Chargeback.Reverse", **admin(dispute_id=dispute_id))


def code(result: dict[str, Any]) -> str | None:
    found: str | None = result.get("error", {}).get("code")
    return found


# Purchases


def test_a_purchase_issues_the_whole_lot_its_entry_and_a_numbered_receipt() -> None:
    core = shop()

    result = core.applied("Purchase.Settled", **purchase())

    entry_id = core.name_entry("u", 1)
    assert result["effects"] == {
        "lot_id": entry_id,
        "entry_id": entry_id,
        "credits": 100,
        "expires_at": wire_time(START + timedelta(days=30)),
        "receipt_number": "R-2026-0001",
    }
    assert (result["user_seq"], result["balance"], result["debt"]) == (1, 100, 0)
    (document,) = core.document_bodies()
    assert document["receipt_number"] == "R-2026-0001"
    assert document["issued_at"] == result["applied_at"]


REFUSED = [
    ({"product_code": "nothing"}, "unknown_product"),
    ({"product_code": "W"}, "not_for_sale"),
    ({"product_code": "LATER"}, "product_not_active"),
    ({"product_code": "UNPRICED"}, "not_for_sale"),
    ({"amount": "10.01"}, "price_mismatch"),
    ({"currency": "EUR"}, "price_mismatch"),
    ({"order_placed_at": wire_time(START - timedelta(seconds=1))}, "product_not_active"),
    ({"order_placed_at": wire_time(START + timedelta(minutes=5, microseconds=1))}, "malformed"),
]


@pytest.mark.parametrize(("changes", "expected"), REFUSED)
def test_a_paid_order_is_refused_with_the_exact_reason(changes: dict[str, Any], expected: str) -> None:
    core = shop()
    core.applied("Product.Create", **product("W", distribution="grant", grant_policy="manual_grant", prices=...))
    later = wire_time(START + timedelta(days=1))
    core.applied("Product.Create", **product("LATER", effective_at=later))
    core.applied("Product.Create", **product("UNPRICED", prices=...))

    assert core.refused("Purchase.Settled", **purchase(**changes)) == expected

    assert core.documents == []
    # The same payment, corrected, is decided afresh under its own reference.
    assert core.do("Purchase.Settled", **purchase())["outcome"] == "applied"


def test_an_order_placed_at_most_five_minutes_ahead_counts_as_now() -> None:
    core = shop()

    result = core.do("Purchase.Settled", **purchase(order_placed_at=wire_time(START + timedelta(minutes=5))))

    assert result["outcome"] == "applied"


def test_an_archive_after_the_order_does_not_matter() -> None:
    core = shop()
    core.wait(minutes=1).applied("Product.Archive", product_code="P", actor="admin")
    core.applied("ProductPrice.Archive", product_code="P", country="*", currency="USD", actor="admin")
    core.wait(days=2)

    assert core.do("Purchase.Settled", **purchase())["outcome"] == "applied"
    late = purchase(external_ref="pay-2", order_placed_at=wire_time(START + timedelta(minutes=1)))
    assert core.refused("Purchase.Settled", **late) == "product_not_active"


def test_the_price_in_force_when_the_order_was_placed_counts() -> None:
    core = shop()
    core.wait(hours=1)
    price = {"product_code": "P", "country": "*", "currency": "USD", "actor": "admin"}
    core.applied("ProductPrice.Archive", **price)
    core.applied("ProductPrice.Create", **price, amount="12.00")
    core.wait(hours=1)

    assert core.refused("Purchase.Settled", **purchase(amount="12.00")) == "price_mismatch"
    assert core.do("Purchase.Settled", **purchase())["outcome"] == "applied"
    today = wire_time(START + timedelta(hours=1))
    later = purchase(external_ref="pay-2", amount="12.00", order_placed_at=today)
    assert core.do("Purchase.Settled", **later)["outcome"] == "applied"


def test_amounts_are_compared_as_numbers() -> None:
    core = shop()

    assert core.do("Purchase.Settled", **purchase(amount="10"))["outcome"] == "applied"
    assert core.document_bodies()[0]["amount"] == "10.00"


def test_a_refused_payment_is_noted_for_attention() -> None:
    core = shop()
    desk = core._desk()
    message = core.message("Purchase.Settled", purchase(amount="1.00"))

    desk.receive(core._decoded(message))

    ((_, external_ref, refusal),) = desk.refused_purchases
    assert (external_ref, refusal.code) == ("pay-1", "price_mismatch")


# Refunds


def test_a_refund_without_an_amount_is_all_that_is_left() -> None:
    core = bought()
    refund(core, "r1", "2.50")

    result = refund(core, "r2")

    assert result["effects"]["credits_taken"] == 75
    assert core.document_bodies()[-1]["amount"] == "7.50"
    assert core.figures("u") == (0, 0)
    assert code(refund(core, "r3")) == "already_reversed"


@pytest.mark.parametrize("order", list(permutations(["3.33", "3.33", "3.34"])))
@pytest.mark.parametrize("credits", [1, 7, 100, 999])
def test_three_odd_parts_end_exactly_at_the_credits_of_the_lot(order: tuple[str, ...], credits: int) -> None:
    core = bought(credits=credits)

    taken = [refund(core, f"r{n}", amount)["effects"]["credits_taken"] for n, amount in enumerate(order)]

    assert sum(taken) == credits
    assert core.figures("u") == (0, 0)
    reversed_before = Decimal(0)
    for amount, credits_taken in zip(order, taken, strict=True):
        reversed_before += Decimal(amount)
        assert credits_taken <= credits * reversed_before / 10


def test_credits_due_are_the_rounded_down_share_less_what_was_due_before() -> None:
    core = bought(credits=7)

    effects = [refund(core, f"r{n}", "1.00")["effects"] for n in range(10)]

    assert [e["credits_due"] for e in effects] == [0, 1, 1, 0, 1, 1, 0, 1, 1, 1]
    assert "entry_id" not in effects[0]
    assert effects[0]["credit_note_number"] == "C-2026-0001"
    assert len(core.documents) == 11


@pytest.mark.parametrize("amount", ["10.01", "1000.00"])
def test_more_than_the_purchase_is_never_refunded(amount: str) -> None:
    core = bought()

    assert code(refund(core, "r1", amount)) == "amount_exceeds_purchase"
    refund(core, "r2", "4.00")
    assert code(refund(core, "r3", "6.01")) == "amount_exceeds_purchase"
    assert refund(core, "r4", "6.00")["outcome"] == "applied"


def test_an_amount_finer_than_the_currency_is_malformed() -> None:
    core = bought()

    assert code(refund(core, "r1", "1.001")) == "malformed"
    assert code(refund(core, "r2", "0")) == "limit_exceeded"


def test_a_full_refund_after_60_used_and_40_expired_takes_what_was_used_and_no_more() -> None:
    core = bought(days=1)
    take(core, 60)
    core.wait(days=2)
    give(core, 500)

    result = refund(core, "r1")

    assert result["effects"]["credits_due"] == 60
    assert result["effects"]["credits_taken"] == 60
    assert core.figures("u") == (440, 0)


def test_a_full_refund_after_all_expired_takes_nothing_and_issues_its_credit_note() -> None:
    core = bought(days=1)
    core.wait(days=2)

    result = refund(core, "r1")

    assert [lot["credits"] for lot in result["time_effects"]["expired"]] == [100]
    assert result["effects"] == {"credits_taken": 0, "credits_due": 0, "credit_note_number": "C-2026-0001"}
    assert core.figures("u") == (0, 0)


def test_by_the_debit_policy_a_shortfall_comes_from_other_lots_then_becomes_debt() -> None:
    core = bought()
    give(core, 10)
    take(core, 80)

    result = refund(core, "r1")

    assert (result["effects"]["credits_due"], result["effects"]["credits_taken"]) == (100, 100)
    assert core.remaining("u") == [0, 0]
    assert core.figures("u") == (-70, 70)


def test_a_refund_takes_from_the_purchase_s_own_lot_before_older_ones() -> None:
    core = shop()
    give(core, 50)
    core.applied("Purchase.Settled", **purchase())

    refund(core, "r1", "5.00")

    assert core.remaining("u") == [50, 50]


def test_by_the_forgive_policy_only_the_purchase_s_lots_pay_and_the_difference_is_noted() -> None:
    core = bought(config(**FORGIVE))
    give(core, 10)
    take(core, 80)

    result = refund(core, "r1")

    assert result["effects"]["credits_due"] == 100
    assert result["effects"]["credits_taken"] == 20
    assert core.remaining("u") == [0, 10]
    note = core.history("u")[-1].note
    assert note is not None
    assert "80" in note


def test_forgiven_credits_are_not_claimed_again() -> None:
    core = bought(config(**FORGIVE))
    take(core, 100)
    assert refund(core, "r1", "5.00")["effects"]["credits_due"] == 50
    core.applied("Merchant.Configure", config=config(), actor="admin")

    result = refund(core, "r2", "5.00")

    assert result["effects"]["credits_due"] == 50
    assert core.figures("u") == (-50, 50)


def test_refunds_and_chargebacks_have_policies_of_their_own() -> None:
    core = bought(config(refund_policy={"shortfall": "forgive"}))
    take(core, 100)

    assert refund(core, "r1", "5.00")["effects"]["credits_taken"] == 0
    assert chargeback(core, "d1", "5.00")["effects"]["credits_taken"] == 50


# Chargebacks and won disputes


def test_a_chargeback_issues_a_credit_note_only_when_configured() -> None:
    core = bought()
    assert "credit_note_number" not in chargeback(core, "d1")["effects"]
    win(core, "d1")
    assert [body["kind"] for body in core.document_bodies()] == ["receipt"]

    core = bought(config(chargeback_policy={"shortfall": "debit", "credit_note": "on_apply"}))
    assert chargeback(core, "d1")["effects"]["credit_note_number"] == "C-2026-0001"
    win(core, "d1")
    assert [body["kind"] for body in core.document_bodies()] == ["receipt", "credit_note", "correction"]


def test_a_won_dispute_gives_back_exactly_what_was_taken_with_the_time_that_was_left() -> None:
    core = bought()
    take(core, 30)
    core.wait(days=10)
    assert chargeback(core, "d1")["effects"]["credits_taken"] == 100
    assert core.figures("u") == (-30, 30)
    core.wait(days=4)

    result = win(core, "d1")

    assert result["effects"]["credits"] == 100
    assert result["effects"]["lot_id"] == result["effects"]["entry_id"]
    assert core.figures("u") == (70, 0)
    assert core.lots("u")[-1].expires_at == core.now + timedelta(days=20)


def test_a_lot_given_back_lasts_at_least_as_long_as_the_dispute_stood() -> None:
    core = bought()
    core.wait(days=29)
    chargeback(core, "d1")
    core.wait(days=40)

    win(core, "d1")

    assert core.lots("u")[-1].expires_at == core.now + timedelta(days=40)


def test_a_lot_given_back_has_no_product() -> None:
    # Spec §3: "Lots without a product (ad hoc grants, adjustments, won disputes) carry credits, days and reason".
    core = bought()
    chargeback(core, "d1")
    win(core, "d1")

    assert core.lots("u")[-1].product_code is None
    assert core.lots("u")[-1].reason == "chargeback"


def test_a_won_dispute_that_took_nothing_gives_nothing_back() -> None:
    core = bought(days=1)
    core.wait(days=2)
    chargeback(core, "d1")

    assert win(core, "d1")["effects"] == {"credits": 0}


def test_after_a_won_dispute_the_purchase_can_be_refunded_again_from_the_lot_given_back() -> None:
    core = bought()
    chargeback(core, "d1")
    assert code(refund(core, "r1")) == "already_reversed"
    win(core, "d1")
    give(core, 5)

    assert refund(core, "r2")["effects"]["credits_taken"] == 100
    assert core.remaining("u") == [0, 0, 5]


def test_credits_that_expired_from_a_lot_given_back_are_not_taken_again() -> None:
    core = bought()
    chargeback(core, "d1")
    win(core, "d1")
    core.wait(days=31)

    assert refund(core, "r1")["effects"]["credits_due"] == 0


def test_a_won_dispute_is_won_once() -> None:
    core = bought()
    chargeback(core, "d1")
    first = win(core, "d1")

    again = win(core, "d1")

    assert again["effects"] == first["effects"]
    assert again["replay_of"] == {"command_source": first["command_source"], "command_id": first["command_id"]}
    assert core.figures("u") == (100, 0)


STEPS = ["refund 3.33", "refund 3.33", "dispute 3.34", "win", "use 60", "wait"]


@pytest.mark.parametrize("policy", ["debit", "forgive"])
def test_reversals_in_any_order_stay_between_nothing_and_the_lot(policy: str) -> None:
    orders = sorted(set(permutations(STEPS)))
    for order in orders[:: 1 if os.environ.get("EVERY_ORDER") else 5]:
        core = bought(config(refund_policy={"shortfall": policy}, chargeback_policy={"shortfall": policy}))
        taken = 0
        for number, step in enumerate(order):
            action, _, value = step.partition(" ")
            match action:
                case "refund":
                    taken += refund(core, f"r{number}", value)["effects"]["credits_taken"]
                case "dispute":
                    members = admin(dispute_id="d", external_ref="pay-1", amount=value)
                    for result in core.send(core.message("Chargeback.Apply", members)):
                        taken += result["effects"].get("credits_taken", 0) - result["effects"].get("credits", 0)
                case "win":
                    # Parked when it comes before the dispute, and decided right after that.
                    for result in core.send(core.message("Chargeback.Reverse", admin(dispute_id="d"))):
                        taken -= result["effects"]["credits"]
                case "use":
                    take(core, int(value))
                case _:
                    core.wait(days=31)
            assert 0 <= taken <= 100
        rest_of_it = refund(core, "rest")
        assert rest_of_it["outcome"] == "applied"
        standing = [r.due for r in core.books.reversals_of["pay-1"] if r.won_at is None]
        expired = sum(lot.expired_credits for lot in core.books.lots_of(core.books.purchases["pay-1"]))
        assert sum(standing) + expired >= 100
        assert sum(standing) <= 100


# Grants and adjustments


def grants(core: Core) -> None:
    grant = {"distribution": "grant", "prices": ..., "credits": 5}
    core.applied("Product.Create", **product("W1", **grant, grant_policy="apply_on_signup"))
    core.applied("Product.Create", **product("W2", **grant, grant_policy="apply_on_signup"))
    core.applied("Product.Create", **product("M", **grant, grant_policy="manual_grant"))


def test_a_sign_up_gives_every_grant_in_force_once_and_for_ever() -> None:
    core = shop()
    grants(core)

    first = core.applied("User.SignedUp", user_id="u")

    assert [(g["product_code"], g["credits"]) for g in first["effects"]["grants"]] == [("W1", 5), ("W2", 5)]
    assert core.documents == []
    again = core.applied("User.SignedUp", user_id="u")
    assert again["effects"] == first["effects"]
    assert "replay_of" in again
    assert core.refused("User.SignedUp", user_id="u", country="AM") == "idempotency_conflict"
    assert core.figures("u") == (10, 0)


def test_a_sign_up_without_grants_is_applied_and_final() -> None:
    core = shop()
    assert core.applied("User.SignedUp", user_id="u")["effects"] == {"grants": []}
    grants(core)

    assert core.applied("User.SignedUp", user_id="u")["effects"] == {"grants": []}


def test_a_manual_grant_issues_a_lot_of_the_product() -> None:
    core = shop()
    grants(core)

    result = core.applied("Grant.Apply", **admin(grant_id="g", user_id="u", product_code="M"))

    assert result["effects"]["credits"] == 5
    assert core.lots("u")[0].expires_at == START + timedelta(days=30)
    assert core.history("u")[0].reason == "promo"
    assert core.documents == []


def test_an_ad_hoc_grant_carries_its_own_credits_and_days() -> None:
    core = shop()

    core.applied("Grant.Apply", **admin(grant_id="g", user_id="u", credits=3, access_period_days=2))

    (lot,) = core.lots("u")
    assert (lot.credits, lot.product_code, lot.expires_at) == (3, None, START + timedelta(days=2))


@pytest.mark.parametrize("product_code", ["P", "W1"])
def test_only_manual_grant_products_are_granted(product_code: str) -> None:
    core = shop()
    grants(core)

    result = core.do("Grant.Apply", **admin(grant_id="g", user_id="u", product_code=product_code))

    assert result["outcome"] == "rejected"
    assert core.books.accounts == {}


def test_a_grant_product_that_ended_is_not_granted() -> None:
    core = shop()
    grants(core)
    core.applied("Product.Archive", product_code="M", actor="admin")
    grant = admin(grant_id="g", user_id="u", product_code="M")

    assert core.refused("Grant.Apply", **grant) == "product_not_active"


def test_a_positive_adjustment_needs_a_period_and_a_negative_one_has_none_to_need() -> None:
    core = shop()

    assert core.refused("Adjustment.Apply", **admin(adjustment_id="a", user_id="u", credits_delta=5)) == "malformed"
    result = core.applied("Adjustment.Apply", **admin(adjustment_id="b", user_id="u", credits_delta=-5))
    assert result["effects"] == {"entry_id": core.name_entry("u", 1), "credits": 5}
