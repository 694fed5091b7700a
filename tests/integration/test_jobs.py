"""The scheduler on a real PostgreSQL: what it finds, sends, and how little it matters when or how often it runs."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio

import merchants.store
from catalog.sql import fetch
from merchants.databases import CONTROL_SETTINGS, WRITER_SETTINGS, Pools, create_unpooled_engine, engine_url
from merchants.registry import Merchant
from merchants.schema import migrate
from schemas.canonical import format_time
from tests.builders import Clerk, Record, catalogue, clerk, command, merchant, purchase
from tests.services import Services
from workers.audit import verify
from workers.publisher import OutMessage, PublishTimeoutError
from workers.scheduler import Scheduler

DAY = 86_400
TERMS = {"access_period_days": 30, "justification": "test", "actor": "tests"}


class Outbox:
    """Takes what would be published, in place of Kafka, which these tests do not need."""

    def __init__(self) -> None:
        self.messages: list[OutMessage] = []

    async def publish(self, messages: Sequence[OutMessage], lease: Any = None) -> None:
        self.messages += messages

    def records(self, clerk: Clerk) -> list[Record]:
        """The sent jobs as the records a worker would consume."""
        taken, self.messages = self.messages, []
        records = []
        for message in taken:
            headers = dict(message.headers)
            payload = json.loads(message.value or b"")
            kind, name = headers["ce_type"].decode(), headers["ce_id"].decode()
            records.append(
                command(kind, payload, headers["ce_source"].decode(), name, merchant_id=clerk.merchant.merchant_id)
            )
        return records


@pytest_asyncio.fixture(scope="module")
async def control_url(services: Services) -> str:
    url = services.database_url("jobs_control")
    await migrate(url)
    return url


@asynccontextmanager
async def scheduler(control_url: str) -> AsyncIterator[tuple[Scheduler, Outbox]]:
    """A scheduler of a process of its own, and what it sends."""
    outbox = Outbox()
    engine = create_unpooled_engine(engine_url(control_url), CONTROL_SETTINGS)
    pools = Pools(WRITER_SETTINGS, pool_size=1, merchants_max=4)
    try:
        yield Scheduler(engine, pools, outbox), outbox  # type: ignore[arg-type]
    finally:
        await pools.close()
        await engine.dispose()


async def wait(clerk: Clerk, seconds: int, identity: bytes) -> None:
    async with clerk.engine.begin() as connection:
        await merchants.store.advance_clock(connection, seconds, identity)


async def buyers(made: Clerk) -> list[str]:
    async with made.engine.connect() as connection:
        rows = await fetch(connection, "SELECT block::json ->> 'name' FROM buyers ORDER BY number")
    return [row[0] for row in rows]


async def entries(made: Clerk) -> list[tuple[str, int]]:
    async with made.engine.connect() as connection:
        rows = await fetch(connection, "SELECT reason, amount FROM entries ORDER BY account_id, user_seq")
    return [(row[0], row[1]) for row in rows]


async def grant(made: Clerk, grant_id: str, credits: int, days: int) -> dict[str, Any]:
    payload = {"grant_id": grant_id, "user_id": "ann", "justification": "test", "actor": "tests"}
    return await made.send("Grant.Apply", payload | {"credits": credits, "access_period_days": days})


async def test_two_schedulers_at_once_write_one_expiry(control_url: str) -> None:
    made = await merchant(control_url, "twice", simulated=True)
    async with (
        clerk(made) as user,
        scheduler(control_url) as (one, sent_one),
        scheduler(control_url) as (two, sent_two),
    ):
        await grant(user, "g1", 10, 1)
        await wait(user, 2 * DAY, b"a" * 16)

        # Past the advisory lock, as if each had run while the other was thought dead.
        await one.send_due(made)
        await two.send_due(made)
        first, second = sent_one.records(user), sent_two.records(user)
        results = await user.apply(*first, *second)

        assert len(first) == len(second) == 1
        assert [result["outcome"] for result in results] == ["applied", "applied"]
        assert results[0] == results[1]
        assert await entries(user) == [("promo", 10), ("expiry", -10)]
        assert (await verify(user.engine)).ok


async def test_only_one_of_two_schedulers_makes_a_pass_at_a_time(control_url: str) -> None:
    made = await merchant(control_url, "lock", simulated=True)
    async with (
        clerk(made) as user,
        scheduler(control_url) as (one, sent_one),
        scheduler(control_url) as (two, sent_two),
    ):
        await grant(user, "g1", 10, 1)
        await wait(user, 2 * DAY, b"b" * 16)

        async with one.control.connect() as holder:
            await fetch(holder, "SELECT pg_advisory_xact_lock(7203155002)")
            assert await two.run_once() == 0
        await two.run_once()

        assert sent_one.messages == []
        assert [dict(m.headers)["ce_type"] for m in sent_two.messages if ".lock." in m.topic] == [b"Lot.Expire"]


async def test_a_scheduler_that_never_ran_changes_nothing_in_the_end(control_url: str) -> None:
    made = await merchant(control_url, "never", simulated=True)
    async with clerk(made) as user:
        await grant(user, "g1", 10, 1)
        await wait(user, 2 * DAY, b"c" * 16)

        result = await grant(user, "g2", 5, 30)

        assert [lot["credits"] for lot in result["time_effects"]["expired"]] == [10]
        assert await entries(user) == [("promo", 10), ("expiry", -10), ("promo", 5)]


async def test_what_was_sent_is_not_sent_again_in_the_same_hour_and_nothing_due_is_missed(control_url: str) -> None:
    made = await merchant(control_url, "again", simulated=True)
    async with clerk(made) as user, scheduler(control_url) as (one, sent):
        for number in range(3):
            await grant(user, f"g{number}", 10, 1 + number)
        await wait(user, DAY + 60, b"d" * 16)
        assert await one.send_due(made) == 1
        assert await one.send_due(made) == 0

        await wait(user, 3 * DAY, b"e" * 16)
        # The first job was lost on its way: it is sent again with the others in a later hour.
        assert await one.send_due(made) == 3
        await user.apply(*sent.records(user))

        assert await entries(user) == [("promo", 10)] * 3 + [("expiry", -10)] * 3
        assert await one.send_due(made) == 0


async def test_an_overdue_operation_is_timed_out_by_the_job(control_url: str) -> None:
    made = await merchant(control_url, "overdue", simulated=True)
    rate = {"operation_code": "chat", "display_name": "Chat", "resource_unit": "TOKEN", "credits_per_unit": "1"}
    async with clerk(made) as user, scheduler(control_url) as (one, sent):
        await user.send("OperationType.CreateWithArchival", rate | {"actor": "tests"})
        opened = await user.send("Operation.Open", {"user_id": "ann", "operation_id": "op-1", "operation_code": "chat"})
        assert opened["outcome"] == "applied"
        await wait(user, 16 * 60, b"f" * 16)

        await one.send_due(made)
        results = await user.apply(*sent.records(user))

        assert [r["effects"] for r in results] == [{"operation_id": "op-1"}]
        async with user.engine.connect() as connection:
            rows = await fetch(connection, "SELECT state FROM operations")
        assert [row[0] for row in rows] == ["timed_out"]


async def test_a_parked_command_is_given_up_by_the_job_when_its_time_is_over(control_url: str) -> None:
    made: Merchant = await merchant(control_url, "giveup", simulated=True)
    close = {"user_id": "ann", "operation_id": "op-9", "resource_amount": "1", "resource_unit": "TOKEN"}
    async with clerk(made) as user, scheduler(control_url) as (one, sent):
        assert await user.send("Operation.RecordAndClose", close | {"completed_at": "2026-01-01T00:00:00Z"}) == {}
        assert await one.send_due(made) == 0
        await wait(user, 16 * 60, b"g" * 16)

        await one.send_due(made)
        results = await user.apply(*sent.records(user))

        codes = {r["command_type"]: r.get("error", {}).get("code") for r in results}
        assert codes == {"Operation.RecordAndClose": "dependency_timeout", "Command.Resolve": None}


async def test_parked_commands_of_two_sources_that_share_an_id_are_given_up_together(control_url: str) -> None:
    made: Merchant = await merchant(control_url, "alike", simulated=True)
    close = {"resource_amount": "1", "resource_unit": "TOKEN", "completed_at": "2026-01-01T00:00:00Z"}
    async with clerk(made) as user, scheduler(control_url) as (one, sent):
        for source in ("/a", "/b"):
            payload = close | {"user_id": "ann", "operation_id": f"op{source}"}
            early = command("Operation.RecordAndClose", payload, source, "same", merchant_id="alike")
            assert await user.apply(early) == []
        await wait(user, 16 * 60, b"k" * 16)

        assert await one.send_due(made) == 2
        results = await user.apply(*sent.records(user))

        given_up = [r for r in results if r["command_type"] == "Operation.RecordAndClose"]
        assert sorted(r["command_source"] for r in given_up) == ["/a", "/b"]


async def test_what_could_not_be_sent_is_sent_with_the_next_pass(
    control_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(messages: Sequence[OutMessage], lease: Any = None) -> None:
        raise PublishTimeoutError

    made = await merchant(control_url, "unsent", simulated=True)
    async with clerk(made) as user, scheduler(control_url) as (one, sent):
        await grant(user, "g1", 10, 1)
        await wait(user, 2 * DAY, b"l" * 16)
        with monkeypatch.context() as patched:
            patched.setattr(sent, "publish", away)
            with pytest.raises(PublishTimeoutError):
                await one.send_due(made)

        assert await one.send_due(made) == 1
        await user.apply(*sent.records(user))
        assert await entries(user) == [("promo", 10), ("expiry", -10)]


async def test_a_lot_whose_batch_began_before_the_clock_was_moved_expires_too(control_url: str) -> None:
    made = await merchant(control_url, "jump", simulated=True)
    async with clerk(made) as user, scheduler(control_url) as (one, sent):
        await wait(user, 2 * DAY, b"j" * 16)
        await one.send_due(made)

        # As the batch of a purchase does that read the clock just before it was moved.
        async with user.engine.begin() as connection:
            await connection.exec_driver_sql("UPDATE merchant_state SET clock_offset = '0'")
        await grant(user, "g1", 5, 1)
        async with user.engine.begin() as connection:
            await connection.exec_driver_sql("UPDATE merchant_state SET clock_offset = '2 days'")

        assert await one.send_due(made) == 1
        await user.apply(*sent.records(user))
        assert await entries(user) == [("promo", 5), ("expiry", -5)]


async def test_partitions_are_made_ahead_of_time(control_url: str) -> None:
    made = await merchant(control_url, "months", simulated=True)
    async with clerk(made) as user, scheduler(control_url) as (one, _):
        await wait(user, 400 * DAY, b"h" * 16)
        await one.send_due(made)
        await grant(user, "g1", 10, 30)

        async with user.engine.connect() as connection:
            rows = await fetch(connection, "SELECT count(*) FROM entries_default")
        assert rows[0][0] == 0


async def test_a_closed_hour_of_queue_lag_loses_no_debit(control_url: str) -> None:
    made = await merchant(control_url, "lag", simulated=True, late_close="refuse")
    rate = {"operation_code": "chat", "display_name": "Chat", "resource_unit": "TOKEN", "credits_per_unit": "1"}
    close = {"user_id": "ann", "operation_id": "op-1", "resource_amount": "7", "resource_unit": "TOKEN"}
    async with clerk(made) as user, scheduler(control_url) as (one, sent):
        await user.send("OperationType.CreateWithArchival", rate | {"actor": "tests"})
        await user.send("Operation.Open", {"user_id": "ann", "operation_id": "op-1", "operation_code": "chat"})
        await wait(user, 3600, b"i" * 16)
        await one.send_due(made)
        await user.apply(*sent.records(user))

        # The broker took it ten minutes after the open; it is read fifty minutes later, after the timeout was written.
        taken = datetime.now(UTC) - timedelta(minutes=50)
        result = await user.send("Operation.RecordAndClose", close | {"completed_at": "2026-01-01T00:00:00Z"}, at=taken)

        assert (result["outcome"], result["effects"]["credits"]) == ("applied", 7)
        assert await entries(user) == [("debit", -7)]


async def test_a_close_taken_before_the_clock_was_moved_past_its_deadline_is_in_time(control_url: str) -> None:
    made = await merchant(control_url, "moved", simulated=True, late_close="refuse")
    rate = {"operation_code": "chat", "display_name": "Chat", "resource_unit": "TOKEN", "credits_per_unit": "1"}
    close = {"user_id": "ann", "operation_id": "op-1", "resource_amount": "7", "resource_unit": "TOKEN"}
    async with clerk(made) as user, scheduler(control_url) as (one, sent):
        await user.send("OperationType.CreateWithArchival", rate | {"actor": "tests"})
        await user.send("Operation.Open", {"user_id": "ann", "operation_id": "op-1", "operation_code": "chat"})
        taken = datetime.now(UTC)
        await wait(user, 600, b"k" * 16)
        await wait(user, 600, b"l" * 16)
        await one.send_due(made)
        await user.apply(*sent.records(user))

        result = await user.send("Operation.RecordAndClose", close | {"completed_at": "2026-01-01T00:00:00Z"}, at=taken)
        assert (result["outcome"], result["effects"]["credits"]) == ("applied", 7)

        await user.send("Adjustment.Apply", {"adjustment_id": "a", "user_id": "ann", "credits_delta": 9} | TERMS)
        await user.send("Operation.Open", {"user_id": "ann", "operation_id": "op-2", "operation_code": "chat"})
        await wait(user, 1200, b"m" * 16)
        await one.send_due(made)
        await user.apply(*sent.records(user))
        late = close | {"operation_id": "op-2", "completed_at": "2026-01-01T00:00:00Z"}
        result = await user.send("Operation.RecordAndClose", late)
        assert result["error"]["code"] == "operation_timed_out"


async def test_buyer_blocks_are_deleted_when_their_retention_is_over_and_the_books_still_add_up(
    control_url: str,
) -> None:
    made = await merchant(control_url, "retained", simulated=True, retention_years=2)
    async with clerk(made) as user, scheduler(control_url) as (one, _):
        await catalogue(user)
        await user.send("Purchase.Settled", purchase("ann", "ref-1", buyer={"name": "Ann"}))
        await wait(user, 366 * DAY, b"n" * 16)
        placed = {"order_placed_at": format_time(datetime.now(UTC) + timedelta(days=366))}
        await user.send("Purchase.Settled", purchase("ben", "ref-2", buyer={"name": "Ben"}) | placed)
        await one.send_due(made)
        assert await buyers(user) == ["Ann", "Ben"]

        await wait(user, 365 * DAY, b"o" * 16)
        await one.send_due(made)

        assert await buyers(user) == ["Ben"]
        assert (await verify(user.engine)).ok


async def test_the_search_for_old_buyer_blocks_goes_on_where_the_last_one_ended(control_url: str) -> None:
    made = await merchant(control_url, "marked", retention_years=2)
    async with clerk(made) as user:
        async with scheduler(control_url) as (one, _):
            await one.send_due(made)
        async with user.engine.connect() as connection:
            (row,) = await fetch(connection, "SELECT watermark FROM job_state WHERE job = 'buyers'")
    age = datetime.now(UTC) - row[0]
    assert timedelta(days=729) < age < timedelta(days=733)
