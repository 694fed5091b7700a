"""An erased user is forgotten, the books stay."""

from collections.abc import Callable

from tests.e2e.blackbox import Merchant, name

MakeUser = Callable[[], str]


async def test_later_commands_naming_an_erased_user_are_refused_but_reversals_work(
    shop: Merchant, user: MakeUser
) -> None:
    someone = user()
    ref, bought = await shop.buy(someone, buyer={"name": "Ani"})
    erase = {"request_id": name(), "user_id": someone}
    erased = await shop.applied("User.Erase", erase)
    assert someone not in str(erased["effects"])
    for type_, members in (
        ("Purchase.Settled", shop.purchase(someone)),
        ("User.SignedUp", {"user_id": someone}),
        ("Operation.Open", {"user_id": someone, "operation_id": name(), "operation_code": "llm"}),
        ("Grant.Apply", {"grant_id": name(), "user_id": someone, "credits": 5, "access_period_days": 3}),
        ("Adjustment.Apply", {"adjustment_id": name(), "user_id": someone, "credits_delta": -5}),
        ("Account.Lock", {"user_id": someone}),
    ):
        await shop.refused("account_erased", type_, members)
    refund = await shop.applied("Refund.Apply", refund_id=name(), external_ref=ref, amount="5.00")
    assert (refund["balance"], refund["effects"]["credits_taken"]) == (50, 50)
    assert refund["user_id"].startswith("erased-")
    note = await shop.document(refund["effects"]["credit_note_number"])
    assert someone not in note.value.decode()
    assert "Ani" not in note.value.decode()
    assert bought["effects"]["receipt_number"] == note.body["receipt_number"]
    again = await shop.do("User.Erase", erase)
    assert (again["outcome"], "replay_of" in again) == ("applied", True)


async def test_commands_naming_an_erased_user_by_the_tombstone_are_refused_too(shop: Merchant, user: MakeUser) -> None:
    someone = user()
    await shop.buy(someone)
    erased = await shop.applied("User.Erase", request_id=name(), user_id=someone)
    tombstone = erased["user_id"]
    for type_, members in (
        ("Purchase.Settled", shop.purchase(tombstone)),
        ("User.SignedUp", {"user_id": tombstone}),
        ("Operation.Open", {"user_id": tombstone, "operation_id": name(), "operation_code": "llm"}),
        ("Grant.Apply", {"grant_id": name(), "user_id": tombstone, "credits": 5, "access_period_days": 3}),
        ("Account.Lock", {"user_id": tombstone}),
        ("User.Erase", {"request_id": name(), "user_id": tombstone}),
        ("UserRole.Assign", {"subject": tombstone, "role": "support"}),
    ):
        await shop.refused("account_erased", type_, members)


async def test_a_stored_answer_names_the_tombstone_after_the_erasure(shop: Merchant, user: MakeUser) -> None:
    someone = user()
    members = shop.purchase(someone)
    sent = await shop.send("Purchase.Settled", members)
    await shop.bus.results(sent)
    await shop.applied("User.Erase", request_id=name(), user_id=someone)
    await shop.send("Purchase.Settled", members, id=sent.id)
    first, second = await shop.bus.results(sent, 2)
    assert first.body["user_id"] == someone
    assert second.body["outcome"] == "applied"
    assert second.body["user_id"].startswith("erased-")
    assert {**second.body, "user_id": someone} == first.body
    assert first.headers["ce_id"] == second.headers["ce_id"]


async def test_an_erasure_stays_within_its_merchant(simulated: Merchant, shop: Merchant, user: MakeUser) -> None:
    other, someone = simulated, user()
    await shop.grant(someone, 1)
    await other.grant(someone, 2)
    await shop.applied("User.Erase", request_id=name(), user_id=someone)
    assert (await other.grant(someone, 3))["balance"] == 5
