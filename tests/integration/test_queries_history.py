"""Balance, lots and ledger agree at every point of a generated history, and walks are whole while writers write."""

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests import builders
from tests.integration.web import Shop, open_shop
from tests.services import Services

USER = "history"
STEPS = 60


@pytest.fixture(scope="module")
async def shop(services: Services) -> AsyncIterator[Shop]:
    """Return a shop whose user has bought, spent, run into debt, been refunded, and lost credits to time."""
    async with open_shop(services, "web-history", simulated=False) as shop:
        await builders.catalogue(shop.clerk)
        await _live(shop, random.Random(20260301))
        yield shop


async def _live(shop: Shop, chance: random.Random) -> None:
    clerk = shop.clerk
    await clerk.send("User.SignedUp", {"user_id": USER})
    paid: list[str] = []
    common = {"user_id": USER, "justification": "a test", "actor": "the tests"}
    for step in range(STEPS):
        match chance.choice(["buy", "spend", "spend", "spend", "up", "down", "refund"]):
            case "buy":
                paid.append(f"pay-{step}")
                await clerk.send("Purchase.Settled", builders.purchase(USER, paid[-1]))
            case "spend":
                opened = await clerk.send(
                    "Operation.Open", {"user_id": USER, "operation_id": f"op-{step}", "operation_code": "chat"}
                )
                if opened["outcome"] == "applied":
                    await _close(shop, f"op-{step}", str(chance.randint(1, 300)), f"w{step % 3}")
            case "up":
                delta = {"credits_delta": chance.randint(1, 50), "access_period_days": 1}
                await clerk.send("Adjustment.Apply", {"adjustment_id": f"adj-{step}"} | delta | common)
            case "down":
                delta = {"credits_delta": -chance.randint(1, 150)}
                await clerk.send("Adjustment.Apply", {"adjustment_id": f"adj-{step}"} | delta | common)
            case "refund" if paid:
                refund = {
                    "refund_id": f"re-{step}",
                    "external_ref": paid.pop(0),
                    "justification": "a test",
                    "actor": "a",
                }
                await clerk.send("Refund.Apply", refund)


async def _close(shop: Shop, operation_id: str, amount: str, workflow_id: str) -> None:
    payload = {"user_id": USER, "operation_id": operation_id, "resource_amount": amount, "resource_unit": "token"}
    closed = payload | {"workflow_id": workflow_id, "completed_at": "2026-03-01T12:00:00Z"}
    assert (await shop.clerk.send("Operation.RecordAndClose", closed))["outcome"] == "applied"


async def test_the_balance_at_every_seq_is_the_sum_of_the_ledger_and_of_the_lots_less_debt(shop: Shop) -> None:
    entries = await shop.api.walk(f"/users/{USER}/ledger", limit=7)
    assert [entry["user_seq"] for entry in entries] == list(range(1, len(entries) + 1))
    assert min(entry["balance_after"] for entry in entries) < 0 < max(entry["balance_after"] for entry in entries)

    total = 0
    for seq in range(len(entries) + 1):
        total += entries[seq - 1]["amount"] if seq else 0
        balance = await shop.api.get(f"/users/{USER}/balance", as_of_seq=seq)
        lots = await shop.api.walk(f"/users/{USER}/lots", as_of_seq=seq, limit=3)
        assert balance["as_of"]["user_seq"] == seq
        assert balance["balance"] == total == sum(lot["remaining"] for lot in lots) - balance["debt"]
        assert (
            balance["spendable"] == sum(lot["remaining"] for lot in lots if lot["state"] == "active") - balance["debt"]
        )


async def test_the_present_is_the_same_whether_read_as_it_is_kept_or_as_of_the_last_seq(shop: Shop) -> None:
    last = (await shop.api.get(f"/users/{USER}/balance"))["as_of"]["user_seq"]
    for seq in (last - 1, last):
        explained = await shop.api.get(f"/users/{USER}/balance", as_of_seq=seq, explain="true")
        owed = sum(debt["uncovered"] for debt in explained["debts"])
        assert explained["debt"] == owed
        assert explained["balance"] == sum(lot["remaining"] for lot in explained["lots"]) - owed

    # The next entry moves the last seq into the past: what was read from the lots is now summed up from allocations.
    now = await shop.api.walk(f"/users/{USER}/lots", as_of_seq=last)
    await shop.clerk.send(
        "Adjustment.Apply",
        {"adjustment_id": "later", "user_id": USER, "credits_delta": -1, "justification": "x", "actor": "a"},
    )
    assert await shop.api.walk(f"/users/{USER}/lots", as_of_seq=last) == now


async def test_a_time_shows_what_was_written_until_then(shop: Shop) -> None:
    entries = await shop.api.walk(f"/users/{USER}/ledger")
    for entry in entries[::9]:
        then = await shop.api.get(f"/users/{USER}/balance", as_of=entry["created_at"])
        assert then["as_of"] == {"user_seq": entry["user_seq"], "at": entry["created_at"]}
        assert then["balance"] == entry["balance_after"]
    before = await shop.api.get(f"/users/{USER}/balance", as_of="2020-01-01T00:00:00Z")
    assert (before["balance"], before["as_of"]["user_seq"]) == (0, 0)


async def test_usage_adds_up_to_the_debits_however_it_is_grouped(shop: Shop) -> None:
    entries = await shop.api.walk(f"/users/{USER}/ledger", reason="debit")
    spent = -sum(entry["amount"] for entry in entries)
    for group_by in ("day", "workflow_id", "operation_code", "workflow_id,day"):
        rows = await shop.api.walk(f"/users/{USER}/usage", group_by=group_by, limit=1)
        assert sum(row["credits"] for row in rows) == spent
        assert sum(row["operations"] for row in rows) == len(entries)
        assert len({tuple(row.get(name) for name in group_by.split(",")) for row in rows}) == len(rows)
    by_workflow = {
        row["workflow_id"]: row for row in await shop.api.walk(f"/users/{USER}/usage", group_by="workflow_id")
    }
    of_one = await shop.api.walk(f"/users/{USER}/ledger", workflow_id="w1")
    assert by_workflow["w1"]["credits"] == -sum(entry["amount"] for entry in of_one)
    (alone,) = await shop.api.walk(f"/users/{USER}/usage", operation_id=of_one[0]["operation_id"])
    assert (alone["operations"], alone["credits"]) == (1, -of_one[0]["amount"])


async def test_every_entry_can_be_explained_and_what_paid_it_adds_up(shop: Shop) -> None:
    for entry in await shop.api.walk(f"/users/{USER}/ledger"):
        told = await shop.api.get(f"/users/{USER}/ledger/{entry['entry_id']}/explain")
        assert told["command"]["source"] == "test"
        if entry["amount"] < 0:
            assert sum(source["credits"] for source in told["paid_by"]) + told["uncovered"] == -entry["amount"]
        else:
            assert told["lot"]["credits"] == entry["amount"]
            assert sum(use["credits"] for use in told["spent_on"]) == entry["amount"] - told["lot"]["remaining"]
        if entry["reason"] == "debit":
            assert told["operation"]["entry_id"] == entry["entry_id"]
        if entry["reason"] in ("purchase", "refund"):
            assert told["receipt_number"] == told["purchase"]["receipt_number"]


async def test_a_walk_while_entries_are_written_gives_every_row_once_and_one_moment(shop: Shop) -> None:
    before = (await shop.api.get(f"/users/{USER}/balance"))["as_of"]["user_seq"]
    stop = asyncio.Event()

    async def write() -> int:
        written = 0
        while not stop.is_set():
            written += 1
            delta = {"adjustment_id": f"while-{written}", "credits_delta": 1, "access_period_days": 1}
            await shop.clerk.send("Adjustment.Apply", delta | {"user_id": USER, "justification": "x", "actor": "a"})
        return written

    writer = asyncio.create_task(write())
    try:
        pages = [page async for page in _pages(shop, f"/users/{USER}/ledger", limit=3)]
        lots = [page async for page in _pages(shop, f"/users/{USER}/lots", limit=3)]
    finally:
        stop.set()
        written = await writer
    assert written > 5
    for walk in (pages, lots):
        assert len({page["as_of"]["user_seq"] for page in walk}) == 1
        seqs = [item["user_seq"] for page in walk for item in page["items"]]
        assert len(seqs) == len(set(seqs))
    seqs = [item["user_seq"] for page in pages for item in page["items"]]
    assert seqs == list(range(1, pages[0]["as_of"]["user_seq"] + 1))
    assert len(seqs) >= before
    then = await shop.api.get(f"/users/{USER}/balance", as_of_seq=lots[0]["as_of"]["user_seq"])
    assert sum(item["remaining"] for page in lots for item in page["items"]) == then["balance"] + then["debt"]


async def _pages(shop: Shop, path: str, **query: Any) -> AsyncIterator[Any]:
    cursor: dict[str, str] = {}
    while True:
        page = await shop.api.get(path, **query, **cursor)
        yield page
        if "next_cursor" not in page:
            return
        cursor = {"cursor": page["next_cursor"]}


async def test_merchant_wide_lists_are_walked_whole_at_any_page_size(shop: Shop) -> None:
    for path in ("/operations", "/purchases", "/products", "/operation-types", f"/users/{USER}/receipts"):
        whole = await shop.api.walk(path)
        assert whole
        assert await shop.api.walk(path, limit=1) == whole, path
        assert await shop.api.walk(path, limit=2) == whole, path
