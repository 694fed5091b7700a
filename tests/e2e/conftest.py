"""One stack and two workers for all end-to-end tests, which see the service from outside alone."""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jwt
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key

from console.stack import Stack
from tests.e2e.blackbox import CONTROL_RESULTS, Bus, Merchant, Sent, parse_time
from tests.services import JARS, Services

ISSUER = "https://login.example"
AUDIENCE = "credits"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the runbooks first: many of their commands look at all merchants, and every test leaves some behind."""
    items.sort(key=lambda item: "test_runbooks.py" not in item.nodeid)


@dataclass
class Running:
    """Two workers, and how to reach them."""

    stack: Stack
    token: str
    environment: dict[str, str]
    services: Services
    # Signs for the identity provider whose public key the workers know.
    key: RSAPrivateKey

    def jwt(self, subject: str, **claims: object) -> str:
        """Return a token of the identity provider, good for five minutes."""
        now = datetime.now(UTC)
        standard = {"sub": subject, "iss": ISSUER, "aud": AUDIENCE, "iat": now, "exp": now + timedelta(minutes=5)}
        return jwt.encode(standard | claims, self.key, algorithm="RS256", headers={"kid": "k1"})

    def start(self, worker: str) -> str:
        """Start a worker, wait until it is ready, and return its URL."""
        return self.stack.start_worker(worker, env=self.environment).url


@pytest.fixture(scope="session")
def running(services: Services, scratch: Path) -> Iterator[Running]:
    """Run two workers on a control database of their own."""
    token = secrets.token_urlsafe(32)
    control_url = services.database_url(f"credits_control_{os.getpid()}")
    key = generate_private_key(public_exponent=65537, key_size=2048)
    jwks = scratch / "jwks.json"
    public = jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    jwks.write_text(json.dumps({"keys": [public | {"kid": "k1", "use": "sig", "alg": "RS256"}]}))
    environment = {
        "CREDITS_JWKS": str(jwks),
        "CREDITS_JWT_ISSUER": ISSUER,
        "CREDITS_JWT_AUDIENCE": AUDIENCE,
        "KAFKA_BOOTSTRAP_SERVERS": services.kafka_bootstrap_servers,
        "CREDITS_CONTROL_DATABASE_URL": control_url,
        "CREDITS_BOOTSTRAP_TOKEN": token,
    }
    command = [sys.executable, "-m", "console.main", "migrate"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAFKA_BOOTSTRAP_SERVERS", services.kafka_bootstrap_servers)
        patch.setenv("CREDITS_CONTROL_DATABASE_URL", control_url)
        stack = Stack(scratch / "workers", jars=JARS)
    running = Running(stack, token, environment, services, key)
    try:
        stack.start()
        for worker in ("worker-1", "worker-2"):
            running.start(worker)
        yield running
    finally:
        ended = [stack.stop_worker(worker) for worker in ("worker-1", "worker-2")]
    assert ended == [True, True], "a worker did not end by itself after SIGTERM"


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def bus(running: Running) -> AsyncIterator[Bus]:
    """Return the client."""
    bus = Bus(running.services.kafka_bootstrap_servers)
    await bus.start()
    await bus.watch(CONTROL_RESULTS, partitions=1)
    yield bus
    await bus.stop()


@dataclass
class Overdue:
    """A close that was sent in time, to a merchant that has been suspended since, and its operation's deadline."""

    merchant: Merchant
    close: Sent
    deadline: datetime


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def overdue(bus: Bus) -> Overdue:
    """Return a close that waits for its merchant to be resumed."""
    merchant = await bus.register(operation_timeout_minutes=1)
    await merchant.stock()
    opening = {"user_id": "late", "operation_id": "late", "operation_code": "llm"}
    opened = await merchant.applied("Operation.Open", opening)
    await bus.control("Merchant.Suspend", {"merchant_id": merchant.id})
    close = await merchant.send("Operation.RecordAndClose", merchant.closing("late", "late", "5"))
    return Overdue(merchant, close, parse_time(opened["effects"]["expires_at"]))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shop(bus: Bus, overdue: Overdue) -> Merchant:
    """Return a merchant with a product and an operation type, for all tests.

    The overdue operation is begun with it because a minute must pass until it is looked at.
    """
    merchant = await bus.register()
    await merchant.stock()
    return merchant


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def simulated(bus: Bus) -> Merchant:
    """Return a merchant with a test clock, a product and an operation type, for all tests."""
    merchant = await bus.register(simulated=True)
    await merchant.stock()
    return merchant


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def changeable(bus: Bus) -> Merchant:
    """Return a merchant like `simulated` for tests that begin with a configuration of their own."""
    merchant = await bus.register(simulated=True)
    await merchant.stock()
    return merchant


@pytest.fixture
def user() -> Callable[[], str]:
    """Return a maker of new users."""
    return lambda: f"user-{secrets.token_hex(6)}"
