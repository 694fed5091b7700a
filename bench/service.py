"""Measures the service itself: a backlog drained, then commands at a steady rate."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.figures import check, latencies, median, percentile, rate
from bench.ground import Ground, Offsets, results_topics
from bench.machine import Processors, memory_mib
from bench.queries import asking
from bench.scenarios import Scenario
from console.processes import StackError
from schemas.topics import input_topic, receipts_topic

SETUP_SECONDS_MAX = 180
# A drain that is slower than this is no measurement any more.
COMMANDS_A_SECOND_MIN = 300
USERS_ASKED_FOR = 50

Say = Callable[[str], None]


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes:
        share: of a scenario's commands.
        seconds: of the steady rate.
    """

    repetitions: int
    share: float
    seconds: float


FULL = Extent(repetitions=3, share=1.0, seconds=15)
QUICK = Extent(repetitions=1, share=0.5, seconds=8)


@dataclass
class Served:
    """What was measured of the service in one scenario.

    Attributes:
        rates: commands a second, of each repetition.
        cores: used by each part during the last drain, and by `others`, programs not ours: the noise.
        cpu_us: processor time that each part spent on one command of the last drain, in microseconds.
        memory_mib: of all workers after the last drain.
        p50_ms, p99_ms, at_rate: from produce to result, at a rate of so many commands a second.
        query_p99_ms: of queries over HTTP at that time.
        late_seconds: by which the generator missed that rate; then the machine was too busy to tell a latency.
    """

    commands: int
    rates: list[float] = field(default_factory=list)
    cores: dict[str, float] = field(default_factory=dict)
    cpu_us: dict[str, int] = field(default_factory=dict)
    memory_mib: int = 0
    p50_ms: float = 0
    p99_ms: float = 0
    query_p99_ms: float = 0
    at_rate: float = 0
    late_seconds: float = 0

    @property
    def commands_per_second(self) -> float:
        """The median of the repetitions."""
        return median(self.rates)


def merchants_of(scenario: Scenario) -> list[str]:
    """Name the merchants of a scenario."""
    name = scenario.name.replace("_", "-")
    return [f"b-{name}-{number}" for number in range(scenario.merchants)]


async def measure(ground: Ground, scenario: Scenario, extent: Extent, say: Say) -> Served:
    """Measure a scenario with fresh merchants, which stay as they are then."""
    merchants = merchants_of(scenario)
    count = int(scenario.commands * extent.share) // 2 * 2
    served = Served(count)
    async with ground.serving(merchants, workers=ground.workers_of(scenario)):
        say("registering")
        await ground.register(merchants, scenario.partitions)
        await prepare(ground, scenario, merchants)
        for number in range(extent.repetitions):
            say(f"draining {count:,} commands, {number + 1} of {extent.repetitions}")
            await drain(ground, scenario, merchants, served, f"d{number}")
        say("steady load")
        await _steady(ground, scenario, merchants, served, extent.seconds)
    return served


async def prepare(ground: Ground, scenario: Scenario, merchants: Sequence[str]) -> None:
    """Give the merchants what the scenario begins with."""
    topics = results_topics(merchants)
    inputs = [input_topic(merchant, "admin") for merchant in merchants]
    starts, before = await ground.ends(topics, scenario.partitions), await ground.ends(inputs, scenario.partitions)
    await ground.generate(scenario, merchants, 0, "setup")
    sent = sum((await ground.ends(inputs, scenario.partitions)).values()) - sum(before.values())
    ends = await ground.wait(starts, sent, SETUP_SECONDS_MAX, poll_seconds=0.2)
    check(await ground.answers(starts, ends), sent)


async def backlog(ground: Ground, scenario: Scenario, merchants: Sequence[str], count: int, run: str) -> Offsets:
    """Fill the topics of suspended merchants; returns where the results will begin."""
    topics = results_topics(merchants)
    starts = await ground.ends(topics, scenario.partitions)
    await ground.generate(scenario, merchants, count, run)
    if await ground.ends(topics, scenario.partitions) != starts:
        raise StackError("a suspended merchant was worked for")
    return starts


async def drain(ground: Ground, scenario: Scenario, merchants: Sequence[str], served: Served, run: str) -> None:
    """Drain a backlog once, and add what was measured."""
    await ground.suspend(merchants)
    receipts = await _receipts(ground, scenario, merchants)
    starts = await backlog(ground, scenario, merchants, served.commands, run)
    whole = Processors(ground)
    await ground.resume(merchants)
    await ground.wait(starts, 1, served.commands, poll_seconds=0.1)
    processors = Processors(ground)
    ends = await ground.wait(starts, served.commands, served.commands / COMMANDS_A_SECOND_MIN)
    served.cores = processors.cores()
    served.cpu_us = {part: round(1e6 * spent / served.commands) for part, spent in whole.seconds().items()}
    served.memory_mib = memory_mib(ground.pids()["worker"])
    # A worker that answers twice would do it now.
    await asyncio.sleep(0.5)
    ends = await ground.ends(results_topics(merchants), scenario.partitions)
    answers = await ground.answers(starts, ends)
    check(answers, served.commands)
    served.rates.append(rate(answers.times.values()))
    issued = await _receipts(ground, scenario, merchants) - receipts
    if scenario.receipts and issued != served.commands:
        raise ValueError(f"{issued} receipts for {served.commands} purchases")


async def _receipts(ground: Ground, scenario: Scenario, merchants: Sequence[str]) -> int:
    topics = [receipts_topic(merchant) for merchant in merchants]
    return sum((await ground.ends(topics, scenario.partitions)).values())


async def _steady(ground: Ground, scenario: Scenario, merchants: Sequence[str], served: Served, seconds: float) -> None:
    """Send at half of the rate that was measured, and compare the broker's times of commands and results."""
    served.at_rate = served.commands_per_second / 2
    count = int(served.at_rate * seconds) // 2 * 2
    channel = "purchases" if scenario.receipts else "operations"
    inputs = [input_topic(merchant, channel) for merchant in merchants]
    before = await ground.ends(inputs, scenario.partitions)
    starts = await ground.ends(results_topics(merchants), scenario.partitions)
    async with asking(ground, merchants[0], min(scenario.users_each, USERS_ASKED_FOR)) as queries:
        took = await ground.generate(scenario, merchants, count, "steady", served.at_rate)
    served.query_p99_ms = round(percentile(queries, 99), 1)
    served.late_seconds = max(0.0, took - seconds)
    ends = await ground.wait(starts, count, SETUP_SECONDS_MAX)
    answers = await ground.answers(starts, ends)
    check(answers, count)
    sent = await ground.sent_times(before, await ground.ends(inputs, scenario.partitions))
    waited = latencies(sent, answers.times)
    served.p50_ms, served.p99_ms = percentile(waited, 50), percentile(waited, 99)
