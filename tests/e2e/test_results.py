"""Every command on its happy path: its effects, and the envelope of its result."""

import uuid
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial

import pytest
import pytest_asyncio
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from tests.e2e.blackbox import (
    JSON,
    Bus,
    Json,
    Merchant,
    name,
    own_number,
    parse_time,
    result_id,
    rfc3339,
    traced,
)
from tests.e2e.conftest import Running

MakeUser = Callable[[], str]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shop(bus: Bus) -> Merchant:
    merchant = await bus.register(partitions=None, chargeback_policy={"shortfall": "debit", "credit_note": "on_apply"})
    await merchant.stock()
    return merchant


def expect(result: Json, user: str | None, seq: int | None, balance: int | None, debt: int = 0) -> None:
    """Check the account's members of a result."""
    assert result.get("user_id") == user
    if seq is not None:
        assert (result["user_seq"], result["balance"], result["debt"]) == (seq, balance, debt), result
    parse_time(result["applied_at"])


async def test_a_result_has_the_cloudevents_envelope_and_the_place_of_its_command(
    shop: Merchant, user: MakeUser
) -> None:
    someone, trace = user(), traced()
    for partition in (0, 3):
        members = {"grant_id": name(), "user_id": someone, "credits": 5, "access_period_days": 1}
        sent = await shop.send("Grant.Apply", members, headers={"traceparent": trace}, partition=partition)
        (result,) = await shop.bus.results(sent)
        assert (result.partition, result.key) == (partition, sent.key)
        headers = result.headers
        assert headers["ce_specversion"] == "1.0"
        assert headers["ce_type"] == "Command.Result"
        assert headers["content-type"] == JSON
        assert headers["traceparent"] == trace
        assert headers["ce_source"]
        assert uuid.UUID(headers["ce_id"]).version == 5
        parse_time(headers["ce_time"])
        body = result.body
        assert (body["command_id"], body["command_source"]) == (sent.id, sent.source)
        assert (body["command_type"], body["merchant_id"]) == ("Grant.Apply", shop.id)


async def test_the_result_id_is_the_uuid_of_source_id_and_fingerprint(shop: Merchant) -> None:
    sent = await shop.send("User.SignedUp", {}, complete=False, key="k")
    (result,) = await shop.bus.results(sent)
    assert result.body["error"]["code"] == "malformed"
    assert result.headers["ce_id"] == result_id(shop.id, sent.source, sent.id, sent.sha256)


async def test_a_result_goes_to_the_reply_topic_too(shop: Merchant, running: Running, user: MakeUser) -> None:
    topic = shop.topic("replies.web")
    admin = AIOKafkaAdminClient(bootstrap_servers=running.services.kafka_bootstrap_servers)
    await admin.start()
    await admin.create_topics([NewTopic(topic, num_partitions=1, replication_factor=1)])
    await admin.close()
    await shop.bus.watch(topic, partitions=1)
    members = {"grant_id": name(), "user_id": user(), "credits": 5, "access_period_days": 1}
    sent = await shop.send("Grant.Apply", members, headers={"ce_replyto": topic})
    (result,) = await shop.bus.results(sent)
    reply = (await shop.bus.until("the reply", lambda: shop.bus.topics[topic]))[0]
    assert (reply.value, reply.headers["ce_id"]) == (result.value, result.headers["ce_id"])


async def test_a_reply_topic_is_served_from_the_moment_it_exists(
    shop: Merchant, running: Running, user: MakeUser
) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=running.services.kafka_bootstrap_servers)
    await admin.start()
    # Each is asked for while the worker has just learned which topics there are.
    for channel in ("replies.new", "replies.newer", "replies.newest"):
        topic = shop.topic(channel)
        await admin.create_topics([NewTopic(topic, num_partitions=1, replication_factor=1)])
        await shop.bus.watch(topic, partitions=1)
        members = {"grant_id": name(), "user_id": user(), "credits": 5, "access_period_days": 1}
        sent = await shop.send("Grant.Apply", members, headers={"ce_replyto": topic})
        (result,) = await shop.bus.results(sent)
        reply = (await shop.bus.until("the reply", partial(shop.said, channel)))[0]
        assert reply.value == result.value
    await admin.close()


@pytest.mark.parametrize("topic", ["credits.{}.replies.absent", "credits.other.replies.web", "credits.{}.receipts"])
async def test_a_reply_topic_that_is_none_holds_nothing_back(shop: Merchant, user: MakeUser, topic: str) -> None:
    before = len(shop.said("receipts"))
    for _ in range(3):
        members = {"grant_id": name(), "user_id": user(), "credits": 5, "access_period_days": 1}
        sent = await shop.send("Grant.Apply", members, headers={"ce_replyto": topic.format(shop.id)})
        (result,) = await shop.bus.results(sent)
        assert result.body["outcome"] == "applied"
    assert len(shop.said("receipts")) == before


async def test_a_settled_purchase_issues_a_lot_an_entry_and_a_receipt(shop: Merchant, user: MakeUser) -> None:
    someone = user()
    _, result = await shop.buy(someone)
    effects = result["effects"]
    assert set(effects) == {"lot_id", "entry_id", "credits", "expires_at", "receipt_number"}
    assert effects["credits"] == 100
    assert parse_time(effects["expires_at"]) == parse_time(result["applied_at"]) + timedelta(days=30)
    expect(result, someone, 1, 100)
    assert "time_effects" not in result
    assert "replay_of" not in result


async def test_a_sign_up_issues_every_sign_up_grant_once(bus: Bus, user: MakeUser) -> None:
    shop, someone = await bus.register(), user()
    grant = {"credits": 10, "access_period_days": 3, "distribution": "grant"}
    for code, policy in (("w1", "apply_on_signup"), ("w2", "apply_on_signup"), ("manual", "manual_grant")):
        await shop.applied("Product.Create", grant, product_code=code, title=code, grant_policy=policy)
    later = shop.now(3600)
    await shop.applied(
        "Product.Create", grant, product_code="w3", title="w3", grant_policy="apply_on_signup", effective_at=later
    )
    result = await shop.applied("User.SignedUp", user_id=someone, country="AM", locale="hy")
    expect(result, someone, 2, 20)
    assert {one["product_code"] for one in result["effects"]["grants"]} == {"w1", "w2"}
    for one in result["effects"]["grants"]:
        assert set(one) == {"product_code", "lot_id", "entry_id", "credits"}
        assert one["credits"] == 10
    await shop.applied("Product.Archive", product_code="w1")
    again = await shop.do("User.SignedUp", user_id=someone, country="AM", locale="hy")
    assert (again["outcome"], again["effects"]) == ("applied", result["effects"])
    assert again["replay_of"]
    other = await shop.applied("User.SignedUp", user_id=user())
    assert [one["product_code"] for one in other["effects"]["grants"]] == ["w2"]
    # The archived one was withdrawn before anybody signed up: then there is nothing to grant, which is no refusal.
    await shop.applied("Product.Archive", product_code="w2")
    nothing = await shop.applied("User.SignedUp", user_id=user())
    assert nothing["effects"]["grants"] == []


async def test_an_operation_is_opened_and_recorded(shop: Merchant, user: MakeUser) -> None:
    someone, operation_id = user(), name("op")
    await shop.grant(someone, 100)
    opened = await shop.applied("Operation.Open", user_id=someone, operation_id=operation_id, operation_code="llm")
    expect(opened, someone, 1, 100)
    assert set(opened["effects"]) == {"operation_id", "expires_at", "credits_per_unit", "resource_unit"}
    assert opened["effects"]["operation_id"] == operation_id
    assert float(opened["effects"]["credits_per_unit"]) == 1
    assert opened["effects"]["resource_unit"] == "TOKEN"
    assert parse_time(opened["effects"]["expires_at"]) == parse_time(opened["applied_at"]) + timedelta(minutes=15)
    closed = await shop.applied("Operation.RecordAndClose", shop.closing(someone, operation_id, "30"))
    expect(closed, someone, 2, 70)
    assert set(closed["effects"]) == {"operation_id", "entry_id", "credits"}
    assert (closed["effects"]["operation_id"], abs(closed["effects"]["credits"])) == (operation_id, 30)


async def test_a_cancelled_operation_costs_nothing(shop: Merchant, user: MakeUser) -> None:
    someone = user()
    operation_id = await shop.open(someone)
    result = await shop.applied(
        "Operation.Cancel", user_id=someone, operation_id=operation_id, reason="changed my mind"
    )
    expect(result, someone, 0, 0)
    assert result["effects"]["operation_id"] == operation_id


async def test_grants_and_adjustments_name_what_they_wrote(shop: Merchant, user: MakeUser) -> None:
    someone = user()
    granted = await shop.grant(someone, 25)
    assert set(granted["effects"]) == {"entry_id", "lot_id", "credits"}
    assert granted["effects"]["credits"] == 25
    expect(granted, someone, 1, 25)
    up = await shop.adjust(someone, 5, access_period_days=1)
    assert set(up["effects"]) == {"entry_id", "lot_id", "credits"}
    expect(up, someone, 2, 30)
    down = await shop.adjust(someone, -40)
    assert set(down["effects"]) == {"entry_id", "credits"}
    assert abs(down["effects"]["credits"]) == 40
    expect(down, someone, 3, -10, 10)


async def test_a_grant_product_is_granted_by_hand(shop: Merchant, user: MakeUser) -> None:
    code = name("gift")
    await shop.applied(
        "Product.Create",
        product_code=code,
        title="Gift",
        credits=12,
        access_period_days=3,
        distribution="grant",
        grant_policy="manual_grant",
    )
    result = await shop.applied("Grant.Apply", grant_id=name(), user_id=user(), product_code=code)
    assert result["effects"]["credits"] == 12
    assert result["balance"] == 12


async def test_refunds_chargebacks_and_won_disputes_say_what_they_took(shop: Merchant, user: MakeUser) -> None:
    someone, dispute = user(), name("dp")
    ref, bought = await shop.buy(someone)
    refund = await shop.applied("Refund.Apply", refund_id=name("rf"), external_ref=ref, amount="2.50")
    assert set(refund["effects"]) == {"entry_id", "credits_taken", "credits_due", "credit_note_number"}
    assert (refund["effects"]["credits_taken"], refund["effects"]["credits_due"]) == (25, 25)
    expect(refund, someone, 2, 75)
    note = await shop.document(refund["effects"]["credit_note_number"])
    assert note.headers["ce_type"] == "CreditNote.Issued"
    assert note.body["receipt_number"] == bought["effects"]["receipt_number"]
    taken = await shop.applied("Chargeback.Apply", dispute_id=dispute, external_ref=ref, category="fraud")
    assert (taken["effects"]["credits_taken"], taken["effects"]["credits_due"]) == (75, 75)
    assert (await shop.document(taken["effects"]["credit_note_number"])).headers["ce_type"] == "CreditNote.Issued"
    expect(taken, someone, 3, 0)
    back = await shop.applied("Chargeback.Reverse", dispute_id=dispute)
    assert set(back["effects"]) == {"entry_id", "lot_id", "credits"}
    assert back["effects"]["credits"] == 75
    expect(back, someone, 4, 75)

    def correction() -> bool:
        return len([one for one in shop.said("receipts") if one.body["external_ref"] == ref]) == 4

    await shop.bus.until("receipt, two credit notes and a correction", correction)


async def test_catalog_commands_answer_with_the_object(shop: Merchant) -> None:
    code, op = name("p"), name("o")
    made = await shop.sellable(code, 50, "5.00", 7)
    effects = made["effects"]
    assert (effects["product_code"], effects["credits"], effects["access_period_days"]) == (code, 50, 7)
    assert effects["distribution"] == "sellable"
    assert parse_time(effects["effective_at"]) == parse_time(made["applied_at"])
    price = await shop.applied("ProductPrice.Create", product_code=code, country="AM", currency="AMD", amount="2000")
    assert (price["effects"]["country"], price["effects"]["currency"]) == ("AM", "AMD")
    gone = await shop.applied("ProductPrice.Archive", product_code=code, country="AM", currency="AMD")
    assert parse_time(gone["effects"]["archived_at"]) == parse_time(gone["applied_at"])
    archived = await shop.applied("Product.Archive", product_code=code)
    assert parse_time(archived["effects"]["archived_at"]) == parse_time(archived["applied_at"])
    rate = await shop.rate(op, "0.25", minimum_charge=3, workflow_type="chat")
    assert rate["effects"]["operation_code"] == op
    assert (float(rate["effects"]["credits_per_unit"]), rate["effects"]["minimum_charge"]) == (0.25, 3)
    ended = await shop.applied("OperationType.Archive", operation_code=op)
    assert parse_time(ended["effects"]["archived_at"]) == parse_time(ended["applied_at"])
    for one in (made, price, rate):
        assert "user_id" not in one
        assert "balance" not in one


async def test_account_role_configuration_and_erasure_commands_are_applied(
    changeable: Merchant, user: MakeUser
) -> None:
    shop, someone = changeable, user()
    await shop.configure()
    until = shop.now(3600)
    locked = await shop.applied("Account.Lock", user_id=someone, until=until)
    assert parse_time(locked["effects"]["until"]) == parse_time(until)
    await shop.applied("Account.Unlock", user_id=someone)
    assigned = await shop.applied("UserRole.Assign", subject=someone, role="support")
    assert (assigned["effects"]["subject"], assigned["effects"]["role"]) == (someone, "support")
    await shop.applied("UserRole.Assign", subject=someone, role="support")
    await shop.applied("UserRole.Revoke", subject=someone, role="support")
    configured = await shop.applied("Merchant.Configure", config=shop.config | {"retention_years": 7})
    assert configured["effects"]["version"] > 1
    assert configured["effects"]["config"]["retention_years"] == 7
    await shop.grant(someone, 1)
    await shop.applied("User.Erase", request_id=name("er"), user_id=someone)


async def test_a_fiscal_receipt_is_attached(shop: Merchant, user: MakeUser) -> None:
    _, bought = await shop.buy(user())
    number = bought["effects"]["receipt_number"]
    members = {
        "receipt_number": number,
        "kind": "sale",
        "fiscal_number": name("f"),
        "authority": "SRC",
        "qr_url": "https://example.org/q",
        "fiscal_at": shop.now(),
    }
    result = await shop.applied("Receipt.AttachFiscal", members)
    assert result["effects"]["receipt_number"] == number
    assert result["effects"]["fiscal_number"] == members["fiscal_number"]
    again = await shop.do("Receipt.AttachFiscal", members)
    assert again["replay_of"], again
    second = await shop.applied("Receipt.AttachFiscal", members | {"kind": "return", "fiscal_number": name("f")})
    assert "replay_of" not in second


async def test_the_jobs_of_the_clock_answer_too(simulated: Merchant, user: MakeUser) -> None:
    someone = user()
    granted = await simulated.grant(someone, 10, days=2)
    lot_id = granted["effects"]["lot_id"]
    await simulated.refused("not_due", "Lot.Expire", user_id=someone, lot_id=lot_id)
    operation_id = await simulated.open(someone)
    await simulated.refused("not_due", "Operation.Expire", user_id=someone, operation_id=operation_id)
    advanced = await simulated.advance(3 * 86_400)
    assert advanced["effects"]["merchant_id"] == simulated.id

    def expired(type_: str) -> list[Json]:
        bodies = [one.body for one in simulated.said("results")]
        return [
            one
            for one in bodies
            if one["command_type"] == type_ and one.get("user_id") == someone and one["outcome"] == "applied"
        ]

    lot = (await simulated.bus.until("the expiry", lambda: expired("Lot.Expire")))[0]
    assert lot["effects"] == {
        "lot_id": lot_id,
        "entry_id": lot["effects"]["entry_id"],
        "credits": lot["effects"]["credits"],
    }
    assert abs(lot["effects"]["credits"]) == 10
    timed_out = (await simulated.bus.until("the timeout", lambda: expired("Operation.Expire")))[0]
    assert timed_out["effects"] == {"operation_id": operation_id} | {
        key: value for key, value in timed_out["effects"].items() if key == "state"
    }
    again = await simulated.applied("Lot.Expire", user_id=someone, lot_id=lot_id)
    assert again["effects"] == lot["effects"]
    assert again["balance"] == 0


async def test_a_receipt_is_published_whole(shop: Merchant, user: MakeUser) -> None:
    someone = user()
    buyer = {"name": "Ani", "email": "ani@example.org", "country": "AM", "locale": "hy"}
    ref, bought = await shop.buy(someone, buyer=buyer)
    number = bought["effects"]["receipt_number"]
    receipt = await shop.document(number)
    body = receipt.body
    assert receipt.headers["ce_type"] == "Receipt.Issued"
    assert (own_number(receipt), body["external_ref"], body["user_id"]) == (number, ref, someone)
    assert body["lot_id"] == bought["effects"]["lot_id"]
    assert (float(body["amount"]), body["currency"]) == (10, "USD")
    assert body["merchant"]["legal_name"] == shop.config["legal_name"]
    assert body["merchant"]["registered_address"] == shop.config["registered_address"]
    assert body["buyer"] == buyer
    assert (body["tax"]["net"], body["tax"]["tax"], body["tax"]["gross"]) == ("8.33", "1.67", "10.00")
    assert parse_time(body["issued_at"]) >= parse_time(bought["applied_at"])
    prefix, year, digits = number.split("-")
    assert (prefix, len(digits) >= 4) == ("R", True)
    local = datetime.fromisoformat(body["issued_at"]) + timedelta(hours=4)
    assert int(year) == local.year
    assert rfc3339(parse_time(body["issued_at"])) == body["issued_at"]


async def test_credit_notes_and_corrections_name_the_buyer_as_their_receipt_does(bus: Bus, user: MakeUser) -> None:
    shop = await bus.register(chargeback_policy={"shortfall": "debit", "credit_note": "on_apply"})
    await shop.stock()
    someone = user()
    buyer = {"name": "Ani", "country": "AM", "vat_id": "AM1", "locale": "hy"}
    ref, _ = await shop.buy(someone, buyer=buyer)
    refund: Json = {"refund_id": name(), "external_ref": ref, "amount": "1.00"}
    refunded = await shop.applied("Refund.Apply", refund)
    dispute_id = name()
    disputed = await shop.applied("Chargeback.Apply", dispute_id=dispute_id, external_ref=ref)
    await shop.applied("Chargeback.Reverse", dispute_id=dispute_id)
    correction = "CN-{1}-0003".format(*refunded["effects"]["credit_note_number"].split("-"))
    for number in (*(one["effects"]["credit_note_number"] for one in (refunded, disputed)), correction):
        body = (await shop.document(number)).body
        assert body["buyer"] == buyer, number
        assert body["buyer_digest"]
    await shop.applied("User.Erase", request_id=name(), user_id=someone)
    later = await shop.applied("Refund.Apply", refund | {"refund_id": name()})
    body = (await shop.document(later["effects"]["credit_note_number"])).body
    assert not {"buyer", "buyer_digest"} & set(body)


async def test_a_credit_note_of_the_same_batch_as_its_receipt_names_the_buyer(shop: Merchant, user: MakeUser) -> None:
    members = shop.purchase(user(), buyer={"name": "Ani"})
    refund = {"refund_id": name(), "external_ref": members["external_ref"]}
    # The refund is parked, and decided with its purchase.
    early = await shop.send("Refund.Apply", refund)
    await shop.applied("Purchase.Settled", members)
    (result,) = await shop.bus.results(early)
    assert (await shop.document(result.body["effects"]["credit_note_number"])).body["buyer"] == {"name": "Ani"}
