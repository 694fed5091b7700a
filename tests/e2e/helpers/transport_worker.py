"""A worker process with a trivial handler, told by environment variables what to do; see test_transport.py."""

import asyncio
import json
import os
import random
from pathlib import Path
from typing import Any

from aiohttp import web

from workers.app import App, create_app, run_worker
from workers.lanes import TP, Lease, Outcome, Record
from workers.logs import configure_logging
from workers.settings import WorkerSettings

FOLDER = Path(os.environ["TEST_FOLDER"])
NAME = os.environ["TEST_NAME"]


class Recorder:
    """Appends a line per record to a file, then commits; some merchants get a special treatment."""

    def __init__(self) -> None:
        self.file = (FOLDER / f"{NAME}.records").open("a", buffering=1)
        self.sought: set[TP] = set()
        self.counted: dict[TP, int] = {}

    async def process(self, merchant: str, records: list[Record], lease: Lease) -> Outcome:
        commit = {TP(r.topic, r.partition): r.offset + 1 for r in records}
        if merchant.startswith("fast"):
            return Outcome(commit)
        if merchant.startswith("slow") and any(r.value == b"block" for r in records):
            await asyncio.sleep(float(os.environ.get("TEST_BLOCK_SECONDS", "20")))
        if merchant.startswith("drain"):
            await asyncio.sleep(2)
        lines = [[r.topic, r.partition, r.offset, (r.value or b"").decode(), r.timestamp] for r in records]
        self.file.write("".join(json.dumps([merchant, lease.generation, len(records), *line]) + "\n" for line in lines))
        if merchant.startswith("chaos"):
            return await self.misbehave(commit)
        if merchant.startswith("seek"):
            return self.seek_once(commit, lease)
        return Outcome(commit)

    def seek_once(self, commit: dict[TP, int], lease: Lease) -> Outcome:
        """Ask for everything from offset 5 again, once for each partition, when it has gone past offset 20."""
        back = {tp: 5 for tp, offset in commit.items() if offset > 20 and tp not in self.sought}
        self.sought |= back.keys()
        return Outcome({tp: offset for tp, offset in commit.items() if tp not in back}, back)

    async def misbehave(self, commit: dict[TP, int]) -> Outcome:
        """Take some time, and go back a little now and then."""
        await asyncio.sleep(random.choice([0, 0, 0.001, 0.01, 0.1]))
        if random.random() > 0.1:
            return Outcome(commit)
        back = {tp: max(0, offset - random.randrange(300)) for tp, offset in commit.items() if random.random() < 0.5}
        for tp, offset in back.items():
            self.file.write(json.dumps({"seek": [tp.topic, tp.partition, offset]}) + "\n")
        return Outcome({tp: offset for tp, offset in commit.items() if tp not in back}, back)

    async def idle(self, merchant: str, partitions: set[TP], lease: Lease) -> None:
        if not merchant.startswith("fast"):
            line = {"idle": merchant, "partitions": len(partitions), "first": len(lease.first & partitions)}
            (FOLDER / f"{NAME}.idle").open("a").write(json.dumps(line) + "\n")


def mount(app: App, server: web.Application) -> None:
    async def state(_: web.Request) -> web.Response:
        it = app.state_of_worker
        body: dict[str, Any] = {
            "ready": it.ready,
            "assigned": {merchant: len(tps) for merchant, tps in it.assigned.items()},
            "lag": sum(it.lag.values()),
            "lag_by_topic": {f"{tp.topic}/{tp.partition}": lag for tp, lag in it.lag.items() if lag},
            "counters": vars(it.counters),
        }
        return web.json_response(body)

    server.router.add_get("/state", state)


def main() -> None:
    configure_logging()

    async def merchants() -> dict[str, list[str]]:
        held = json.loads(file.read_text()) if (file := FOLDER / "held.json").exists() else []
        listed: dict[str, list[str]] = json.loads((FOLDER / "merchants.json").read_text())
        for merchant in listed:
            (app.state_of_worker.hold if merchant in held else app.state_of_worker.release)(merchant)
        return listed

    app: App = create_app(
        WorkerSettings.from_env(), Recorder(), merchants=merchants, web_setup=lambda server: mount(app, server)
    )
    run_worker(app)


if __name__ == "__main__":
    main()
