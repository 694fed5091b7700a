"""The operator page in a real browser, on a real server, database and broker."""

import gc
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from console.processes import free_port
from merchants import tokens
from merchants.databases import CONTROL_SETTINGS, READER_SETTINGS, Pools, create_engine, engine_url
from merchants.schema import migrate
from tests.browser import Page, browse, find_chromium
from tests.integration.shop import Shop, open_shop
from tests.integration.test_restore import purchase
from tests.services import Services
from workers.lanes import Counters
from workers.metrics import Metrics
from workers.operator import OperatorPage
from workers.web import WebSettings
from workers.web.server import Server

CUT_OFF = """
    [...document.querySelectorAll('.scroll, article')].filter(e => e.scrollWidth > e.clientWidth).map(e => e.innerText)
"""
needs_browser = pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed here")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shop(services: Services) -> AsyncIterator[Shop]:
    url = services.database_url(f"operator_control_{secrets.token_hex(3)}")
    await migrate(url)
    async with open_shop(services, url, f"s{secrets.token_hex(4)}") as shop:
        await shop.stock()
        shop.send("Purchase.Settled", **purchase("ann <b>", "pay-1"))
        shop.send("Purchase.Settled", **purchase("ann <b>", "<img src=x onerror=alert(1)>", product_code="nothing"))
        shop.send("Operation.Open", user_id="ann <b>", operation_id="op-1", operation_code="llm")
        await shop.work()
        message = shop.message("Operation.Open", "m1", {"user_id": "u", "operation_id": "o", "operation_code": "llm"})
        shop.unsent.append(type(message)(message.topic, message.key, b"{", message.headers))
        yield shop


@asynccontextmanager
async def serve(shop: Shop, **changes: Any) -> AsyncIterator[str]:
    """Serve the page beside the queries on a free port, under changed settings, and yield the address."""
    url = shop.settings.control_database_url
    state: Any = SimpleNamespace(ready=True, counters=Counters(), assigned={}, lag={})
    metrics = Metrics(lambda: state, dict, {})
    shop.pipeline.observers[:] = [metrics.observe]
    service: Any = SimpleNamespace(
        settings=replace(shop.settings, **changes),
        control_engine=create_engine(engine_url(url), CONTROL_SETTINGS, pool_size=2),
        readers=Pools(READER_SETTINGS, pool_size=2, merchants_max=4),
        merchants={shop.merchant.merchant_id: shop.merchant},
        metrics=metrics,
        app=SimpleNamespace(state_of_worker=state),
    )
    server = Server(service, WebSettings(bootstrap_token="root of the tests", rate=0))
    application = web.Application()
    server.mount(application)
    page = OperatorPage(service, server._principal)
    if not any(resource.canonical == "/operator" for resource in application.router.resources()):
        for path, handler in page.routes():
            resource = application.router.add_get(path, handler).resource
            assert resource is not None
            server._own.add(resource)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await page.close()
        await runner.cleanup()
        await service.readers.close()
        await service.control_engine.dispose()


async def enter(page: Page, url: str) -> None:
    """Sign in and look at the only merchant."""
    await page.open(f"{url}/operator")
    await page.type("#token", "root of the tests")
    await page.click("#enter button")
    await page.until("document.querySelectorAll('#merchants tbody tr').length === 1")
    await page.click("#merchants button")


@needs_browser
async def test_an_operator_sees_merchants_purchases_dead_letters_and_an_account(shop: Shop, tmp_path: Path) -> None:
    async with serve(shop) as url, browse(str(find_chromium())) as page:
        await shop.work()
        await page.open(f"{url}/operator")
        await page.type("#token", "not a token")
        await page.click("#enter button")
        assert "No valid credentials" in await page.until("document.querySelector('#refused').innerText")
        page.errors.clear()
        await enter(page, url)
        await page.until("document.querySelector('#attention td')")
        assert "<img src=x" in await page.text("#attention")
        assert "unknown_product" in await page.text("#attention")
        assert f"credits.{shop.merchant.merchant_id}.operations" in await page.text("#letters")
        assert "malformed" in await page.text("#refusals")

        await page.type("#user", "ann <b>")
        await page.click("#find button")
        await page.until("document.querySelectorAll('#account tbody tr').length === 2")
        assert "100" in await page.text("#account .figures")
        assert "op-1" in await page.text("#account")
        await page.until("document.querySelector('#rate path')")
        assert await page.run(CUT_OFF) == []
        await page.screenshot(tmp_path / "board.png")
        await page.click("#account table:last-of-type button")
        await page.until("document.querySelector('#explain').open")
        assert "Purchase.Settled" in await page.text("#explanation")

        assert page.errors == []
        assert [request for request in page.requests if not request.startswith((url, "data:", "about:"))] == []
        await page.run("document.querySelector('#explain').close()")
        await page.click("#leave")
        assert await page.run("sessionStorage.length") == 0


@needs_browser
async def test_of_a_long_history_the_newest_entries_are_shown(shop: Shop) -> None:
    admin = {"actor": "ops", "justification": "x", "user_id": "bea", "credits_delta": 1, "access_period_days": 5}
    for number in range(205):
        shop.send("Adjustment.Apply", adjustment_id=f"a{number}", **admin)
    async with serve(shop) as url, browse(str(find_chromium())) as page:
        await shop.work()
        await enter(page, url)
        await page.type("#user", "bea")
        await page.click("#find button")
        await page.until("document.querySelectorAll('#account table:last-of-type tbody tr').length === 20")

        assert "Ledger, the newest 20 of 205 entries" in await page.text("#account")
        assert (await page.text("#account table:last-of-type tbody tr")).startswith("205")


@needs_browser
async def test_the_page_can_neither_run_foreign_scripts_nor_be_framed(shop: Shop) -> None:
    async with serve(shop) as url, browse(str(find_chromium())) as page:
        await page.open(f"{url}/operator")
        ran = """
        new Promise((done) => {
            const script = document.createElement('script');
            script.textContent = 'window.broken = 1';
            document.body.append(script);
            setTimeout(() => done(window.broken === undefined), 200);
        })
        """
        assert await page.run(ran)
        assert any("Content Security Policy" in error for error in page.errors)


async def test_only_operators_get_data_and_only_of_their_own_merchant(shop: Shop) -> None:
    engine = create_engine(engine_url(shop.settings.control_database_url), CONTROL_SETTINGS, pool_size=1)
    name = shop.merchant.merchant_id
    async with engine.begin() as connection:
        made = {role: await tokens.create(connection, role) for role in ("support", "auditor", "admin", "metrics")}
        made["elsewhere"] = await tokens.create(connection, "support", "elsewhere")
    await engine.dispose()
    async with serve(shop) as url, aiohttp.ClientSession() as session:

        async def get(path: str, token: str | None) -> tuple[int, Any]:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            async with session.get(url + path, headers=headers) as answer:
                return answer.status, await answer.json()

        letters = f"/operator/data/dead-letters?merchant={name}"
        for path in ("/operator/data/status", letters):
            assert (await get(path, None))[0] == 401
            assert (await get(path, made["metrics"]))[0] == 403
            for role in ("support", "auditor", "admin"):
                assert (await get(path, made[role]))[0] == 200
        assert (await get("/operator/data/status", made["elsewhere"]))[1]["merchants"] == []
        assert (await get(letters, made["elsewhere"]))[0] == 404
        async with session.get(f"{url}/operator") as answer:
            assert "script-src 'self'" in answer.headers["Content-Security-Policy"]


async def test_a_broker_that_is_away_is_a_503_and_leaves_no_connection_behind(shop: Shop) -> None:
    headers = {"Authorization": "Bearer root of the tests"}
    async with (
        serve(shop, kafka_bootstrap_servers=f"127.0.0.1:{free_port()}") as url,
        aiohttp.ClientSession(headers=headers) as session,
        session.get(f"{url}/operator/data/status") as response,
    ):
        problem = await response.json()
        assert (response.status, problem["retryable"]) == (503, True)
        assert "broker" in problem["detail"]
        assert int(response.headers["Retry-After"]) > 0
    # One that was not closed says so when it is collected.
    gc.collect()
