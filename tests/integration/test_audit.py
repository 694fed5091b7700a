"""The auditor finds nothing in what the service wrote, and everything that is changed behind its back."""

import asyncio
import itertools
import json
import os
import random
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
import pytest_asyncio
from aiokafka import TopicPartition
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool
from typer.testing import CliRunner

import merchants.registry
import merchants.store
from console import main
from ledger.model import LotsNeeded
from merchants.databases import CONTROL_SETTINGS, create_unpooled_engine, engine_url, in_a_line
from merchants.registry import Merchant
from merchants.schema import migrate
from schemas.envelope import DecodeContext, decode
from schemas.payloads import MerchantConfig
from tests import builders
from tests.core import admin, as_record, closing, config, opening, operation_type, product, purchase, wire_time
from tests.services import Services
from workers.audit import Report, audit, verify
from workers.positions import Position
from workers.transaction import Batch, Context, Plan, StaleContextError

MUTATIONS = int(os.environ.get("CREDITS_AUDIT_MUTATIONS", "200"))
SEED = 20260301
DAY = 86_400


class Books:
    """A merchant's database, and the batches that are applied to it as a worker does."""

    def __init__(self, merchant: Merchant, settings: MerchantConfig, admin_url: str) -> None:
        self.merchant = merchant
        self.url = engine_url(merchant.database_url, password=merchant.password)
        self.admin = create_async_engine(engine_url(admin_url), poolclass=NullPool)
        self.writer = create_async_engine(self.url, poolclass=NullPool)
        self.context = Context(merchant.merchant_id, merchant.secret, True, 1, settings)
        self.outcomes: list[str] = []
        self._ids = itertools.count(1)

    def message(self, command_type: str, **payload: Any) -> dict[str, Any]:
        number = next(self._ids)
        # A UUIDv7 gives its time to the message's identity.
        name = f"m-{number}" if number % 2 else f"017f22e2-79b0-7cc3-98c4-{number:012x}"
        return {"type": command_type, "id": name, "payload": payload}

    async def apply(self, *messages: dict[str, Any]) -> None:
        """Apply messages as one batch."""
        channels = [as_record(m, self.merchant.merchant_id, datetime.now(UTC)) for m in messages]
        decoded = []
        for record in channels:
            channel = record.topic.rpartition(".")[2]
            secret = self.merchant.secret
            item = decode(record, DecodeContext(self.merchant.merchant_id, channel, secret, {}, Decimal(10**9)))
            decoded.append(item)
        wanted: dict[int, int] = {}
        while True:
            rows = {TopicPartition(r.topic, 0): Position("worker", 1, 0, 0) for r in channels}
            try:
                async with self.writer.begin() as connection:
                    batch = Batch(connection, self.context, wanted)
                    applied = await batch.apply(Plan(rows, fresh=decoded))
                break
            except StaleContextError:
                self.context = batch.context
            except LotsNeeded as needed:
                wanted[needed.account_id] = 1000
        self.context = applied.context
        self.outcomes += [f"{answer.row.type} {answer.row.code or answer.row.outcome}" for answer in applied.answers]

    async def wait(self, days: int) -> None:
        async with self.writer.begin() as connection:
            await merchants.store.advance_clock(connection, days * DAY, os.urandom(16))


def commands(books: Books, choice: random.Random, users: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Make the commands of a lively day, in an order that makes sense for most of them."""
    for user in users:
        ref = f"pay-{next(books._ids)}"
        when = {"order_placed_at": wire_time(datetime.now(UTC)), "settled_at": wire_time(datetime.now(UTC))}
        if choice.random() < 0.6:
            buyer = {"name": "Ann", "country": "AM"} if choice.random() < 0.5 else None
            yield books.message("Purchase.Settled", **purchase(user, ref, buyer=buyer, **when))
        if choice.random() < 0.2:
            yield books.message("Purchase.Settled", **purchase(user, f"{ref}-dear", amount="11.00", **when))
        for _ in range(choice.randrange(4)):
            operation = f"op-{next(books._ids)}"
            amount = str(choice.randrange(1, 90))
            workflow = {"workflow_id": "w"} if choice.random() < 0.3 else {}
            yield books.message("Operation.Open", **opening(operation, user), **workflow)
            yield books.message("Operation.RecordAndClose", **closing(operation, user, amount))
        if choice.random() < 0.2:
            yield books.message("Operation.Open", **opening(f"open-{next(books._ids)}", user))
        if choice.random() < 0.2:
            delta = choice.choice((-7, 30))
            members = {"access_period_days": 5} if delta > 0 else {}
            key = f"a-{next(books._ids)}"
            yield books.message(
                "Adjustment.Apply", **admin(adjustment_id=key, user_id=user, credits_delta=delta, **members)
            )
        if choice.random() < 0.3:
            key = f"r-{next(books._ids)}"
            yield books.message("Refund.Apply", **admin(refund_id=key, external_ref=ref, amount="3.33"))
        if choice.random() < 0.3:
            key = f"d-{next(books._ids)}"
            yield books.message("Chargeback.Apply", **admin(dispute_id=key, external_ref=ref))
            if choice.random() < 0.6:
                yield books.message("Chargeback.Reverse", **admin(dispute_id=key))


async def live(books: Books) -> None:
    """Let a merchant do business for half a year."""
    choice = random.Random(SEED)
    users = [f"user-{n}" for n in range(12)]
    welcome = product("hello", distribution="grant", grant_policy="apply_on_signup", credits=20, prices=...)
    await books.apply(
        books.message("Product.Create", **product(access_period_days=45)),
        books.message("Product.Create", **welcome),
        books.message("OperationType.CreateWithArchival", **operation_type(credits_per_unit="1.5")),
    )
    await books.apply(*(books.message("User.SignedUp", user_id=user) for user in users))
    for _ in range(9):
        messages = list(commands(books, choice, users))
        await books.apply(*messages[: len(messages) // 2])
        await books.apply(*messages[len(messages) // 2 :])
        # The same messages again, and one that waits for a purchase that does not come.
        await books.apply(*choice.sample(messages, 5))
        await books.wait(choice.randrange(20))
    debit = admin(adjustment_id="deep", user_id=users[1], credits_delta=-1_000)
    await books.apply(
        books.message("User.Erase", **admin(request_id="e", user_id=users[0])),
        books.message("Adjustment.Apply", **debit),
        books.message("Operation.Open", **opening("last", "user-new")),
        books.message("Refund.Apply", **admin(refund_id="early", external_ref="pay-that-comes-later")),
    )


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def books(services: Services) -> AsyncIterator[Books]:
    """A merchant with half a year of history."""
    control_url = services.database_url(f"audit_control_{os.getpid()}")
    await migrate(control_url)
    engine = create_unpooled_engine(engine_url(control_url), CONTROL_SETTINGS)
    name = f"audited-{os.getpid()}"
    async with engine.begin() as connection:
        merchant = await merchants.registry.reserve(
            connection,
            name,
            database_url=merchants.registry.server_url(control_url),
            partitions=1,
            simulated=True,
            command=bytes(16),
            fingerprint=bytes(32),
        )
    await engine.dispose()
    settings = MerchantConfig.model_validate(
        config(chargeback_policy={"shortfall": "debit", "credit_note": "on_apply"})
    )
    await merchants.registry.provision(control_url, merchant, settings, "admin")
    books = Books(merchant, settings, services.database_url(merchants.registry.names(name)[1]))
    await live(books)
    yield books


async def test_an_untouched_ledger_holds_every_identity(books: Books) -> None:
    told: list[tuple[str, int, int]] = []
    report = await verify(books.url, lambda *progress: told.append(progress))
    assert report.ok, report.broken
    assert report.entries > 200
    assert ("chains of accounts", report.entries, report.entries) in told
    assert all(finding.checked for finding in report.findings), "the history is too dull to check everything"
    assert {"Operation.Open insufficient_balance", "Chargeback.Reverse applied"} <= set(books.outcomes)


async def test_an_audit_beside_a_busy_writer_sees_one_moment(books: Books) -> None:
    choice = random.Random(SEED + 1)
    for n in range(5):
        report = await verify(books.admin)
        assert report.ok, report.broken
        await books.apply(*commands(books, choice, [f"late-{n}", "user-3"]))


# Mutations


@dataclass(frozen=True)
class Place:
    """A table, which of its rows, and which of their columns no one can change unnoticed."""

    table: str
    columns: str
    where: str = "true"
    may_delete: bool = True


HISTORY = Place(
    "entries",
    "account_id user_seq amount reason operation_type resource_amount resource_unit operation_id workflow_id note "
    "command created_at effective_at balance_after debt_after hash",
)
PLACES = (
    HISTORY,
    Place("allocations", "account_id entry_seq lot_seq at_seq credits created_at"),
    Place(
        "lots",
        "account_id user_seq credits remaining reason product_code purchase issued_at expires_at spent "
        "expired_credits expiry_seq",
    ),
    Place("accounts", "account_id last_seq balance debt head last_entry_at open_operation", "last_seq > 0"),
    Place("debts", "account_id entry_seq uncovered"),
    Place(
        "operations",
        "operation_id account_id operation_code resource_unit state closed_at resource_amount credits entry_seq "
        "workflow_id",
        "state = 'closed'",
    ),
    Place("operations", "operation_id account_id state", "state = 'open'"),
    Place(
        "purchases",
        "external_ref account_id lot_seq credits product_code payment_method country amount currency order_placed_at "
        "settled_at applied_at command receipt_number",
    ),
    Place(
        "reversals",
        "external_ref account_id amount taken entry_seq applied_at command has_credit_note credit_note_number won_at "
        "given_back_seq correction_number",
        "entry_seq IS NOT NULL",
    ),
    Place("documents", "number kind prefix year sequence issued_at external_ref account_id body hash command"),
    Place("document_series", "prefix year next_number last_issued_at head"),
    Place("buyers", "account_id salt block", may_delete=False),
    Place(
        "inbox",
        "identity outcome code result account_id",
        "EXISTS (SELECT FROM entries WHERE command = identity AND reason <> 'expiry')",
    ),
    Place("parked", "identity"),
)

OTHER = {
    "bigint": "coalesce({0} + 1, 1)",
    "integer": "coalesce({0} + 1, 1)",
    "numeric": "coalesce({0} + 1, 1)",
    "boolean": "NOT {0}",
    "text": "coalesce({0} || 'x', 'x')",
    "bytea": "set_byte({0}, 0, get_byte({0}, 0) # 1)",
    "timestamp with time zone": "coalesce({0} + interval '1 microsecond', now())",
}


class Vandal:
    """Changes one thing of the books, inside a transaction that is undone afterwards."""

    def __init__(self, choice: random.Random, types: dict[tuple[str, str], str]) -> None:
        self.choice = choice
        self.types = types

    async def strike(self, connection: AsyncConnection) -> str:
        """Change something, and tell what; what the database itself refuses, or changes nothing, is tried elsewhere."""
        while True:
            place = self.choice.choice(PLACES)
            act = self.choice.choice((self._flip, self._flip, self._delete, self._reorder))
            savepoint = await connection.begin_nested()
            try:
                told = await act(connection, place)
            except DBAPIError:
                told = None
            if told is not None:
                await savepoint.commit()
                return told
            await savepoint.rollback()

    async def _rows(self, connection: AsyncConnection, place: Place, count: int) -> list[str]:
        sql = f"SELECT tableoid::regclass || ' ' || ctid FROM {place.table} WHERE {place.where} ORDER BY tableoid, ctid"
        rows = (await connection.exec_driver_sql(sql)).scalars().all()
        return self.choice.sample(rows, count) if len(rows) >= count else []

    async def _flip(self, connection: AsyncConnection, place: Place) -> str | None:
        column = self.choice.choice(place.columns.split())
        for row in await self._rows(connection, place, 1):
            other = OTHER[self.types[place.table, column]].format(column)
            sql = f"UPDATE {place.table} SET {column} = {other} WHERE tableoid::regclass || ' ' || ctid = $1"
            if (await connection.exec_driver_sql(f"{sql} RETURNING 1", (row,))).all():
                return f"{place.table}.{column} of {row}"
        return None

    async def _delete(self, connection: AsyncConnection, place: Place) -> str | None:
        if not place.may_delete:
            return None
        for row in await self._rows(connection, place, 1):
            sql = f"DELETE FROM {place.table} WHERE tableoid::regclass || ' ' || ctid = $1"
            await connection.exec_driver_sql(sql, (row,))
            return f"{place.table} without {row}"
        return None

    async def _reorder(self, connection: AsyncConnection, place: Place) -> str | None:
        """Exchange what two rows have in one column."""
        column = self.choice.choice(place.columns.split())
        rows = await self._rows(connection, place, 2)
        if not rows:
            return None
        sql = f"""
        UPDATE {place.table} t SET {column} = o.{column} FROM {place.table} o
        WHERE t.tableoid::regclass || ' ' || t.ctid = ANY($1::text[])
            AND o.tableoid::regclass || ' ' || o.ctid = ANY($1::text[])
            AND (t.tableoid, t.ctid) <> (o.tableoid, o.ctid) AND t.{column} IS DISTINCT FROM o.{column} RETURNING 1
        """
        changed = (await connection.exec_driver_sql(sql, (rows,))).all()
        return f"{place.table}.{column} exchanged between {rows}" if changed else None


async def column_types(engine: AsyncEngine) -> dict[tuple[str, str], str]:
    sql = "SELECT table_name, column_name, data_type FROM information_schema.columns WHERE table_schema = 'public'"
    async with engine.connect() as connection:
        return {(row[0], row[1]): row[2] for row in await connection.exec_driver_sql(sql)}


async def after(books: Books, *statements: str) -> Report:
    """Audit the books as they would be after these statements of a superuser."""
    async with books.admin.connect() as connection:
        await connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        for sql in statements:
            assert (await connection.exec_driver_sql(sql)).rowcount, sql
        report = await audit(connection)
        await connection.rollback()
    return report


async def test_every_change_behind_the_services_back_is_found(books: Books) -> None:
    vandal = Vandal(random.Random(SEED), await column_types(books.admin))
    missed = []
    for _ in range(MUTATIONS):
        async with books.admin.connect() as connection:
            await connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
            done = await vandal.strike(connection)
            if (await audit(connection)).ok:
                missed.append(done)
            await connection.rollback()
    assert not missed


async def test_the_first_break_is_named(books: Books) -> None:
    report = await after(books, "UPDATE entries SET note = 'nothing happened' WHERE user_seq = 2")
    (finding,) = report.broken
    assert finding.name == "the hash chain of every account"
    assert finding.violations > 5
    assert finding.first is not None
    assert finding.first.split(":")[0].endswith("-2")


async def test_a_tail_cut_off_with_its_account_row_rewound_is_found(books: Books) -> None:
    last = "SELECT account_id, max(user_seq) AS user_seq FROM entries WHERE reason = 'debit' GROUP BY 1"
    report = await after(
        books,
        f"""
        DELETE FROM entries WHERE (account_id, user_seq) IN (
            SELECT account_id, user_seq FROM accounts JOIN ({last}) l USING (account_id)
            WHERE last_seq = user_seq AND last_seq > 1 ORDER BY 1 LIMIT 1)
        """,
        """
        UPDATE accounts a SET last_seq = e.user_seq, balance = balance_after, debt = debt_after, head = hash,
            last_entry_at = e.created_at
        FROM entries e WHERE e.account_id = a.account_id AND e.user_seq = a.last_seq - 1
            AND NOT EXISTS (SELECT FROM entries x WHERE x.account_id = a.account_id AND x.user_seq = a.last_seq)
        """,
    )
    assert {
        "an applied command that moves credits has its entry",
        "a result is its command's and says what the ledger says",
    } <= {finding.name for finding in report.broken}


async def test_overlapping_periods_of_the_catalogue_are_found(books: Books) -> None:
    report = await after(
        books,
        """
        INSERT INTO operation_types (operation_code, display_name, resource_unit, credits_per_unit, minimum_charge,
            effective_at, version)
        SELECT operation_code, display_name, resource_unit, credits_per_unit, minimum_charge,
            effective_at + interval '1 day', version + 1 FROM operation_types
        """,
        """
        INSERT INTO product_prices (product_code, country, currency, amount, effective_at, version)
        SELECT product_code, country, currency, amount, effective_at + interval '1 day', version + 1
        FROM product_prices
        """,
    )
    assert {finding.name for finding in report.broken} == {
        "a product's prices do not overlap",
        "an operation type's versions do not overlap",
    }


async def test_debt_beside_credits_to_spend_is_found(books: Books) -> None:
    name = "debt > 0 ⇒ every unexpired lot is empty"
    report = await after(
        books,
        """
        UPDATE accounts SET debt = 1 WHERE account_id IN (
            SELECT account_id FROM lots, merchant_state WHERE expires_at > now() + clock_offset AND remaining > 0)
        """,
    )
    assert name in {finding.name for finding in report.broken}


async def test_a_merchant_that_lets_nobody_in_is_named_and_the_others_are_audited(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    control_url = services.database_url(f"verify_control_{os.getpid()}")
    await migrate(control_url)
    closed, other = (f"{name}-{os.getpid()}" for name in ("closed", "other"))
    for merchant_id in (closed, other):
        await builders.merchant(control_url, merchant_id)
    server = create_unpooled_engine(engine_url(control_url), CONTROL_SETTINGS)
    async with server.begin() as connection:
        await connection.exec_driver_sql(f'ALTER ROLE "{merchants.registry.names(closed)[0]}" NOLOGIN')
    await server.dispose()
    monkeypatch.setenv("CREDITS_CONTROL_DATABASE_URL", control_url)

    told = await asyncio.to_thread(CliRunner().invoke, main.app, ["verify", "--all"])
    told_to_programs = await asyncio.to_thread(CliRunner().invoke, main.app, ["verify", "--all", "--json"])

    assert told.exit_code == told_to_programs.exit_code == 1
    (line,) = [line for line in told.stdout.splitlines() if closed in line]
    assert re.match(f"{closed} can't be verified: .*not permitted to log in", line)
    assert re.search(f"identity +{other}", told.stdout)
    found = json.loads(told_to_programs.stdout)
    assert (found[closed]["ok"], found[other]["ok"]) == (False, True)
    assert "not permitted to log in" in found[closed]["error"]


def test_a_database_that_accepts_and_says_nothing_has_an_error_all_the_same() -> None:
    assert in_a_line(TimeoutError()) == "TimeoutError"
    assert in_a_line(OSError("one\ntwo")) == "one"
