"""What is counted of each batch and said of it in the log; Prometheus reads it at `/metrics` (spec §6).

Labels name merchants, command types and codes, never users: a type that is not ours is `unknown`, because it is
whatever its sender wrote. Times are from the broker's record time to the acknowledged results, by the wall clock; no
decision looks at them.
"""

import asyncio
import logging
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.pool import QueuePool

from catalog.sql import fetch
from merchants.databases import Pools
from merchants.registry import Merchant
from schemas.errors import Code
from schemas.payloads import COMMANDS
from workers.decide import Answer
from workers.inbox import DeadLetter
from workers.lanes import TP, Record
from workers.queries import NEEDING_ATTENTION
from workers.transaction import Applied

if TYPE_CHECKING:
    # `credits status` reads the gauges without Faust.
    from workers.app import State

log = structlog.get_logger(__name__)
_levels = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
CONTROL = "control"  # no merchant has this id
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)
SIZES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0)
# So many of the accounts that batches touched are looked at in each pass of the sampler.
ACCOUNTS_SAMPLED = 50
ENTRIES_SAMPLED_MAX = 10_000
SAMPLE_SECONDS = 15.0
SAMPLES_A_SECOND = 3


class Distribution:
    """Counts of values by upper bound, for a histogram; takes equal values in one go."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Write the cumulated counts into a metric family."""
        buckets, total = [], 0
        names = [*(str(bound) for bound in self._bounds), "+Inf"]
        for name, count in zip(names, self._counts, strict=True):
            total += count
            buckets.append((name, float(total)))
        family.add_metric(labels, buckets, self._sum)


@dataclass
class Tally:
    """What the batches of one call of a lane came to, for its line in the log."""

    applied: int = 0
    rejected: int = 0
    replays: int = 0
    dead_letters: int = 0
    documents: int = 0


@dataclass
class Sample:
    """What a merchant's database said of itself when it last answered, and when that was.

    Without gauges it never did, and ``at`` is when it was first asked.
    """

    at: float
    gauges: dict[str, float] | None = None


class Metrics(Collector):
    """Everything that is counted in one worker process.

    Args:
        state: of the worker, read when the metrics are.
        errors: tells of each part that works beside the lanes how often it failed with a merchant.
        pools: by name, for the numbers of connections.
    """

    def __init__(
        self, state: Callable[[], "State"], errors: Callable[[], Mapping[str, int]], pools: Mapping[str, Pools]
    ) -> None:
        self._state = state
        self._errors = errors
        self._pools = pools
        self._commands: Counter[tuple[str, str, str]] = Counter()
        self._refusals: Counter[tuple[str, str, str]] = Counter()
        self._replays: Counter[tuple[str, str]] = Counter()
        self._conflicts: Counter[tuple[str, str]] = Counter()
        self._letters: Counter[tuple[str, str]] = Counter()
        self._documents: Counter[tuple[str, str]] = Counter()
        self.violations: Counter[tuple[str, str]] = Counter()
        self._end_to_end: dict[str, Distribution] = {}
        self._batch_seconds: dict[str, Distribution] = {}
        self._batch_records: dict[str, Distribution] = {}
        self._pool_wait: dict[str, Distribution] = {}
        self._tallies: dict[str, Tally] = {}
        self.touched: dict[str, deque[int]] = {}
        self.samples: dict[str, Sample] = {}
        self.checkpointed_at: dict[str, float] = {}
        self.suspended: dict[str, bool] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def render(self, merchant: str | None = None) -> bytes:
        """Return all metrics in Prometheus' text format; without those of others, if a merchant is given."""
        if merchant is None:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        registry.register(_OneMerchant(self, merchant))
        return generate_latest(registry)

    def refusals(self) -> dict[str, dict[str, int]]:
        """Return how many commands of each merchant were refused, by code, since the process started."""
        found: dict[str, dict[str, int]] = {}
        for (merchant, _, code), times in list(self._refusals.items()):
            codes = found.setdefault(merchant, {})
            codes[code] = codes.get(code, 0) + times
        return found

    # What happens

    def published(self, merchant: str, records: Sequence[Record], begun: float) -> None:
        """Measure a batch whose results are out, and log its line. `begun`: when, by `time.monotonic`."""
        name = merchant or CONTROL
        tally = self._tallies.pop(name, None) or Tally()
        seconds = time.monotonic() - begun
        now = time.time()
        ages = Counter(record.timestamp for record in records)
        end_to_end = _distribution(self._end_to_end, name, SECONDS)
        for timestamp, times in ages.items():
            end_to_end.observe(max(0.0, now - timestamp / 1000), times)
        _distribution(self._batch_seconds, name, SECONDS).observe(seconds)
        _distribution(self._batch_records, name, SIZES).observe(len(records))
        log.info(
            "batch",
            merchant=name,
            records=len(records),
            ms=round(1000 * seconds, 1),
            oldest_ms=round(1000 * max(0.0, now - min(ages, default=0) / 1000)) if ages else 0,
            **vars(tally),
        )

    def observe(self, merchant: str, applied: Applied) -> None:
        """Count a published batch; an observer of the pipeline."""
        self.answered(merchant, applied.answers, applied.letters)
        for issued in applied.issued:
            self._documents[merchant, issued.document.kind] += 1
        self._tally(merchant).documents += len(applied.issued)
        touched = self.touched.setdefault(merchant, deque(maxlen=ACCOUNTS_SAMPLED))
        touched.extend(list(applied.accounts)[:ACCOUNTS_SAMPLED])

    def answered(self, merchant: str | None, answers: Iterable[Answer], letters: Sequence[DeadLetter]) -> None:
        """Count answers and dead letters; without a merchant those of the control topic."""
        name = merchant or CONTROL
        tally = self._tally(name)
        for answer in answers:
            self._count(name, answer, tally)
            if _levels.isEnabledFor(logging.DEBUG):
                log.debug("command", **_line(name, answer))
        for letter in letters:
            self._letters[name, str(letter.code)] += 1
        tally.dead_letters += len(letters)

    def _count(self, merchant: str, answer: Answer, tally: Tally) -> None:
        row = answer.row
        layer = replay_layer(answer)
        if layer is not None:
            self._replays[merchant, layer] += answer.times
            tally.replays += answer.times
            return
        command_type = known_type(row.type)
        outcome = row.outcome or "parked"
        self._commands[merchant, command_type, outcome] += 1
        if outcome == "applied":
            tally.applied += 1
            return
        tally.rejected += 1
        code = str(row.code)
        self._refusals[merchant, command_type, code] += 1
        if code == Code.IDEMPOTENCY_CONFLICT:
            self._conflicts[merchant, command_type] += 1

    def _tally(self, merchant: str) -> Tally:
        return self._tallies.setdefault(merchant, Tally())

    def pool_waited(self, merchant: str, seconds: float) -> None:
        """Note how long it took to get a connection of a merchant."""
        _distribution(self._pool_wait, merchant, SECONDS).observe(seconds)

    # What is told

    def collect(self) -> Iterable[Metric]:
        """Yield all metrics; called by the registry."""
        yield from self._counters()
        yield from self._distributions()
        yield from self._worker()
        yield from self._sampled()

    def _counters(self) -> Iterator[Metric]:
        # A counter that begins at 1 has not increased as far as Prometheus knows, and this one is a page.
        undecidable = {(name or CONTROL, str(Code.INTERNAL_ERROR)): 0 for name in list(self._state().assigned)}
        for name, text, labels, counts in (
            ("credits_commands", "Commands decided", ("merchant", "type", "outcome"), self._commands),
            ("credits_refusals", "Commands refused, by code", ("merchant", "type", "code"), self._refusals),
            ("credits_replays", "Deliveries answered from what is stored", ("merchant", "layer"), self._replays),
            ("credits_conflicts", "Known identities or keys with other content", ("merchant", "type"), self._conflicts),
            (
                "credits_dead_letters",
                "Messages that need a person",
                ("merchant", "code"),
                {**undecidable, **self._letters},
            ),
            ("credits_documents", "Receipts, credit notes and corrections", ("merchant", "kind"), self._documents),
            ("credits_invariant_violations", "Must be 0: run credits verify", ("merchant", "check"), self.violations),
        ):
            family = CounterMetricFamily(name, text, labels=labels)
            for key, count in list(counts.items()):
                family.add_metric(key, count)
            yield family

    def _distributions(self) -> Iterator[Metric]:
        for name, text, label, found in (
            ("credits_end_to_end_seconds", "Record time to published result", "merchant", self._end_to_end),
            ("credits_batch_seconds", "One batch, retries included", "merchant", self._batch_seconds),
            ("credits_batch_records", "Records in one batch", "merchant", self._batch_records),
            ("credits_database_pool_wait_seconds", "Wait for a reader's connection", "merchant", self._pool_wait),
        ):
            family = HistogramMetricFamily(name, text, labels=(label,))
            for key, distribution in list(found.items()):
                distribution.add_to(family, (key,))
            yield family

    def _worker(self) -> Iterator[Metric]:
        state = self._state()
        yield GaugeMetricFamily("credits_worker_ready", "1 with an assignment", float(state.ready))
        suspended = GaugeMetricFamily("credits_merchant_suspended", "1 while it is suspended", labels=("merchant",))
        for merchant, is_suspended in list(self.suspended.items()):
            suspended.add_metric((merchant,), float(is_suspended))
        yield suspended
        lag = GaugeMetricFamily(
            "credits_consumer_lag", "Records not committed yet", labels=("merchant", "topic", "partition")
        )
        merchants = {tp: name for name, partitions in state.assigned.items() for tp in partitions}
        for tp, records in list(state.lag.items()):
            lag.add_metric((merchants.get(tp) or CONTROL, tp.topic, str(tp.partition)), records)
        yield lag
        events = CounterMetricFamily("credits_worker_events", "What happened in this worker", labels=("event",))
        for event, count in vars(state.counters).items():
            events.add_metric((event,), count)
        for part, count in self._errors().items():
            events.add_metric((f"{part}_errors",), count)
        yield events
        connections = GaugeMetricFamily("credits_database_connections", "By pool and state", labels=("pool", "state"))
        for pool, pools in self._pools.items():
            in_use, open_ = _connections(pools)
            connections.add_metric((pool, "in_use"), in_use)
            connections.add_metric((pool, "open"), open_)
        yield connections

    def _sampled(self) -> Iterator[Metric]:
        samples = list(self.samples.items())
        for name, text in _GAUGES.items():
            family = GaugeMetricFamily(f"credits_{name}", text, labels=("merchant",))
            for merchant, sample in samples:
                if sample.gauges is not None:
                    family.add_metric((merchant,), sample.gauges[name])
            yield family
        age = GaugeMetricFamily("credits_sample_age_seconds", "Age of the gauges of a database", labels=("merchant",))
        for merchant, sample in samples:
            age.add_metric((merchant,), time.monotonic() - sample.at)
        yield age
        age = GaugeMetricFamily("credits_checkpoint_age_seconds", "Since the last checkpoint", labels=("merchant",))
        for merchant, at in list(self.checkpointed_at.items()):
            age.add_metric((merchant,), time.monotonic() - at)
        yield age


@dataclass(frozen=True, slots=True)
class _OneMerchant(Collector):
    """The metrics that a merchant may see: its own, and those of the whole worker."""

    metrics: Metrics
    merchant: str

    def collect(self) -> Iterable[Metric]:
        for family in self.metrics.collect():
            family.samples = [s for s in family.samples if s.labels.get("merchant", self.merchant) == self.merchant]
            yield family


def _distribution(found: dict[str, Distribution], name: str, bounds: Sequence[float]) -> Distribution:
    distribution = found.get(name)
    if distribution is None:
        distribution = found[name] = Distribution(bounds)
    return distribution


def _connections(pools: Pools) -> tuple[int, int]:
    """Return (connections in use, connections open) of all merchants."""
    kinds = [engine.pool for engine in list(pools._engines.values())]
    in_use = sum(pool.checkedout() for pool in kinds if isinstance(pool, QueuePool))
    return in_use, in_use + sum(pool.checkedin() for pool in kinds if isinstance(pool, QueuePool))


def known_type(command_type: str) -> str:
    """Return the type of a command for a label: one of ours, or `unknown`."""
    return command_type if command_type in COMMANDS else "unknown"


def replay_layer(answer: Answer) -> str | None:
    """Tell why an answer is a repetition: `message`, `business_key`, or None if it was decided just now."""
    row = answer.row
    # A row read from the database has no body: its command was decided before.
    if not row.body or not answer.whole:
        return "message"
    return "business_key" if "replay_of" in row.body else None


def _line(merchant: str, answer: Answer) -> dict[str, Any]:
    """Say where a command came from and what came of it; no ids that its sender chose, they may name a user."""
    row = answer.row
    line = {
        "merchant": merchant,
        "type": known_type(row.type),
        "identity": row.identity.hex(),
        "position": f"{row.topic}/{row.partition}/{row.kafka_offset}",
        "outcome": row.outcome,
        "code": row.code,
        "user_seq": row.body.get("user_seq"),
        "replay": replay_layer(answer),
        "traceparent": answer.traceparent,
    }
    return {name: value for name, value in line.items() if value is not None}


# What only a database knows

_GAUGES = {
    "open_operations": "Operations open now",
    "overdue_operations": "Open operations past their deadline",
    "parked_commands": "Commands that wait for another one",
    "parked_oldest_seconds": "For how long the oldest of them has waited",
    "dead_letters_open": "Dead letters that nobody has settled or redriven",
    "purchases_needing_attention": "Paid orders that were refused and neither applied nor settled since",
    "receipts_gaps": "Must be 0: numbers missing among the newest thousand of each series",
}

# Index scans throughout. An open operation ends at its deadline at the latest, so older ones need no look.
_READ_GAUGES = f"""
WITH clock AS (SELECT clock_timestamp() + clock_offset AS now FROM merchant_state)
SELECT
    (SELECT count(*) FROM operations, clock WHERE expires_at > now AND state = 'open'),
    (SELECT count(*) FROM operations, clock
        WHERE expires_at > now - interval '1 hour' AND expires_at <= now AND state = 'open'),
    (SELECT count(*) FROM parked),
    (SELECT coalesce(extract(epoch FROM max(now) - min(parked_at)), 0)::float8 FROM parked, clock),
    (SELECT count(*) FROM dead_letters WHERE redriven_at IS NULL),
    ({NEEDING_ATTENTION} SELECT count(*) FROM items),
    (SELECT coalesce(sum(least(1000, s.next_number - 1) - (
        SELECT count(*) FROM documents d WHERE d.prefix = s.prefix AND d.year = s.year
            AND d.sequence >= s.next_number - 1000 AND d.sequence < s.next_number)), 0)
        FROM document_series s)
"""


async def read_gauges(connection: AsyncConnection) -> dict[str, float]:
    """Read what a merchant's database says of itself, by the names of the gauges without their prefix."""
    row = (await fetch(connection, _READ_GAUGES))[0]
    return dict(zip(_GAUGES, map(float, row), strict=True))


# Each check names the accounts of which it does not hold; the identities of spec §3.
_CHECKS = {
    "balance is the sum of entries": f"""
        SELECT a.account_id FROM accounts a
        WHERE a.account_id = ANY($1::bigint[]) AND a.last_seq <= {ENTRIES_SAMPLED_MAX}
            AND (a.balance, a.last_seq) <> (
                SELECT coalesce(sum(e.amount), 0), coalesce(count(*), 0) FROM entries e
                WHERE e.account_id = a.account_id)
    """,
    "balance is remaining less debt": """
        SELECT a.account_id FROM accounts a WHERE a.account_id = ANY($1::bigint[])
            AND a.balance IS DISTINCT FROM (
                SELECT coalesce(sum(l.remaining), 0) FROM lots l
                WHERE l.account_id = a.account_id AND NOT l.spent) - a.debt
    """,
    "debt is what the debts sum to": """
        SELECT a.account_id FROM accounts a WHERE a.account_id = ANY($1::bigint[])
            AND a.debt IS DISTINCT FROM (
                SELECT coalesce(sum(d.uncovered), 0) FROM debts d WHERE d.account_id = a.account_id)
    """,
}


@dataclass
class Sampler:
    """Asks the databases of merchants for their gauges, and checks identities of accounts that batches touched.

    Each merchant is asked by one worker only: the one that has the first partition of its jobs.
    """

    metrics: Metrics
    readers: Pools
    merchants: Mapping[str, Merchant]
    assigned: Callable[[], Mapping[str, set[TP]]]
    errors: int = field(default=0)

    async def run(self, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """Look at each merchant every `SAMPLE_SECONDS`, with many of them less often: connections are dear."""
        await sleep(SAMPLE_SECONDS)
        while True:
            names = self.names()
            for name in names:
                await self.look(name)
                await sleep(max(SAMPLE_SECONDS / len(names), 1 / SAMPLES_A_SECOND))
            if not names:
                await sleep(SAMPLE_SECONDS)

    def names(self) -> list[str]:
        """Return the merchants this worker looks after, and forget the figures of others."""
        mine = {name for name, partitions in self.assigned().items() if name and looks_after(name, partitions)}
        for name in self.metrics.samples.keys() - mine:
            del self.metrics.samples[name]
        return sorted(mine & self.merchants.keys())

    async def look(self, name: str) -> None:
        """Look at a merchant; one whose database is away keeps its last figures."""
        self.metrics.samples.setdefault(name, Sample(time.monotonic()))
        try:
            await self._look(self.merchants[name])
        except Exception as error:
            self.errors += 1
            log.warning("a database is not sampled", merchant=name, error=repr(error)[:500])

    async def _look(self, merchant: Merchant) -> None:
        name = merchant.merchant_id
        engine = await self.readers.engine(name, merchant.database_url, merchant.password)
        begun = time.monotonic()
        async with engine.connect() as connection:
            self.metrics.pool_waited(name, time.monotonic() - begun)
            gauges = await read_gauges(connection)
            self.metrics.samples[name] = Sample(time.monotonic(), gauges)
            await self._check(connection, name)

    async def _check(self, connection: AsyncConnection, merchant: str) -> None:
        """Check the accounts touched since the last pass; each statement sees one moment, so no batch is in between."""
        touched = self.metrics.touched.pop(merchant, None)
        for check, sql in _CHECKS.items() if touched else ():
            broken = await fetch(connection, sql, sorted(set(touched or ())))
            self.metrics.violations[merchant, check] += len(broken)
            for row in broken:
                log.error("an invariant is violated", merchant=merchant, check=check, account=f"{row[0]:016x}")


def looks_after(merchant: str, partitions: Iterable[TP]) -> bool:
    """Whether the worker with these partitions does what one worker must do for a merchant."""
    return TP(f"credits.{merchant}.jobs", 0) in partitions
