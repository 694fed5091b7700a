"""The operator page: read-only, plain HTML and JavaScript out of this package, for support, admins and auditors.

It needs nothing from elsewhere and may ask nobody but this server (see `POLICY`). The page itself holds no data: it
asks the same queries as everybody, with the bearer token that the operator typed in, and three of its own.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import structlog
from aiohttp import web
from aiokafka.errors import KafkaError

from catalog.sql import fetch
from schemas.canonical import compact_json, format_time
from schemas.errors import Code
from workers.status import Lookout, MerchantStatus, Status
from workers.web.access import ADMIN, AUDITOR, SUPPORT, Principal
from workers.web.problems import problem, unavailable

if TYPE_CHECKING:
    from workers.service import Service

log = structlog.get_logger(__name__)

ROOT = "/operator"
ROLES = frozenset({SUPPORT, ADMIN, AUDITOR})
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FILES = {
    "": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
# However many look at the page, the databases are asked once in this time.
FRESH_SECONDS = 2.0
HISTORY = 600
LETTERS_MAX = 200

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class OperatorPage:
    """Serves the page and what only operators ask.

    Args:
        service: the worker around the web server.
        principal: tells who a request comes from, or raises `unauthenticated`.
    """

    def __init__(self, service: "Service", principal: Callable[[web.Request], Awaitable[Principal]]) -> None:
        self._service = service
        self._principal = principal
        self._lookout: Lookout | None = None
        self._lock = asyncio.Lock()
        self._status: Status | None = None
        # What was seen so far: wall clock, and (applied, lag) by merchant. It grows while somebody looks.
        self._history: deque[tuple[float, dict[str, tuple[int, int]]]] = deque(maxlen=HISTORY)

    def routes(self) -> list[tuple[str, Handler]]:
        """Return the addresses and who answers them."""
        pages: list[tuple[str, Handler]] = [(ROOT + path, _static(*file)) for path, file in FILES.items()]
        return [
            *pages,
            (ROOT + "/data/status", self.status),
            (ROOT + "/data/dead-letters", self.dead_letters),
        ]

    async def close(self) -> None:
        """Let go of the broker."""
        if self._lookout is not None:
            await self._lookout.close()

    async def status(self, request: web.Request) -> web.StreamResponse:
        """Show all merchants that the asker may see, their past since somebody looks, and refusals by reason."""
        principal = await self._operator(request)
        status = await self._look()
        shown = [m for m in status.merchants if principal.sees(m.merchant_id)]
        names = {merchant.merchant_id for merchant in shown}
        refusals = self._service.metrics.refusals()
        return _json(
            {
                "workers": status.workers,
                "control_lag": status.control_lag,
                "merchants": [_merchant(merchant) for merchant in shown],
                "history": [
                    {"at": at, "merchants": {name: figures for name, figures in seen.items() if name in names}}
                    for at, seen in self._history
                ],
                "refusals": {name: codes for name, codes in refusals.items() if name in names},
            }
        )

    async def _look(self) -> Status:
        async with self._lock:
            if self._status is None or time.monotonic() - self._status.at > FRESH_SECONDS:
                try:
                    self._status = await self._open().look()
                except KafkaError as error:
                    log.warning("the status can't be looked up now", error=type(error).__name__)
                    raise unavailable("the broker can't be reached at the moment") from error
                figures = {m.merchant_id: (m.applied, m.lag) for m in self._status.merchants if m.error is None}
                self._history.append((time.time(), figures))
            return self._status

    def _open(self) -> Lookout:
        if self._lookout is None:
            settings = self._service.settings
            self._lookout = Lookout(
                settings.kafka_bootstrap_servers,
                settings.security_kwargs(),
                settings.group,
                self._service.control_engine,
                self._service.readers,
            )
        return self._lookout

    async def dead_letters(self, request: web.Request) -> web.StreamResponse:
        """Show the newest dead letters of one merchant that nobody has redriven."""
        principal = await self._operator(request)
        name = request.query.get("merchant", "")
        merchant = self._service.merchants.get(name)
        if merchant is None or not principal.sees(name):
            raise problem(Code.UNKNOWN_MERCHANT)
        engine = await self._service.readers.engine(name, merchant.database_url, merchant.password)
        sql = """
        SELECT topic, partition, kafka_offset, code, message, noted_at FROM dead_letters WHERE redriven_at IS NULL
        ORDER BY noted_at DESC LIMIT $1
        """
        async with engine.connect() as connection:
            rows = await fetch(connection, sql, LETTERS_MAX)
        members = ("topic", "partition", "offset", "code", "message")
        items = [dict(zip(members, row[:5], strict=True)) | {"noted_at": format_time(row[5])} for row in rows]
        return _json({"items": items})

    async def _operator(self, request: web.Request) -> Principal:
        principal = await self._principal(request)
        if principal.role not in ROLES:
            raise problem(Code.FORBIDDEN)
        return principal


def _merchant(merchant: MerchantStatus) -> dict[str, Any]:
    return asdict(merchant) | {"gauges": {name: int(value) for name, value in merchant.gauges.items()}}


def _json(shown: dict[str, Any]) -> web.Response:
    return web.Response(
        body=compact_json(shown), content_type="application/json", headers={"Cache-Control": "no-store"}
    )


def _static(name: str, content_type: str) -> Handler:
    body = files("workers.operator").joinpath(name).read_bytes()

    async def answer(_: web.Request) -> web.StreamResponse:
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers=headers)

    return answer
