"""Crash points: every named place of the pipeline × every kind of command, in real processes on real services.

Each case sends a command (twice) and a bystander's, has a process work on them that a fault strikes at a point, and
then another process to which they are delivered again. The judge looks at everything at the end.
"""

import asyncio
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import psutil
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.structs import ConsumerRecord

from tests.chaos.generator import CONFIG, Json, Message, command, now
from tests.chaos.judging import ask_judge
from workers.faults import POINTS

CASE_SECONDS_MAX = 30.0
# An exception where none is caught, after the commit, ends the process: what it did not finish is delivered again.
EXIT_CODES = {"die": (137,), "hang": (-signal.SIGKILL,), "raise": (0, 1), "break": (0, 1)}
# Where a process is frozen while another one takes over.
ZOMBIE_POINTS = ("after_decode", "after_positions", "after_lock", "before_commit", "after_commit", "after_publish")
JUSTIFIED = {"justification": "chaos", "actor": "chaos"}
ACTOR = {"actor": "chaos"}


@dataclass(frozen=True)
class Case:
    """One command, and where which fault strikes."""

    kind: str
    point: str
    action: str = "die"

    def __str__(self) -> str:
        return f"{self.kind}, {self.action} at {self.point}"


def _purchase(name: str, **more: Any) -> Json:
    snapshot = {"country": "AM", "amount": "10.00", "currency": "USD"}
    payload: Json = {"user_id": f"user-{name}", "external_ref": f"ch-{name}", "product_code": "pack100"}
    payload |= {"payment_method": "card", "order_placed_at": now(), "settled_at": now(), "pricing_snapshot": snapshot}
    return payload | more


def _product(name: str) -> Json:
    prices = [{"country": "*", "currency": "USD", "amount": "5"}]
    payload = {"product_code": f"p-{name}", "title": "p", "credits": 3, "access_period_days": 3}
    return payload | {"distribution": "sellable", "prices": prices} | ACTOR


def _rate(name: str) -> Json:
    payload = {"operation_code": f"o-{name}", "display_name": "o", "resource_unit": "TOKEN", "credits_per_unit": "1"}
    return payload | ACTOR


def _operation(name: str, **more: Any) -> Json:
    return {"user_id": f"user-{name}", "operation_id": f"op-{name}"} | more


def _close(name: str) -> Json:
    return _operation(name, resource_amount="700", resource_unit="TOKEN", completed_at=now())


_OPEN = {"operation_code": "llm"}
Step = tuple[str, Callable[[str], Json]]
# What a kind of command needs to have happened before, and the command itself.
KINDS: dict[str, tuple[tuple[Step, ...], tuple[Step, ...]]] = {
    "purchase": ((), (("Purchase.Settled", _purchase),)),
    "refused purchase": ((), (("Purchase.Settled", lambda n: _purchase(n, product_code="none")),)),
    "sign-up": ((), (("User.SignedUp", lambda n: {"user_id": f"user-{n}"}),)),
    "open": ((), (("Operation.Open", lambda n: _operation(n, **_OPEN)),)),
    "close": (
        (("Operation.Open", lambda n: _operation(n, **_OPEN)),),
        (("Operation.RecordAndClose", _close),),
    ),
    "close before open": (
        (("Operation.RecordAndClose", _close),),
        (("Operation.Open", lambda n: _operation(n, **_OPEN)),),
    ),
    "cancel": ((("Operation.Open", lambda n: _operation(n, **_OPEN)),), (("Operation.Cancel", _operation),)),
    "parked": ((), (("Operation.Cancel", _operation),)),
    "grant": (
        (),
        (
            (
                "Grant.Apply",
                lambda n: {"grant_id": n, "user_id": f"user-{n}", "credits": 5, "access_period_days": 3} | JUSTIFIED,
            ),
        ),
    ),
    "adjustment": (
        (),
        (
            (
                "Adjustment.Apply",
                lambda n: {"adjustment_id": n, "user_id": f"user-{n}", "credits_delta": -5} | JUSTIFIED,
            ),
        ),
    ),
    "refund": (
        (("Purchase.Settled", _purchase),),
        (("Refund.Apply", lambda n: {"refund_id": n, "external_ref": f"ch-{n}", "amount": "3.33"} | JUSTIFIED),),
    ),
    "refund before purchase": (
        (("Refund.Apply", lambda n: {"refund_id": n, "external_ref": f"ch-{n}"} | JUSTIFIED),),
        (("Purchase.Settled", _purchase),),
    ),
    "chargeback": (
        (("Purchase.Settled", _purchase),),
        (("Chargeback.Apply", lambda n: {"dispute_id": n, "external_ref": f"ch-{n}"} | JUSTIFIED),),
    ),
    "won dispute": (
        (
            ("Purchase.Settled", _purchase),
            ("Chargeback.Apply", lambda n: {"dispute_id": n, "external_ref": f"ch-{n}"} | JUSTIFIED),
        ),
        (("Chargeback.Reverse", lambda n: {"dispute_id": n} | JUSTIFIED),),
    ),
    "product": ((), (("Product.Create", _product),)),
    "product archived": (
        (("Product.Create", _product),),
        (("Product.Archive", lambda n: {"product_code": f"p-{n}"} | ACTOR),),
    ),
    "price": (
        (("Product.Create", _product),),
        (
            (
                "ProductPrice.Create",
                lambda n: {"product_code": f"p-{n}", "country": "AM", "currency": "AMD", "amount": "9"} | ACTOR,
            ),
        ),
    ),
    "price archived": (
        (("Product.Create", _product),),
        (("ProductPrice.Archive", lambda n: {"product_code": f"p-{n}", "country": "*", "currency": "USD"} | ACTOR),),
    ),
    "rate": ((), (("OperationType.CreateWithArchival", _rate),)),
    "rate archived": (
        (("OperationType.CreateWithArchival", _rate),),
        (("OperationType.Archive", lambda n: {"operation_code": f"o-{n}"} | ACTOR),),
    ),
    "configuration": ((), (("Merchant.Configure", lambda n: {"config": CONFIG | {"legal_name": n}} | ACTOR),)),
    "role": ((), (("UserRole.Assign", lambda n: {"subject": f"user-{n}", "role": "support"} | ACTOR),)),
    "lock": (
        (("User.SignedUp", lambda n: {"user_id": f"user-{n}"}),),
        (("Account.Lock", lambda n: {"user_id": f"user-{n}"} | JUSTIFIED),),
    ),
    "erasure": (
        (("Purchase.Settled", _purchase),),
        (("User.Erase", lambda n: {"request_id": n, "user_id": f"user-{n}"} | JUSTIFIED),),
    ),
    "wrong topic": ((), (("Account.Nonsense", lambda n: {"user_id": f"user-{n}"}),)),
}


@dataclass(frozen=True)
class Delivery:
    """Records for one process, in batches, and what shall happen to it."""

    batches: tuple[tuple[ConsumerRecord, ...], ...]
    merchant: str
    generation: int
    fault: str | None
    bug: str | None


def all_cases() -> list[Case]:
    """Every point × every kind of command, and every other action at every point."""
    cases = [Case(kind, point) for kind in KINDS for point in POINTS]
    others = itertools.cycle(("purchase", "close before open", "grant"))
    return cases + [Case(next(others), point, action) for point in POINTS for action in ("hang", "raise", "break")]


def work(servers: str, control_url: str, delivery: Delivery, stderr: Connection) -> None:
    """Be a worker's process for some batches; runs in a child."""
    os.dup2(stderr.fileno(), 2)
    from workers import faults
    from workers.logs import configure_logging

    configure_logging("INFO")
    faults.enable(delivery.fault, delivery.bug)
    asyncio.run(_work(servers, control_url, delivery))


async def _work(servers: str, control_url: str, delivery: Delivery) -> None:
    import merchants.registry
    from merchants.databases import CONTROL_SETTINGS, WRITER_SETTINGS, Pools, create_unpooled_engine, engine_url
    from workers.lanes import Lease
    from workers.pipeline import Pipeline
    from workers.publisher import Publisher

    engine = create_unpooled_engine(engine_url(control_url), CONTROL_SETTINGS)
    async with engine.connect() as connection:
        merchant = await merchants.registry.find(connection, delivery.merchant)
    assert merchant is not None
    publisher, pools = Publisher(servers), Pools(WRITER_SETTINGS, pool_size=1, merchants_max=1)
    await publisher.start()
    pipeline = Pipeline(publisher, pools, pools, resource_amount_max=Decimal(10**9))
    pipeline.know(merchant)
    partitions = {TopicPartition(r.topic, r.partition) for batch in delivery.batches for r in batch}
    lease = Lease(delivery.generation, f"process-{os.getpid()}", partitions, object())
    publishing: asyncio.Task[bool] | None = None
    for batch in delivery.batches:
        outcome = await pipeline.process(delivery.merchant, list(batch), lease)
        lease.first -= outcome.commit.keys() - outcome.seek.keys()
        if outcome.published is not None:
            publishing = outcome.published
    if publishing is not None:
        await publishing
    await pipeline.idle(delivery.merchant, partitions, lease)
    await publisher.stop()
    await pools.close()


@dataclass
class Child:
    """A process at work."""

    process: BaseProcess
    said: Connection
    text: bytes = b""

    def says(self, text: str) -> bool:
        """Tell whether its stderr has got a text."""
        while self.said.poll():
            if not (more := os.read(self.said.fileno(), 65536)):
                break
            self.text += more
        return text.encode() in self.text


@dataclass
class Points:
    """Runs cases for one merchant of a control database.

    Attributes:
        bug: planted in the processes.
        failures: how processes ended that should have ended otherwise; part of the verdict.
        repeats_max: so many results may be repeated: those of batches that were published and not noted so.
    """

    servers: str
    control_url: str
    merchant: str = "points"
    bug: str | None = None
    failures: list[str] = field(default_factory=list)
    repeats_max: int = 0

    def __post_init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.chaos.points", "workers.pipeline", "workers.control"])
        self._numbers = itertools.count(1)
        self._generation = itertools.count(1)

    async def __aenter__(self) -> "Points":
        self._producer = AIOKafkaProducer(bootstrap_servers=self.servers)
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=self.servers, auto_offset_reset="earliest", enable_auto_commit=False
        )
        await self._producer.start()
        await self._consumer.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._producer.stop()
        await self._consumer.stop()

    async def make_merchant(self) -> None:
        """Make the merchant of the cases, with one partition a topic, a product, a grant product and a rate."""
        import merchants.registry
        from merchants.databases import CONTROL_SETTINGS, create_unpooled_engine, engine_url
        from schemas.payloads import MerchantConfig
        from workers.admin import ensure_topics
        from workers.service import merchant_topics

        engine = create_unpooled_engine(engine_url(self.control_url), CONTROL_SETTINGS)
        async with engine.begin() as connection:
            merchant = await merchants.registry.reserve(
                connection,
                self.merchant,
                database_url=merchants.registry.server_url(self.control_url),
                partitions=1,
                simulated=False,
                command=bytes(16),
                fingerprint=bytes(32),
            )
        config = MerchantConfig.model_validate(CONFIG)
        await merchants.registry.provision(self.control_url, merchant, config, "chaos")
        await ensure_topics(self.servers, merchant_topics(self.merchant, 1))
        async with engine.begin() as connection:
            await merchants.registry.set_state(connection, self.merchant, "active")
        prices = [{"country": "*", "currency": "USD", "amount": "10.00"}]
        pack = {"product_code": "pack100", "title": "p", "credits": 100, "access_period_days": 30, "prices": prices}
        gift = {"product_code": "gift", "title": "g", "credits": 5, "access_period_days": 30}
        rate = {"operation_code": "llm", "display_name": "o", "resource_unit": "TOKEN", "credits_per_unit": "0.01"}
        gift |= {"distribution": "grant", "grant_policy": "apply_on_signup"}
        made: list[tuple[str, Json]] = [
            ("Product.Create", pack | {"distribution": "sellable"} | ACTOR),
            ("Product.Create", gift | ACTOR),
        ]
        made.append(("OperationType.CreateWithArchival", rate | ACTOR))
        await self.deliver(await self.send([self._message(type_, payload) for type_, payload in made]))

    async def judge(self) -> Json:
        """Return the judge's verdict, and that on how processes ended: one that lost its partition must not go on."""
        verdict = await ask_judge(
            self.servers, self.control_url, merchants=[self.merchant], repeats_max=self.repeats_max
        )
        if self.failures:
            what = "a process did not end as it should"
            verdict["findings"][what], verdict["examples"][what] = len(self.failures), self.failures
        return verdict

    def _message(self, type_: str, payload: Json) -> Message:
        return command(self.merchant, type_, payload, f"c-{next(self._numbers)}")

    async def send(self, messages: Iterable[Message]) -> tuple[ConsumerRecord, ...]:
        """Send messages, and return the records that come of them."""
        sent = []
        for message in messages:
            headers = list(message.headers)
            taken = await self._producer.send_and_wait(message.topic, message.value, message.key, 0, headers=headers)
            sent.append((TopicPartition(message.topic, 0), taken.offset))
        firsts: dict[TopicPartition, int] = {}
        for tp, offset in sent:
            firsts.setdefault(tp, offset)
        self._consumer.assign(list(firsts))
        for tp, offset in firsts.items():
            self._consumer.seek(tp, offset)
        found: dict[tuple[TopicPartition, int], ConsumerRecord] = {}
        while len(found) < len(sent):
            for tp, records in (await self._consumer.getmany(timeout_ms=200)).items():
                found |= {(tp, record.offset): record for record in records}
        return tuple(found[place] for place in sent)

    # Processes

    def start(self, batches: Sequence[Sequence[ConsumerRecord]], fault: str | None = None) -> Child:
        """Start a process that works on batches."""
        ours, theirs = self._context.Pipe(duplex=False)
        made = tuple(map(tuple, batches))
        delivery = Delivery(made, self.merchant, next(self._generation), fault, self.bug)
        process = self._context.Process(target=work, args=(self.servers, self.control_url, delivery, theirs))
        process.start()
        theirs.close()
        return Child(process, ours)

    async def wait(self, child: Child, condition: Callable[[], bool], what: str) -> bool:
        """Wait until a condition holds; note a failure when it takes too long."""
        end = time.monotonic() + CASE_SECONDS_MAX
        while not condition():
            if time.monotonic() > end:
                self.failures.append(f"{what}: {child.text.decode(errors='replace')[-2000:]}")
                return False
            await asyncio.sleep(0.005)
        return True

    async def finish(self, child: Child, what: str, *, codes: Sequence[int] = (0,)) -> None:
        """Wait for the end of a process, which must have one of these exit codes."""
        process = child.process
        ended = await self.wait(child, lambda: child.says("\0") or not process.is_alive(), f"{what}: no end")
        if not ended:
            process.kill()
        process.join()
        child.says("")
        if ended and process.exitcode not in codes:
            text = child.text.decode(errors="replace")[-2000:]
            self.failures.append(f"{what}: exit code {process.exitcode}: {text}")
        child.said.close()
        process.close()

    async def deliver(self, records: Sequence[ConsumerRecord]) -> None:
        """Have a process without faults work on records."""
        await self.finish(self.start([records]), "delivery")

    # Cases

    async def run(self, case: Case) -> None:
        """Run one case."""
        name = f"{next(self._numbers)}"
        before, steps = KINDS[case.kind]
        if before:
            earlier = [self._message(type_, make(name)) for type_, make in before]
            # Twice, so that a command that waits has two deliveries to be answered.
            await self.deliver(await self.send([*earlier, *earlier]))
        messages = [self._message(type_, make(name)) for type_, make in steps]
        grant = {"grant_id": f"by-{name}", "user_id": f"by-{name}", "credits": 1, "access_period_days": 3} | JUSTIFIED
        records = await self.send([*messages, self._message("Grant.Apply", grant), *messages])
        child = self.start([records], f"{case.point}:{case.action}")
        if not await self.wait(child, lambda: child.says("fault: "), f"{case}: the point was not passed"):
            child.process.kill()
        if case.action == "hang":
            child.process.kill()
        await self.finish(child, str(case), codes=EXIT_CODES[case.action])
        if case.point == "after_publish":
            # The batch, and what it released.
            self.repeats_max += len(records) + 2 * len(before)
        await self.deliver(records)

    async def run_zombie(self, point: str) -> None:
        """Stop a process at a point, have another one take over, and wake the first: it may publish its batch only.

        The successor dies before it notes what it published: the owner of the partition is all that holds the zombie
        back then.
        """
        grants = []
        for _ in range(3):
            name = f"{next(self._numbers)}"
            grant = {"grant_id": name, "user_id": f"user-{name}", "credits": 1, "access_period_days": 3} | JUSTIFIED
            grants.append(self._message("Grant.Apply", grant))
        records = await self.send(grants)
        child = self.start([records[:1], records[1:2], records[2:]], f"{point}:stop")
        process = psutil.Process(child.process.pid)
        await self.wait(child, lambda: process.status() == psutil.STATUS_STOPPED, f"zombie at {point}: not stopped")
        successor = self.start([records], "after_publish:die")
        await self.finish(successor, f"successor of a zombie at {point}", codes=EXIT_CODES["die"])
        process.send_signal(signal.SIGCONT)
        end = time.monotonic() + CASE_SECONDS_MAX
        # It is dropped for good only when its lease ends, which nobody does here: what it does until then counts.
        while time.monotonic() < end and not child.says("a batch is dropped") and child.process.is_alive():
            await asyncio.sleep(0.01)
        child.process.kill()
        await self.finish(child, f"zombie at {point}", codes=EXIT_CODES["hang"])
        await self.deliver(records)
        # What the zombie was publishing, and what its successor had published and not noted.
        self.repeats_max += 1 + len(records)


async def run_cases(points: Points, cases: Iterable[Case], zombies: Iterable[str], say: Callable[[str], None]) -> Json:
    """Run cases and zombies for a new merchant, and return the verdict."""
    await points.make_merchant()
    for case in cases:
        await points.run(case)
        say(str(case))
    for point in zombies:
        await points.run_zombie(point)
        say(f"zombie at {point}")
    return await points.judge()


# What shows each of the planted bugs; one needs a consumer group, and so a campaign.
REVEALING: dict[str, tuple[tuple[Case, ...], tuple[str, ...]]] = {
    "no_inbox": ((Case("grant", "after_commit"),), ()),
    "wrong_position": ((Case("grant", "after_commit"),), ()),
    "random_id": ((Case("grant", "after_publish"),), ()),
    "no_owner_fence": ((), ("after_commit",)),
}
