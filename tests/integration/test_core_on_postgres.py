"""The whole transaction of a batch on a real PostgreSQL against the reference model: results, tables, audit."""

import json
import os
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio

import ledger.store
from catalog.sql import fetch
from ledger.model import account_id_of, entry_id_of
from merchants.registry import Merchant
from merchants.schema import migrate
from tests import builders
from tests.builders import Clerk, Record, clerk, merchant
from tests.core import closing, config, opening, purchase, wire_time
from tests.model.ledger import Ledger
from tests.model.traffic import WAITS, Traffic, by_answer, compare, first_catalogue
from tests.services import Services
from workers.audit import verify

HISTORIES = 4
STEPS = int(os.environ.get("POSTGRES_STEPS", "200")) // HISTORIES
SEED = int(os.environ.get("HYPOTHESIS_SEED", random.SystemRandom().randrange(2**32)))
SIZE_MAX = 12


@pytest_asyncio.fixture(scope="module")
async def control_url(services: Services) -> AsyncIterator[str]:
    url = services.database_url("model_control")
    await migrate(url)
    yield url


class Comparison:
    """One merchant's database and a model of it, both given the same traffic."""

    def __init__(self, clerk: Clerk, chosen: random.Random) -> None:
        self.clerk = clerk
        self.random = chosen
        self.secret = clerk.merchant.secret
        self.model = Ledger(config(), lambda user_id, seq: entry_id_of(self.account_id(user_id), seq))
        self.traffic = Traffic(self.model, config())
        self.offset = timedelta(0)

    def account_id(self, user_id: str) -> int:
        return account_id_of(user_id, self.secret)

    async def rows(self, sql: str) -> list[Any]:
        async with self.clerk.engine.connect() as connection:
            return [tuple(row) for row in await fetch(connection, sql)]

    async def wait(self, seconds: int) -> None:
        """Move the merchant's clock, as it is moved for a simulated one."""
        self.offset += timedelta(seconds=seconds)
        async with self.clerk.engine.begin() as connection:
            sql = "UPDATE merchant_state SET clock_offset = make_interval(secs => $1)"
            await connection.exec_driver_sql(sql, (self.offset.total_seconds(),))

    async def step(self) -> None:
        await self.wait(self.random.choice(WAITS))
        size = self.random.randint(1, SIZE_MAX)
        await self.send(self.traffic.batch(self.random, datetime.now(UTC) + self.offset, size))

    async def send(self, messages: list[dict[str, Any]]) -> None:
        records = [self.record(message) for message in messages]
        results = await self.clerk.apply(*records)
        now = await self.newest()
        expected = by_answer(result for message in messages for result in self.model.deliver(message, now))
        found = by_answer(results)
        assert found.keys() == expected.keys()
        for which, wanted in expected.items():
            # How often each is there tells nothing: the publisher repeats one for every delivery that asked for it.
            for result in found[which]:
                compare(wanted[0], result)
        await self.compare_state()
        if self.random.randrange(4) == 0:
            await self.redeliver(records)

    async def redeliver(self, records: list[Record]) -> None:
        """Deliver a batch again at its own positions, as after a crash: the same answers, and nothing moves."""
        for result in await self.clerk.apply(*records):
            known = self.model.seen[result["command_source"], result["command_id"]]["result"]
            if result.get("error", {}).get("code") != "idempotency_conflict":
                compare(known, result)
        await self.compare_state()

    def record(self, message: dict[str, Any]) -> Record:
        real = datetime.now(UTC) - message.get("late_by", timedelta(0))
        made = builders.command(
            message["type"],
            message["payload"],
            message["source"],
            message["id"],
            merchant_id=self.clerk.merchant.merchant_id,
            at=real,
        )
        taken = datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=made.timestamp)
        # The repetition of a message has a record time of its own.
        message["record_time"] = taken + self.offset
        return made

    async def newest(self) -> datetime:
        """Return the moment of the last batch that decided anything."""
        sql = "SELECT greatest((SELECT max(decided_at) FROM inbox), (SELECT max(parked_at) FROM parked))"
        now: datetime = (await self.rows(sql))[0][0]
        return now

    async def compare_state(self) -> None:
        model = self.model
        sql = "SELECT account_id, user_id, balance, debt, open_operation, erased_at IS NOT NULL FROM accounts"
        accounts = {row[0]: row for row in await self.rows(sql)}
        assert {self.account_id(name) for name in model.users} == accounts.keys()
        told = await self.by_account("entries", "user_seq, amount, reason, created_at, effective_at")
        lots = await self.by_account("lots", "user_seq, credits, remaining, expires_at, purchase")
        paid = await self.by_account("allocations", "entry_seq, lot_seq, at_seq, credits")
        for name, user in model.users.items():
            account_id = self.account_id(name)
            user["tombstone"] = accounts[account_id][1] if user["erased"] else ""
            figures = (model.balance(user), model.debt(user), user["open"], user["erased"])
            assert accounts[account_id][2:] == figures
            assert told.get(account_id, []) == [
                (e["seq"], e["amount"], e["reason"], e["at"], e.get("effective", e["at"])) for e in user["entries"]
            ]
            assert lots.get(account_id, []) == [
                (lot["seq"], lot["credits"], model.remaining(user, lot), lot["expires"], lot["purchase"])
                for lot in user["lots"]
            ]
            expected = sorted((a["entry"], a["lot"], a["at"], a["credits"]) for a in user["allocations"])
            assert paid.get(account_id, []) == expected
        await self.compare_rest()

    async def compare_rest(self) -> None:
        model = self.model
        states = {key: operation["state"] for key, operation in model.operations.items()}
        assert dict(await self.rows("SELECT operation_id, state FROM operations")) == states
        numbers = {document["number"] for document in model.documents}
        assert {row[0] for row in await self.rows("SELECT number FROM documents")} == numbers
        roles = {self.account_id(name): role for name, role in model.roles.items()}
        assert dict(await self.rows("SELECT account_id, role FROM user_roles")) == roles
        counts = await self.rows("SELECT (SELECT config_version FROM merchant_state), (SELECT count(*) FROM parked)")
        assert counts == [(model.version, len(model.parked))]

    async def by_account(self, table: str, columns: str) -> dict[int, list[Any]]:
        found: dict[int, list[Any]] = {}
        for row in await self.rows(f"SELECT account_id, {columns} FROM {table} ORDER BY account_id, 2, 3, 4"):
            found.setdefault(row[0], []).append(row[1:])
        return found


@pytest.mark.parametrize("history", range(HISTORIES))
async def test_the_database_and_the_model_agree_after_every_batch(
    control_url: str, history: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    print(f"HYPOTHESIS_SEED={SEED} POSTGRES_STEPS={STEPS * HISTORIES}, history {history}")
    # So few that batches often have to ask for more.
    monkeypatch.setattr(ledger.store, "LOTS_AT_FIRST", 2)
    made = await merchant(control_url, f"model-{history}", simulated=True, **config(), vat_rates=[])
    async with clerk(made) as at_work:
        comparison = Comparison(at_work, random.Random(SEED + history))
        comparison.traffic.random, comparison.traffic.now = comparison.random, datetime.now(UTC)
        await comparison.send([comparison.traffic.message(*command) for command in first_catalogue()])
        for _ in range(STEPS):
            await comparison.step()
        report = await verify(at_work.engine)
        assert report.ok, report.as_object()


async def test_what_a_refused_open_released_names_its_user_again_after_a_crash(control_url: str) -> None:
    made = await merchant(control_url, "model-nobody", **config(), vat_rates=[])
    async with clerk(made) as at_work:
        close = builders.command("Operation.RecordAndClose", closing(), "test", "close", merchant_id="model-nobody")
        assert await at_work.apply(close) == []
        refused = builders.command("Operation.Open", opening(), "test", "open", merchant_id="model-nobody")

        first = await at_work.apply(refused)
        again = await at_work.apply(refused)

        assert [(r["command_id"], r["user_id"], r["error"]["code"]) for r in first] == [
            ("open", "u", "unknown_operation_type"),
            ("close", "u", "operation_not_open"),
        ]
        assert again == first


async def test_a_redelivered_batch_with_a_parked_command_repeats_nothing_for_it(control_url: str) -> None:
    made = await merchant(control_url, "model-parked", **config(), vat_rates=[])
    async with clerk(made) as at_work:
        early = closing()
        record = builders.command("Operation.RecordAndClose", early, merchant_id=made.merchant_id)
        assert await at_work.apply(record) == []

        assert await at_work.apply(record) == []

        opened, closed = await at_work.apply(
            builders.command("Operation.Open", opening(operation_code="none"), merchant_id=made.merchant_id)
        )
        assert (opened["error"]["code"], closed["error"]["code"]) == ("unknown_operation_type", "operation_not_open")
        assert await at_work.apply(record) == [closed]


async def shop(control_url: str, merchant_id: str) -> tuple[Merchant, Any]:
    """Make a merchant that sells P100, and a function that makes records of its commands."""
    made = await merchant(control_url, merchant_id, simulated=True, **config(), vat_rates=[])

    def record(command_type: str, payload: dict[str, Any], command_id: str | None = None) -> Record:
        return builders.command(command_type, payload, command_id=command_id, merchant_id=merchant_id)

    async with clerk(made) as at_work:
        for command_type, payload in first_catalogue():
            await at_work.apply(record(command_type, payload))
    return made, record


def attachment(**changes: Any) -> dict[str, Any]:
    members = {"receipt_number": f"R-{datetime.now(UTC).year}-0001", "kind": "sale", "fiscal_number": "f"}
    return members | {"authority": "SRC", "fiscal_at": wire_time(datetime.now(UTC)), "actor": "admin"} | changes


def payment() -> dict[str, Any]:
    return purchase(product_code="P100", order_placed_at=wire_time(datetime.now(UTC)))


async def test_what_waits_for_a_receipt_is_decided_in_order_of_arrival_over_batches(control_url: str) -> None:
    made, record = await shop(control_url, "model-order")
    async with clerk(made) as at_work:
        assert await at_work.apply(record("Receipt.AttachFiscal", attachment(), "first")) == []

        second = attachment(actor="another")
        results = await at_work.apply(
            record("Purchase.Settled", payment()), record("Receipt.AttachFiscal", second, "second")
        )

        outcomes = {result["command_id"]: result["outcome"] for result in results}
        assert (outcomes["first"], outcomes["second"]) == ("applied", "rejected")


@pytest.mark.parametrize("purchase_first", [True, False])
async def test_what_is_given_up_in_the_batch_of_its_receipt_is_decided_once(
    control_url: str, purchase_first: bool
) -> None:
    made, record = await shop(control_url, f"model-once-{int(purchase_first)}")
    async with clerk(made) as at_work:
        assert await at_work.apply(record("Receipt.AttachFiscal", attachment(), "early")) == []
        async with at_work.engine.begin() as connection:
            await connection.exec_driver_sql("UPDATE merchant_state SET clock_offset = interval '20 minutes'")
        records = [
            record("Purchase.Settled", payment()),
            record("Command.Resolve", {"source": "test", "id": "early"}, "job"),
        ]

        results = await at_work.apply(*(records if purchase_first else reversed(records)))

        assert sorted(result["command_id"] for result in results).count("early") == 1
        assert (await verify(at_work.engine)).ok


async def test_a_message_delivered_again_at_its_place_is_answered_even_if_it_is_read_otherwise_now(
    control_url: str,
) -> None:
    made, record = await shop(control_url, "model-reread")
    async with clerk(made) as at_work:
        grant = {"grant_id": "g", "user_id": "u", "credits": 5, "access_period_days": 30}
        first = record("Grant.Apply", grant | {"justification": "as agreed", "actor": "admin"})
        answered = await at_work.apply(first)

        # As another release or another configuration may read the same bytes.
        again = replace(first, value=json.dumps(grant | {"justification": "otherwise", "actor": "admin"}).encode())

        assert await at_work.apply(again) == answered


async def test_a_prefix_of_any_earlier_configuration_stays_its_documents_own(control_url: str) -> None:
    made, record = await shop(control_url, "model-prefixes")

    def configured(receipt: str, credit_note: str) -> Record:
        changed = config(receipt_series_prefix=receipt, credit_note_series_prefix=credit_note)
        return record("Merchant.Configure", {"config": changed, "actor": "admin"})

    async with clerk(made) as at_work:
        (first,) = await at_work.apply(record("Purchase.Settled", payment()))
        assert await codes(at_work, configured("INV", "C")) == ["applied"]
        # Each in the batch of the one before, and all of them long after.
        assert await codes(at_work, configured("INV", "CN"), configured("CN", "C"), configured("C", "CN")) == [
            "applied",
            "immutable",
            "immutable",
        ]
    async with clerk(made) as later:
        assert await codes(later, configured("INV", "R"), configured("R", "C")) == ["immutable", "applied"]
        (second,) = await later.apply(record("Purchase.Settled", payment() | {"external_ref": "another"}))
        assert (await verify(later.engine)).ok

    numbers = [result["effects"]["receipt_number"] for result in (first, second)]
    assert numbers == [f"R-{datetime.now(UTC).year}-{n:04d}" for n in (1, 2)]


async def codes(at_work: Clerk, *records: Record) -> list[str]:
    results = await at_work.apply(*records)
    return [result["error"]["code"] if "error" in result else result["outcome"] for result in results]
