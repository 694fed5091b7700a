"""Who may see what: every role at every endpoint, tokens, JWTs, limits."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from merchants import tokens
from tests import builders
from tests.integration.web import ROOT_TOKEN, Api, Shop, open_shop
from tests.services import Services
from workers.settings import SettingsError
from workers.web import WebSettings
from workers.web.endpoints import ENDPOINTS

MERCHANT = "web-access"
ISSUER, AUDIENCE = "https://login.example", "credits"
ROLES = ("user", "support", "admin", "upstream", "auditor", "metrics")
READERS = ("support", "admin", "upstream", "auditor")

KEYS: dict[str, Any] = {
    "RS256": rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}


def key_set() -> dict[str, Any]:
    keys = []
    for name, key in KEYS.items():
        shown = jwt.get_algorithm_by_name(name).to_jwk(key.public_key(), as_dict=True)
        keys.append(shown | {"kid": name, "use": "sig", "alg": name})
    return {"keys": keys}


def signed(subject: str, algorithm: str = "ES256", *, key: Any = None, kid: str | None = None, **claims: Any) -> str:
    now = datetime.now(UTC)
    whole = {"sub": subject, "iss": ISSUER, "aud": AUDIENCE, "exp": now + timedelta(minutes=5), "iat": now} | claims
    whole = {name: value for name, value in whole.items() if value is not ...}
    return jwt.encode(whole, key or KEYS[algorithm], algorithm=algorithm, headers={"kid": kid or algorithm})


@pytest.fixture(scope="module")
async def shop(services: Services, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    keys = tmp_path_factory.mktemp("keys") / "jwks.json"
    keys.write_text(json.dumps(key_set()))
    settings = WebSettings(bootstrap_token=ROOT_TOKEN, jwks=str(keys), jwt_issuer=ISSUER, jwt_audience=AUDIENCE, rate=0)
    async with open_shop(services, MERCHANT, settings) as shop:
        await builders.catalogue(shop.clerk)
        for user in ("ann", "bob"):
            await shop.clerk.send("Purchase.Settled", builders.purchase(user, f"pay-{user}"))
            await builders.operation(shop.clerk, user, f"op-{user}", "2")
        await builders.merchant(shop.control_url, "web-access-2")
        yield shop


async def addresses(shop: Shop, user: str) -> dict[str, tuple[str, dict[str, str]]]:
    """Return (path below the merchant, query) of every endpoint, about a user where it is about one."""
    entry = (await shop.api.get(f"/users/{user}/ledger"))["items"][0]["entry_id"]
    number = (await shop.api.get(f"/users/{user}/receipts"))["items"][0]["number"]
    command = (await shop.api.get(f"/users/{user}/ledger"))["items"][0]["command"]
    parts = {"user": user, "entry": entry, "number": number, "operation": f"op-{user}", "code": "chat"}
    query = {
        "getCommandResult": {"source": command["source"], "id": command["id"]},
        "listOperations": {"user_id": user},
        "listPurchases": {"user_id": user},
    }
    return {e.name: (e.path.format(**parts), query.get(e.name, {})) for e in ENDPOINTS}


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.name)
async def test_every_role_sees_what_it_may_and_nothing_else(shop: Shop, endpoint: Any) -> None:
    path, query = (await addresses(shop, "ann"))[endpoint.name]
    others_path, others_query = (await addresses(shop, "bob"))[endpoint.name]
    is_about_somebody = (path, query) != (others_path, others_query)
    for role in ROLES:
        token = await shop.api.make_token(role, MERCHANT, "ann" if role == "user" else None)
        api = shop.api.holding(token)
        status, body, _ = await api.ask(api.root + path, **query)
        others_status, others_body, _ = await api.ask(api.root + others_path, **others_query)
        if role in READERS:
            assert (status, others_status) == (200, 200), (role, body)
        elif role == "metrics" or "user" not in endpoint.roles:
            assert (status, body["code"]) == (others_status, others_body["code"]) == (403, "forbidden"), role
        elif is_about_somebody:
            assert status == 200, body
            assert others_status == 404, others_body
        else:
            assert status == 200, body
    status, body, headers = await shop.api.holding(None).ask(shop.api.root + path, **query)
    assert (status, body["code"], headers["WWW-Authenticate"]) == (401, "unauthenticated", "Bearer")


async def test_anothers_object_looks_just_like_one_that_does_not_exist(shop: Shop) -> None:
    api = shop.api.holding(await shop.api.make_token("user", MERCHANT, "ann"))
    number = (await shop.api.get("/users/bob/receipts"))["items"][0]["number"]
    for theirs, nothing in (
        ("/users/bob/balance", "/users/nobody/balance"),
        ("/operations/op-bob", "/operations/op-none"),
        (f"/receipts/{number}", "/receipts/R-1999-0001"),
        (f"/receipts/{number}/status", "/receipts/R-1999-0001/status"),
    ):
        _, shown, _ = await api.ask(api.root + theirs)
        _, absent, _ = await api.ask(api.root + nothing)
        assert shown == absent


async def test_a_user_lists_what_is_their_own_and_says_so(shop: Shop) -> None:
    api = shop.api.holding(await shop.api.make_token("user", MERCHANT, "ann"))
    (operation,) = (await api.get("/operations", user_id="ann"))["items"]
    (purchase,) = (await api.get("/purchases", user_id="ann"))["items"]
    assert (operation["operation_id"], purchase["external_ref"]) == ("op-ann", "pay-ann")
    for path in ("/operations", "/purchases"):
        assert await api.problem(path) == (403, "forbidden")
        assert await api.problem(path, user_id="bob") == await api.problem(path, user_id="nobody")
    assert await api.problem("/operations", operation_id="op-ann") == (403, "forbidden")
    assert (await api.get("/operations", user_id="ann", operation_id="op-bob"))["items"] == []
    assert (await api.get("/purchases", user_id="ann", external_ref="pay-bob"))["items"] == []
    assert await api.problem("/purchases", needs_attention="true") == (403, "forbidden")
    assert await api.problem("/purchases", needs_attention="true", user_id="ann") == (400, "invalid_parameter")
    assert await api.problem("/operations/metrics") == (403, "forbidden")
    assert await api.problem("/operations/metrics", user_id="ann") == (403, "forbidden")


async def test_a_user_is_told_of_no_command_but_their_own(shop: Shop) -> None:
    api = shop.api.holding(await shop.api.make_token("user", MERCHANT, "ann"))
    for user in ("ann", "bob"):
        refund = {"refund_id": f"early-{user}", "external_ref": f"later-{user}", "actor": "a", "justification": "b"}
        close = {"user_id": user, "operation_id": f"later-{user}"}
        await shop.clerk.send("Operation.Cancel", close, command_id=f"cancel-{user}")
        await shop.clerk.send("Refund.Apply", refund, command_id=f"refund-{user}")
    await shop.clerk.send("Account.Lock", {"user_id": "bob", "justification": "b", "actor": "a"}, command_id="lock-bob")

    def asked(command_id: str) -> dict[str, str]:
        return {"source": "test", "id": command_id}

    _, parked, _ = await api.ask(f"{api.root}/commands", **asked("cancel-ann"))
    assert parked["details"]["waits_for"] == {"operation": "later-ann"}
    _, nothing, _ = await api.ask(f"{api.root}/commands", **asked("none"))
    for command_id in ("cancel-bob", "lock-bob", "refund-ann", "refund-bob"):
        _, theirs, _ = await api.ask(f"{api.root}/commands", **asked(command_id))
        assert theirs == nothing, command_id


async def test_a_token_of_one_merchant_does_not_even_see_that_another_exists(shop: Shop) -> None:
    for role in ("support", "admin", "upstream", "auditor", "user"):
        api = shop.api.holding(await shop.api.make_token(role, MERCHANT, "ann" if role == "user" else None))
        for merchant_id in ("web-access-2", "no-such-merchant"):
            status, body, _ = await api.ask(f"/v1/merchants/{merchant_id}/users/ann/balance")
            assert (status, body["code"]) == (404, "unknown_merchant"), role
    status, _, _ = await shop.api.ask("/v1/merchants/web-access-2/products")
    assert status == 200


async def test_a_token_is_kept_as_a_hash_and_good_until_it_is_revoked(shop: Shop) -> None:
    text = await shop.api.make_token("support", MERCHANT)
    api = shop.api.holding(text)
    await api.get("/products")
    engine = shop.api.wiring.control_engine
    async with engine.begin() as connection:
        rows = (await connection.exec_driver_sql("SELECT tokens::text FROM tokens")).all()
        assert not any(text[20:] in row[0] for row in rows)
        token = await tokens.find(connection, text)
        assert token is not None
        assert token.token_id in {known.token_id for known in await tokens.list_all(connection)}
        assert await tokens.find(connection, text[:-1] + ("A" if text[-1] != "A" else "B")) is None
        assert await tokens.revoke(connection, token.token_id)
        assert not await tokens.revoke(connection, token.token_id)
        assert await tokens.find(connection, text) is None
    async with asyncio.timeout(5):
        while (await api.ask(f"{api.root}/products"))[0] == 200:
            await asyncio.sleep(0.1)
    assert await api.problem("/products") == (401, "unauthenticated")


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer ",
        "Basic YTpi",
        "bearer x",
        "Bearer crd_0_0",
        f"Token {ROOT_TOKEN}",
        "Bearer " + "x" * 7000,
    ],
)
async def test_what_is_no_credential_is_not_let_in(shop: Shop, authorization: str) -> None:
    api = shop.api.holding(None)
    status, body, _ = await api.ask(f"{api.root}/products", {"Authorization": authorization})
    assert (status, body["code"]) == (401, "unauthenticated")


# JWT


@pytest.mark.parametrize("algorithm", sorted(KEYS))
async def test_a_signed_jwt_is_its_subject_in_the_role_user(shop: Shop, algorithm: str) -> None:
    api = shop.api.holding(signed("ann", algorithm))
    assert (await api.get("/users/ann/balance"))["user_id"] == "ann"
    assert await api.problem("/users/bob/balance") == (404, "unknown_user")
    assert await api.problem("/purchases") == (403, "forbidden")


def _none(text: str) -> str:
    payload = text.split(".")[1]
    forged = jwt.utils.base64url_encode(b'{"alg":"none","typ":"JWT"}').decode()
    return f"{forged}.{payload}."


PAST = datetime(2020, 1, 1, tzinfo=UTC)
REFUSED: dict[str, Callable[[], str]] = {
    "alg none": lambda: _none(signed("ann")),
    "a shared secret": lambda: signed("ann", "HS256", key="0123456789" * 5, kid="ES256"),
    "another key": lambda: signed("ann", key=ec.generate_private_key(ec.SECP256R1())),
    "an unknown key": lambda: signed("ann", kid="unknown"),
    "the key of another algorithm": lambda: signed("ann", "ES256", kid="RS256"),
    "another audience": lambda: signed("ann", aud="shop"),
    "no audience": lambda: signed("ann", aud=...),
    "another issuer": lambda: signed("ann", iss="https://evil.example"),
    "expired": lambda: signed("ann", exp=PAST),
    "without an end": lambda: signed("ann", exp=...),
    "not yet": lambda: signed("ann", nbf=datetime.now(UTC) + timedelta(hours=1)),
    "no subject": lambda: signed("ann", sub=...),
    "an empty subject": lambda: signed(""),
    "a merchant that is no text": lambda: signed("ann", mid=7),
    "another signature": lambda: signed("ann")[:-8] + "AAAAAAAA",
    "another payload": lambda: ".".join([signed("ann").split(".")[0], signed("bob").split(".")[1], "x"]),
}


@pytest.mark.parametrize("what", sorted(REFUSED))
async def test_a_jwt_that_is_not_right_is_refused(shop: Shop, what: str) -> None:
    assert await shop.api.holding(REFUSED[what]()).problem("/users/ann/balance") == (401, "unauthenticated")


async def test_a_jwt_for_another_merchant_is_refused(shop: Shop) -> None:
    assert await shop.api.holding(signed("ann", mid="web-access-2")).problem("/users/ann/balance") == (
        404,
        "unknown_merchant",
    )
    await shop.api.holding(signed("ann", mid=MERCHANT)).get("/users/ann/balance")


async def test_the_role_of_a_jwt_is_the_one_the_merchant_has_assigned(shop: Shop) -> None:
    api = shop.api.holding(signed("carol"))
    assert await api.problem("/purchases") == (403, "forbidden")
    role = {"subject": "carol", "role": "support", "actor": "the tests"}
    await shop.clerk.send("UserRole.Assign", role)
    await api.get("/purchases")
    await api.get("/users/bob/balance")
    status, _, _ = await api.ask("/v1/merchants/web-access-2/purchases")
    assert status == 403, "a role is one merchant's"
    await shop.clerk.send("UserRole.Revoke", role)
    assert await api.problem("/users/bob/balance") == (404, "unknown_user")


# What is not about a merchant


async def test_health_readiness_and_contracts_are_public_and_metrics_are_not(shop: Shop) -> None:
    stranger = shop.api.holding(None)
    for path in ("/healthz", "/readyz", "/openapi.json", "/asyncapi.json", "/docs"):
        assert (await stranger.ask(path))[0] == 200, path
    assert (await stranger.ask("/metrics"))[0] == 401
    for role in ROLES:
        api = shop.api.holding(await shop.api.make_token(role, MERCHANT, "ann" if role == "user" else None))
        assert (await api.ask("/metrics"))[0] == (200 if role in ("admin", "metrics", "auditor") else 403), role
    assert (await shop.api.holding(signed("ann")).ask("/metrics"))[0] == 403


async def test_a_worker_without_an_assignment_is_not_ready_but_alive(shop: Shop) -> None:
    state = shop.api.wiring.app.state_of_worker
    state.ready = False
    try:
        status, body, headers = await shop.api.ask("/readyz")
        assert (status, body["status"], "Retry-After" in headers) == (503, 503, True)
        assert (await shop.api.ask("/healthz"))[0] == 200
    finally:
        state.ready = True


async def test_addresses_that_are_not_ours_do_not_exist(services: Services) -> None:
    """The framework's own pages, which ask nobody who they are, are closed."""

    async def table(_: web.Request) -> web.Response:
        return web.Response(text="everything")

    from aiohttp.test_utils import TestClient, TestServer

    from workers.web import mount

    application = web.Application()
    application.router.add_get("/table", table)
    mount(application, SimpleNamespace(), WebSettings())  # type: ignore[arg-type]
    async with TestClient(TestServer(application, host="127.0.0.1")) as client, client.get("/table") as answer:
        assert answer.status == 404
        assert (await answer.json())["code"] == "not_found"


# Limits


async def test_answers_forbid_what_browsers_might_do_with_them(shop: Shop) -> None:
    for path in (f"{shop.api.root}/products", "/nothing", "/docs"):
        _, _, headers = await shop.api.ask(path)
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert "no-cache" in headers["Cache-Control"]


async def test_methods_bodies_and_long_queries_are_refused(shop: Shop) -> None:
    url, headers = f"{shop.api.root}/products", {"Authorization": f"Bearer {ROOT_TOKEN}"}
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        async with shop.api.client.request(method, url, headers=headers) as answer:
            assert (answer.status, (await answer.json())["details"]["allowed"]) == (405, ["GET", "HEAD"])
    async with shop.api.client.request("GET", url, headers=headers, data=b"x") as answer:
        assert answer.status == 413
    async with shop.api.client.request("GET", f"{url}?cursor={'x' * 5000}", headers=headers) as answer:
        assert answer.status == 422
        assert (await answer.json())["code"] == "limit_exceeded"


async def test_each_principal_has_its_own_allowance(services: Services) -> None:
    settings = WebSettings(bootstrap_token=ROOT_TOKEN, rate=1, burst=3)
    async with open_shop(services, "web-limits", settings) as shop:
        statuses = [await shop.api.ask(f"{shop.api.root}/products") for _ in range(5)]
        assert [status for status, _, _ in statuses[:3]] == [200, 200, 200]
        status, body, headers = statuses[-1]
        assert (status, body["code"], int(headers["Retry-After"])) == (429, "rate_limited", 1)
        other = shop.api.holding(await shop.api.make_token("support", "web-limits"))
        await other.get("/products")
        strangers = [(await Api.ask(shop.api.holding("x"), f"{shop.api.root}/products"))[0] for _ in range(5)]
        assert strangers[0] == 401
        assert strangers[-1] == 429


def test_settings_that_would_let_the_wrong_people_in_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="CREDITS_JWT_ISSUER"):
        WebSettings.from_env({"CREDITS_JWKS": "keys.json"})
    with pytest.raises(SettingsError, match="https"):
        WebSettings.from_env({"CREDITS_JWKS": "http://x/keys", "CREDITS_JWT_ISSUER": "i", "CREDITS_JWT_AUDIENCE": "a"})
    with pytest.raises(SettingsError, match="CREDITS_WEB_RATE"):
        WebSettings.from_env({"CREDITS_WEB_RATE": "-1"})
    secret = tmp_path / "token"
    secret.write_text("hidden\n")
    settings = WebSettings.from_env({"CREDITS_BOOTSTRAP_TOKEN_FILE": str(secret)})
    assert settings.bootstrap_token == "hidden"
    assert "hidden" not in repr(settings)
