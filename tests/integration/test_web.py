"""Queries over HTTP against real databases whose history the real core wrote."""

from collections.abc import AsyncIterator

import pytest

from merchants.schema import migrate
from tests import builders
from tests.integration.web import Api, serve
from tests.services import Services


@pytest.fixture(scope="module")
async def control_url(services: Services) -> str:
    url = services.database_url("web_control")
    await migrate(url)
    await builders.merchant(url, "acme")
    return url


@pytest.fixture(scope="module")
async def api(control_url: str) -> AsyncIterator[Api]:
    async with serve(control_url) as api:
        yield api


async def test_smoke(api: Api, control_url: str) -> None:
    from merchants.registry import find
    async with api.wiring.control_engine.connect() as c:
        m = await find(c, "acme")
    async with builders.clerk(m) as clerk:
        await builders.catalogue(clerk)
        print(await clerk.send("User.SignedUp", {"user_id": "u 1/%"}))
        print(await clerk.send("Purchase.Settled", builders.purchase("u 1/%", "pay-1", buyer={"name": "Ann"})))
        print(await builders.operation(clerk, "u 1/%", "op-1", "50", workflow_id="w1"))
        print(await builders.operation(clerk, "u 1/%", "op-2", "500"))
        print(await clerk.send("Purchase.Settled", builders.purchase("u 1/%", "pay-2")))
        print(await clerk.send("Purchase.Settled", builders.purchase("u 1/%", "pay-3", product_code="nope")))
        print(await clerk.send("Refund.Apply", {"refund_id": "r1", "external_ref": "pay-1", "amount": "100", "justification": "x", "actor": "a"}))
    u = "/users/u%201%2F%25"
    import json
    from yarl import URL
    for path in ["/balance", "/balance?explain=true", "/lots", "/ledger", "/usage", "/receipts", "/overview", "/export"]:
        print(path, json.dumps(await api.get(URL(u + path, encoded=True)) if False else await get(api, u + path)))
    for path in ["/receipts/R-2026-0001", "/receipts/R-2026-0001/status", "/products", "/products?country=AM", "/operation-types", "/operation-types/chat", "/operations", "/operations/metrics", "/operations/op-1", "/purchases", "/purchases?needs_attention=true", "/purchases?external_ref=pay-1", "/commands?source=test&id=c1", "/commands?source=test&id=nope", "/users/x/balance"]:
        print(path, json.dumps(await get(api, path)))
    for e in (await get(api, u + "/ledger"))["items"]:
        print(json.dumps(await get(api, f"{u}/ledger/{e['entry_id']}/explain")))


async def get(api, path):
    from yarl import URL
    r = await api.client.get(URL(f"/v1/merchants/acme{path}", encoded=True), headers={"Authorization": f"Bearer {api.token}"})
    print(r.status, r.headers.get("ETag"))
    return await r.json()
