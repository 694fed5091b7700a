"""What the tests of the web server share: a merchant with real pools behind a real HTTP server."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from sqlalchemy.ext.asyncio import AsyncEngine
from yarl import URL

from merchants import tokens
from merchants.databases import CONTROL_SETTINGS, READER_SETTINGS, Pools, create_engine, engine_url
from merchants.registry import Merchant
from merchants.schema import migrate
from tests import builders
from tests.builders import Clerk
from tests.services import Services
from workers.app import State
from workers.metrics import Metrics
from workers.web import WebSettings, mount

ROOT_TOKEN = "the bootstrap token of the tests"


@dataclass
class Wiring:
    """Stands in for the worker around the web server: the same pools, no Kafka."""

    control_engine: AsyncEngine
    readers: Pools
    merchants: dict[str, Merchant] = field(default_factory=dict)
    app: Any = field(default_factory=lambda: SimpleNamespace(state_of_worker=SimpleNamespace(ready=True)))
    metrics: Metrics = field(default_factory=lambda: Metrics(lambda: State("tests"), dict, {}))


@dataclass
class Api:
    """A client of the web server; asks as the holder of ``token``."""

    client: "TestClient[web.Request, web.Application]"
    wiring: Wiring
    merchant_id: str
    token: str | None = ROOT_TOKEN

    def holding(self, token: str | None) -> "Api":
        """Return the same for somebody else; None is for a stranger."""
        return Api(self.client, self.wiring, self.merchant_id, token)

    @property
    def root(self) -> str:
        return f"/v1/merchants/{self.merchant_id}"

    async def ask(self, path: str, headers: Mapping[str, str] | None = None, **query: Any) -> tuple[int, Any, Any]:
        """Return (status, JSON or bytes, headers) of a GET."""
        sent = {**({"Authorization": f"Bearer {self.token}"} if self.token else {}), **(headers or {})}
        url = URL(path, encoded=True).update_query(query)
        async with self.client.get(url, headers=sent) as answer:
            is_json = answer.content_type.endswith("json") and answer.status != 304
            return answer.status, await (answer.json() if is_json else answer.read()), answer.headers

    async def get(self, path: str, **query: Any) -> Any:
        """Return the JSON of a GET below the merchant, which must succeed."""
        status, body, _ = await self.ask(self.root + path, **query)
        assert status == 200, (path, query, status, body)
        return body

    async def problem(self, path: str, **query: Any) -> tuple[int, str]:
        """Return (status, code) of a GET below the merchant that must fail."""
        status, body, headers = await self.ask(self.root + path, **query)
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
async def serve(control_url: str, merchant_id: str, settings: WebSettings | None = None) -> AsyncIterator[Api]:
    """Run the web server on a free port of 127.0.0.1."""
    control = create_engine(engine_url(control_url), CONTROL_SETTINGS, pool_size=2, max_overflow=2)
    wiring = Wiring(control, Pools(READER_SETTINGS, pool_size=2, merchants_max=10))
    application = web.Application()
    mount(application, wiring, settings or WebSettings(bootstrap_token=ROOT_TOKEN, rate=0))  # type: ignore[arg-type]
    async with TestClient(TestServer(application, host="127.0.0.1")) as client:
        yield Api(client, wiring, merchant_id)
    await wiring.readers.close()
    await control.dispose()


@dataclass
class Shop:
    """A merchant of its own, in a control database of its own: its web server, and a clerk who writes its history."""

    api: Api
    clerk: Clerk
    control_url: str


@asynccontextmanager
async def open_shop(
    services: Services, merchant_id: str, settings: WebSettings | None = None, **changes: Any
) -> AsyncIterator[Shop]:
    """Register a merchant and serve it; ``changes`` are made to its configuration."""
    control_url = services.database_url(f"control_{merchant_id.replace('-', '_')}")
    await migrate(control_url)
    merchant = await builders.merchant(control_url, merchant_id, **changes)
    async with builders.clerk(merchant) as clerk, serve(control_url, merchant_id, settings) as api:
        yield Shop(api, clerk, control_url)
