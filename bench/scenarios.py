"""What is measured: for each scenario the merchants, what is there before, and the commands. No clock but in `now`."""

import bisect
import csv
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import orjson

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "urn:bench"
TRACE_FILE = "llm_usage_code.csv"
TRACE_USERS = 2_000
ZIPF_EXPONENT = 1.1
CREDITS = 1_000_000_000

CONFIG = {
    "legal_name": "Bench LLC",
    "registered_address": {"lines": ["1 Main Street"], "city": "Yerevan", "country": "AM"},
    "country": "AM",
    "time_zone": "Asia/Yerevan",
    "locale": "en",
    "contact_email": "bench@example.com",
    "tax_regime": "vat",
    "vat_rates": [{"country": "*", "rate": "20"}],
    "receipt_series_prefix": "R",
    "credit_note_series_prefix": "CN",
    "retention_years": 5,
}


class Command(NamedTuple):
    """One message: its channel names the topic, its key chooses the partition."""

    channel: str
    type: str
    id: str
    key: str
    value: bytes


@dataclass(frozen=True)
class Scenario:
    """One line of the table.

    Attributes:
        commands: of all merchants together, in a full run.
        users: of all merchants together.
        make: returns the commands of one merchant, without an end.
        workers: processes that serve it; as many as the run has, if None.
    """

    name: str
    title: str
    make: Callable[["Scenario", str, int], Iterator[Command]]
    merchants: int = 1
    partitions: int = 4
    commands: int = 60_000
    users: int = 10_000
    receipts: bool = False
    workers: int | None = None

    @property
    def users_each(self) -> int:
        """Users of one merchant."""
        return max(1, self.users // self.merchants)


def now() -> str:
    """Return the moment as messages have it."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def setup(scenario: Scenario) -> Iterator[Command]:
    """Return what a merchant has before: the catalogue, and credits for each user (of a scenario without purchases)."""
    if scenario.receipts:
        yield _admin("Product.Create", "p100", _PRODUCT)
        return
    yield _admin("OperationType.CreateWithArchival", "llm", _OPERATION_TYPE)
    for user in range(scenario.users_each):
        grant = {"grant_id": f"grant-{user}", "user_id": f"user-{user}", "credits": CREDITS, "access_period_days": 365}
        yield _admin("Grant.Apply", f"user-{user}", grant | {"justification": "credits to begin with"})


_PRODUCT = {
    "product_code": "p100",
    "title": "100 credits",
    "credits": 100,
    "access_period_days": 90,
    "distribution": "sellable",
    "prices": [{"country": "*", "currency": "USD", "amount": "10.00"}],
}
_OPERATION_TYPE = {
    "operation_code": "llm",
    "display_name": "Completion",
    "resource_unit": "TOKEN",
    "credits_per_unit": "0.01",
}


def _admin(command_type: str, key: str, members: dict[str, Any]) -> Command:
    value = orjson.dumps(members | {"actor": "bench"})
    return Command("admin", command_type, f"setup-{command_type}-{key}", key, value)


def operations(scenario: Scenario, run: str, first: int) -> Iterator[Command]:
    """Open and close operations of one user after the other."""
    for number in itertools.count(first):
        yield from _operation(run, number, f"user-{number % scenario.users_each}", "1234")


def trace(_scenario: Scenario, run: str, first: int) -> Iterator[Command]:
    """Open and close the operations of the real trace, over and over; a few users have most of them."""
    tokens = _trace_tokens()
    for number in itertools.count(first):
        yield from _operation(run, number, f"user-{zipf_user(number)}", tokens[number % len(tokens)])


def message_id(run: str, kind: str, number: int) -> str:
    """Name something by a UUIDv7 of the moment, as an application does; its last part begins with the run's mark."""
    at = (time.time_ns() // 1_000_000).to_bytes(6).hex()
    rest = blake2b(f"{run} {kind} {number}".encode(), digest_size=7).hexdigest()
    return f"{at[:8]}-{at[8:]}-7{rest[:3]}-a{rest[3:6]}-{mark(run)}{rest[6:]}"


@cache
def mark(run: str) -> str:
    """Return the four hexadecimal digits that tell a run's ids from those of others."""
    return blake2b(run.encode(), digest_size=2).hexdigest()


def _operation(run: str, number: int, user: str, resource_amount: str) -> tuple[Command, Command]:
    operation = message_id(run, "operation", number)
    opened = {"user_id": user, "operation_id": operation, "operation_code": "llm", "workflow_id": f"wf-{number // 8}"}
    closed = {
        "user_id": user,
        "operation_id": operation,
        "resource_amount": resource_amount,
        "resource_unit": "TOKEN",
        "completed_at": now(),
    }
    return (
        Command("operations", "Operation.Open", message_id(run, "open", number), user, orjson.dumps(opened)),
        Command("operations", "Operation.RecordAndClose", message_id(run, "close", number), user, orjson.dumps(closed)),
    )


def purchases(scenario: Scenario, run: str, first: int) -> Iterator[Command]:
    """Settle purchases, each with a buyer block and so a receipt."""
    for number in itertools.count(first):
        user, at = f"user-{number % scenario.users_each}", now()
        members = {
            "user_id": user,
            "external_ref": f"ch_{run}_{number:012d}",
            "product_code": "p100",
            "payment_method": "card",
            "order_placed_at": at,
            "settled_at": at,
            "pricing_snapshot": {"country": "AM", "amount": "10.00", "currency": "USD"},
            "buyer": {"name": "Ani Petrosyan", "email": f"{user}@example.com", "country": "AM"},
        }
        yield Command("purchases", "Purchase.Settled", message_id(run, "buy", number), user, orjson.dumps(members))


@cache
def _trace_tokens() -> list[str]:
    file = Path(os.environ.get("CREDITS_BENCH_TRACE") or ROOT / "console" / "data" / TRACE_FILE)
    with file.open(newline="") as rows:
        return [str(int(row["ContextTokens"]) + int(row["GeneratedTokens"])) for row in csv.DictReader(rows)]


@cache
def _zipf_shares() -> list[float]:
    """Return for each user, most active first, the share of all calls that it and those before it make."""
    weights = [1 / (rank + 1) ** ZIPF_EXPONENT for rank in range(TRACE_USERS)]
    total = sum(weights)
    return [running / total for running in itertools.accumulate(weights)]


def zipf_user(number: int) -> int:
    """Choose the user of a call by a hash of its number: the same one each time."""
    digest = blake2b(number.to_bytes(8, "big"), digest_size=8).digest()
    share = int.from_bytes(digest, "big") / 2**64
    return min(bisect.bisect_left(_zipf_shares(), share), TRACE_USERS - 1)


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("many_users", "many users", operations),
        Scenario("many_users_2_workers", "many users, 2 workers", operations, workers=2),
        Scenario("hot_user", "one hot user", operations, users=1),
        Scenario("merchants_1", "1 merchant", operations, partitions=1),
        Scenario("merchants_10", "10 merchants", operations, merchants=10, partitions=1, commands=100_000),
        Scenario("merchants_100", "100 merchants", operations, merchants=100, partitions=1, commands=200_000),
        Scenario("purchases", "purchases with receipts", purchases, receipts=True, commands=30_000),
        Scenario("real_trace", "real trace", trace, users=TRACE_USERS),
    )
}

# Not in the table: for `--growth` and `--startup`.
GROWTH = Scenario("growth", "a growing ledger", operations, commands=20_000)
ONE_LOT = Scenario("one_lot", "a user with one lot", operations, users=1, commands=20_000)
MANY_LOTS = Scenario("many_lots", "a user with many lots", operations, users=1, commands=20_000)
STARTUP = Scenario("startup", "a start", operations, merchants=300, partitions=1, commands=30_000, users=3_000)
ALL = SCENARIOS | {scenario.name: scenario for scenario in (GROWTH, ONE_LOT, MANY_LOTS, STARTUP)}
