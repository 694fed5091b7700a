"""Commands that arrive before the one they depend on wait for it, and are decided right after it."""

from collections.abc import Callable

from tests.e2e.blackbox import Bus, Json, Merchant, Sent, name

MakeUser = Callable[[], str]
DAY = 86_400


async def passed(shop: Merchant) -> None:
    """Wait until everything sent before to the admin and operations topics was handled (one partition each)."""
    someone = name("passer")
    opening = {"user_id": someone, "operation_id": name(), "operation_code": "llm"}
    for type_, members in (("Operation.Open", opening), ("Account.Lock", {"user_id": someone})):
        await shop.bus.results(await shop.send(type_, members))


async def parked(shop: Merchant, type_: str, members: Json) -> Sent:
    """Send a command that must wait, and check that it does."""
    sent = await shop.send(type_, members)
    await passed(shop)
    assert shop.bus.heard(sent) == []
    return sent


async def answer(shop: Merchant, sent: Sent) -> Json:
    """Return the only answer of a message."""
    (result,) = await shop.bus.results(sent)
    return result.body


async def test_a_close_before_its_open_is_decided_right_after_it(shop: Merchant, user: MakeUser) -> None:
    someone, operation_id = user(), name("op")
    await shop.grant(someone, 50)
    close = await parked(shop, "Operation.RecordAndClose", shop.closing(someone, operation_id, "20"))
    await shop.open(someone, operation_id=operation_id)
    result = await answer(shop, close)
    assert (result["outcome"], result["balance"], result["effects"]["operation_id"]) == ("applied", 30, operation_id)
    await shop.open(someone)


async def test_a_close_whose_open_is_refused_is_refused_with_it(shop: Merchant, user: MakeUser) -> None:
    someone, operation_id = user(), name("op")
    await shop.adjust(someone, -1)
    close = await parked(shop, "Operation.RecordAndClose", shop.closing(someone, operation_id, "20"))
    opening = {"user_id": someone, "operation_id": operation_id, "operation_code": "llm"}
    await shop.refused("insufficient_balance", "Operation.Open", opening)
    assert (await answer(shop, close))["error"]["code"] == "operation_not_open"


async def test_duplicates_of_a_parked_command_are_answered_when_it_is(shop: Merchant, user: MakeUser) -> None:
    someone, operation_id = user(), name("op")
    members = shop.closing(someone, operation_id, "20")
    close = await parked(shop, "Operation.RecordAndClose", members)
    for _ in range(2):
        await shop.send("Operation.RecordAndClose", members, id=close.id)
    other = await parked(shop, "Operation.RecordAndClose", members)
    assert shop.bus.heard(close) == []
    await shop.open(someone, operation_id=operation_id)
    results = await shop.bus.results(close, 3)
    assert len({(one.value, one.headers["ce_id"]) for one in results}) == 1
    assert results[0].body["balance"] == -20
    replay = await answer(shop, other)
    assert replay["replay_of"] == {"command_source": close.source, "command_id": close.id}
    assert replay["balance"] == -20


async def test_refunds_and_chargebacks_before_their_purchase_wait_in_order(shop: Merchant, user: MakeUser) -> None:
    purchase = shop.purchase(user())
    ref, dispute_id = purchase["external_ref"], name("dp")
    first = await parked(shop, "Refund.Apply", {"refund_id": name(), "external_ref": ref, "amount": "6.00"})
    second = await parked(shop, "Refund.Apply", {"refund_id": name(), "external_ref": ref, "amount": "6.00"})
    third = await parked(shop, "Chargeback.Apply", {"dispute_id": dispute_id, "external_ref": ref})
    fourth = await parked(shop, "Chargeback.Reverse", {"dispute_id": dispute_id})
    bought = await shop.applied("Purchase.Settled", purchase)
    assert bought["balance"] == 100
    results = [await answer(shop, one) for one in (first, second, third, fourth)]
    assert [one["outcome"] for one in results] == ["applied", "rejected", "applied", "applied"]
    assert results[1]["error"]["code"] == "amount_exceeds_purchase"
    assert [one["user_seq"] for one in results] == [2, 2, 3, 4]
    assert [one["balance"] for one in results] == [40, 40, 0, 40]


async def test_a_fiscal_receipt_before_its_purchase_waits_for_the_number(shop: Merchant, user: MakeUser) -> None:
    _, bought = await shop.buy(user())
    prefix, year, digits = bought["effects"]["receipt_number"].split("-")
    number = f"{prefix}-{year}-{int(digits) + 1:04}"
    members = {"receipt_number": number, "kind": "sale", "fiscal_number": name("f"), "authority": "SRC"}
    fiscal = await parked(shop, "Receipt.AttachFiscal", members | {"fiscal_at": shop.now()})
    _, second = await shop.buy(user())
    assert second["effects"]["receipt_number"] == number
    result = await answer(shop, fiscal)
    assert (result["outcome"], result["effects"]["receipt_number"]) == ("applied", number)


async def test_a_reverse_before_its_chargeback_waits(shop: Merchant, user: MakeUser) -> None:
    ref, _ = await shop.buy(user())
    dispute_id = name("dp")
    reverse = await parked(shop, "Chargeback.Reverse", {"dispute_id": dispute_id})
    charged = await shop.applied("Chargeback.Apply", dispute_id=dispute_id, external_ref=ref)
    assert charged["balance"] == 0
    result = await answer(shop, reverse)
    assert (result["outcome"], result["effects"]["credits"], result["balance"]) == ("applied", 100, 100)


async def test_a_refund_whose_purchase_was_refused_stays_parked(shop: Merchant, user: MakeUser) -> None:
    purchase = shop.purchase(user(), amount="9.00")
    refund = await parked(shop, "Refund.Apply", {"refund_id": name(), "external_ref": purchase["external_ref"]})
    await shop.refused("price_mismatch", "Purchase.Settled", purchase)
    await passed(shop)
    assert shop.bus.heard(refund) == []
    corrected = purchase | {"pricing_snapshot": purchase["pricing_snapshot"] | {"amount": "10.00"}}
    await shop.applied("Purchase.Settled", corrected)
    assert (await answer(shop, refund))["effects"]["credits_taken"] == 100


async def test_what_never_comes_is_given_up_in_time(bus: Bus, simulated: Merchant, user: MakeUser) -> None:
    shop = simulated
    close = await parked(shop, "Operation.RecordAndClose", shop.closing(user(), name("op"), "20"))
    refund = await parked(shop, "Refund.Apply", {"refund_id": name(), "external_ref": name("ch")})
    await shop.advance(14 * 60)
    await passed(shop)
    assert bus.heard(close) == []
    await shop.advance(120)
    assert (await answer(shop, close))["error"]["code"] == "dependency_timeout"
    assert bus.heard(refund) == []
    await shop.advance(7 * DAY)
    assert (await answer(shop, refund))["error"]["code"] == "dependency_timeout"


async def test_a_close_given_up_leaves_its_key_free(simulated: Merchant, user: MakeUser) -> None:
    shop, someone, operation_id = simulated, user(), name("op")
    members = shop.closing(someone, operation_id, "20")
    close = await parked(shop, "Operation.RecordAndClose", members)
    await shop.advance(16 * 60)
    assert (await answer(shop, close))["error"]["code"] == "dependency_timeout"
    await shop.open(someone, operation_id=operation_id)
    assert (await shop.applied("Operation.RecordAndClose", members))["balance"] == -20
