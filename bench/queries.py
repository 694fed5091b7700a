"""Asks the queries as a caller does, and tells how long the answers took."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

from bench.ground import Ground
from console.local import prepare as make_token

QUERIES = {"balance": "balance", "ledger": "ledger?limit=50", "lots": "lots?limit=50"}
PAUSE_SECONDS = 0.05


class Caller:
    """A session with the first worker, as an operator."""

    def __init__(self, session: aiohttp.ClientSession, worker: str) -> None:
        self._session = session
        self._worker = worker

    async def ask(self, merchant: str, user: str, query: str) -> float:
        """Ask one query about a user; returns the milliseconds until the answer was read."""
        began = time.perf_counter()
        async with self._session.get(f"{self._worker}/v1/merchants/{merchant}/users/{user}/{query}") as response:
            await response.read()
            response.raise_for_status()
        return 1000 * (time.perf_counter() - began)


@asynccontextmanager
async def calling(ground: Ground) -> AsyncIterator[Caller]:
    """Open a session."""
    worker = next(line.address for line in ground.stack.status() if line.name == "worker-1")
    assert worker is not None
    token = await make_token(ground.stack.endpoints)
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session:
        yield Caller(session, worker)


@asynccontextmanager
async def asking(ground: Ground, merchant: str, users: int) -> AsyncIterator[list[float]]:
    """Ask all kinds of queries about the first users in turn while the block runs; yields the milliseconds taken."""
    took: list[float] = []

    async def ask_on(caller: Caller) -> None:
        for number, query in zip(itertools.count(), itertools.cycle(QUERIES.values()), strict=False):
            took.append(await caller.ask(merchant, f"user-{number % users}", query))
            await asyncio.sleep(PAUSE_SECONDS)

    async with calling(ground) as caller:
        task = asyncio.create_task(ask_on(caller))
        try:
            yield took
            if task.done():
                # It goes on for ever, but for an error.
                task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
