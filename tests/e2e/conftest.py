"""One stack and two workers for all end-to-end tests, which see the service from outside alone."""

import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from console.stack import Stack
from tests.e2e.blackbox import CONTROL_RESULTS, Bus, Merchant
from tests.services import JARS, Services


@dataclass
class Running:
    """Two workers, and how to reach them."""

    stack: Stack
    token: str
    environment: dict[str, str]
    services: Services

    def start(self, worker: str) -> str:
        """Start a worker, wait until it is ready, and return its URL."""
        return self.stack.start_worker(worker, env=self.environment).url


@pytest.fixture(scope="session")
def running(services: Services, scratch: Path) -> Iterator[Running]:
    """Run two workers on a control database of their own."""
    token = secrets.token_urlsafe(32)
    control_url = services.database_url(f"credits_control_{os.getpid()}")
    environment = {
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
    running = Running(stack, token, environment, services)
    try:
        stack.start()
        for worker in ("worker-1", "worker-2"):
            running.start(worker)
        yield running
    finally:
        for worker in ("worker-1", "worker-2"):
            stack.stop_worker(worker)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def bus(running: Running) -> AsyncIterator[Bus]:
    """Return the client."""
    bus = Bus(running.services.kafka_bootstrap_servers)
    await bus.start()
    await bus.watch(CONTROL_RESULTS, partitions=1)
    yield bus
    await bus.stop()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shop(bus: Bus) -> Merchant:
    """Return a merchant with a product and an operation type, for all tests."""
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
