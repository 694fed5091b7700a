"""A worker is killed in the middle of its work: judged by the topics and the database alone."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import asyncpg

from tests.e2e.blackbox import Bus, Json, Merchant, Received, name, parse_time, record_key
from tests.e2e.conftest import Running

USERS = 2_000
ROUNDS = 4
COMMANDS = USERS * (2 + 2 * ROUNDS)
BATCH_MAX = 2_000
SECONDS_MAX = 240.0


async def test_twenty_thousand_commands_survive_a_kill_of_a_worker(
    bus: Bus, running: Running, record_property: Callable[[str, object], None]
) -> None:
    shop = await bus.register(partitions=4)
    await shop.stock()
    before = len(shop.said("results"))
    users = [name("u") for _ in range(USERS)]
    await _send(shop, [("Purchase.Settled", shop.purchase(user)) for user in users])
    await _heard(shop, before + USERS)
    sending = asyncio.create_task(_send(shop, list(_commands(shop, users))))
    await _heard(shop, before + USERS + COMMANDS // 20)
    await asyncio.to_thread(running.stack.kill_worker, "worker-1")
    killed_at = len(shop.said("results"))
    assert killed_at < before + COMMANDS, "all was done before the worker could be killed"
    await sending
    await asyncio.to_thread(running.start, "worker-1")

    def distinct() -> set[str]:
        return {one.headers["ce_id"] for one in shop.bus.topics[shop.topic("results")][before:]}

    await bus.until("all results", lambda: len(distinct()) >= COMMANDS, SECONDS_MAX)
    await bus.until("all receipts", lambda: len(_by_number(shop.said("receipts"))) >= 2 * USERS, SECONDS_MAX)
    results = shop.said("results")[before:]
    assert len(distinct()) == COMMANDS
    repeated = len(results) - COMMANDS
    record_property("repeated_results", repeated)
    print(f"{repeated} results repeated, killed after {killed_at - before}")
    assert repeated <= BATCH_MAX
    _check_results(results)
    _check_receipts(shop)
    await _check_books(running, shop, results)


def _commands(shop: Merchant, users: list[str]) -> Iterator[tuple[str, Json]]:
    for turn in range(ROUNDS):
        for user in users:
            yield "Operation.Open", {"user_id": user, "operation_id": f"{user}-{turn}", "operation_code": "llm"}
            yield "Operation.RecordAndClose", shop.closing(user, f"{user}-{turn}", str(turn + 1))
    for user in users:
        yield "Purchase.Settled", shop.purchase(user)


async def _send(shop: Merchant, commands: list[tuple[str, Json]]) -> None:
    channels = {"Purchase.Settled": "purchases"}
    taken = [
        await shop.bus.post(shop.topic(channels.get(type_, "operations")), type_, members, key=record_key(members))
        for type_, members in commands
    ]
    for one in taken:
        await one()


async def _heard(shop: Merchant, count: int) -> None:
    topic = shop.topic("results")
    await shop.bus.until(f"{count} results", lambda: len(shop.bus.topics[topic]) >= count, SECONDS_MAX)


def _check_results(results: list[Received]) -> None:
    """All results of one message are the same bytes, and every command was applied."""
    by_message = defaultdict(set)
    for one in results:
        by_message[one.body["command_source"], one.body["command_id"]].add((one.headers["ce_id"], one.value))
    assert len(by_message) == COMMANDS
    assert {len(values) for values in by_message.values()} == {1}
    assert Counter(one.body["outcome"] for one in results) == {"applied": len(results)}
    # Results keep the order of their input partition: per user the operations are in the order they were sent.
    turns: dict[str, list[str]] = defaultdict(list)
    seen = set()
    for one in results:
        if one.body["command_type"] == "Operation.Open" and one.headers["ce_id"] not in seen:
            seen.add(one.headers["ce_id"])
            turns[one.body["user_id"]].append(one.body["effects"]["operation_id"][-1])
    assert set(map(tuple, turns.values())) == {tuple(str(turn) for turn in range(ROUNDS))}


def _by_number(documents: list[Received]) -> dict[str, set[bytes]]:
    numbers: dict[str, set[bytes]] = defaultdict(set)
    for one in documents:
        numbers[one.body["receipt_number"]].add(one.value)
    return numbers


def _check_receipts(shop: Merchant) -> None:
    """Receipts are gapless and chronological; a repeated one is the same bytes."""
    documents = shop.said("receipts")
    assert {len(values) for values in _by_number(documents).values()} == {1}
    issued = {int(one.body["receipt_number"].split("-")[2]): parse_time(one.body["issued_at"]) for one in documents}
    assert sorted(issued) == list(range(1, 2 * USERS + 1))
    assert [issued[number] for number in sorted(issued)] == sorted(issued.values())
    assert len({one.body["external_ref"] for one in documents}) == 2 * USERS


async def _check_books(running: Running, shop: Merchant, results: list[Received]) -> None:
    """Recompute the identities of the ledger from the tables."""
    rows = await _tables(running, shop)
    entries: dict[int, list[Any]] = defaultdict(list)
    for entry in sorted(rows["entries"], key=lambda row: (row["account_id"], row["user_seq"])):
        entries[entry["account_id"]].append(entry)
    paid, used = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for one in rows["allocations"]:
        assert one["credits"] > 0
        paid[one["account_id"], one["entry_seq"]] += one["credits"]
        used[one["account_id"], one["lot_seq"]] += one["credits"]
    debts = {(one["account_id"], one["entry_seq"]): one["uncovered"] for one in rows["debts"]}
    assert len(rows["lots"]) == 2 * USERS
    remaining: Counter[int] = Counter()
    for lot in rows["lots"]:
        place = (lot["account_id"], lot["user_seq"])
        assert lot["remaining"] == lot["credits"] - used.pop(place, 0) >= 0
        remaining[lot["account_id"]] += lot["remaining"]
    assert not used, "allocations of no lot"
    last: dict[str, Json] = {}
    for result in results:
        if result.body["user_seq"] >= last.get(result.body["user_id"], result.body)["user_seq"]:
            last[result.body["user_id"]] = result.body
    accounts = [one for one in rows["accounts"] if one["user_id"] in last]
    assert len(accounts) == USERS
    for account in accounts:
        mine, total = entries.pop(account["account_id"]), 0
        assert [one["user_seq"] for one in mine] == list(range(1, len(mine) + 1))
        owed = 0
        for entry in mine:
            total += entry["amount"]
            assert entry["balance_after"] == total
            if entry["amount"] < 0:
                place = (entry["account_id"], entry["user_seq"])
                uncovered = debts.get(place, 0)
                owed += uncovered
                assert paid.pop(place, 0) + uncovered == -entry["amount"]
        assert len(mine) == 2 + ROUNDS
        assert total == 200 - sum(range(1, ROUNDS + 1))
        assert account["balance"] == total == remaining[account["account_id"]] - owed
        assert account["debt"] == owed == 0
        assert last[account["user_id"]]["balance"] == total
    assert not entries, "entries of no account"
    assert not paid, "allocations of no entry"
    assert len(rows["documents"]) == 2 * USERS
    assert {one["state"] for one in rows["operations"]} == {"closed"}


async def _tables(running: Running, shop: Merchant) -> dict[str, list[Any]]:
    admin = await asyncpg.connect(running.services.postgres_url)
    (database,) = await admin.fetch("SELECT datname FROM pg_database WHERE datname LIKE '%' || $1", shop.id)
    await admin.close()
    connection = await asyncpg.connect(running.services.database_url(database[0]))
    try:
        # One moment for all tables.
        async with connection.transaction(isolation="repeatable_read"):
            names = ("accounts", "entries", "allocations", "lots", "debts", "documents", "operations")
            return {table: await connection.fetch(f"SELECT * FROM {table}") for table in names}
    finally:
        await connection.close()
