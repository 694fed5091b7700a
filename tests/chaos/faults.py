"""The kinds of faults: each breaks something, mends it again if nobody else will, and says how it went."""

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import asyncpg

from tests.chaos.cluster import SESSION_SECONDS, Cluster
from tests.chaos.generator import Ear, Load
from workers.faults import POINTS

INSIDE = POINTS[POINTS.index("after_begin") : POINTS.index("before_commit") + 1]
DATABASE = "credits_m_{}"
POINT_SECONDS_MAX = 60.0


class MissedError(Exception):
    """The moment to strike did not come, so that there was no fault."""


@dataclass
class Strike:
    """How a fault went.

    Attributes:
        what: the fault in a few words.
        inside: whether a transaction was open when it struck.
        failures: what should not have been, such as a worker that did not stop in time.
    """

    what: str
    inside: bool = False
    failures: tuple[str, ...] = ()


@dataclass
class Scene:
    """What the faults have at hand."""

    cluster: Cluster
    load: Load
    ear: Ear
    rng: random.Random
    names: list[str]
    control: Callable[[str, dict[str, object], str], Awaitable[dict[str, object]]]
    add_merchant: Callable[[], Awaitable[str]]
    probe: Callable[[list[str], float], Awaitable[float | None]]

    def worker(self) -> str:
        """Choose a worker."""
        return self.rng.choice(self.names)

    def merchant(self) -> str:
        """Choose a merchant."""
        return self.rng.choice(self.load.shops).merchant


async def connect(scene: Scene, database: str = "postgres") -> asyncpg.Connection:
    """Connect as the superuser, not through the proxy."""
    return await asyncpg.connect(scene.cluster.database_url(database), timeout=10)


_WRITERS = """
SELECT count(*) FROM pg_stat_activity
WHERE application_name = 'credits-writer' AND xact_start IS NOT NULL
    AND ($1::integer[] IS NULL OR client_port = ANY($1))
"""


async def is_inside(scene: Scene, worker: str | None = None) -> bool:
    """Tell whether a worker (or any of them) has a transaction open at this moment."""
    connection = await connect(scene)
    try:
        ports = None if worker is None else scene.cluster.server_ports(worker)
        return bool(await connection.fetchval(_WRITERS, ports))
    finally:
        await connection.close()


async def wait_inside(scene: Scene, worker: str | None = None, seconds: float = 2.0) -> bool:
    """Wait for a moment at which a transaction is open, not for long; tell whether there is one."""
    if scene.rng.random() < 0.2:
        return await is_inside(scene, worker)
    connection = await connect(scene)
    try:
        ports = None if worker is None else scene.cluster.server_ports(worker)
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while loop.time() < end:
            if await connection.fetchval(_WRITERS, ports):
                return True
            await asyncio.sleep(0.001)
        return False
    finally:
        await connection.close()


# Workers


async def freeze_inside(scene: Scene, worker: str) -> bool:
    """Stop a worker with SIGSTOP, in a transaction if possible; a frozen process shows what it was about."""
    await wait_inside(scene, worker)
    scene.cluster.send_signal(worker, signal.SIGSTOP)
    return await is_inside(scene, worker)


async def worker_kill(scene: Scene) -> Strike:
    """SIGKILL a worker; it is started again."""
    worker = scene.worker()
    inside = await freeze_inside(scene, worker)
    await asyncio.to_thread(scene.cluster.kill_worker, worker)
    return Strike(f"SIGKILL {worker}", inside)


async def all_workers_kill(scene: Scene) -> Strike:
    """SIGKILL all workers at once."""
    inside = await wait_inside(scene)
    for worker in scene.names:
        await asyncio.to_thread(scene.cluster.kill_worker, worker)
    return Strike("SIGKILL all workers", inside)


async def worker_term(scene: Scene) -> Strike:
    """SIGTERM a worker, and start it again."""
    worker = scene.worker()
    inside = await wait_inside(scene, worker)
    ended = await asyncio.to_thread(scene.cluster.leave, worker)
    scene.cluster.start_worker(worker)
    return Strike(f"SIGTERM {worker}", inside, () if ended else ("a worker did not stop by itself",))


async def worker_joins(scene: Scene) -> Strike:
    """Let a third worker come, or go."""
    known = scene.cluster.workers.get("worker-extra")
    if known is not None and known.wanted:
        ended = await asyncio.to_thread(scene.cluster.leave, "worker-extra")
        return Strike("a worker leaves", False, () if ended else ("a worker did not stop by itself",))
    scene.cluster.start_worker("worker-extra")
    return Strike("a worker joins")


async def worker_freeze(scene: Scene) -> Strike:
    """SIGSTOP a worker beyond its session, then SIGCONT: a zombie."""
    worker = scene.worker()
    inside = await freeze_inside(scene, worker)
    seconds = SESSION_SECONDS + scene.rng.uniform(1, 6)
    if scene.rng.random() < 0.3:
        # Somebody joins meanwhile, and the frozen one is waited for.
        other = next((name for name in scene.names if name != worker), worker)
        if other != worker:
            await asyncio.to_thread(scene.cluster.kill_worker, other)
    await asyncio.sleep(seconds)
    scene.cluster.send_signal(worker, signal.SIGCONT)
    if scene.rng.random() < 0.3:
        await asyncio.sleep(scene.rng.uniform(0, 0.3))
        await asyncio.to_thread(scene.cluster.kill_worker, worker)
        return Strike(f"SIGSTOP {worker} for {seconds:.0f} s, SIGCONT, SIGKILL", inside)
    return Strike(f"SIGSTOP {worker} for {seconds:.0f} s, SIGCONT", inside)


async def worker_pause(scene: Scene) -> Strike:
    """SIGSTOP a worker for a moment shorter than its session."""
    worker = scene.worker()
    inside = await freeze_inside(scene, worker)
    await asyncio.sleep(scene.rng.uniform(0.5, SESSION_SECONDS - 2))
    scene.cluster.send_signal(worker, signal.SIGCONT)
    return Strike(f"SIGSTOP {worker} for a moment", inside)


async def _at_point(scene: Scene, action: str) -> Strike:
    worker, name = scene.worker(), scene.rng.choice(POINTS)
    fault = f"{name}:{action}:{scene.rng.randint(1, 12)}"
    await asyncio.to_thread(scene.cluster.leave, worker)
    struck = scene.cluster.watch_log(worker, "fault: ")
    scene.cluster.start_worker(worker, fault)
    loop = asyncio.get_running_loop()
    end = loop.time() + POINT_SECONDS_MAX
    while not struck():
        if loop.time() > end:
            await asyncio.to_thread(scene.cluster.kill_worker, worker)
            raise MissedError(fault)
        await asyncio.sleep(0.05)
    if action == "stop":
        await asyncio.sleep(SESSION_SECONDS + scene.rng.uniform(1, 4))
        scene.cluster.send_signal(worker, signal.SIGCONT)
    if action == "hang":
        await asyncio.sleep(scene.rng.uniform(0, 3))
        if scene.rng.random() < 0.5:
            await asyncio.to_thread(scene.cluster.kill_worker, worker)
        else:
            await asyncio.to_thread(scene.cluster.leave, worker)
            scene.cluster.start_worker(worker)
    return Strike(f"{fault} in {worker}", name in INSIDE)


async def point_die(scene: Scene) -> Strike:
    """A worker dies at a named place of the pipeline."""
    return await _at_point(scene, "die")


async def point_hang(scene: Scene) -> Strike:
    """A worker hangs at a named place, and is stopped or killed."""
    return await _at_point(scene, "hang")


async def point_stop(scene: Scene) -> Strike:
    """A worker is stopped at a named place beyond its session, and goes on: a zombie that is about to write."""
    return await _at_point(scene, "stop")


async def point_raise(scene: Scene) -> Strike:
    """Trouble is raised at a named place."""
    return await _at_point(scene, "raise")


async def point_break(scene: Scene) -> Strike:
    """A defect is raised at a named place."""
    return await _at_point(scene, "break")


# Services


async def broker_kill(scene: Scene) -> Strike:
    """SIGKILL the broker, and start it again after a while."""
    inside = await wait_inside(scene)
    await asyncio.to_thread(scene.cluster.kafka.kill)
    await asyncio.sleep(scene.rng.uniform(0, 5))
    await asyncio.to_thread(scene.cluster.kafka.start)
    return Strike("SIGKILL the broker", inside)


async def postgres_kill(scene: Scene) -> Strike:
    """SIGKILL PostgreSQL, and start it again after a while."""
    inside = await wait_inside(scene)
    await asyncio.to_thread(scene.cluster.postgres.kill)
    await asyncio.sleep(scene.rng.uniform(0, 5))
    await asyncio.to_thread(scene.cluster.postgres.start)
    return Strike("SIGKILL PostgreSQL", inside)


_TERMINATE = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name LIKE 'credits-%'"


async def backend_kill(scene: Scene) -> Strike:
    """Have the server end the workers' sessions."""
    inside = await wait_inside(scene)
    connection = await connect(scene)
    count = await connection.fetchval(_TERMINATE)
    await connection.close()
    return Strike(f"{count} sessions ended by the server", inside)


async def disk_full(scene: Scene) -> Strike:
    """Fill the database's disk for a while."""
    inside = await is_inside(scene)
    await asyncio.to_thread(scene.cluster.fill_disk)
    await asyncio.sleep(scene.rng.uniform(2, 6))
    await asyncio.to_thread(scene.cluster.free_disk)
    # A server that could not write its log has given up.
    await asyncio.to_thread(scene.cluster.postgres.start)
    return Strike("the disk is full", inside)


# Connections


async def postgres_cut(scene: Scene) -> Strike:
    """Reset all connections to the databases."""
    inside = await wait_inside(scene)
    count = scene.cluster.pg_proxy.cut()
    return Strike(f"{count} database connections reset", inside)


async def commit_cut(scene: Scene) -> Strike:
    """Pass a COMMIT on, and reset its connection before the answer."""
    proxy = scene.cluster.pg_proxy
    before = proxy.cuts
    proxy.cut_after(b"COMMIT")
    loop = asyncio.get_running_loop()
    end = loop.time() + POINT_SECONDS_MAX
    while proxy.cuts == before and loop.time() < end:
        await asyncio.sleep(0.01)
    proxy.cut_after(None)
    if proxy.cuts == before:
        raise MissedError("no COMMIT came")
    return Strike("connection reset after COMMIT was sent", True)


async def postgres_refuse(scene: Scene) -> Strike:
    """Let nobody connect to the databases for a while."""
    inside = await wait_inside(scene)
    scene.cluster.pg_proxy.refuse(True)
    await asyncio.sleep(scene.rng.uniform(1, 8))
    scene.cluster.pg_proxy.refuse(False)
    return Strike("databases can't be reached", inside)


async def postgres_half_open(scene: Scene) -> Strike:
    """Let all database connections go silent, and be reset after a while."""
    inside = await wait_inside(scene)
    scene.cluster.pg_proxy.deafen()
    await asyncio.sleep(scene.rng.uniform(3, 12))
    scene.cluster.pg_proxy.cut()
    return Strike("database connections are half-open", inside)


async def postgres_slow(scene: Scene) -> Strike:
    """Slow the databases' connections down."""
    scene.cluster.pg_proxy.slow(scene.rng.uniform(0.02, 0.2), 100_000)
    await asyncio.sleep(scene.rng.uniform(3, 6))
    scene.cluster.pg_proxy.slow(0)
    return Strike("databases are slow")


async def kafka_cut(scene: Scene) -> Strike:
    """Reset all connections to the broker."""
    inside = await wait_inside(scene)
    return Strike(f"{scene.cluster.kafka_proxy.cut()} broker connections reset", inside)


async def kafka_refuse(scene: Scene) -> Strike:
    """Let no worker connect to the broker for a while."""
    inside = await wait_inside(scene)
    scene.cluster.kafka_proxy.refuse(True)
    await asyncio.sleep(scene.rng.uniform(1, 10))
    scene.cluster.kafka_proxy.refuse(False)
    return Strike("the broker can't be reached", inside)


async def kafka_half_open(scene: Scene) -> Strike:
    """Let all broker connections go silent, and be reset after a while."""
    scene.cluster.kafka_proxy.deafen()
    await asyncio.sleep(scene.rng.uniform(3, 12))
    scene.cluster.kafka_proxy.cut()
    return Strike("broker connections are half-open")


async def kafka_slow(scene: Scene) -> Strike:
    """Slow the broker's connections down."""
    scene.cluster.kafka_proxy.slow(scene.rng.uniform(0.02, 0.3), 200_000)
    await asyncio.sleep(scene.rng.uniform(3, 6))
    scene.cluster.kafka_proxy.slow(0)
    return Strike("the broker is slow")


# Merchants


def _others(scene: Scene, merchant: str) -> list[str]:
    return [shop.merchant for shop in scene.load.shops if shop.merchant != merchant]


async def merchant_away(scene: Scene) -> Strike:
    """Take one merchant's database away for a while; the others must go on."""
    merchant = scene.merchant()
    database = DATABASE.format(merchant.replace("-", "_"))
    connection = await connect(scene)
    await connection.execute(f'ALTER DATABASE "{database}" ALLOW_CONNECTIONS false')
    inside = await is_inside(scene)
    await connection.fetch("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", database)
    try:
        others = await scene.probe(_others(scene, merchant), 15)
    finally:
        await asyncio.sleep(scene.rng.uniform(0, 5))
        await connection.execute(f'ALTER DATABASE "{database}" ALLOW_CONNECTIONS true')
        await connection.close()
    failures = () if others is not None else ("other merchants stood still",)
    return Strike(f"the database of {merchant} is away", inside, failures)


async def merchant_locked(scene: Scene) -> Strike:
    """Lock a table of one merchant for a while; the others must go on."""
    merchant = scene.merchant()
    connection = await connect(scene, DATABASE.format(merchant.replace("-", "_")))
    failures: tuple[str, ...] = ()
    try:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("LOCK TABLE inbox IN ACCESS EXCLUSIVE MODE")
        if await scene.probe(_others(scene, merchant), 15) is None:
            failures = ("other merchants stood still",)
        await asyncio.sleep(scene.rng.uniform(2, 8))
        await transaction.rollback()
    finally:
        with suppress(asyncpg.PostgresError, OSError):
            await connection.close()
    return Strike(f"a table of {merchant} is locked", False, failures)


async def merchant_suspended(scene: Scene) -> Strike:
    """Suspend a merchant under load, and resume it."""
    merchant = scene.merchant()
    await scene.control("Merchant.Suspend", {"merchant_id": merchant, "justification": "chaos"}, merchant)
    await asyncio.sleep(scene.rng.uniform(1, 4))
    await scene.control("Merchant.Resume", {"merchant_id": merchant, "justification": "chaos"}, merchant)
    return Strike(f"{merchant} suspended and resumed")


async def merchant_added(scene: Scene) -> Strike:
    """Register a merchant under load."""
    return Strike(f"{await scene.add_merchant()} registered")


Kind = Callable[[Scene], Awaitable[Strike]]

# The names, and how often each comes compared with the others.
KINDS: dict[str, tuple[Kind, int]] = {
    "worker killed": (worker_kill, 6),
    "all workers killed": (all_workers_kill, 1),
    "worker stopped": (worker_term, 4),
    "worker joins or leaves": (worker_joins, 4),
    "worker frozen": (worker_freeze, 4),
    "worker paused": (worker_pause, 2),
    "death at a point": (point_die, 5),
    "hang at a point": (point_hang, 2),
    "freeze at a point": (point_stop, 4),
    "trouble at a point": (point_raise, 3),
    "defect at a point": (point_break, 3),
    "broker killed": (broker_kill, 3),
    "PostgreSQL killed": (postgres_kill, 4),
    "sessions ended": (backend_kill, 3),
    "disk full": (disk_full, 2),
    "database connections cut": (postgres_cut, 3),
    "cut after COMMIT": (commit_cut, 6),
    "database unreachable": (postgres_refuse, 2),
    "database connections half-open": (postgres_half_open, 2),
    "database slow": (postgres_slow, 1),
    "broker connections cut": (kafka_cut, 3),
    "broker unreachable": (kafka_refuse, 2),
    "broker connections half-open": (kafka_half_open, 2),
    "broker slow": (kafka_slow, 1),
    "merchant's database away": (merchant_away, 3),
    "merchant's table locked": (merchant_locked, 2),
    "merchant suspended": (merchant_suspended, 2),
    "merchant added": (merchant_added, 1),
}
