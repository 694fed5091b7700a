"""What a worker counts and logs of its batches, against a real database and broker."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
from aiokafka import TopicPartition as TP
from prometheus_client.parser import text_string_to_metric_families

from console.deadletters import settle
from console.processes import StackError
from merchants.databases import READER_SETTINGS, Pools, create_unpooled_engine, engine_url
from merchants.schema import migrate
from schemas.topics import CHANNELS, input_topic
from tests import builders
from tests.integration.shop import Shop, open_shop
from tests.services import Services
from workers.lanes import Counters
from workers.metrics import Metrics, Sampler, read_gauges
from workers.queries import purchases_needing_attention


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shop(services: Services) -> AsyncIterator[Shop]:
    url = services.database_url(f"metrics_control_{secrets.token_hex(3)}")
    await migrate(url)
    async with open_shop(services, url, f"s{secrets.token_hex(4)}") as shop:
        await shop.stock()
        yield shop


def assigned(shop: Shop) -> dict[str, set[TP]]:
    name = shop.merchant.merchant_id
    return {name: {TP(input_topic(name, channel), 0) for channel in CHANNELS}}


@pytest.fixture
def metrics(shop: Shop) -> Metrics:
    state: Any = SimpleNamespace(ready=True, counters=Counters(batches=3), assigned=assigned(shop), lag={})
    state.lag[TP(input_topic(shop.merchant.merchant_id, "admin"), 0)] = 7
    metrics = Metrics(lambda: state, lambda: {"scheduler": 2, "checkpoint": 1}, {"writers": shop.pools})
    shop.pipeline.observers[:] = [metrics.observe]
    return metrics


def read(metrics: Metrics) -> dict[tuple[str, frozenset[str]], float]:
    """Return the samples by name and values of labels; Prometheus' own parser reads them."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            found[sample.name, frozenset(sample.labels.values())] = sample.value
    return found


def labels(*values: str) -> frozenset[str]:
    return frozenset(values)


async def test_commands_are_counted_by_type_and_outcome_and_users_are_not_named(shop: Shop, metrics: Metrics) -> None:
    name = shop.merchant.merchant_id
    grant = {
        "user_id": "ann-the-user",
        "access_period_days": 5,
        "credits_delta": 5,
        "actor": "ops",
        "justification": "x",
    }
    first = shop.send("Adjustment.Apply", adjustment_id="a1", **grant)
    shop.send("Adjustment.Apply", first, adjustment_id="a1", **grant)
    shop.send("Adjustment.Apply", adjustment_id="a1", **grant)
    shop.send("Adjustment.Apply", adjustment_id="a1", **grant | {"credits_delta": 6})
    shop.send("Operation.Open", user_id="ann-the-user", operation_id="o1", operation_code="nothing")
    await shop.work()

    found = read(metrics)
    assert found["credits_commands_total", labels(name, "Adjustment.Apply", "applied")] == 1
    assert found["credits_commands_total", labels(name, "Adjustment.Apply", "rejected")] == 1
    assert found["credits_conflicts_total", labels(name, "Adjustment.Apply")] == 1
    assert found["credits_refusals_total", labels(name, "Operation.Open", "unknown_operation_type")] == 1
    assert found["credits_replays_total", labels(name, "message")] == 1
    assert found["credits_replays_total", labels(name, "business_key")] == 1
    assert found["credits_consumer_lag", labels(name, input_topic(name, "admin"), "0")] == 7
    assert found["credits_worker_events_total", labels("batches")] == 3
    assert found["credits_worker_events_total", labels("scheduler_errors")] == 2
    assert found["credits_worker_events_total", labels("checkpoint_errors")] == 1
    assert "ann-the-user" not in metrics.render().decode()


async def test_a_merchant_is_shown_its_own_numbers_and_the_workers_only(shop: Shop, metrics: Metrics) -> None:
    name = shop.merchant.merchant_id
    metrics.pool_waited(name, 0.1)
    metrics.pool_waited("somebody-else", 0.1)

    assert 'merchant="somebody-else"' in metrics.render().decode()
    shown = metrics.render(name).decode()
    assert f'credits_database_pool_wait_seconds_count{{merchant="{name}"}} 1.0' in shown
    assert "credits_worker_ready 1.0" in shown
    assert "somebody-else" not in shown


async def test_a_type_that_is_not_ours_is_no_label(shop: Shop, metrics: Metrics) -> None:
    message = shop.message("Operation.Open", "m1", {"user_id": "u", "operation_id": "o", "operation_code": "llm"})
    headers = [(name, b"Evil.Label" if name == "ce_type" else value) for name, value in message.headers]
    shop.unsent.append(type(message)(message.topic, message.key, message.value, headers))
    await shop.work()

    found = read(metrics)
    assert found["credits_commands_total", labels(shop.merchant.merchant_id, "unknown", "rejected")] == 1
    assert found["credits_dead_letters_total", labels(shop.merchant.merchant_id, "unknown_command")] == 1
    assert "Evil.Label" not in metrics.render().decode()


async def test_a_batch_is_measured_and_has_one_line(metrics: Metrics, caplog: pytest.LogCaptureFixture) -> None:
    records: Any = [SimpleNamespace(timestamp=0), SimpleNamespace(timestamp=0)]
    with caplog.at_level(logging.INFO):
        metrics.published("acme", records, time.monotonic())

    found = read(metrics)
    assert found["credits_batch_seconds_count", labels("acme")] == 1
    assert found["credits_batch_records_sum", labels("acme")] == 2
    assert found["credits_end_to_end_seconds_count", labels("acme")] == 2
    assert found["credits_end_to_end_seconds_bucket", labels("acme", "3600.0")] == 0


async def test_a_merchants_database_is_sampled_and_a_broken_account_is_noticed(shop: Shop, metrics: Metrics) -> None:
    name = shop.merchant.merchant_id
    readers = Pools(READER_SETTINGS, pool_size=1, merchants_max=2)
    sampler = Sampler(metrics, readers, {name: shop.merchant}, lambda: assigned(shop))
    admin = {"actor": "ops", "justification": "x"}
    for user in ("bob", "eve"):
        shop.send("Adjustment.Apply", adjustment_id=user, user_id=user, credits_delta=9, access_period_days=5, **admin)
        shop.send("Operation.Open", user_id=user, operation_id=f"op-{user}", operation_code="llm")
    shop.send("Refund.Apply", refund_id="r", external_ref="unknown", **admin)
    await shop.work()

    await look(sampler)
    found = read(metrics)
    assert found["credits_open_operations", labels(name)] == 2
    assert found["credits_parked_commands", labels(name)] == 1
    assert found["credits_parked_oldest_seconds", labels(name)] > 0
    assert found["credits_receipts_gaps", labels(name)] == 0
    assert found["credits_database_pool_wait_seconds_count", labels(name)] == 1
    assert found["credits_invariant_violations_total", labels(name, "balance is the sum of entries")] == 0

    await shop.query("UPDATE accounts SET balance = balance + 1 WHERE user_id = 'bob'")
    shop.send("Account.Lock", user_id="bob", **admin)
    shop.send("Account.Lock", user_id="eve", **admin)
    await shop.work()
    await look(sampler)
    found = read(metrics)
    assert found["credits_invariant_violations_total", labels(name, "balance is the sum of entries")] == 1
    assert found["credits_invariant_violations_total", labels(name, "balance is remaining less debt")] == 1
    assert found["credits_invariant_violations_total", labels(name, "debt is what the debts sum to")] == 0

    sampler.assigned = dict
    await look(sampler)
    assert ("credits_open_operations", labels(name)) not in read(metrics)
    await readers.close()


async def test_orders_need_attention_until_they_are_settled_and_the_figures_say_what_the_list_says(shop: Shop) -> None:
    async def places() -> list[str]:
        async with engine.connect() as connection:
            found = await purchases_needing_attention(connection, after=None, limit=10)
            assert (await read_gauges(connection))["purchases_needing_attention"] == len(found)
        where = [(shown["error"]["code"], shown["message"]) for _, shown in found]
        return [f"{code} {at['topic']}/{at['partition']}/{at['offset']}" for code, at in where]

    name = shop.merchant.merchant_id
    url = engine_url(shop.merchant.database_url, password=shop.merchant.password)
    engine = create_unpooled_engine(url, READER_SETTINGS)
    wrong = {"country": "AM", "amount": "1", "currency": "EUR"}
    order = builders.purchase("eve", "paid-back", product_code="c100", pricing_snapshot=wrong)
    for _ in range(2):
        shop.send("Purchase.Settled", **order)
    await shop.work()
    unreadable = shop.message("Purchase.Settled", "unreadable", order)
    shop.unsent.append(replace(unreadable, value=b"{"))
    await shop.work()

    refused, malformed = await places()
    assert [line.split()[0] for line in (refused, malformed)] == ["price_mismatch", "malformed"]
    await settle(shop.settings, name, [malformed.split()[1]])
    assert await places() == [refused]
    await settle(shop.settings, name, [refused.split()[1]])
    assert await places() == []
    with pytest.raises(StackError, match="settled or redriven already"):
        await settle(shop.settings, name, [refused.split()[1]])
    shop.send("Purchase.Settled", **order)
    await shop.work()
    (earlier,) = await places()
    shop.send("Purchase.Settled", **order)
    await shop.work()
    # One that came since the list was read is not settled with it.
    await settle(shop.settings, name, [earlier.split()[1]])
    (later,) = await places()
    assert later != earlier
    await engine.dispose()


async def look(sampler: Sampler) -> None:
    for name in sampler.names():
        await sampler.look(name)


@pytest.mark.parametrize(("number", "seconds"), [(0, 15), (1, 15), (30, 0.5), (90, 1 / 3)])
async def test_many_merchants_are_looked_at_less_often(
    metrics: Metrics, number: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"m{n}" for n in range(number)]
    sampler = Sampler(metrics, Pools({}, pool_size=1, merchants_max=1), {}, dict)
    looked: list[str] = []
    slept: list[float] = []

    async def look(name: str) -> None:
        looked.append(name)

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) > 2 * max(number, 1):
            raise asyncio.CancelledError

    monkeypatch.setattr(sampler, "names", lambda: names)
    monkeypatch.setattr(sampler, "look", look)
    with pytest.raises(asyncio.CancelledError):
        await sampler.run(sleep)

    assert looked == 2 * names
    assert slept == [15] + [seconds] * 2 * max(number, 1)


async def test_a_database_that_never_answered_has_an_age(shop: Shop, metrics: Metrics) -> None:
    name = shop.merchant.merchant_id
    gone = replace(shop.merchant, database_url=shop.merchant.database_url + "_gone")
    readers = Pools(READER_SETTINGS, pool_size=1, merchants_max=2)
    sampler = Sampler(metrics, readers, {name: gone}, lambda: assigned(shop))
    await look(sampler)
    first = read(metrics)["credits_sample_age_seconds", labels(name)]
    await look(sampler)

    assert sampler.errors == 2
    assert read(metrics)["credits_sample_age_seconds", labels(name)] > first
    assert ("credits_open_operations", labels(name)) not in read(metrics)
    await readers.close()


def test_the_first_undecidable_command_is_an_increase(shop: Shop, metrics: Metrics) -> None:
    assert read(metrics)["credits_dead_letters_total", labels(shop.merchant.merchant_id, "internal_error")] == 0
