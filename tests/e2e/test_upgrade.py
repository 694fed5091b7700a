"""A rolling upgrade under traffic, as `docs/operations/upgrade.md` tells it: the next version is this one, copied, with
one more migration a lineage, and workers of both serve the same merchants for a while.
"""

import asyncio
import os
import re
import shutil
import sys
import tomllib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
import pytest
import pytest_asyncio

from console.processes import StackError
from console.stack import Stack
from tests.e2e.blackbox import CONTROL_RESULTS, Bus, Merchant, Sent, name
from tests.services import JARS

ROOT = Path(__file__).parents[2]
USERS = 20
ENOUGH = 1_000_000
# So many commands wait for their results at most.
AHEAD_MAX = 400
SECONDS_MAX = 90.0
# What releases usually bring: a column in tables that are written all the time, a table, an index.
MIGRATIONS = {
    "merchant": """
        ALTER TABLE accounts ADD COLUMN nickname text;
        ALTER TABLE inbox ADD COLUMN origin text NOT NULL DEFAULT 'kafka';
        CREATE TABLE nicknames (nickname text PRIMARY KEY, account_id bigint NOT NULL);
        CREATE INDEX accounts_nickname ON accounts (nickname);
    """,
    "control": "ALTER TABLE merchants ADD COLUMN region text",
}


def next_version(folder: Path) -> dict[str, str]:
    """Write the next version into a folder; returns the environment in which Python finds it before this one."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    for package in {package.partition(".")[0] for package in packages}:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for lineage, sql in MIGRATIONS.items():
        newest = max((folder / "migrations" / lineage / "versions").glob("*.py"))
        script = re.sub(
            "^down_revision = .*", f'down_revision = "{newest.stem}"', newest.read_text(), flags=re.MULTILINE
        )
        newest.with_stem("9999_next").write_text(
            script.replace(f'revision = "{newest.stem}"', 'revision = "9999_next"', 1)
        )
        newest.with_name("9999_next.sql").write_text(sql)
    return {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}


@dataclass
class Upgrade:
    """A stack of its own: the template of new merchants is one a server, so others would be upgraded with it."""

    stack: Stack
    bus: Bus
    next: dict[str, str]

    async def credits(self, *words: str, version: dict[str, str] | None = None) -> str:
        """Run the program, of the next version unless told otherwise; it must succeed."""
        environment = os.environ | self.stack.endpoints.environment() | (self.next if version is None else version)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "console.main", *words),
            env=environment | {"COLUMNS": "200"},
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out = (await process.communicate())[0].decode()
        assert process.returncode == 0, out
        return out

    async def start(self, worker: str, version: dict[str, str]) -> int:
        """Start a worker and return its process id."""
        return (await asyncio.to_thread(self.stack.start_worker, worker, version)).pid

    async def owners(self, merchant: Merchant) -> set[int]:
        """Return the process ids of the workers that have written to a merchant's partitions last."""
        rows = await self.query(merchant, "SELECT DISTINCT owner FROM positions")
        return {int(row["owner"].split("-")[-2]) for row in rows}

    async def query(self, merchant: Merchant, sql: str) -> list[asyncpg.Record]:
        """Read from a merchant's database."""
        connection = await asyncpg.connect(self.stack.postgres.url(f"credits_m_{merchant.id}"))
        try:
            return list(await connection.fetch(sql))
        finally:
            await connection.close()


@pytest.fixture
def stack(scratch: Path) -> Iterator[Stack]:
    stack = Stack(scratch / "upgrade", jars=JARS)
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()


@pytest_asyncio.fixture(loop_scope="session")
async def upgrade(stack: Stack, tmp_path: Path) -> AsyncIterator[Upgrade]:
    bus = Bus(stack.endpoints.kafka_bootstrap_servers)
    upgrade = Upgrade(stack, bus, next_version(tmp_path / "next"))
    await upgrade.credits("migrate", version={})
    for worker in ("worker-1", "worker-2"):
        await upgrade.start(worker, {})
    await bus.start()
    await bus.watch(CONTROL_RESULTS, partitions=1)
    yield upgrade
    await bus.stop()


@dataclass
class Traffic:
    """Purchases, and operations that are opened and closed, for some users of a merchant, until it is ended."""

    shop: Merchant
    users: list[str] = field(default_factory=lambda: [name("u") for _ in range(USERS)])
    sent: list[Sent] = field(default_factory=list)
    unanswered: list[Sent] = field(default_factory=list)
    turns: int = 0
    ending: bool = False

    async def run(self) -> None:
        while not self.ending:
            self.turns += 1
            for user in self.users:
                opening = {"user_id": user, "operation_id": f"{user}-{self.turns}", "operation_code": "llm"}
                sent = [
                    await self.shop.send("Purchase.Settled", self.shop.purchase(user)),
                    await self.shop.send("Operation.Open", opening),
                    await self.shop.send(
                        "Operation.RecordAndClose", self.shop.closing(user, f"{user}-{self.turns}", "7")
                    ),
                ]
                self.sent += sent
                self.unanswered += sent
            await self.until("results that keep up", len(self.sent) - AHEAD_MAX)

    def answered(self) -> int:
        self.unanswered = [sent for sent in self.unanswered if not self.shop.bus.heard(sent)]
        return len(self.sent) - len(self.unanswered)

    async def until(self, what: str, count: int) -> None:
        await self.shop.bus.until(what, lambda: self.answered() >= count, SECONDS_MAX)

    async def flows(self) -> None:
        """Wait until commands are answered that are not sent yet."""
        await self.until("results of new commands", len(self.sent) + 3 * USERS)


async def test_workers_are_replaced_by_those_of_the_next_version_while_commands_flow(upgrade: Upgrade) -> None:
    async with asyncio.TaskGroup() as tasks:
        old = await begin(upgrade.bus, tasks)
        assert "migrated" in await upgrade.credits("migrate")
        # Made from the migrated template by a worker that does not know of it, and served by it.
        new = await begin(upgrade.bus, tasks)
        with pytest.raises(StackError, match="this version needs 0001_control: a newer version has migrated it"):
            await upgrade.start("worker-3", {})
        for worker in ("worker-1", "worker-2"):
            assert await asyncio.to_thread(upgrade.stack.stop_worker, worker), "it did not end by itself"
            await upgrade.start(worker, upgrade.next)
            await all_workers_work(upgrade, old, new)
        old.ending = new.ending = True

    await judge(upgrade, old)
    await judge(upgrade, new)
    assert "every identity holds" in await upgrade.credits("verify", "--all")
    told = await upgrade.credits("migrate", "--check")
    assert "4 of 4 databases are up to date (control 9999_next, merchants 9999_next)" in told


async def begin(bus: Bus, tasks: asyncio.TaskGroup) -> Traffic:
    """Register a merchant whose users have enough, and let traffic flow."""
    shop = await bus.register(partitions=4)
    await shop.stock()
    traffic = Traffic(shop)
    for user in traffic.users:
        await shop.grant(user, ENOUGH)
    tasks.create_task(traffic.run())
    await traffic.flows()
    return traffic


async def all_workers_work(upgrade: Upgrade, *traffics: Traffic) -> None:
    """Wait until each running worker has written for a merchant, and all merchants are served."""
    pids = {line.pid for line in upgrade.stack.status() if line.name in ("worker-1", "worker-2")}
    owners: set[int] = set()
    async with asyncio.timeout(SECONDS_MAX):
        while not pids <= owners:
            await asyncio.gather(*(traffic.flows() for traffic in traffics))
            owners = set().union(*[await upgrade.owners(traffic.shop) for traffic in traffics])


async def judge(upgrade: Upgrade, traffic: Traffic) -> None:
    """Every command was applied once; a result, or a receipt, that was published again is the same bytes."""
    shop, count = traffic.shop, traffic.turns * USERS
    await traffic.until("all results", len(traffic.sent))
    assert len(traffic.sent) == 3 * count
    for sent in traffic.sent:
        results = shop.bus.heard(sent)
        assert {one.body["outcome"] for one in results} == {"applied"}, results[0].body
        assert len({(one.headers["ce_id"], one.value) for one in results}) == 1
    receipts = {one.body["receipt_number"]: one.value for one in shop.said("receipts")}
    assert {one.value for one in shop.said("receipts")} == set(receipts.values())
    assert sorted(int(number.split("-")[2]) for number in receipts) == list(range(1, count + 1))
    assert shop.said("dead-letter") == []
    moved = await upgrade.query(shop, "SELECT user_id, reason FROM entries JOIN accounts USING (account_id)")
    assert Counter((row["user_id"], row["reason"]) for row in moved) == {
        (user, reason): traffic.turns for user in traffic.users for reason in ("purchase", "debit")
    } | {(user, "promo"): 1 for user in traffic.users}
    operations = await upgrade.query(shop, "SELECT operation_id FROM operations WHERE state = 'closed'")
    wanted = {f"{user}-{turn + 1}" for user in traffic.users for turn in range(traffic.turns)}
    assert sorted(row["operation_id"] for row in operations) == sorted(wanted)
    balances = await upgrade.query(shop, "SELECT balance, debt FROM accounts")
    assert [tuple(row) for row in balances] == [(ENOUGH + traffic.turns * (100 - 7), 0)] * USERS
