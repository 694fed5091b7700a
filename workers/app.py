"""The Faust app of a worker: one agent a merchant, feeding that merchant's lane."""

import asyncio
import contextlib
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import structlog
from aiohttp import web

from workers import faults
from workers.lanes import TP, Counters, Handler, LaneOptions, Lanes, Lease
from workers.logs import die_with
from workers.settings import WorkerSettings
from workers.transport import BaseApp, ConsumerFeed, Report, Watch, Worker

log = structlog.get_logger(__name__)

REVOKE_SECONDS_MAX = 8.0
DRAIN_SECONDS_MAX = 20.0
# From the signal to the end of the process, whatever hangs.
STOP_SECONDS_MAX = 28.0
# For the rest of it once everything is drained: connections to a broker that is away close badly.
CLOSE_SECONDS_MAX = 5.0

Merchants = Callable[[], Awaitable[Mapping[str, list[str]]]]
Hook = Callable[[], Awaitable[None]]


async def _nothing() -> None:
    """Do nothing."""


@dataclass
class State:
    """What others may know of the worker, for `/readyz` and metrics.

    Attributes:
        worker_id: of this process, new at each start.
        counters: what happened since the start.
        lanes: None before the start.
        report: returns what the consumer last said of itself.
    """

    worker_id: str
    counters: Counters = field(default_factory=Counters)
    lanes: Lanes | None = None
    report: Callable[[], Report] = Report

    @property
    def lease(self) -> Lease | None:
        """The lease on the current assignment, None during a rebalance."""
        return None if self.lanes is None else self.lanes.lease

    @property
    def assigned(self) -> dict[str, set[TP]]:
        """The partitions of each merchant that this worker owns now."""
        return {} if self.lanes is None else self.lanes.assigned()

    @property
    def ready(self) -> bool:
        """Whether the worker has an assignment, possibly an empty one, and the coordinator of the group is known."""
        return self.lease is not None and self.lease.alive() and self.report().coordinator_known

    @property
    def lag(self) -> dict[TP, int]:
        """Records that are not committed yet, by partition; at most a second old."""
        return self.report().lag

    def hold(self, merchant: str) -> None:
        """Work on nothing more of a merchant; nothing is lost."""
        if self.lanes is not None:
            self.lanes.hold(merchant)

    def release(self, merchant: str) -> None:
        """Go on after a hold; without one, do nothing."""
        if self.lanes is not None:
            self.lanes.release(merchant)


class App(BaseApp):
    """A worker; made by `create_app`, run by `run_worker`."""

    def __init__(
        self,
        settings: WorkerSettings,
        handler: Handler,
        *,
        merchants: Merchants,
        on_start: Hook,
        on_stop: Hook,
        web_setup: Callable[[web.Application], None],
    ) -> None:
        super().__init__(settings)
        self.state_of_worker = State(f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
        self.drained = False
        self._handler = handler
        self._merchants = merchants
        self._start_hook = on_start
        self._stop_hook = on_stop
        self._web_setup: Callable[[web.Application], None] | None = web_setup
        self._known: dict[str, set[str]] = {}
        self._background: list[asyncio.Task[None]] = []
        self.on_before_shutdown.connect(self._drain)

    @property
    def lanes(self) -> Lanes:
        """The lanes; only after the start."""
        assert self.state_of_worker.lanes is not None
        return self.state_of_worker.lanes

    async def on_start(self) -> None:
        """Start what the agents need, then the agents of all merchants known now."""
        await self._start_hook()
        settings, state = self.settings, self.state_of_worker
        state.lanes = Lanes(
            self._handler,
            ConsumerFeed(self),
            worker_id=state.worker_id,
            options=LaneOptions(batch_max=settings.batch_max, linger=settings.linger_ms / 1000),
            concurrency=settings.concurrency,
            counters=state.counters,
        )
        await self._add(await self._merchants())
        if not self._known:
            raise RuntimeError("there is no topic to consume")
        watch = Watch(self, lambda: state.lease, lambda: set().union(*self._known.values()))
        state.report = lambda: watch.report
        self._background = [
            asyncio.create_task(watch.run(), name="watch"),
            asyncio.create_task(self._look_for_merchants(), name="merchants"),
        ]
        for task in self._background:
            die_with(task)
        await super().on_start()

    async def _add(self, merchants: Mapping[str, list[str]]) -> None:
        """Make lanes and agents of the merchants that have none. One that is gone keeps its own until a restart."""
        for merchant, topics in merchants.items():
            if merchant not in self._known:
                self._known[merchant] = set(topics)
                await self.feed_lane(self.lanes.add(merchant, topics))

    async def _look_for_merchants(self) -> None:
        """Poll for new merchants, at the same moments as all workers do, so that they rebalance together."""
        period = self.settings.merchants_poll
        while True:
            await asyncio.sleep(period - time.time() % period)
            try:
                await self._add(await self._merchants())
            except Exception as error:
                # The registry may be away for a while; known merchants are served meanwhile.
                log.warning("new merchants can't be looked for", error=repr(error))

    def open_lease(self, generation: int, partitions: set[TP], token: object) -> None:
        """Begin to work on an assignment."""
        self.lanes.open(generation, partitions, token)
        log.info("assigned", generation=generation, partitions=len(partitions))

    async def close_lease(self) -> None:
        """Let go of the assignment; the rebalance waits for it."""
        if not await self.lanes.close(REVOKE_SECONDS_MAX):
            log.warning("work was still under way when partitions were revoked")

    def lose_lease(self) -> None:
        """Begin nothing more: the assignment is gone while the process stops."""
        if lease := self.lanes.lease:
            lease.end()

    async def on_stop(self) -> None:
        """Drain, then stop; also after a crash it must come to an end."""
        self.end_in(STOP_SECONDS_MAX)
        await super().on_stop()

    def end_in(self, seconds: float) -> None:
        """End the process after a time, unless it has ended by itself."""
        timer = threading.Timer(seconds, self._end)
        timer.daemon = True
        timer.start()

    def _end(self) -> None:
        sys.stderr.flush()
        os._exit(0 if self.drained and not self.crashed else 1)

    async def _drain(self, *_: Any, **__: Any) -> None:
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        lanes = self.state_of_worker.lanes
        self.drained = lanes is None or await lanes.stop(DRAIN_SECONDS_MAX)
        self.end_in(CLOSE_SECONDS_MAX)
        log.info("drained" if self.drained else "work was still under way at the end", drained=self.drained)

    async def on_shutdown(self) -> None:
        """Stop what the handler needed, after everything else."""
        await super().on_shutdown()
        await self._stop_hook()

    def on_webserver_init(self, faust_web: Any) -> None:
        """Mount our routes; Faust calls this more than once."""
        setup, self._web_setup = self._web_setup, None
        if setup is not None:
            setup(faust_web.web_app)


def create_app(
    settings: WorkerSettings,
    handler: Handler,
    *,
    merchants: Merchants,
    on_start: Hook = _nothing,
    on_stop: Hook = _nothing,
    web_setup: Callable[[web.Application], None] = lambda _: None,
) -> App:
    """Return the Faust app of a worker; what it has to tell is in its `state_of_worker`.

    Args:
        settings: of the process.
        handler: works on the records.
        merchants: returns the input topics by merchant, "" standing for those of no merchant. Asked at the start, where
            it may raise to end the process, and every few seconds.
        on_start: called before anything is consumed.
        on_stop: called when nothing is under way any more.
        web_setup: mounts routes and middlewares on the web server's application.
    """
    with contextlib.suppress(RuntimeError):
        asyncio.get_running_loop()
        raise AssertionError("a worker runs its own event loop")
    asyncio.set_event_loop(_new_event_loop())
    return App(settings, handler, merchants=merchants, on_start=on_start, on_stop=on_stop, web_setup=web_setup)


def _new_event_loop() -> asyncio.AbstractEventLoop:
    """Return uvloop's event loop if it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def run_worker(app: App) -> NoReturn:
    """Run the worker until SIGTERM or SIGINT, and end the process.

    The exit code is 0 after a stop in which everything under way was finished, else 1. It takes at most half a minute,
    also when the broker is away.
    """
    faults.enable_from_env()
    Worker(
        app, on_signal=partial(app.end_in, STOP_SECONDS_MAX), loop=asyncio.get_event_loop()
    ).execute_from_commandline()
