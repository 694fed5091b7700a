"""The demo's second act: a year in the life of one merchant, on a test clock that is moved by command."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from console.client import Client
from console.demo_data import ACTOR, Command, justified, purchase, sellable, welcome
from schemas.canonical import format_time

STEPS = 24
STEP = timedelta(days=15)
USER = "ann"
RATE = {
    "operation_code": "chat",
    "display_name": "Chat",
    "resource_unit": "TOKEN",
    "credits_per_unit": "0.01",
    "actor": ACTOR,
}


@dataclass
class Year:
    """What happened: when it began and ended, and the events worth a mark, by one letter each."""

    start: datetime
    now: datetime
    marks: dict[str, datetime] = field(default_factory=dict)
    legend: list[str] = field(default_factory=list)

    def note(self, what: str) -> None:
        """Mark an event at the merchant's present."""
        letter = "abcdefghijklmnopqrstuvwxyz"[len(self.marks)]
        self.marks[letter] = self.now
        self.legend.append(f"[bold]{letter}[/bold] {what}")


def opening() -> Iterator[Command]:
    """Define what is for sale."""
    yield welcome(300, 60)
    yield sellable("pack", "1,000 credits", 1000, 90, "10.00", "USD")
    yield "OperationType.CreateWithArchival", RATE


def events(step: int, year: Year) -> Iterator[Command]:
    """Give the commands of one half of a month, noting on the way what is worth a mark."""
    at = format_time(year.now)
    buy = purchase(USER, f"order-{step}", "pack", ("US", "10.00", "USD"), at)
    match step:
        case 0:
            year.note("signs up: 300 welcome credits")
            yield "User.SignedUp", {"user_id": USER}
        case 1 | 3 | 12 | 20:
            year.note("buys 1,000 credits")
            yield buy
        case 4:
            year.note("a refund of 4.00 of 10.00")
            refund = {"refund_id": "refund-1", "external_ref": "order-3", "amount": "4.00"}
            yield "Refund.Apply", refund | justified("half of it was a mistake")
        case 6:
            year.note("a dearer rate is announced, for a month later")
            rate = RATE | {"credits_per_unit": "0.015", "effective_at": format_time(year.now + 2 * STEP)}
            yield "OperationType.CreateWithArchival", rate
        case 13:
            year.note("a chargeback takes the purchase back")
            yield "Chargeback.Apply", {"dispute_id": "dispute-1", "external_ref": "order-12"} | justified("disputed")
        case 16:
            year.note("the dispute is won: its credits are back")
            yield "Chargeback.Reverse", {"dispute_id": "dispute-1"} | justified("the bank agreed")
        case 18:
            year.note("an adjustment of 200 for an outage")
            adjustment = {"adjustment_id": "outage-1", "user_id": USER, "credits_delta": 200, "access_period_days": 30}
            yield "Adjustment.Apply", adjustment | justified("the service was down")
    names = {"user_id": USER, "operation_id": f"chat-{step}"}
    yield "Operation.Open", names | {"operation_code": "chat"}
    tokens = 60_000 if step == 19 else 4_000 + 1_500 * (step % 5)
    used = {"resource_amount": str(tokens), "resource_unit": "TOKEN", "completed_at": at}
    yield "Operation.RecordAndClose", names | used


async def live(client: Client, merchant: str, start: datetime, progress: Callable[[], None]) -> Year:
    """Let the year pass; each command waits for the one before it, and time moves when all is quiet."""
    year = Year(start, start)
    for command in opening():
        await client.call(merchant, *command)
    for step in range(STEPS):
        for command in events(step, year):
            await client.call(merchant, *command)
        progress()
        await _advance(client, merchant, year)
    return year


async def _advance(client: Client, merchant: str, year: Year) -> None:
    seconds = STEP // timedelta(seconds=1)
    payload = {"merchant_id": merchant, "seconds": seconds, "actor": ACTOR}
    result = await client.call(None, "Clock.Advance", payload)
    year.now = datetime.fromisoformat(result["effects"]["now"])
