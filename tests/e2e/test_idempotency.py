"""Every delivery is answered once, every effect happens once."""

import asyncio
import json
from collections.abc import Callable

import pytest
from aiokafka import AIOKafkaProducer

from tests.e2e.blackbox import AVRO, JSON, STRUCTURED, Json, Merchant, Received, Sent, completed, name
from tests.e2e.conftest import Running

MakeUser = Callable[[], str]
SAME = ("outcome", "effects", "user_seq", "balance", "debt", "applied_at", "user_id")


async def again(shop: Merchant, sent: Sent, payload: Json, type_: str, times: int, **options: object) -> list[Received]:
    """Send the same message some more times and wait for an answer to each."""
    for _ in range(times):
        await shop.send(type_, payload, id=sent.id, **options)
    return await shop.bus.results(sent, times + 1)


async def test_a_message_delivered_five_times_has_one_effect_and_five_equal_results(
    shop: Merchant, user: MakeUser
) -> None:
    someone = user()
    purchase = shop.purchase(someone)
    for type_, members in (
        ("Purchase.Settled", purchase),
        ("Grant.Apply", {"grant_id": name(), "user_id": someone, "credits": 7, "access_period_days": 9}),
        ("Adjustment.Apply", {"adjustment_id": name(), "user_id": someone, "credits_delta": -3}),
        ("Refund.Apply", {"refund_id": name(), "external_ref": purchase["external_ref"], "amount": "1"}),
        ("Operation.Open", {"user_id": someone, "operation_id": "same-" + someone, "operation_code": "llm"}),
        ("Operation.RecordAndClose", shop.closing(someone, "same-" + someone, "4")),
    ):
        sent = await shop.send(type_, members)
        results = await again(shop, sent, members, type_, 4)
        assert len({one.value for one in results}) == 1, type_
        assert len({one.headers["ce_id"] for one in results}) == 1, type_
        assert results[0].body["outcome"] == "applied", results[0].body
        assert "replay_of" not in results[0].body
    last = await shop.grant(someone, 1)
    assert (last["user_seq"], last["balance"]) == (6, 100 + 7 - 3 - 10 - 4 + 1)
    receipts = [one for one in shop.said("receipts") if one.body["external_ref"] == purchase["external_ref"]]
    assert len(receipts) == 2


async def test_five_deliveries_in_a_burst_are_answered_five_times(shop: Merchant, user: MakeUser) -> None:
    someone = user()
    members = {"grant_id": name(), "user_id": someone, "credits": 7, "access_period_days": 9}
    sent = await shop.send("Grant.Apply", members)
    await asyncio.gather(*(shop.send("Grant.Apply", members, id=sent.id) for _ in range(4)))
    results = await shop.bus.results(sent, 5)
    assert len({(one.value, one.headers["ce_id"]) for one in results}) == 1
    assert (await shop.grant(someone, 1))["balance"] == 8


async def test_a_refusal_is_repeated_byte_for_byte_too(shop: Merchant, user: MakeUser) -> None:
    members = shop.purchase(user(), amount="9.99")
    sent = await shop.send("Purchase.Settled", members)
    results = await again(shop, sent, members, "Purchase.Settled", 4)
    assert len({(one.value, one.headers["ce_id"]) for one in results}) == 1
    assert results[0].body["error"]["code"] == "price_mismatch"


async def test_a_business_key_in_a_new_message_replays_the_original_under_its_own_identity(
    shop: Merchant, user: MakeUser
) -> None:
    someone = user()
    members = shop.purchase(someone)
    sent = await shop.send("Purchase.Settled", members)
    (first,) = await shop.bus.results(sent)
    await shop.grant(someone, 1)
    new = await shop.send("Purchase.Settled", members, source="urn:other-shop")
    (second,) = await shop.bus.results(new)
    assert (second.body["command_id"], second.body["command_source"]) == (new.id, "urn:other-shop")
    assert second.body["replay_of"] == {"command_source": sent.source, "command_id": sent.id}
    assert {key: second.body[key] for key in SAME} == {key: first.body[key] for key in SAME}
    assert second.headers["ce_id"] != first.headers["ce_id"]
    results = await again(shop, new, members, "Purchase.Settled", 1, source="urn:other-shop")
    assert results[0].value == results[1].value


async def test_spelling_defaults_nulls_and_unknown_members_are_no_content(shop: Merchant, user: MakeUser) -> None:
    someone = user()
    members = shop.purchase(someone)
    sent = await shop.send("Purchase.Settled", members)
    await shop.bus.results(sent)
    variant = dict(reversed(members.items())) | {"buyer": None, "campaign": "spring", "nested": {"deep": [1, None]}}
    variant["pricing_snapshot"] = {"currency": "USD", "amount": "10", "country": "AM", "tax": None}
    variant["settled_at"] = members["settled_at"].replace("Z", "+00:00")
    results = await again(shop, sent, variant, "Purchase.Settled", 1)
    assert results[0].value == results[1].value


async def test_the_same_identity_with_other_content_is_a_conflict(shop: Merchant, user: MakeUser) -> None:
    someone = user()
    members = {"grant_id": name(), "user_id": someone, "credits": 5, "access_period_days": 3}
    sent = await shop.send("Grant.Apply", members)
    await shop.bus.results(sent)
    await shop.send("Grant.Apply", members | {"credits": 6, "access_period_days": 4}, id=sent.id)
    first, second = await shop.bus.results(sent, 2)
    assert second.body["outcome"] == "rejected"
    assert second.body["error"]["code"] == "idempotency_conflict"
    assert sorted(second.body["error"]["details"]["fields"]) == ["access_period_days", "credits"]
    assert second.body["error"]["details"]["first"] == {"command_source": sent.source, "command_id": sent.id}
    assert first.headers["ce_id"] != second.headers["ce_id"]
    assert (await shop.grant(someone, 1))["balance"] == 6


async def test_the_same_business_key_with_other_content_is_a_conflict_that_names_the_paths(
    shop: Merchant, user: MakeUser
) -> None:
    members = shop.purchase(user())
    sent = await shop.send("Purchase.Settled", members)
    await shop.bus.results(sent)
    changed = members | {
        "pricing_snapshot": members["pricing_snapshot"] | {"country": "US"},
        "payment_method": "paypal",
    }
    result = await shop.refused("idempotency_conflict", "Purchase.Settled", changed)
    assert sorted(result["error"]["details"]["fields"]) == ["payment_method", "pricing_snapshot.country"]
    assert result["error"]["details"]["first"] == {"command_source": sent.source, "command_id": sent.id}
    original = await shop.do("Purchase.Settled", members)
    assert original["replay_of"]


async def test_actor_and_justification_are_content(shop: Merchant, user: MakeUser) -> None:
    members = {"grant_id": name(), "user_id": user(), "credits": 5, "access_period_days": 3}
    await shop.applied("Grant.Apply", members)
    result = await shop.refused("idempotency_conflict", "Grant.Apply", members, actor="x", justification="y")
    assert sorted(result["error"]["details"]["fields"]) == ["actor", "justification"]


async def test_an_identity_is_one_whatever_the_type(shop: Merchant, user: MakeUser) -> None:
    someone = user()
    members = {"grant_id": name(), "user_id": someone, "credits": 5, "access_period_days": 3}
    sent = await shop.send("Grant.Apply", members)
    await shop.bus.results(sent)
    await shop.send("User.SignedUp", {"user_id": someone}, id=sent.id)
    _, second = await shop.bus.results(sent, 2)
    assert second.body["error"]["code"] == "idempotency_conflict"


async def test_business_keys_of_different_types_do_not_meet(shop: Merchant, user: MakeUser) -> None:
    someone, key = user(), name()
    await shop.applied("Grant.Apply", grant_id=key, user_id=someone, credits=5, access_period_days=3)
    await shop.applied("Adjustment.Apply", adjustment_id=key, user_id=someone, credits_delta=-1)
    purchase = shop.purchase(someone) | {"external_ref": key}
    await shop.applied("Purchase.Settled", purchase)
    refund = await shop.applied("Refund.Apply", refund_id=key, external_ref=key, amount="1")
    chargeback = await shop.applied("Chargeback.Apply", dispute_id=key, external_ref=key, amount="1")
    reverse = await shop.applied("Chargeback.Reverse", dispute_id=key)
    assert all("replay_of" not in one for one in (refund, chargeback, reverse))


async def test_a_refused_purchase_is_decided_afresh_corrected_or_not(shop: Merchant, user: MakeUser) -> None:
    someone = user()
    members = shop.purchase(someone, amount="9.00")
    await shop.refused("price_mismatch", "Purchase.Settled", members)
    second = await shop.refused("price_mismatch", "Purchase.Settled", members)
    assert "replay_of" not in second
    corrected = members | {"pricing_snapshot": members["pricing_snapshot"] | {"amount": "10.00"}}
    result = await shop.applied("Purchase.Settled", corrected)
    assert (result["balance"], "replay_of" in result) == (100, False)


async def test_a_refused_open_is_final_for_its_operation_id(shop: Merchant, user: MakeUser) -> None:
    someone, operation_id = user(), name("op")
    await shop.adjust(someone, -1)
    members = {"user_id": someone, "operation_id": operation_id, "operation_code": "llm"}
    sent = await shop.send("Operation.Open", members)
    (first,) = await shop.bus.results(sent)
    assert first.body["error"]["code"] == "insufficient_balance"
    await shop.grant(someone, 10)
    second = await shop.refused("insufficient_balance", "Operation.Open", members)
    assert second["replay_of"] == {"command_source": sent.source, "command_id": sent.id}
    await shop.refused("idempotency_conflict", "Operation.Open", members | {"user_id": user()})
    await shop.open(someone)


async def test_a_refused_close_leaves_the_operation_open(shop: Merchant, user: MakeUser) -> None:
    someone = user()
    await shop.grant(someone, 10)
    operation_id = await shop.open(someone)
    wrong = shop.closing(someone, operation_id, "3", resource_unit="SECOND")
    await shop.refused("resource_unit_mismatch", "Operation.RecordAndClose", wrong)
    result = await shop.applied("Operation.RecordAndClose", wrong | {"resource_unit": "TOKEN"})
    assert result["balance"] == 7


@pytest.mark.parametrize("encoding", [JSON, STRUCTURED, AVRO])
async def test_every_encoding_has_the_same_outcome_and_is_answered_in_kind(
    shop: Merchant, user: MakeUser, encoding: str
) -> None:
    someone = user()
    members = shop.purchase(someone)
    for type_, payload, balance in (
        ("Purchase.Settled", members, 100),
        ("Operation.Open", {"user_id": someone, "operation_id": "e" + someone, "operation_code": "llm"}, 100),
        ("Operation.RecordAndClose", shop.closing(someone, "e" + someone, "5.5"), 94),
        ("Refund.Apply", {"refund_id": name(), "external_ref": members["external_ref"], "amount": "1.00"}, 84),
    ):
        sent = await shop.send(type_, payload, encoding=encoding)
        (result,) = await shop.bus.results(sent)
        assert (result.body["outcome"], result.body["balance"]) == ("applied", balance), result.body
        answered = {AVRO: AVRO, JSON: JSON, STRUCTURED: result.headers["content-type"]}[encoding]
        assert result.headers["content-type"] == answered
        assert result.headers["content-type"] in (JSON, STRUCTURED, AVRO)
    refused = await shop.send("Purchase.Settled", shop.purchase(someone, amount="1.00"), encoding=encoding)
    (result,) = await shop.bus.results(refused)
    assert result.body["error"]["code"] == "price_mismatch"
    document = [one for one in shop.said("receipts") if one.body["external_ref"] == members["external_ref"]]
    assert document


@pytest.mark.parametrize(("one", "two"), [(JSON, AVRO), (AVRO, JSON), (JSON, STRUCTURED), (STRUCTURED, AVRO)])
async def test_the_same_command_in_another_encoding_is_the_same_content(
    shop: Merchant, user: MakeUser, one: str, two: str
) -> None:
    for type_, members in (
        ("Purchase.Settled", shop.purchase(user(), buyer={"name": "Ani", "country": "AM"})),
        ("Grant.Apply", {"grant_id": name(), "user_id": user(), "credits": 5, "access_period_days": 3}),
        ("Operation.Open", {"user_id": user(), "operation_id": name(), "operation_code": "llm"}),
    ):
        sent = await shop.send(type_, members, encoding=one)
        await shop.bus.results(sent)
        await shop.send(type_, members, encoding=two, id=sent.id)
        first, second = await shop.bus.results(sent, 2)
        assert first.headers["ce_id"] == second.headers["ce_id"]
        assert first.body == second.body
        replay = await shop.send(type_, members, encoding=two)
        assert (await shop.bus.results(replay))[0].body["replay_of"]["command_id"] == sent.id


async def test_a_product_code_can_be_created_once(shop: Merchant) -> None:
    code = name("p")
    await shop.sellable(code)
    again_ = await shop.do("Product.Create", _product(code))
    assert (again_["outcome"], "replay_of" in again_) == ("applied", True)
    result = await shop.refused("idempotency_conflict", "Product.Create", _product(code) | {"credits": 101})
    assert result["error"]["details"]["fields"] == ["credits"]


def _product(code: str) -> Json:
    prices = [{"country": "*", "currency": "USD", "amount": "10.00"}]
    product: Json = {"product_code": code, "title": code, "credits": 100, "access_period_days": 30}
    return product | {"distribution": "sellable", "prices": prices}


async def test_what_an_aborted_transaction_wrote_is_never_applied(
    shop: Merchant, running: Running, user: MakeUser
) -> None:
    someone = user()
    producer = AIOKafkaProducer(
        bootstrap_servers=running.services.kafka_bootstrap_servers, transactional_id=name("transaction")
    )
    await producer.start()
    try:
        for commits, credits in ((False, 1), (True, 10), (False, 100), (True, 1000)):
            members = {"grant_id": name(), "user_id": someone, "credits": credits, "access_period_days": 1}
            members = completed("Grant.Apply", members)
            attributes = {"specversion": "1.0", "id": name(), "source": "urn:t", "type": "Grant.Apply"}
            headers = [(f"ce_{key}", value.encode()) for key, value in attributes.items()]
            headers += [("ce_time", shop.now().encode()), ("content-type", JSON.encode())]
            await producer.begin_transaction()
            await producer.send_and_wait(
                shop.topic("admin"), json.dumps(members).encode(), key=someone.encode(), headers=headers
            )
            await (producer.commit_transaction() if commits else producer.abort_transaction())
    finally:
        await producer.stop()
    assert (await shop.grant(someone, 5))["balance"] == 1015
    assert (await shop.grant(someone, 5))["user_seq"] == 4
