"""The queries tell what the topics told."""

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest_asyncio

from tests.e2e.blackbox import Bus, Json, Merchant, Sent, name
from tests.e2e.conftest import Running

MakeUser = Callable[[], str]


@dataclass
class Answer:
    """What the server said."""

    status: int
    headers: Mapping[str, str]
    body: Any


@dataclass
class Web:
    """Both workers' HTTP, by turns."""

    session: aiohttp.ClientSession
    urls: list[str]
    token: str

    async def get(self, path: str, *, token: str | None = "", **headers: str) -> Answer:
        """Ask as the administrator, with another token, or (None) without one."""
        self.urls.reverse()
        if token is not None:
            headers["Authorization"] = f"Bearer {token or self.token}"
        async with self.session.get(self.urls[0] + path, headers=headers) as response:
            text = await response.read()
            is_json = "json" in response.content_type
            return Answer(
                response.status,
                response.headers,
                await response.json(content_type=None) if is_json and text else text,
            )

    async def ok(self, path: str, **options: Any) -> Json:
        """Ask and expect an answer."""
        answer = await self.get(path, **options)
        assert answer.status == 200, (path, answer)
        body: Json = answer.body
        return body

    async def problem(self, status: int, code: str, path: str, **options: Any) -> Json:
        """Ask and expect a problem."""
        answer = await self.get(path, **options)
        assert answer.status == status, (path, answer)
        assert answer.headers["Content-Type"].startswith("application/problem+json")
        assert answer.body["status"] == status
        assert answer.body["code"] == code, answer.body
        assert {"type", "title"} <= set(answer.body)
        return dict(answer.body)

    async def all_items(self, path: str, limit: int) -> list[Json]:
        """Walk through a list."""
        items: list[Json] = []
        cursor = ""
        while True:
            page = await self.ok(f"{path}{'&' if '?' in path else '?'}limit={limit}{cursor}")
            assert len(page["items"]) <= limit
            items += page["items"]
            if not page.get("next_cursor"):
                return items
            cursor = f"&cursor={quote(page['next_cursor'], safe='')}"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def web(running: Running) -> AsyncIterator[Web]:
    async with aiohttp.ClientSession() as session:
        yield Web(session, [running.start(worker) for worker in ("worker-1", "worker-2")], running.token)


def at(merchant: Merchant, path: str) -> str:
    return f"/v1/merchants/{merchant.id}/{path}"


def of(merchant: Merchant, user: str, path: str) -> str:
    return at(merchant, f"users/{quote(user, safe='')}/{path}")


async def history(shop: Merchant, user: str) -> list[Json]:
    """Give a user a history and return the results that wrote entries."""
    results = [await shop.grant(user, 10)]
    results.append((await shop.buy(user))[1])
    results.append(await shop.use(user, "50"))
    results.append(await shop.use(user, "80"))
    ref, bought = await shop.buy(user)
    results.append(bought)
    results.append(await shop.applied("Refund.Apply", refund_id=name(), external_ref=ref, amount="5.00"))
    return results


async def test_the_balance_is_what_the_last_result_said_and_the_sum_of_the_ledger(
    shop: Merchant, web: Web, user: MakeUser
) -> None:
    someone = f"{user()}/é %20&?#"
    results = await history(shop, someone)
    assert [one["balance"] for one in results] == [10, 110, 60, -20, 80, 30]
    balance = await web.ok(of(shop, someone, "balance"))
    last = results[-1]
    assert (balance["balance"], balance["spendable"], balance["debt"]) == (30, 30, 0)
    assert balance["as_of"]["user_seq"] == last["user_seq"] == 6
    for limit in (1, 4, 200):
        entries = await web.all_items(of(shop, someone, "ledger"), limit)
        assert sorted(one["user_seq"] for one in entries) == list(range(1, 7))
        assert sum(one["amount"] for one in entries) == balance["balance"]
    by_seq = {one["user_seq"]: one for one in entries}
    for result in results:
        entry = by_seq[result["user_seq"]]
        assert entry["entry_id"] == result["effects"]["entry_id"]
        assert (entry["balance_after"], entry["debt_after"]) == (result["balance"], result["debt"])
    assert [by_seq[seq]["reason"] for seq in range(1, 7)] == [
        "promo",
        "purchase",
        "debit",
        "debit",
        "purchase",
        "refund",
    ]
    assert [by_seq[seq]["operation_type"] for seq in (1, 2, 3, 6)] == ["promo_grant", "card", "llm", "refund"]
    assert by_seq[2]["resource_unit"] == "USD"
    assert float(by_seq[2]["resource_amount"]) == 10
    assert (by_seq[3]["resource_unit"], float(by_seq[3]["resource_amount"])) == ("TOKEN", 50)
    assert by_seq[1]["resource_unit"] == "CREDIT"


async def test_the_past_is_told_by_sequence_for_balance_and_lots(shop: Merchant, web: Web, user: MakeUser) -> None:
    someone = user()
    results = await history(shop, someone)
    for result in results:
        seq = result["user_seq"]
        balance = await web.ok(of(shop, someone, f"balance?as_of_seq={seq}"))
        assert (balance["balance"], balance["debt"]) == (result["balance"], result["debt"])
        lots = await web.all_items(of(shop, someone, f"lots?as_of_seq={seq}"), 200)
        assert sum(one["remaining"] for one in lots) - balance["debt"] == balance["balance"]
        past = await web.ok(of(shop, someone, f"balance?as_of={quote(result['applied_at'])}"))
        assert past["balance"] == result["balance"]
    lots = await web.all_items(of(shop, someone, "lots"), 2)
    assert {one["lot_id"] for one in lots} >= {results[1]["effects"]["lot_id"], results[4]["effects"]["lot_id"]}
    bought = next(one for one in lots if one["lot_id"] == results[4]["effects"]["lot_id"])
    assert (bought["credits"], bought["remaining"]) == (100, 30)


async def test_spendable_knows_the_time(simulated: Merchant, web: Web, user: MakeUser) -> None:
    someone = user()
    await simulated.grant(someone, 10, days=1)
    await simulated.grant(someone, 5, days=9)
    await simulated.advance(2 * 86_400)
    balance = await web.ok(of(simulated, someone, "balance"))
    assert balance["spendable"] == 5


async def test_receipts_commands_and_purchases_agree_with_the_topics(shop: Merchant, web: Web, user: MakeUser) -> None:
    someone = user()
    members = shop.purchase(someone)
    sent: Sent = await shop.send("Purchase.Settled", members)
    (result,) = await shop.bus.results(sent)
    number = result.body["effects"]["receipt_number"]
    document = await shop.document(number)
    assert await web.ok(at(shop, f"receipts/{number}")) == document.body
    listed = await web.all_items(of(shop, someone, "receipts"), 10)
    assert number in str(listed)
    stored = await web.ok(at(shop, f"commands?source={quote(sent.source)}&id={sent.id}"))
    assert stored == result.body
    found = await web.all_items(at(shop, f"purchases?external_ref={members['external_ref']}"), 10)
    assert [one["external_ref"] for one in found] == [members["external_ref"]]
    for kind, first in (("text/html", b"<"), ("application/pdf", b"%PDF")):
        one = await web.get(at(shop, f"receipts/{number}"), Accept=kind)
        two = await web.get(at(shop, f"receipts/{number}"), Accept=kind)
        assert one.status == 200, one
        assert one.body.lstrip().startswith(first)
        assert one.body == two.body


async def test_a_refused_purchase_needs_attention(shop: Merchant, web: Web, user: MakeUser) -> None:
    members = shop.purchase(user(), amount="1.00")
    await shop.refused("price_mismatch", "Purchase.Settled", members)
    listed = await web.all_items(at(shop, "purchases?needs_attention=true"), 200)
    assert members["external_ref"] in str(listed)
    corrected = members | {"pricing_snapshot": members["pricing_snapshot"] | {"amount": "10.00"}}
    await shop.applied("Purchase.Settled", corrected)
    listed = await web.all_items(at(shop, "purchases?needs_attention=true"), 200)
    assert members["external_ref"] not in str(listed)


async def test_operations_and_types_are_told(shop: Merchant, web: Web, user: MakeUser) -> None:
    someone = user()
    await shop.grant(someone, 100)
    operation_id = await shop.open(someone, workflow_id=f"w-{someone}")
    assert (await web.ok(at(shop, f"operations/{operation_id}")))["state"] == "open"
    await shop.applied("Operation.RecordAndClose", shop.closing(someone, operation_id, "7"))
    operation = await web.ok(at(shop, f"operations/{operation_id}"))
    assert (operation["operation_id"], operation["state"], operation["credits"]) == (operation_id, "closed", 7)
    listed = await web.all_items(at(shop, f"operations?workflow_id=w-{someone}"), 50)
    assert [one["operation_id"] for one in listed] == [operation_id]
    ledger = await web.all_items(of(shop, someone, f"ledger?workflow_id=w-{someone}"), 50)
    assert [one["amount"] for one in ledger] == [-7]
    assert "llm" in [one["operation_code"] for one in await web.all_items(at(shop, "operation-types"), 200)]
    assert "llm" in str(await web.ok(at(shop, "operation-types/llm")))
    assert "pack" in [one["product_code"] for one in await web.all_items(at(shop, "products?country=AM"), 200)]
    for path in (of(shop, someone, "usage"), of(shop, someone, "overview"), at(shop, "operations/metrics")):
        await web.ok(path)


async def test_the_export_has_everything_about_one_user_and_nothing_of_others(
    shop: Merchant, web: Web, user: MakeUser
) -> None:
    someone, other = user(), user()
    ref, bought = await shop.buy(someone, buyer={"name": "Ani"})
    other_ref, _ = await shop.buy(other)
    operation_id = await shop.open(someone)
    text = str(await web.ok(of(shop, someone, "export")))
    for wanted in (someone, ref, operation_id, bought["effects"]["receipt_number"], "Ani"):
        assert wanted in text
    assert other not in text
    assert other_ref not in text


async def test_an_etag_saves_the_answer_until_it_changes(shop: Merchant, web: Web, user: MakeUser) -> None:
    someone = user()
    await shop.grant(someone, 5)
    first = await web.get(of(shop, someone, "balance"))
    again = await web.get(of(shop, someone, "balance"), **{"If-None-Match": first.headers["ETag"]})
    assert again.status == 304
    await shop.grant(someone, 5)
    changed = await web.get(of(shop, someone, "balance"), **{"If-None-Match": first.headers["ETag"]})
    assert (changed.status, changed.body["balance"]) == (200, 10)


async def test_unknown_things_are_404_and_bad_parameters_400(shop: Merchant, web: Web, user: MakeUser) -> None:
    someone = user()
    await shop.grant(someone, 5)
    for path in ("balance", "lots", "ledger", "usage", "receipts", "overview", "export"):
        await web.problem(404, "unknown_user", of(shop, user(), path))
    await web.problem(404, "unknown_merchant", "/v1/merchants/nobody-here/users/x/balance")
    for path in ("receipts/R-2026-9999", "operations/none", "commands?source=x&id=y"):
        assert (await web.get(at(shop, path))).status == 404, path
    assert (await web.get(at(shop, "operation-types/none"))).status == 404
    assert (await web.get("/v1/none")).status == 404
    for query in ("limit=0", "limit=201", "limit=x", "limit=-1", "from=yesterday"):
        await web.problem(400, "invalid_parameter", of(shop, someone, f"ledger?{query}"))
    await web.problem(400, "invalid_cursor", of(shop, someone, "ledger?cursor=nonsense"))
    for query in ("as_of_seq=-1", "as_of_seq=x", "as_of=x"):
        await web.problem(400, "invalid_parameter", of(shop, someone, f"balance?{query}"))


async def test_nobody_is_served_without_a_token(shop: Merchant, web: Web, running: Running) -> None:
    path = at(shop, "products?country=AM")
    for token in (None, "wrong", running.jwt("x", aud="other"), running.jwt("x", iss="other"), running.jwt("x", exp=1)):
        answer = await web.get(path, token=token)
        assert answer.status == 401, (token, answer)
        assert answer.headers["Content-Type"].startswith("application/problem+json")
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        assert answer.body["code"] == "unauthenticated"


async def test_a_user_sees_their_own_data_only(shop: Merchant, web: Web, running: Running, user: MakeUser) -> None:
    me, other = user(), user()
    _, mine = await shop.buy(me)
    _, theirs = await shop.buy(other)
    operation_id = await shop.open(other)
    token = running.jwt(me)
    assert (await web.ok(of(shop, me, "balance"), token=token))["balance"] == 100
    await web.ok(at(shop, f"receipts/{mine['effects']['receipt_number']}"), token=token)
    for path in ("balance", "lots", "ledger", "receipts", "export", "overview", "usage"):
        assert (await web.get(of(shop, other, path), token=token)).status == 404, path
    assert (await web.get(at(shop, f"receipts/{theirs['effects']['receipt_number']}"), token=token)).status == 404
    assert (await web.get(at(shop, f"operations/{operation_id}"), token=token)).status == 404
    for path in ("purchases?needs_attention=true", "operations/metrics"):
        assert (await web.get(at(shop, path), token=token)).status == 403, path


async def test_roles_come_from_the_role_commands(
    shop: Merchant, simulated: Merchant, web: Web, running: Running, user: MakeUser
) -> None:
    staff, someone = user(), user()
    await shop.grant(someone, 5)
    await simulated.grant(someone, 5)
    token = running.jwt(staff)
    assert (await web.get(of(shop, someone, "balance"), token=token)).status == 404
    await shop.applied("UserRole.Assign", subject=staff, role="support")
    await web.ok(of(shop, someone, "balance"), token=token)
    await web.ok(at(shop, "purchases?needs_attention=true"), token=token)
    # At another merchant they are a user like any other.
    assert (await web.get(of(simulated, someone, "balance"), token=token)).status == 404
    await shop.applied("UserRole.Revoke", subject=staff, role="support")
    assert (await web.get(of(shop, someone, "balance"), token=token)).status == 404
    await shop.applied("UserRole.Assign", subject=staff, role="metrics")
    assert (await web.get(of(shop, someone, "balance"), token=token)).status == 403


async def test_the_commands_of_a_user_and_the_past_of_an_erased_one_are_gone(
    shop: Merchant, web: Web, user: MakeUser
) -> None:
    someone = user()
    _, bought = await shop.buy(someone, buyer={"name": "Ani Only Here", "email": "ani@example.org"})
    await shop.applied("User.Erase", request_id=name(), user_id=someone)
    answer = await web.get(of(shop, someone, "balance"))
    assert answer.status in (404, 410)
    receipt = await web.ok(at(shop, f"receipts/{bought['effects']['receipt_number']}"))
    assert someone not in str(receipt)
    assert "Ani Only Here" not in str(receipt)
    assert receipt["amount"] == "10.00"
    assert receipt["user_id"].startswith("erased-")


async def test_a_suspended_merchants_queries_answer(bus: Bus, changeable: Merchant, web: Web, user: MakeUser) -> None:
    someone = user()
    await changeable.grant(someone, 5)
    await bus.control("Merchant.Suspend", {"merchant_id": changeable.id})
    try:
        for _ in range(2):
            assert (await web.ok(of(changeable, someone, "balance")))["balance"] == 5
    finally:
        await bus.control("Merchant.Resume", {"merchant_id": changeable.id})


async def test_health_and_descriptions_are_public(web: Web) -> None:
    for path in ("/healthz", "/readyz"):
        await web.ok(path, token=None)
        await web.ok(path, token=None)
    assert (await web.ok("/openapi.json", token=None))["openapi"].startswith("3.1")
    assert (await web.ok("/asyncapi.json", token=None))["asyncapi"].startswith("3.")
    # Nothing of the stream processor's own pages.
    for path in ("/router", "/table", "/router/", "/table/"):
        assert (await web.get(path)).status == 404, path
