"""What the tests of the web server share: a merchant with real pools behind a real HTTP server."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from sqlalchemy.ext.asyncio import AsyncEngine

from merchants import tokens
from merchants.databases import CONTROL_SETTINGS, READER_SETTINGS, Pools, create_engine, engine_url
from merchants.registry import Merchant
from workers.web import WebSettings, mount

ROOT_TOKEN = "the bootstrap token of the tests"


@dataclass
class Wiring:
    """Stands in for the worker around the web server: the same pools, no Kafka."""

    control_engine: AsyncEngine
    readers: Pools
    merchants: dict[str, Merchant] = field(default_factory=dict)
    app: Any = field(default_factory=lambda: SimpleNamespace(state_of_worker=SimpleNamespace(ready=True)))


@dataclass
class Api:
    """A client of the web server; asks as the holder of ``token``."""

    client: "TestClient[web.Request, web.Application]"
    wiring: Wiring
    token: str | None = ROOT_TOKEN

    def holding(self, token: str | None) -> "Api":
        return Api(self.client, self.wiring, token)

    async def ask(self, path: str, headers: Mapping[str, str] | None = None, **query: Any) -> tuple[int, Any, Any]:
        """Return (status, JSON or bytes, headers) of a GET."""
        sent = {**({"Authorization": f"Bearer {self.token}"} if self.token else {}), **(headers or {})}
        async with self.client.get(path, params=query, headers=sent) as answer:
            is_json = answer.content_type.endswith("json") and answer.status != 304
            return answer.status, await (answer.json() if is_json else answer.read()), answer.headers

    async def get(self, path: str, **query: Any) -> Any:
        """Return the JSON of a GET below the merchant, which must succeed."""
        status, body, _ = await self.ask(f"/v1/merchants/acme{path}", **query)
        assert status == 200, (path, query, status, body)
        return body

    async def problem(self, path: str, **query: Any) -> tuple[int, str]:
        """Return (status, code) of a GET below the merchant that must fail."""
        status, body, headers = await self.ask(f"/v1/merchants/acme{path}", **query)
        assert headers["Content-Type"].startswith("application/problem+json"), (status, body)
        return status, body["code"]

    async def walk(self, path: str, **query: Any) -> list[Any]:
        """Return all items of a list, page by page."""
        items, cursor = [], {}
        while True:
            page = await self.get(path, **query, **cursor)
            items += page["items"]
            if "next_cursor" not in page:
                return items
            cursor = {"cursor": page["next_cursor"]}

    async def make_token(self, role: str, merchant_id: str | None = None, subject: str | None = None) -> str:
        async with self.wiring.control_engine.begin() as connection:
            return await tokens.create(connection, role, merchant_id, subject)


@asynccontextmanager
async def serve(control_url: str, settings: WebSettings | None = None) -> AsyncIterator[Api]:
    """Run the web server on a free port of 127.0.0.1."""
    control = create_engine(engine_url(control_url), CONTROL_SETTINGS, pool_size=2, max_overflow=2)
    wiring = Wiring(control, Pools(READER_SETTINGS, pool_size=2, merchants_max=10))
    application = web.Application()
    mount(application, wiring, settings or WebSettings(bootstrap_token=ROOT_TOKEN, rate=0))  # type: ignore[arg-type]
    async with TestClient(TestServer(application, host="127.0.0.1")) as client:
        yield Api(client, wiring)
    await wiring.readers.close()
    await control.dispose()
