"""Serves the table of endpoints: lets in, opens a read-only transaction, answers, translates errors."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import structlog
from aiohttp import web
from sqlalchemy.ext.asyncio import AsyncConnection

import ledger.queries
import merchants.registry
import merchants.store
from catalog.sql import fetch
from ledger.model import Account, account_id_of
from ledger.queries import Cut
from merchants.registry import Merchant
from schemas.canonical import compact_json
from schemas.errors import Code
from schemas.topics import is_merchant_id
from workers.metrics import CONTENT_TYPE
from workers.pipeline import is_trouble
from workers.web import documentation, negotiation, paging
from workers.web.access import ADMIN, AUDITOR, METRICS, USER, Gate, Principal, role_in
from workers.web.calls import Call, Endpoint
from workers.web.endpoints import ENDPOINTS
from workers.web.limits import RateLimit
from workers.web.parameters import is_id, read_query
from workers.web.problems import ProblemError, from_http_error, problem, response, too_many, unavailable
from workers.web.settings import WebSettings

if TYPE_CHECKING:
    from workers.service import Service

log = structlog.get_logger(__name__)

ROOT = "/v1/merchants/{merchant}"
QUERY_LENGTH_MAX = 4096
BODY_LENGTH_MAX = 0  # a query has none
REQUEST_SECONDS = 15
PROBE_SECONDS = 2
WAIT_SECONDS = 2.0
WAIT_STEP_SECONDS = 0.05
MERCHANT_SECONDS = 2.0

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "private, no-cache",
}


class NotYetError(Exception):
    """The user has not reached the user_seq that a reader waits for."""


@dataclass
class Server:
    """The web server of one worker."""

    service: "Service"
    settings: WebSettings
    _gate: Gate | None = None
    _rates: RateLimit | None = None
    _found: dict[str, tuple[float, Merchant]] = field(default_factory=dict)
    _own: set[web.AbstractResource] = field(default_factory=set)

    # Wiring

    def mount(self, application: web.Application) -> None:
        router = application.router
        application.middlewares.append(self._middleware())
        routes: list[tuple[str, Callable[[web.Request], Awaitable[web.StreamResponse]]]] = [
            ("/healthz", self.healthz),
            ("/readyz", self.readyz),
            ("/metrics", self.metrics),
            ("/openapi.json", documentation.openapi),
            ("/asyncapi.json", documentation.asyncapi),
            ("/docs", documentation.page),
        ]
        routes += [(ROOT + pattern(endpoint.path), self._handler(endpoint)) for endpoint in ENDPOINTS]
        from workers.operator import OperatorPage  # imports this package's access rules

        operator = OperatorPage(self.service, self._principal)
        routes += operator.routes()
        application.on_cleanup.append(lambda _: operator.close())
        for path, handler in routes:
            resource = router.add_get(path, handler).resource
            assert resource is not None
            self._own.add(resource)

    def _handler(self, endpoint: Endpoint) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            async with asyncio.timeout(REQUEST_SECONDS):
                return await self._answer(endpoint, request)

        return handle

    def _middleware(self) -> Any:
        @web.middleware
        async def guard(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            try:
                self._check(request)
                answer = await handler(request)
            except ProblemError as error:
                answer = response(error)
            except web.HTTPException as error:
                answer = response(from_http_error(error))
            except Exception as error:
                answer = response(self._translate(request, error))
            for name, value in SECURITY_HEADERS.items():
                answer.headers.setdefault(name, value)
            return answer

        return guard

    def _check(self, request: web.Request) -> None:
        resource = request.match_info.route.resource
        if resource is not None and resource not in self._own:
            # The framework brings addresses of its own, which ask nobody who they are.
            raise problem(Code.NOT_FOUND)
        if len(request.rel_url.raw_query_string) > QUERY_LENGTH_MAX:
            raise problem(Code.LIMIT_EXCEEDED, "the query is too long")
        if (request.content_length or 0) > BODY_LENGTH_MAX or "Transfer-Encoding" in request.headers:
            raise ProblemError(problem(Code.LIMIT_EXCEEDED, "a query has no body").refusal, status=413)

    def _translate(self, request: web.Request, error: Exception) -> ProblemError:
        resource = request.match_info.route.resource
        address = resource.canonical if resource is not None else None
        if is_trouble(error):
            # Not the whole error: it may repeat what was asked for.
            cause = getattr(error, "orig", None) or error
            log.warning("a query can't be answered now", address=address, error=type(cause).__name__)
            return unavailable("the database can't be reached, or is too slow, at the moment")
        log.error("a query failed", address=address, error=type(error).__name__, exc_info=error)
        return problem(Code.INTERNAL_ERROR, "the service failed on this query")

    # Who asks

    @property
    def gate(self) -> Gate:
        if self._gate is None:
            self._gate = Gate(self.settings, self.service.control_engine, asyncio.get_running_loop().time)
        return self._gate

    async def _principal(self, request: web.Request) -> Principal:
        if self._rates is None:
            self._rates = RateLimit(self.settings.rate, self.settings.burst, asyncio.get_running_loop().time)
        try:
            principal = await self.gate.principal(request.headers.get("Authorization"))
        except ProblemError:
            self._limit(f"stranger:{request.remote}")
            raise
        self._limit(principal.name)
        return principal

    def _limit(self, name: str) -> None:
        assert self._rates is not None
        seconds = self._rates.wait(name)
        if seconds:
            raise too_many(seconds)

    async def _merchant(self, merchant_id: str) -> Merchant:
        """Return a merchant of the registry; raises ``unknown_merchant``, also for one still being made."""
        known = self.service.merchants.get(merchant_id)
        if known is not None:
            return known
        now = asyncio.get_running_loop().time()
        found_at, merchant = self._found.get(merchant_id, (float("-inf"), None))
        if merchant is not None and now - found_at < MERCHANT_SECONDS:
            return merchant
        if is_merchant_id(merchant_id):
            async with self.service.control_engine.connect() as connection:
                merchant = await merchants.registry.find(connection, merchant_id)
            if merchant is not None and merchant.state != "provisioning":
                self._found[merchant_id] = (now, merchant)
                return merchant
        raise problem(Code.UNKNOWN_MERCHANT)

    # Answers

    async def _answer(self, endpoint: Endpoint, request: web.Request) -> web.StreamResponse:
        principal = await self._principal(request)
        path = dict(request.match_info)
        merchant_id = path.pop("merchant")
        if not principal.sees(merchant_id):
            raise problem(Code.UNKNOWN_MERCHANT)
        merchant = await self._merchant(merchant_id)
        if principal.role is not None and principal.role not in endpoint.roles:
            raise problem(Code.FORBIDDEN)
        query: dict[str, Any] | None = None
        deadline = asyncio.get_running_loop().time() + WAIT_SECONDS
        engine = await self.service.readers.engine(merchant.merchant_id, merchant.database_url, merchant.password)
        while True:
            async with engine.connect() as connection:
                # All statements of one answer see the same moment.
                await connection.execution_options(isolation_level="REPEATABLE READ")
                role = await role_in(principal, merchant, connection)
                if role not in endpoint.roles:
                    raise problem(Code.FORBIDDEN)
                query = query or read_query(endpoint.known, request.query)
                try:
                    call = await self._call(endpoint, connection, merchant, (role, principal.subject), path, query)
                    return await self._respond(endpoint, request, call)
                except NotYetError as error:
                    if asyncio.get_running_loop().time() >= deadline:
                        message = "the user has not reached this user_seq"
                        refusal = problem(Code.NOT_DUE, message, parameter="min_seq", user_seq=error.args[0]).refusal
                        raise ProblemError(refusal, headers={"Retry-After": "1"}) from None
            await asyncio.sleep(WAIT_STEP_SECONDS)

    async def _call(
        self,
        endpoint: Endpoint,
        connection: AsyncConnection,
        merchant: Merchant,
        who: tuple[str, str | None],
        path: Mapping[str, str],
        query: Mapping[str, Any],
    ) -> Call:
        """Read what every answer needs: the clock, the user's account, the point in time to be shown."""
        role, subject = who
        if endpoint.not_found is not None and not all(is_id(part) for part in path.values()):
            raise problem(endpoint.not_found)
        if endpoint.is_about_user and role == USER and path["user"] != subject:
            raise problem(Code.UNKNOWN_USER)
        state = await merchants.store.read_state(connection)
        now, owner, after = state.now, None, None
        if endpoint.is_about_user:
            owner = await self._owner(connection, merchant, path["user"], query.get("min_seq"))
            # The clock is never before the newest entry.
            now = max(now, owner.last_entry_at or now)
        cut = Cut(0, now) if owner is None else await _cut(connection, owner, query, now)
        if "cursor" in query:
            cursor = paging.read(query["cursor"], merchant.secret, _scope(endpoint, path, query))
            cut, after = cursor.cut, cursor.key
        return Call(connection, merchant, role, subject, path, query, now, cut, state.config_version, owner, after)

    async def _owner(
        self, connection: AsyncConnection, merchant: Merchant, user_id: str, min_seq: int | None
    ) -> Account:
        owner = None
        if is_id(user_id):
            account_id = account_id_of(user_id, merchant.secret)
            owner = await ledger.queries.find_account(connection, account_id, user_id)
        if min_seq and (owner is None or owner.last_seq < min_seq):
            raise NotYetError(0 if owner is None else owner.last_seq)
        if owner is None:
            raise problem(Code.UNKNOWN_USER)
        if owner.user_id != user_id:
            raise problem(Code.ACCOUNT_ERASED)
        return owner

    async def _respond(self, endpoint: Endpoint, request: web.Request, call: Call) -> web.StreamResponse:
        answer = await endpoint.handler(call)
        shown: dict[str, Any] = answer
        if endpoint.is_list:
            shown = {"items": answer}
            if call.next_key is not None:
                cursor = paging.Cursor(call.next_key, call.cut)
                scope = _scope(endpoint, call.path, call.query)
                shown["next_cursor"] = paging.write(cursor, call.merchant.secret, scope)
            if call.owner is not None:
                shown["as_of"] = call.cut.as_object()
        tag = entity_tag(shown, call)
        if endpoint.name == "getReceipt":
            return await negotiation.respond(request, call, shown, tag)
        if negotiation.is_known(request, tag):
            return web.Response(status=304, headers={"ETag": tag})
        return web.Response(body=compact_json(shown), content_type="application/json", headers={"ETag": tag})

    # About the process

    async def healthz(self, _: web.Request) -> web.StreamResponse:
        """Tell that the process lives."""
        return web.json_response({"status": "ok"})

    async def readyz(self, _: web.Request) -> web.StreamResponse:
        """Tell whether the worker can work: it has an assignment, and the control database answers."""
        if not self.service.app.state_of_worker.ready:
            raise unavailable("the worker has no assignment")
        async with asyncio.timeout(PROBE_SECONDS), self.service.control_engine.connect() as connection:
            await fetch(connection, "SELECT 1")
        return web.json_response({"status": "ready"})

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        """Show what the worker has measured."""
        principal = await self._principal(request)
        if principal.role not in (ADMIN, METRICS, AUDITOR):
            raise problem(Code.FORBIDDEN)
        body = await asyncio.to_thread(self.service.metrics.render, principal.merchant_id)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE})


def pattern(path: str) -> str:
    """Return a path for the router: a part may hold whatever is not a slash."""
    return path.replace("}", ":[^/]+}")


async def _cut(connection: AsyncConnection, owner: Account, query: Mapping[str, Any], now: Any) -> Cut:
    if "as_of_seq" in query and "as_of" in query:
        raise problem(Code.INVALID_PARAMETER, "as_of_seq and as_of exclude each other", parameter="as_of")
    if "as_of_seq" in query:
        if query["as_of_seq"] > owner.last_seq:
            raise problem(
                Code.INVALID_PARAMETER,
                "as_of_seq is beyond the newest entry",
                parameter="as_of_seq",
                user_seq=owner.last_seq,
            )
        return await ledger.queries.cut_after(connection, owner, query["as_of_seq"])
    if "as_of" in query and query["as_of"] < now:
        return await ledger.queries.cut_at(connection, owner, query["as_of"])
    return Cut(owner.last_seq, now)


def _scope(endpoint: Endpoint, path: Mapping[str, str], query: Mapping[str, Any]) -> dict[str, Any]:
    filters = {name: value for name, value in query.items() if name not in ("cursor", "limit", "min_seq")}
    return {"endpoint": endpoint.name, "path": dict(path), "filters": filters}


def entity_tag(shown: Mapping[str, Any], call: Call) -> str:
    """Return the ETag of an answer: the user_seq and a digest of all but the moment it was made."""
    lasting = {name: value for name, value in shown.items() if name not in ("as_of", "next_cursor", "exported_at")}
    nested = lasting.get("balance")
    if isinstance(nested, dict):
        lasting["balance"] = {name: value for name, value in nested.items() if name != "as_of"}
    digest = sha256(compact_json([lasting, "next_cursor" in shown])).hexdigest()[:24]
    return f'W/"{call.cut.user_seq}-{digest}"'
