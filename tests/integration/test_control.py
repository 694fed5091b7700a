"""The commands of `credits.control` when the database of the merchant they name is in trouble."""

import socket
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import pytest_asyncio
from aiokafka import TopicPartition as TP

import merchants.databases
import workers.control
from merchants.schema import migrate
from schemas.canonical import compact_json
from schemas.events import command_headers
from schemas.topics import CONTROL
from tests.integration.shop import SOURCE, Shop, open_shop
from tests.services import Services
from workers.admin import ensure_topics
from workers.control import Control
from workers.lanes import Lease, Record
from workers.publisher import OutMessage
from workers.service import CONTROL_TOPICS


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shop(services: Services) -> AsyncIterator[Shop]:
    url = services.database_url("control_trouble")
    await migrate(url)
    async with open_shop(services, url, "unreachable") as opened:
        await ensure_topics(services.kafka_bootstrap_servers, CONTROL_TOPICS)
        yield opened


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


async def send(shop: Shop, command_type: str, command_id: str) -> list[Record]:
    """Send a control command; return what a worker reads of the topic from there on."""
    tp = TP(CONTROL, 0)
    async with shop.consumer() as consumer:
        begin = (await consumer.end_offsets([tp]))[tp]
        payload = compact_json({"merchant_id": "unreachable", "justification": "a test", "actor": "ops"})
        headers = command_headers(command_type, command_id, SOURCE, datetime.now(UTC))
        await shop.publisher.publish([OutMessage(CONTROL, b"unreachable", payload, headers)])
        consumer.assign([tp])
        consumer.seek(tp, begin)
        return [await consumer.getone(tp)]


async def test_a_merchant_whose_database_does_not_answer_holds_up_no_other_for_ever(
    shop: Shop, silent_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(_: object) -> None: ...

    monkeypatch.setattr(workers.control, "PATIENCE_SECONDS", 0.5)
    original = merchants.databases.connect_args
    monkeypatch.setattr(merchants.databases, "connect_args", lambda settings: original(settings) | {"timeout": 1})
    control = Control(shop.control, shop.settings.control_database_url, shop.publisher, nothing, nothing)
    # Workers of other tests answer on the same topic.
    answered: dict[str, dict[str, Any]] = {}
    control.observers.append(lambda _, answers, __: answered.update({a.id: a.row.body for a in answers}))
    lease = Lease(1, "the tests", [TP(CONTROL, 0)], object())
    # What other tests sent before is not read again.
    lease.first.clear()
    there = "UPDATE merchants SET database_url = $1 WHERE merchant_id = 'unreachable'"
    database = shop.settings.control_database_url.rpartition("/")[2]
    away = f"postgresql://credits@127.0.0.1:{silent_port}/nowhere"
    await shop.query(there, away, database=database)

    await control.process(await send(shop, "Merchant.Suspend", "while-away"), lease)

    assert answered["while-away"]["error"] == {
        "code": "internal_error",
        "message": "the merchant's database does not answer, send the command again when it does",
        "details": {},
    }

    await shop.query(there, shop.merchant.database_url, database=database)
    await control.process(await send(shop, "Merchant.Suspend", "when-back"), lease)
    assert answered["when-back"]["outcome"] == "applied"
