"""How figures change while a ledger grows: throughput, queries, memory; and a user with very many lots."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import asyncpg
from rich.console import Console

from bench import machine, service
from bench.figures import percentile
from bench.ground import Ground
from bench.history import Writer
from bench.limits import secret_of
from bench.queries import QUERIES, calling
from bench.scenarios import GROWTH, MANY_LOTS, ONE_LOT, Scenario
from workers.audit import verify

SHARES = (0, 0.1, 0.3, 0.6, 1)
HEAVY_SHARE = 10  # one entry in so many is of one user
HEAVY_USER = "user-0"
REQUESTS = 400
DRAINS = 3
# After a checkpoint the first change of each page writes the whole page to the WAL. So many commands touch most pages
# of the indexes of ten million entries.
WARM_UP_COMMANDS = 200_000
# A page of entries that is full at every point: a user of the empty ledger has 17 by the time of the questions.
ASKED = QUERIES | {"ledger": "ledger?limit=10"}
LOTS = 10_000
LOT_CREDITS = 1_000

Say = Callable[[str], None]
Point = dict[str, Any]


async def measure(ground: Ground, entries: int, say: Say, console: Console) -> dict[str, Any]:
    """Let a ledger grow to so many entries, a tenth of them one user's, and measure at some points on the way."""
    points: list[Point] = []
    merchant = service.merchants_of(GROWTH)[0]
    written = 0
    async with ground.serving([merchant]):
        await ground.register([merchant], GROWTH.partitions)
        await service.prepare(ground, GROWTH, [merchant])
        secret = await secret_of(ground, merchant)
        users = [f"user-{number}" for number in range(1, GROWTH.users)]
        many = Writer(ground.database_url(merchant), secret, users)
        heavy = Writer(ground.database_url(merchant), secret, [HEAVY_USER], number=10**9)
        for share in SHARES:
            missing = round(entries * share) - written
            say(f"writing {missing:,} entries behind {written:,}")
            began = time.monotonic()
            await heavy.add(missing // HEAVY_SHARE)
            await many.add(missing - missing // HEAVY_SHARE)
            written += missing
            seconds = time.monotonic() - began
            await _settle_down(ground, merchant)
            point = await _point(ground, merchant, written, f"g{len(points)}", say)
            points.append(point | {"written_per_second": round(missing / seconds) if missing else None})
            console.print(point, highlight=False)
    audited = await _audit(ground, merchant, say)
    lots = await _lots(ground, say)
    console.print(lots, highlight=False)
    return {"points": points, "lots": lots, "audit_seconds": audited, "machine": await machine.facts(ground)}


async def _audit(ground: Ground, merchant: str, say: Say) -> float:
    """Have the auditor see that the history is what commands would have written; returns the seconds it took."""
    say("auditing")
    found = await verify(ground.database_url(merchant))
    if not found.ok:
        raise ValueError(f"the ledger is not in order: {found.broken}")
    return round(found.seconds, 1)


async def _settle_down(ground: Ground, merchant: str) -> None:
    """Do at once what autovacuum and the checkpointer would do during the measurement."""
    connection = await asyncpg.connect(ground.database_url(merchant))
    await connection.execute("VACUUM ANALYZE")
    await connection.execute("CHECKPOINT")
    await connection.close()


async def _point(ground: Ground, merchant: str, entries: int, run: str, say: Say) -> Point:
    """Measure right after a checkpoint, which is the worst moment, and when most pages were written since."""
    first = await _drains(ground, merchant, f"{run}c", lambda what: say(f"{what} at {entries:,} entries, cold"))
    say(f"draining {WARM_UP_COMMANDS:,} commands at {entries:,} entries")
    await service.drain(ground, GROWTH, [merchant], service.Served(WARM_UP_COMMANDS), f"{run}w")
    served = await _drains(ground, merchant, f"{run}d", lambda what: say(f"{what} at {entries:,} entries"))
    say(f"asking at {entries:,} entries")
    asked = await _queries(ground, merchant)
    return {
        "entries": entries,
        "commands_per_second": round(served.commands_per_second),
        "after_checkpoint_per_second": round(first.commands_per_second),
        **asked,
        "worker_memory_mib": served.memory_mib,
        "cpu_us_per_command": served.cpu_us,
        "cores": served.cores,
    }


async def _drains(ground: Ground, merchant: str, run: str, say: Say) -> service.Served:
    served = service.Served(GROWTH.commands)
    for number in range(DRAINS):
        say(f"draining {number + 1} of {DRAINS}")
        await service.drain(ground, GROWTH, [merchant], served, f"{run}{number}")
    return served


async def _queries(ground: Ground, merchant: str) -> dict[str, float]:
    """Ask for the heavy user and for others in turn; return p99 and p50 of each query in milliseconds."""
    users = [HEAVY_USER, *(f"user-{number}" for number in range(1, 50))]
    told: dict[str, float] = {}
    async with calling(ground) as caller:
        for name, query in ASKED.items():
            # Every other question is about the user with the long history.
            asked = [users[0] if number % 2 else users[number % len(users)] for number in range(REQUESTS)]
            took = [await caller.ask(merchant, user, query) for user in asked]
            told[f"{name}_p50_ms"] = round(percentile(took, 50), 1)
            told[f"{name}_p99_ms"] = round(percentile(took, 99), 1)
    return told


async def _lots(ground: Ground, say: Say) -> dict[str, Any]:
    """Compare the debits of a user with one lot with those of one with 10,000."""
    rates: dict[str, Any] = {"lots": LOTS}
    for scenario in (ONE_LOT, MANY_LOTS):
        say(scenario.title)
        merchants = service.merchants_of(scenario)
        async with ground.serving(merchants):
            await ground.register(merchants, scenario.partitions)
            await _catalogue_and_lots(ground, scenario, merchants)
            served = service.Served(GROWTH.commands)
            for number in range(DRAINS):
                await service.drain(ground, scenario, merchants, served, f"l{number}")
            rates[f"{scenario.name}_commands_per_second"] = round(served.commands_per_second)
            rates[f"{scenario.name}_cpu_us"] = served.cpu_us
    return rates


async def _catalogue_and_lots(ground: Ground, scenario: Scenario, merchants: Sequence[str]) -> None:
    if scenario is MANY_LOTS:
        # Before the setup's own large lot, so that these pay first.
        writer = Writer(ground.database_url(merchants[0]), await secret_of(ground, merchants[0]), [HEAVY_USER])
        await writer.add_lots(LOTS, LOT_CREDITS)
    await service.prepare(ground, scenario, merchants)
