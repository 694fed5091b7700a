"""A campaign: services, workers and load, one fault after the other, and the judge at the end."""

import asyncio
import itertools
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from tests.chaos.cluster import Cluster
from tests.chaos.faults import KINDS, MissedError, Scene, Strike
from tests.chaos.generator import CONFIG, PARTITIONS, PRODUCTS, RATES, UNITS, Ear, Json, Load, command
from tests.chaos.judging import NoVerdictError, ask_judge
from tests.chaos.points import ZOMBIE_POINTS, Points, all_cases, run_cases

RECOVERY_SECONDS_MAX = 120.0
SETTLE_SECONDS_MAX = 150.0
MERCHANTS_ADDED_MAX = 4
GROUP = "credits"


@dataclass(frozen=True)
class Plan:
    """What a campaign does; the same seed gives the same sequence of faults and commands, not the same timing."""

    faults: int = 200
    seed: int = 1
    minutes: float = 40.0
    workers: int = 2
    merchants: int = 2
    kinds: tuple[str, ...] = tuple(KINDS)
    environment: dict[str, str] = field(default_factory=dict)
    skip: int = 0
    points: int | None = None  # so many crash points, all of them by default


@dataclass
class Report:
    """What a campaign found."""

    strikes: list[tuple[str, Strike, float | None]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    exits: list[tuple[str, str]] = field(default_factory=list)
    vain_starts: int = 0
    missed: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    sent: int = 0
    aborted: int = 0
    judged: Json = field(default_factory=dict)
    points: int = 0
    points_judged: Json = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing was lost or doubled, and everything recovered."""
        return not (self.failures or self.judged.get("findings") or self.points_judged.get("findings"))

    def as_json(self, plan: Plan) -> Json:
        """Return the figures."""
        kinds = Counter(kind for kind, _, _ in self.strikes)
        times: dict[str, list[float]] = defaultdict(list)
        for kind, _, seconds in self.strikes:
            if seconds is not None:
                times[kind].append(seconds)
        judged = self.judged
        return {
            "ok": self.ok,
            "faults": len(self.strikes),
            "kinds": len(kinds),
            "commands": judged.get("commands", 0),
            "lost": judged.get("lost", 0) + judged.get("unanswered", 0),
            "applied_twice": judged.get("applied_twice", 0),
            "results_repeated": judged.get("results_repeated", 0),
            "inside_transaction": sum(strike.inside for _, strike, _ in self.strikes),
            "seed": plan.seed,
            "bound": round(3 / max(1, len(self.strikes)), 4),
            "seconds": round(self.seconds),
            "deliveries": judged.get("deliveries", 0),
            "aborted_messages": judged.get("aborted_seen", 0),
            "faults_by_kind": dict(sorted(kinds.items())),
            "inside_by_kind": dict(Counter(kind for kind, strike, _ in self.strikes if strike.inside)),
            "recovery_seconds": {
                kind: {"median": round(median(found), 1), "max": round(max(found), 1)}
                for kind, found in sorted(times.items())
            },
            "skipped": self.skipped,
            "unplanned_exits": [{"during": during, "log": log} for during, log in self.exits],
            "missed": self.missed,
            "vain_starts": self.vain_starts,
            "failures": self.failures,
            "judge": judged,
            "crash_points": self.points,
            "crash_points_judge": self.points_judged,
        }


class Campaign:
    """Runs a plan in a folder.

    Args:
        plan: what to do.
        root: gets `.credits`.
        jars: the folder of the downloaded Kafka.
        say: is told what happens.
    """

    def __init__(self, plan: Plan, root: Path, jars: Path, say: Callable[[str, int], None]) -> None:
        self.plan = plan
        self.cluster = Cluster(root, jars, plan.environment)
        self.report = Report()
        self._say = say
        self._rng = random.Random(plan.seed)
        self._numbers = itertools.count()
        self._now = "start"
        self._added = 0

    async def run(self) -> Report:
        """Run it all; the services are stopped in any case."""
        began = time.monotonic()
        try:
            await self._start()
            await self._strike_all(began)
            await self._end()
            await self._run_points()
        finally:
            await asyncio.to_thread(self.cluster.stop)
            self.report.seconds = time.monotonic() - began
        return self.report

    async def _start(self) -> None:
        cluster, plan = self.cluster, self.plan
        kinds = list(plan.kinds)
        if "disk full" in kinds and (reason := await asyncio.to_thread(cluster.make_disk)):
            kinds.remove("disk full")
            self.report.skipped["disk full"] = reason
        self._kinds = kinds
        await asyncio.to_thread(cluster.start)
        self._load = Load(cluster.bootstrap_servers, plan.seed)
        self._ear = Ear(cluster.bootstrap_servers)
        names = [f"worker-{n + 1}" for n in range(plan.workers)]
        for name in names:
            cluster.start_worker(name)
        self._carer = asyncio.create_task(self._look_after())
        self._scene = Scene(
            cluster, self._load, self._ear, self._rng, names, self._control, self._add_merchant, self._probe
        )
        await self._topics_are_there()
        await self._ear.start()
        await self._load.start_producer()
        for _ in range(plan.merchants):
            await self._register()
        self._load.start()

    async def _topics_are_there(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + 60
        while loop.time() < end:
            admin = AIOKafkaAdminClient(bootstrap_servers=self.cluster.bootstrap_servers)
            await admin.start()
            topics = await admin.list_topics()
            await admin.close()
            if {"credits.control", "credits.control.results"} <= set(topics):
                return
            await asyncio.sleep(0.2)
        raise AssertionError(f"no worker made the topics: {[e.log for e in self.cluster.exits]}")

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(0.2)
            await asyncio.to_thread(self.cluster.look_after)
            for gone in self.cluster.exits:
                if gone.served:
                    self.report.exits.append((self._now, gone.log))
                    self._say(f"[yellow]{gone.worker} ended by itself[/yellow]", 0)
                else:
                    self.report.vain_starts += 1
            self.cluster.exits.clear()

    # Commands of our own

    async def _ask(self, type_: str, payload: Json, merchant: str, key: str, seconds: float) -> Json:
        """Send a command until it is answered."""
        message_id = f"own-{next(self._numbers)}"
        answer = self._ear.expect(message_id)
        await self._load.send(command(merchant, type_, payload, message_id, key))
        async with asyncio.timeout(seconds):
            return await answer

    async def _control(self, type_: str, payload: Json, key: str) -> Json:
        return await self._ask(type_, payload | {"actor": "chaos"}, "", key, RECOVERY_SECONDS_MAX)

    async def _register(self) -> str:
        merchant = f"chaos{len(self._load.shops) + 1}"
        payload = {"merchant_id": merchant, "config": CONFIG, "partitions": PARTITIONS}
        answer = await self._control("Merchant.Register", payload, merchant)
        assert answer["outcome"] == "applied", answer
        self._ear.listen(f"credits.{merchant}.results")
        asked = []
        for code, (credits, amount) in PRODUCTS.items():
            prices = [{"country": "*", "currency": "USD", "amount": amount}]
            product = {"product_code": code, "title": code, "credits": credits, "access_period_days": 30}
            product |= {"distribution": "sellable", "prices": prices, "actor": "chaos"}
            asked.append(self._ask("Product.Create", product, merchant, code, RECOVERY_SECONDS_MAX))
        welcome = {"product_code": "welcome", "title": "Welcome", "credits": 5, "access_period_days": 30}
        welcome |= {"distribution": "grant", "grant_policy": "apply_on_signup", "actor": "chaos"}
        asked.append(self._ask("Product.Create", welcome, merchant, "welcome", RECOVERY_SECONDS_MAX))
        for code, rate in RATES.items():
            rated = {"operation_code": code, "display_name": code, "resource_unit": UNITS[code]}
            rated |= {"credits_per_unit": rate, "actor": "chaos"}
            asked.append(self._ask("OperationType.CreateWithArchival", rated, merchant, code, RECOVERY_SECONDS_MAX))
        answers = await asyncio.gather(*asked)
        assert all(one["outcome"] == "applied" for one in answers), answers
        self._load.add(merchant)
        return merchant

    async def _add_merchant(self) -> str:
        if self._added >= MERCHANTS_ADDED_MAX:
            return "no more merchants are"
        self._added += 1
        return await self._register()

    async def _probe(self, merchants: list[str], seconds: float) -> float | None:
        """Return after how many seconds every input partition was answered, None if it takes too long."""
        began = time.monotonic()
        answers = []
        for merchant in merchants:
            for partition in range(PARTITIONS):
                answers += [await self._send_probe(merchant, channel, partition) for channel in range(3)]
        _, pending = await asyncio.wait(answers, timeout=seconds) if answers else (set(), set())
        for future in pending:
            future.cancel()
        return None if pending else time.monotonic() - began

    async def _send_probe(self, merchant: str, channel: int, partition: int) -> "asyncio.Future[Json]":
        message_id = f"probe-{next(self._numbers)}"
        user = {"user_id": f"prober-{partition}"}
        type_, payload = (
            ("User.SignedUp", user),
            ("Operation.Open", user | {"operation_id": message_id, "operation_code": "none"}),
            ("Account.Unlock", user | {"justification": "probe", "actor": "chaos"}),
        )[channel]
        answer = self._ear.expect(message_id)
        message = command(merchant, type_, payload, message_id)
        await self._load.send(replace(message, partition=partition))
        return answer

    # Faults

    def _schedule(self) -> list[str]:
        """Order the kinds so that each prefix has all of them in about the wanted shares."""
        shares = {kind: KINDS[kind][1] for kind in self._kinds}
        counts: Counter[str] = Counter()
        order = []
        for _ in range(self.plan.faults):
            scored = {kind: (counts[kind] + self._rng.random()) / share for kind, share in shares.items()}
            kind = min(scored, key=scored.__getitem__)
            counts[kind] += 1
            order.append(kind)
        return order

    async def _strike_all(self, began: float) -> None:
        order = self._schedule()
        for number, kind in enumerate(order):
            self._now = kind
            self._scene.rng = random.Random(f"{self.plan.seed}/{number}")
            if number < self.plan.skip:
                continue
            if time.monotonic() - began > self.plan.minutes * 60:
                self._say("[yellow]time is over[/yellow]", 0)
                return
            await self._strike(kind)

    async def _strike(self, kind: str) -> None:
        try:
            strike = await KINDS[kind][0](self._scene)
        except MissedError as missed:
            self.report.missed.append(f"{kind}: {missed}")
            self._say(f"missed: {missed}", 1)
            return
        except Exception as error:
            self.report.failures.append(f"{kind}: {error!r}")
            strike = Strike(repr(error))
        merchants = [shop.merchant for shop in self._load.shops]
        recovered = await self._probe(merchants, RECOVERY_SECONDS_MAX)
        self.report.strikes.append((kind, strike, recovered))
        self.report.failures += [f"{kind}: {strike.what}: {failure}" for failure in strike.failures]
        if recovered is None:
            self.report.failures.append(f"{kind}: {strike.what}: no recovery in {RECOVERY_SECONDS_MAX:.0f} s")
            self._say(f"[red]{strike.what}: no recovery[/red]", 1)
        else:
            self._say(f"{strike.what}{' (inside)' if strike.inside else ''}: {recovered:.1f} s", 1)
        await asyncio.sleep(self._scene.rng.uniform(0, 1))

    # The end

    async def _end(self) -> None:
        self._now = "end"
        self._say("settling", 0)
        await self._load.stop()
        if not await self._settle():
            self.report.failures.append(f"not everything was consumed in {SETTLE_SECONDS_MAX:.0f} s")
        self.report.sent, self.report.aborted = self._load.sent, self._load.aborted
        self._carer.cancel()
        await asyncio.gather(self._carer, return_exceptions=True)
        await self._ear.stop()
        for name, worker in self.cluster.workers.items():
            if worker.wanted and not await asyncio.to_thread(self.cluster.leave, name):
                self.report.failures.append(f"{name} did not stop by itself at the end")
        self._say("judging", 0)
        try:
            self.report.judged = await ask_judge(self.cluster.bootstrap_servers, self.cluster.database_url())
        except NoVerdictError as error:
            self.report.failures.append(f"no verdict: {error}")

    async def _settle(self) -> bool:
        """Wait until everything sent is consumed, and nothing more comes for a while."""
        loop = asyncio.get_running_loop()
        end, quiet_since, heard = loop.time() + SETTLE_SECONDS_MAX, loop.time(), -1
        while loop.time() < end:
            if self._ear.heard != heard or await self._lag():
                heard, quiet_since = self._ear.heard, loop.time()
            # Overdue operations and what races left behind are found by the scheduler within a few seconds.
            if loop.time() - quiet_since > 6:
                return True
            await asyncio.sleep(0.5)
        return False

    async def _lag(self) -> int:
        """Return how many offsets the group has not committed yet."""
        with suppress(KafkaError, TimeoutError):
            async with asyncio.timeout(10):
                admin = AIOKafkaAdminClient(bootstrap_servers=self.cluster.bootstrap_servers)
                await admin.start()
                try:
                    committed = await admin.list_consumer_group_offsets(GROUP)
                finally:
                    await admin.close()
                ends = await self._ear.end_offsets(list(committed))
                return sum(ends[tp] - committed[tp].offset for tp in ends)
        return 1

    async def _run_points(self) -> None:
        """Run the crash points on the same services, without the workers."""
        cases, wanted = all_cases(), self.plan.points
        if wanted is not None:
            cases = cases[:: max(1, len(cases) // wanted)][:wanted] if wanted else []
        if not cases:
            return
        self._say(f"{len(cases)} crash points", 0)
        zombies = ZOMBIE_POINTS if wanted is None else ()
        async with Points(self.cluster.bootstrap_servers, self.cluster.database_url()) as points:
            try:
                verdict = await run_cases(points, cases, zombies, lambda text: self._say(text, 0))
            except NoVerdictError as error:
                self.report.failures.append(f"no verdict on crash points: {error}")
                return
        self.report.points = len(cases) + len(zombies)
        self.report.points_judged = verdict
        self.report.failures += points.failures
