"""What each query answers, and how errors, tags, cursors and waiting behave, over HTTP with real databases."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import pytest

from schemas.canonical import compact_json
from tests import builders
from tests.integration.web import Shop, open_shop
from tests.services import Services
from workers.web import users

ANN = "ann"
ADMIN = {"justification": "a test", "actor": "the tests"}


@pytest.fixture(scope="module")
async def shop(services: Services) -> AsyncIterator[Shop]:
    async with open_shop(services, "web-queries") as shop:
        clerk = shop.clerk
        await builders.catalogue(clerk)
        await clerk.send("User.SignedUp", {"user_id": ANN})
        await clerk.send("Purchase.Settled", builders.purchase(ANN, "pay-1", buyer={"name": "Ann"}))
        await builders.operation(clerk, ANN, "op-1", "50", workflow_id="w-1")
        yield shop


# Balance, tags, waiting


async def test_the_balance_tells_what_there_is_what_can_be_spent_and_what_expires_next(shop: Shop) -> None:
    balance = await shop.api.get(f"/users/{ANN}/balance")

    assert balance["user_id"] == ANN
    assert (balance["balance"], balance["debt"], balance["spendable"]) == (85, 0, 85)
    assert balance["next_expiry"]["credits"] == 85
    assert balance["locked"] is False
    assert balance["as_of"]["user_seq"] == 3


async def test_an_open_operation_and_a_lock_are_shown_and_change_the_tag_without_an_entry(shop: Shop) -> None:
    await shop.clerk.send("User.SignedUp", {"user_id": "opener"})
    path = f"{shop.api.root}/users/opener/balance"
    _, _, first = await shop.api.ask(path)

    await shop.clerk.send("Operation.Open", {"user_id": "opener", "operation_id": "op-o", "operation_code": "chat"})
    status, body, second = await shop.api.ask(path, {"If-None-Match": first["ETag"]})
    assert status == 200
    assert body["open_operation"]["operation_id"] == "op-o"
    await shop.clerk.send("Account.Lock", {"user_id": "opener", **ADMIN})
    status, body, third = await shop.api.ask(path, {"If-None-Match": second["ETag"]})
    assert (status, body["locked"]) == (200, True)
    status, body, _ = await shop.api.ask(path, {"If-None-Match": f'"other", {third["ETag"]}'})
    assert (status, body) == (304, b"")
    assert third["ETag"].startswith('W/"1-')


async def test_any_answer_at_all_is_what_a_star_has_already(shop: Shop) -> None:
    await shop.clerk.send("User.SignedUp", {"user_id": "starred"})
    for path in (f"{shop.api.root}/users/starred/balance", f"{shop.api.root}/products"):
        assert (await shop.api.ask(path, {"If-None-Match": "*"}))[:2] == (304, b"")
    assert (await shop.api.ask(f"{shop.api.root}/users/nobody/balance", {"If-None-Match": "*"}))[0] == 404


async def test_a_new_entry_changes_the_tag_of_every_answer_about_the_user(shop: Shop) -> None:
    await shop.clerk.send("User.SignedUp", {"user_id": "tagged"})
    for what in ("balance", "lots", "ledger", "overview", "export"):
        path = f"{shop.api.root}/users/tagged/{what}"
        _, _, headers = await shop.api.ask(path)
        status, _, _ = await shop.api.ask(path, {"If-None-Match": headers["ETag"]})
        assert status == 304, what
        grant = {"grant_id": f"grant-{what}", "user_id": "tagged", "product_code": "gift"}
        await shop.clerk.send("Grant.Apply", grant | ADMIN)
        status, _, _ = await shop.api.ask(path, {"If-None-Match": headers["ETag"]})
        assert status == 200, what


async def test_a_reader_can_wait_for_the_seq_of_a_result(shop: Shop) -> None:
    waiting = asyncio.create_task(shop.api.get("/users/later/balance", min_seq=1))
    await asyncio.sleep(0)
    await shop.clerk.send("User.SignedUp", {"user_id": "later"})
    assert (await waiting)["as_of"]["user_seq"] == 1

    status, body, headers = await shop.api.ask(f"{shop.api.root}/users/later/balance", min_seq=2)
    assert (status, body["code"], body["details"]["user_seq"]) == (409, "not_due", 1)
    assert headers["Retry-After"] == "1"


async def test_the_balance_explained_is_its_lots_and_debts(shop: Shop) -> None:
    await shop.clerk.send("User.SignedUp", {"user_id": "debtor"})
    await builders.operation(shop.clerk, "debtor", "op-d", "100")

    told = await shop.api.get("/users/debtor/balance", explain="true")

    assert (told["balance"], told["debt"], told["lots"]) == (-40, 40, [])
    assert [(debt["operation_id"], debt["uncovered"]) for debt in told["debts"]] == [("op-d", 40)]


# Lists and filters


async def test_the_ledger_has_the_shape_of_the_wire(shop: Shop) -> None:
    entries = (await shop.api.get(f"/users/{ANN}/ledger"))["items"]

    welcome, bought, spent = entries
    assert welcome["lot_id"] == welcome["entry_id"]
    assert (bought["operation_type"], bought["resource_amount"], bought["resource_unit"]) == ("card", "1200", "AMD")
    assert (spent["amount"], spent["operation_id"], spent["workflow_id"]) == (-25, "op-1", "w-1")
    assert [a["credits"] for a in spent["allocations"]] == [10, 15]
    assert spent["command"]["type"] == "Operation.RecordAndClose"
    assert [entry["balance_after"] for entry in entries] == [10, 110, 85]


@pytest.mark.parametrize(
    ("filters", "seqs"),
    [
        ({"reason": "debit"}, [3]),
        ({"reason": "expiry"}, []),
        ({"workflow_id": "w-1"}, [3]),
        ({"operation_id": "op-1"}, [3]),
        ({"to": "2020-01-01T00:00:00Z"}, []),
        ({"from": "2020-01-01T00:00:00Z", "reason": "purchase"}, [2]),
        ({"as_of_seq": "2"}, [1, 2]),
    ],
)
async def test_the_ledger_can_be_filtered(shop: Shop, filters: dict[str, str], seqs: list[int]) -> None:
    items = (await shop.api.get(f"/users/{ANN}/ledger", **filters))["items"]
    assert [item["user_seq"] for item in items] == seqs


async def test_lots_can_be_filtered_by_state_reason_and_purchase(shop: Shop) -> None:
    async def ids(**filters: str) -> list[int]:
        return [lot["user_seq"] for lot in await shop.api.walk(f"/users/{ANN}/lots", **filters)]

    assert await ids() == [1, 2]
    assert await ids(state="spent") == [1]
    assert await ids(state="active") == await ids(reason="purchase") == await ids(external_ref="pay-1") == [2]
    assert await ids(state="expired") == []


async def test_a_cursor_is_good_only_for_the_list_and_the_filters_it_was_made_for(shop: Shop) -> None:
    cursor = (await shop.api.get(f"/users/{ANN}/ledger", limit=1))["next_cursor"]

    assert len((await shop.api.get(f"/users/{ANN}/ledger", cursor=cursor, limit=2))["items"]) == 2
    wrong = (400, "invalid_cursor")
    assert await shop.api.problem(f"/users/{ANN}/ledger", cursor=cursor, reason="debit") == wrong
    assert await shop.api.problem(f"/users/{ANN}/lots", cursor=cursor) == wrong
    assert await shop.api.problem("/products", cursor=cursor) == wrong
    for text in (cursor[:-2], cursor[1:], "x", "", "=", "ü", "!" * 2048, "A" * 64):
        assert await shop.api.problem(f"/users/{ANN}/ledger", cursor=text) == wrong, text


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=201",
        "limit=-1",
        "limit=1.0",
        "limit=",
        "limit=1&limit=2",
        "reason=theft",
        "from=yesterday",
        "from=2026-01-01",
        "from=2026-02-01T00:00:00Z&to=2026-01-01T00:00:00Z",
        "as_of_seq=4",
        "as_of_seq=-1",
        "as_of_seq=1&as_of=2026-01-01T00:00:00Z",
        "workflow_id=",
        "workflow_id=%00",
        "workflow_id=" + "x" * 129,
        "workflow=w-1",
    ],
)
async def test_a_parameter_that_is_not_acceptable_is_named(shop: Shop, query: str) -> None:
    status, body, _ = await shop.api.ask(f"{shop.api.root}/users/{ANN}/ledger?{query}")
    assert (status, body["code"]) == (400, "invalid_parameter")
    assert body["details"]["parameter"] in query


async def test_required_parameters_are_asked_for(shop: Shop) -> None:
    assert await shop.api.problem("/commands", source="test") == (400, "invalid_parameter")


# Paths


@pytest.mark.parametrize(
    "user_id", ["a/b", "a%2Fb", "a b", "%", "ü–漢", "a+b", "..", "{a}", "a?b#c", "a:b@c", "'\"", "x" * 128, "a\\b", "é"]
)
async def test_any_user_id_can_be_asked_for_percent_encoded(shop: Shop, user_id: str) -> None:
    await shop.clerk.send("User.SignedUp", {"user_id": user_id})
    found = await shop.api.get(f"/users/{quote(user_id, safe='').replace('.', '%2E')}/balance")
    assert (found["user_id"], found["balance"]) == (user_id, 10)


@pytest.mark.parametrize("part", ["nobody", "%00", "%ff", "x" * 129, "erased-00000000-0000-0000-0000-000000000000"])
async def test_an_unknown_user_is_a_404_whatever_is_asked(shop: Shop, part: str) -> None:
    for what in ("balance", "lots", "ledger", "usage", "receipts", "overview", "export", "ledger/1/explain"):
        assert await shop.api.problem(f"/users/{part}/{what}") in ((404, "unknown_user"), (404, "not_found"))


async def test_what_is_not_there_is_a_404_with_its_own_code(shop: Shop) -> None:
    assert await shop.api.problem("/receipts/R-1999-0001") == (404, "unknown_receipt")
    assert await shop.api.problem("/receipts/%00") == (404, "unknown_receipt")
    assert await shop.api.problem("/operations/op-none") == (404, "operation_not_found")
    assert await shop.api.problem("/operation-types/none") == (404, "unknown_operation_type")
    assert await shop.api.problem("/commands", source="test", id="none") == (404, "not_found")
    assert await shop.api.problem("/nothing") == (404, "not_found")
    assert await shop.api.problem(f"/users/{ANN}/ledger/xyz/explain") == (404, "not_found")
    entry_id = (await shop.api.get(f"/users/{ANN}/ledger"))["items"][0]["entry_id"]
    await shop.clerk.send("User.SignedUp", {"user_id": "neighbour"})
    assert await shop.api.problem(f"/users/neighbour/ledger/{entry_id}/explain") == (404, "not_found")
    status, body, _ = await shop.api.ask("/v1/merchants/nobody/products")
    assert (status, body["code"]) == (404, "unknown_merchant")


async def test_every_error_is_a_problem_document_that_says_what_to_do(shop: Shop) -> None:
    status, body, headers = await shop.api.ask(f"{shop.api.root}/users/nobody/balance")

    assert headers["Content-Type"].startswith("application/problem+json")
    assert (body["status"], body["code"], body["type"]) == (status, "unknown_user", "/docs#error-unknown_user")
    assert set(body) == {"type", "title", "status", "detail", "code", "retryable"}


# Documents


async def test_a_receipt_is_served_exactly_as_it_is_published(shop: Shop) -> None:
    number = (await shop.api.get(f"/users/{ANN}/receipts"))["items"][0]["number"]
    async with shop.api.client.get(
        f"{shop.api.root}/receipts/{number}", headers={"Authorization": f"Bearer {shop.api.token}"}
    ) as answer:
        raw = await answer.read()
    document = json.loads(raw)
    assert (document["kind"], document["user_id"], document["buyer"]) == ("receipt", ANN, {"name": "Ann"})
    assert raw == compact_json(document)


async def test_the_list_of_receipts_adds_their_status_and_fiscal_receipts(shop: Shop) -> None:
    user = "refunded"
    bought = await shop.clerk.send("Purchase.Settled", builders.purchase(user, "pay-r"))
    number = bought["effects"]["receipt_number"]
    published = await shop.api.get(f"/receipts/{number}")
    fiscal = {"receipt_number": number, "kind": "sale", "fiscal_number": "1", "authority": "SRC"}
    await shop.clerk.send(
        "Receipt.AttachFiscal", fiscal | {"fiscal_at": builders.format_time(datetime.now(UTC)), "actor": "a"}
    )
    assert (await shop.api.get(f"/users/{user}/receipts"))["items"][0]["status"] == "paid"
    for part, status in (("700", "partially_credited"), ("500", "credited")):
        refund = {"refund_id": f"re-{part}", "external_ref": "pay-r", "amount": part}
        await shop.clerk.send("Refund.Apply", refund | ADMIN)
        receipt = (await shop.api.get(f"/users/{user}/receipts", kind="receipt"))["items"][0]
        assert receipt["status"] == status
        assert receipt["fiscal_receipts"][0]["fiscal_number"] == "1"
        standing = await shop.api.get(f"/receipts/{number}/status")
        assert (standing["status"], standing["fiscal_receipts"]) == (status, receipt["fiscal_receipts"])
        assert await shop.api.get(f"/receipts/{number}") == published
    notes = (await shop.api.get(f"/users/{user}/receipts", kind="credit_note"))["items"]
    assert [note["amount"] for note in notes] == ["700.00", "500.00"]
    purchase = (await shop.api.get("/purchases", external_ref="pay-r"))["items"][0]
    assert (purchase["status"], purchase["amount_left"], len(purchase["reversals"])) == ("reversed", "0.00", 2)


# Catalogue and operations


async def test_products_of_a_country_carry_the_prices_that_apply_there(shop: Shop) -> None:
    def prices(page: dict[str, list[dict[str, list[dict[str, str]]]]]) -> list[str]:
        return [price["currency"] for product in page["items"] for price in product["prices"]]

    assert prices(await shop.api.get("/products", country="AM")) == ["AMD"]
    assert prices(await shop.api.get("/products", country="FR")) == ["USD"]
    assert {p["product_code"] for p in await shop.api.walk("/products")} == {"pack", "hello", "gift"}
    assert {p["product_code"] for p in await shop.api.walk("/products", distribution="grant")} == {"hello", "gift"}
    assert await shop.api.walk("/products", active_at="2020-01-01T00:00:00Z") == []


async def test_an_operation_type_shows_the_version_in_force_and_all_others(shop: Shop) -> None:
    rate = {"operation_code": "draw", "display_name": "Draw", "resource_unit": "image", "actor": "a"}
    for credits in ("1", "2"):
        await shop.clerk.send("OperationType.CreateWithArchival", rate | {"credits_per_unit": credits})
    later = {"credits_per_unit": "3", "effective_at": "2099-01-01T00:00:00Z"}
    await shop.clerk.send("OperationType.CreateWithArchival", rate | later)

    shown = await shop.api.get("/operation-types/draw")

    assert shown["active"]["credits_per_unit"] == "2"
    assert [version["state"] for version in shown["versions"]] == ["archived", "active", "scheduled"]
    active = await shop.api.walk("/operation-types", state="active", limit=1)
    assert [version["operation_code"] for version in active] == ["chat", "draw"]


async def test_operations_are_found_by_id_user_state_and_workflow_and_counted(shop: Shop) -> None:
    assert (await shop.api.get("/operations/op-1"))["credits"] == 25
    assert [o["operation_id"] for o in await shop.api.walk("/operations", user_id=ANN)] == ["op-1"]
    assert [o["operation_id"] for o in await shop.api.walk("/operations", workflow_id="w-1")] == ["op-1"]
    await shop.clerk.send("Operation.Open", {"user_id": ANN, "operation_id": "op-x", "operation_code": "none"})
    refused = await shop.api.get("/operations/op-x")
    assert (refused["state"], "credits_per_unit" in refused) == ("refused", False)
    metrics = {row["operation_code"]: row for row in await shop.api.walk("/operations/metrics")}
    assert metrics["none"]["refused"] == 1
    assert metrics["chat"]["closed"] >= 1
    assert metrics["chat"]["opened"] == sum(
        metrics["chat"][state] for state in ("open", "closed", "cancelled", "timed_out", "refused")
    )


# Purchases that need a person, and results


async def test_a_refused_order_is_listed_until_its_purchase_is_applied(shop: Shop) -> None:
    async def listed(**filters: str) -> list[tuple[str | None, str, int]]:
        items = await shop.api.walk("/purchases", needs_attention="true", **filters)
        return [(item.get("external_ref"), item["error"]["code"], item["times"]) for item in items]

    wrong = {"country": "AM", "amount": "1", "currency": "AMD"}
    for _ in range(2):
        await shop.clerk.send("Purchase.Settled", builders.purchase("buyer", "pay-w", pricing_snapshot=wrong))
    await shop.clerk.apply(
        builders.command("Purchase.Settled", b"{}", merchant_id="web-queries", command_id="unreadable")
    )
    nameless = builders.command("Purchase.Settled", b"{}", merchant_id="web-queries")
    nameless.headers = []
    await shop.clerk.apply(nameless)

    assert await listed() == [("pay-w", "price_mismatch", 2), (None, "malformed", 1), (None, "malformed", 1)]
    assert await listed(external_ref="pay-w") == [("pay-w", "price_mismatch", 2)]
    kinds = [item["status"] for item in await shop.api.walk("/purchases", needs_attention="true", limit=1)]
    assert kinds == ["refused", "refused", "dead_lettered"]
    await shop.clerk.send("Purchase.Settled", builders.purchase("buyer", "pay-w"))
    assert await listed(external_ref="pay-w") == []
    assert [p["status"] for p in await shop.api.walk("/purchases", external_ref="pay-w")] == ["paid"]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"user_id": None}, "malformed"),
        ({"merchant_id": "another"}, "wrong_merchant"),
        ({"cvv": "123"}, "sensitive_data"),
        ({"pricing_snapshot": {"country": "AM", "amount": "9" * 16, "currency": "AMD"}}, "limit_exceeded"),
    ],
)
async def test_an_order_that_could_not_be_read_whole_is_listed_by_its_reference_until_it_is_applied(
    shop: Shop, changes: dict[str, Any], code: str
) -> None:
    order = builders.purchase("buyer", f"pay-{code}")

    async def listed() -> list[tuple[str, str]]:
        items = await shop.api.walk("/purchases", needs_attention="true", external_ref=order["external_ref"])
        return [(item["status"], item["error"]["code"]) for item in items]

    await shop.clerk.send("Purchase.Settled", order | changes)
    assert await listed() == [("refused", code)]
    await shop.clerk.send("Purchase.Settled", order)
    assert await listed() == []


async def test_what_may_be_a_card_number_is_not_listed_as_a_reference(shop: Shop) -> None:
    for changes in ({}, {"user_id": None}):
        await shop.clerk.send("Purchase.Settled", builders.purchase("buyer", "4242424242424242") | changes)
    found = await shop.api.walk("/purchases", needs_attention="true")
    assert "4242424242424242" not in json.dumps(found)


async def test_a_stored_result_can_be_read_and_a_parked_command_says_what_it_waits_for(shop: Shop) -> None:
    result = await shop.clerk.send("User.SignedUp", {"user_id": "asked"}, source="app 1", command_id="id/1")
    assert await shop.api.get("/commands", source="app 1", id="id/1") == result

    close = {"user_id": "asked", "operation_id": "op-p", "resource_amount": "2", "resource_unit": "token"}
    close |= {"completed_at": "2026-03-01T12:00:00Z"}
    assert await shop.clerk.send("Operation.RecordAndClose", close, command_id="early") == {}
    status, body, _ = await shop.api.ask(f"{shop.api.root}/commands", source="test", id="early")
    assert (status, body["code"], body["details"]["waits_for"]) == (404, "not_found", {"operation": "op-p"})
    assert (await shop.api.get("/users/asked/overview"))["parked_commands"][0]["command_id"] == "early"
    await shop.clerk.send("Operation.Open", {"user_id": "asked", "operation_id": "op-p", "operation_code": "chat"})
    assert (await shop.api.get("/commands", source="test", id="early"))["outcome"] == "applied"


# Everything about a user


async def test_the_export_holds_everything_about_a_user_and_adds_up(shop: Shop) -> None:
    told = await shop.api.get(f"/users/{ANN}/export")

    assert told["entries"] == await shop.api.walk(f"/users/{ANN}/ledger")
    assert told["lots"] == await shop.api.walk(f"/users/{ANN}/lots")
    assert told["documents"] == await shop.api.walk(f"/users/{ANN}/receipts")
    assert told["balance"]["balance"] == sum(entry["amount"] for entry in told["entries"])
    assert {o["operation_id"] for o in told["operations"]} == {"op-1", "op-x"}
    assert [p["external_ref"] for p in told["purchases"]] == ["pay-1"]
    assert {c["command_type"] for c in told["commands"] if c["outcome"] == "applied"} == {
        "User.SignedUp",
        "Purchase.Settled",
        "Operation.RecordAndClose",
    }


async def test_an_export_too_large_for_one_document_is_refused_and_never_cut(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = await shop.api.get(f"/users/{ANN}/export")
    most = max(len(whole[kind]) for kind in ("lots", "entries", "operations", "commands"))

    monkeypatch.setattr(users, "EXPORTED_MAX", most)
    assert (await shop.api.get(f"/users/{ANN}/export"))["entries"] == whole["entries"]
    monkeypatch.setattr(users, "EXPORTED_MAX", most - 1)
    assert await shop.api.problem(f"/users/{ANN}/export") == (422, "limit_exceeded")


async def test_the_export_holds_commands_that_moved_nothing(shop: Shop) -> None:
    refused = builders.purchase("ada", "pay-ada") | {"product_code": "nothing"}
    await shop.clerk.send("Account.Lock", {"user_id": "ada", **ADMIN})
    await shop.clerk.send("Purchase.Settled", refused)

    told = await shop.api.get("/users/ada/export")

    assert [(c["command_type"], c["outcome"]) for c in told["commands"]] == [
        ("Account.Lock", "applied"),
        ("Purchase.Settled", "rejected"),
    ]


async def test_an_erased_user_is_gone_by_name_and_found_without_personal_data_by_the_tombstone(shop: Shop) -> None:
    await shop.clerk.send("Purchase.Settled", builders.purchase("eve", "pay-e", buyer={"name": "Eve Adams"}))
    await shop.clerk.send("Operation.Open", {"user_id": "eve", "operation_id": "op-e", "operation_code": "chat"})
    erased = await shop.clerk.send("User.Erase", {"request_id": "erase-eve", "user_id": "eve", **ADMIN})

    assert await shop.api.problem("/users/eve/balance") == (410, "account_erased")
    for what in ("/purchases", "/operations"):
        assert await shop.api.walk(what, user_id="eve") == [], what
        assert len(await shop.api.walk(what, user_id=erased["user_id"])) == 1, what
    told = await shop.api.get(f"/users/{erased['user_id']}/export")
    assert (told["user_id"], told["balance"]["balance"]) == (erased["user_id"], 100)
    text = json.dumps(told)
    assert "Eve Adams" not in text
    assert '"eve"' not in text
    assert "buyer_digest" in text

    own = shop.api.holding(await shop.api.make_token("user", shop.api.merchant_id, "eve"))
    assert await own.problem("/operations/op-e") == (410, "account_erased")
    assert await own.problem("/commands", source="test", id="e-open") == (410, "account_erased")
    for what in ("/purchases", "/operations"):
        assert await own.problem(what, user_id="eve") == (410, "account_erased"), what
