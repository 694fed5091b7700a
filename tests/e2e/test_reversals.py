"""Refunds, chargebacks and won disputes: what they take, where from, and what they issue."""

from collections.abc import Awaitable, Callable
from decimal import Decimal

import pytest

from tests.e2e.blackbox import Bus, Json, Merchant, Received, name, parse_time

MakeUser = Callable[[], str]
DAY = 86_400


async def refund(shop: Merchant, ref: str, amount: str | None = None) -> Json:
    """Refund a purchase, or what is left of it."""
    part = {} if amount is None else {"amount": amount}
    return await shop.applied("Refund.Apply", {"refund_id": name("rf"), "external_ref": ref} | part)


async def dispute(shop: Merchant, ref: str, amount: str | None = None) -> tuple[str, Json]:
    """Charge a purchase back, or what is left of it."""
    part = {} if amount is None else {"amount": amount}
    dispute_id = name("dp")
    return dispute_id, await shop.applied("Chargeback.Apply", {"dispute_id": dispute_id, "external_ref": ref} | part)


def took(result: Json) -> tuple[int, int]:
    """Return what a reversal took and what was due."""
    effects = result["effects"]
    assert ("entry_id" in effects) == (effects["credits_taken"] > 0), effects
    return effects["credits_taken"], effects["credits_due"]


async def test_any_number_of_parts_takes_exactly_all_credits(shop: Merchant, user: MakeUser) -> None:
    ref, _ = await shop.buy(user())
    taken = [took(await refund(shop, ref, amount))[0] for amount in ("3.33", "3.33", "0.01", "3.32")]
    assert taken == [33, 33, 0, 33]
    assert took(await refund(shop, ref)) == (1, 1)
    members = {"refund_id": name("rf"), "external_ref": ref}
    await shop.refused("already_reversed", "Refund.Apply", members)
    await shop.refused("already_reversed", "Refund.Apply", members | {"amount": "0.01"})


async def test_a_part_too_small_for_a_credit_has_no_entry_but_a_credit_note(shop: Merchant, user: MakeUser) -> None:
    ref, bought = await shop.buy(user())
    result = await refund(shop, ref, "0.05")
    assert took(result) == (0, 0)
    assert result["user_seq"] == 1
    note = await shop.document(result["effects"]["credit_note_number"])
    assert note.body["receipt_number"] == bought["effects"]["receipt_number"]


async def test_reversals_never_exceed_the_purchase(shop: Merchant, user: MakeUser) -> None:
    ref, _ = await shop.buy(user())
    await refund(shop, ref, "6.00")
    too_much = {"refund_id": name("rf"), "external_ref": ref, "amount": "4.01"}
    await shop.refused("amount_exceeds_purchase", "Refund.Apply", too_much)
    charge = {"dispute_id": name("dp"), "external_ref": ref}
    await shop.refused("amount_exceeds_purchase", "Chargeback.Apply", charge | {"amount": "10.00"})
    await shop.applied("Chargeback.Apply", charge)
    await shop.refused("already_reversed", "Chargeback.Apply", charge | {"dispute_id": name("dp")})


async def test_amounts_must_fit_the_currency_and_be_positive(shop: Merchant, user: MakeUser) -> None:
    ref, _ = await shop.buy(user())
    for amount in ("1.001", "0", "-1", "0.00"):
        members = {"refund_id": name("rf"), "external_ref": ref, "amount": amount}
        result = await shop.do("Refund.Apply", members)
        assert result["outcome"] == "rejected", amount
        assert result["error"]["code"] in ("malformed", "limit_exceeded"), amount


@pytest.mark.parametrize("shortfall", ["debit", "forgive"])
async def test_what_the_purchases_lots_do_not_hold_follows_the_policy(
    changeable: Merchant, user: MakeUser, shortfall: str
) -> None:
    shop, policy = changeable, {"shortfall": shortfall}
    await shop.configure(refund_policy=policy, chargeback_policy=policy | {"credit_note": "never"})
    for reverse in (refund, lambda *of: _second(dispute(*of))):
        someone = user()
        ref, _ = await shop.buy(someone)
        await shop.use(someone, "90")
        await shop.grant(someone, 30)
        result = await reverse(shop, ref)
        if shortfall == "debit":
            assert took(result) == (100, 100)
            assert (result["balance"], result["debt"]) == (-60, 60)
        else:
            assert took(result) == (10, 100)
            assert (result["balance"], result["debt"]) == (30, 0)


async def _second(pair: Awaitable[tuple[str, Json]]) -> Json:
    _, result = await pair
    return result


async def test_forgiven_credits_are_not_claimed_again(changeable: Merchant, user: MakeUser) -> None:
    shop, someone = changeable, user()
    await shop.configure(refund_policy={"shortfall": "forgive"})
    ref, _ = await shop.buy(someone)
    await shop.use(someone, "70")
    assert took(await refund(shop, ref, "5.00")) == (30, 50)
    await shop.grant(someone, 100)
    assert took(await refund(shop, ref)) == (0, 50)
    assert (await shop.grant(someone, 1))["balance"] == 101


async def test_the_purchases_lot_pays_before_older_ones(simulated: Merchant, user: MakeUser) -> None:
    someone = user()
    await simulated.grant(someone, 40, days=1)
    ref, _ = await simulated.buy(someone)
    assert took(await refund(simulated, ref)) == (100, 100)
    await simulated.advance(2 * DAY)
    # The older lot was not touched: all of it expires.
    result = await simulated.grant(someone, 1)
    assert result["balance"] == 1


async def test_credits_that_expired_unspent_are_not_taken_again(simulated: Merchant, user: MakeUser) -> None:
    someone = user()
    ref, _ = await simulated.buy(someone)
    await simulated.use(someone, "60")
    await simulated.advance(31 * DAY)
    # 40 expired, 60 were used: half of the money back is worth 50, of which 40 are gone already.
    assert took(await refund(simulated, ref, "5.00")) == (10, 10)
    assert took(await refund(simulated, ref)) == (50, 50)
    result = await simulated.grant(someone, 100)
    assert (result["balance"], result["debt"]) == (40, 0)


async def test_a_won_dispute_gives_back_what_was_taken_for_the_time_that_was_left(
    simulated: Merchant, user: MakeUser
) -> None:
    someone = user()
    ref, _ = await simulated.buy(someone)
    await simulated.use(someone, "30")
    await simulated.advance(20 * DAY)
    dispute_id, charged = await dispute(simulated, ref)
    assert took(charged) == (100, 100)
    assert (charged["balance"], charged["debt"]) == (-30, 30)
    await simulated.advance(3 * DAY)
    won = await simulated.applied("Chargeback.Reverse", dispute_id=dispute_id)
    assert won["effects"]["credits"] == 100
    assert (won["balance"], won["debt"]) == (70, 0)
    # Ten days were left when it was charged back.
    await simulated.advance(10 * DAY - 3600)
    assert (await simulated.grant(someone, 1))["balance"] == 71
    await simulated.advance(7200)
    assert (await simulated.grant(someone, 1))["balance"] == 2


async def test_a_long_dispute_is_given_back_for_as_long_as_it_stood(simulated: Merchant, user: MakeUser) -> None:
    someone = user()
    ref, _ = await simulated.buy(someone)
    await simulated.advance(29 * DAY)
    dispute_id, _ = await dispute(simulated, ref)
    await simulated.advance(5 * DAY)
    await simulated.applied("Chargeback.Reverse", dispute_id=dispute_id)
    await simulated.advance(5 * DAY - 3600)
    assert (await simulated.grant(someone, 1))["balance"] == 101
    await simulated.advance(7200)
    assert (await simulated.grant(someone, 1))["balance"] == 2


async def test_after_a_won_dispute_the_purchase_can_be_reversed_again(shop: Merchant, user: MakeUser) -> None:
    someone = user()
    ref, _ = await shop.buy(someone)
    await refund(shop, ref, "2.00")
    dispute_id, charged = await dispute(shop, ref)
    assert took(charged) == (80, 80)
    won = await shop.applied("Chargeback.Reverse", dispute_id=dispute_id)
    assert won["balance"] == 80
    again = await shop.do("Chargeback.Reverse", dispute_id=dispute_id)
    assert again["replay_of"], again
    await shop.use(someone, "50")
    assert took(await refund(shop, ref, "8.00")) == (80, 80)
    last = await shop.grant(someone, 50)
    assert (last["balance"], last["debt"]) == (0, 0)


async def test_a_won_dispute_that_took_nothing_gives_nothing_back(changeable: Merchant, user: MakeUser) -> None:
    shop, someone = changeable, user()
    await shop.configure(chargeback_policy={"shortfall": "forgive", "credit_note": "never"})
    ref, _ = await shop.buy(someone)
    await shop.use(someone, "100")
    dispute_id, charged = await dispute(shop, ref)
    assert took(charged) == (0, 100)
    won = await shop.applied("Chargeback.Reverse", dispute_id=dispute_id)
    assert won["effects"]["credits"] == 0
    assert "lot_id" not in won["effects"]
    assert won["balance"] == 0


def money(document: Received, member: str) -> Decimal:
    """Return an amount of a document's tax block, without its sign."""
    return abs(Decimal(document.body["tax"][member]))


async def test_the_parts_of_credit_notes_sum_exactly_to_the_receipt(shop: Merchant, user: MakeUser) -> None:
    code = name("p")
    await shop.sellable(code, amount="9.99")
    ref, bought = await shop.buy(user(), code, "9.99")
    receipt = await shop.document(bought["effects"]["receipt_number"])
    parts = [await refund(shop, ref, amount) for amount in ("3.33", "0.01", "3.33", None)]
    notes = [await shop.document(part["effects"]["credit_note_number"]) for part in parts]
    assert sum(money(note, "gross") for note in notes) == money(receipt, "gross") == Decimal("9.99")
    for member in ("net", "tax"):
        assert sum(money(note, member) for note in notes) == money(receipt, member), member
    for note in notes:
        assert money(note, "net") + money(note, "tax") == money(note, "gross")
        assert note.headers["ce_type"] == "CreditNote.Issued"
        assert note.body["external_ref"] == ref


@pytest.mark.parametrize("credit_note", ["never", "on_apply"])
async def test_chargebacks_issue_credit_notes_where_the_policy_says_so(
    changeable: Merchant, user: MakeUser, credit_note: str
) -> None:
    shop = changeable
    await shop.configure(chargeback_policy={"shortfall": "debit", "credit_note": credit_note})
    ref, _ = await shop.buy(user())
    dispute_id, charged = await dispute(shop, ref)
    await shop.applied("Chargeback.Reverse", dispute_id=dispute_id)
    _, bought = await shop.buy(user())
    await shop.document(bought["effects"]["receipt_number"])
    documents = [one for one in shop.said("receipts") if one.body["external_ref"] == ref]
    if credit_note == "never":
        assert "credit_note_number" not in charged["effects"]
        assert len(documents) == 1
    else:
        await shop.bus.until(
            "the correction",
            lambda: len([one for one in shop.said("receipts") if one.body["external_ref"] == ref]) == 3,
        )
        assert charged["effects"]["credit_note_number"].startswith("CN-")


async def test_receipts_are_gapless_and_chronological(bus: Bus, user: MakeUser) -> None:
    shop = await bus.register(partitions=4)
    await shop.stock()
    purchases = [shop.purchase(user()) for _ in range(40)]
    wrong = [shop.purchase(user(), amount="1.00") for _ in range(10)]
    results = await shop.together(
        ("Purchase.Settled", members) for members in [*purchases[:20], *wrong, *purchases[20:], *purchases[:5]]
    )
    assert sum(one["outcome"] == "applied" for one in results) == 45
    await bus.until("40 receipts", lambda: len(shop.said("receipts")) >= 40)
    for members in purchases[:3]:
        await refund(shop, members["external_ref"])
    await bus.until("3 credit notes", lambda: len(shop.said("receipts")) >= 43)
    assert len(shop.said("receipts")) == 43
    for prefix, count in (("R", 40), ("CN", 3)):
        issued = {}
        for document in shop.said("receipts"):
            number = document.body.get("number") or document.body["receipt_number"]
            if number.startswith(f"{prefix}-"):
                issued[int(number.split("-")[2])] = parse_time(document.body["issued_at"])
        assert sorted(issued) == list(range(1, count + 1))
        assert [issued[number] for number in sorted(issued)] == sorted(issued.values())


async def test_a_new_year_restarts_the_numbers(changeable: Merchant, user: MakeUser) -> None:
    shop = changeable
    # A series of its own.
    await shop.configure(receipt_series_prefix="NEW")
    await shop.sellable("year", days=3)
    _, first = await shop.buy(user(), "year")
    _, second = await shop.buy(user(), "year")
    await shop.advance(365 * DAY)
    _, third = await shop.buy(user(), "year")
    numbers = [one["effects"]["receipt_number"] for one in (first, second, third)]
    year = int(numbers[0].split("-")[1])
    assert numbers == [f"NEW-{year}-0001", f"NEW-{year}-0002", f"NEW-{year + 1}-0001"]
    document = await shop.document(numbers[2])
    assert document.body.get("simulation"), "documents of a simulated merchant say so"


@pytest.mark.parametrize(
    ("regime", "rates", "country", "net", "tax"),
    [
        ("none", None, "AM", "10.00", "0.00"),
        ("turnover", None, "AM", "10.00", "0.00"),
        ("vat", [{"country": "*", "rate": "20"}], "AM", "8.33", "1.67"),
        ("vat", [{"country": "*", "rate": "20"}, {"country": "DE", "rate": "19"}], "DE", "8.40", "1.60"),
        ("vat", [{"country": "*", "rate": "5.5"}], "FR", "9.48", "0.52"),
        ("vat", [{"country": "*", "rate": "0", "category": "Z"}], "FR", "10.00", "0.00"),
    ],
)
async def test_tax_is_inclusive_and_rounded_half_up(
    changeable: Merchant, user: MakeUser, regime: str, rates: list[Json] | None, country: str, net: str, tax: str
) -> None:
    shop = changeable
    await shop.configure(tax_regime=regime, vat_rates=rates)
    _, bought = await shop.buy(user(), country=country)
    body = (await shop.document(bought["effects"]["receipt_number"])).body["tax"]
    assert Decimal(body["gross"]) == 10
    assert Decimal(body.get("tax", "0")) == Decimal(tax)
    assert Decimal(body.get("net", body["gross"])) == Decimal(net)
    assert body["regime"] == regime
    assert bool(body.get("lines")) == (regime == "vat")


@pytest.mark.parametrize(
    ("breakdown", "tax", "is_flagged"),
    [
        ({"type": "S", "rate": "20", "amount": "1.67"}, "1.67", False),
        ({"type": "S", "rate": "10", "amount": "0.91"}, "0.91", True),
        ({"type": "S", "rate": "20", "amount": "2.00"}, "2.00", True),
        ({"type": "E", "rate": "0", "amount": "0"}, "0.00", True),
        ({"type": "AE", "note": "reverse charge"}, "0.00", True),
        ({"type": "S", "amount": "1.67"}, "1.67", False),
        ({"type": "S", "amount": "11.00"}, None, True),
    ],
)
async def test_upstreams_tax_is_used_where_it_can_be_true(
    shop: Merchant, user: MakeUser, breakdown: Json, tax: str | None, is_flagged: bool
) -> None:
    members = shop.purchase(user())
    members["pricing_snapshot"]["tax"] = breakdown
    result = await shop.do("Purchase.Settled", members)
    if tax is None and result["outcome"] == "rejected":
        assert result["error"]["code"] == "malformed"
        return
    body = (await shop.document(result["effects"]["receipt_number"])).body["tax"]
    assert tax in (None, body["tax"])
    assert Decimal(body["net"]) + Decimal(body["tax"]) == Decimal(body["gross"]) == 10
    assert Decimal(body["net"]) >= 0
    assert ("discrepancy" in body) == is_flagged
    for line in body["lines"]:
        assert (Decimal(line["rate"]) > 0) == (Decimal(line["tax"]) > 0), line
