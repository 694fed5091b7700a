"""A sample of the crash points; `make chaos` runs every point × every kind of command."""

import os
import subprocess
import sys
from collections.abc import Awaitable, Callable

import pytest

from tests.chaos.points import KINDS, Case, Points
from tests.services import Services
from workers.faults import POINTS

Judged = Callable[[str, Callable[[Points], Awaitable[None]]], Awaitable[dict[str, object]]]


@pytest.fixture(scope="module")
def control_url(services: Services) -> str:
    """Return a control database for the merchants of these tests."""
    url = services.database_url(f"credits_points_{os.getpid()}")
    command = [sys.executable, "-m", "console.main", "migrate"]
    environment = os.environ | {"CREDITS_CONTROL_DATABASE_URL": url}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return url


async def find(
    services: Services, url: str, merchant: str, work: Callable[[Points], Awaitable[None]], bug: str | None = None
) -> list[str]:
    """Run cases for a new merchant, and return all that was found wrong."""
    async with Points(services.kafka_bootstrap_servers, url, merchant, bug) as points:
        await points.make_merchant()
        await work(points)
        verdict = await points.judge()
    assert verdict["commands"] > 0
    return [f"{what}: {verdict['examples'][what]}" for what in verdict["findings"]]


async def test_a_process_may_die_at_every_point_and_every_effect_and_result_is_there_once(
    services: Services, control_url: str
) -> None:
    kinds = list(KINDS)

    async def work(points: Points) -> None:
        # Each point once, and most kinds of commands; which goes with which is left to the full run.
        for number, point in enumerate(POINTS):
            await points.run(Case(kinds[2 * number], point))

    assert await find(services, control_url, "deaths", work) == []


@pytest.mark.parametrize(
    ("kind", "point"), [("parked", "after_commit"), ("close before open", "after_commit"), ("erasure", "after_publish")]
)
async def test_a_process_may_die_with_commands_that_wait_for_others(
    services: Services, control_url: str, kind: str, point: str
) -> None:
    async def work(points: Points) -> None:
        await points.run(Case(kind, point))

    assert await find(services, control_url, f"waits-{kind.partition(' ')[0]}", work) == []


@pytest.mark.parametrize("action", ["hang", "raise", "break"])
async def test_a_process_may_hang_or_meet_trouble_or_a_defect_at_a_point(
    services: Services, control_url: str, action: str
) -> None:
    async def work(points: Points) -> None:
        for point in ("after_decode", "after_lock", "before_commit", "after_publish"):
            await points.run(Case("purchase", point, action))

    assert await find(services, control_url, action, work) == []


@pytest.mark.parametrize("point", ["after_decode", "before_commit", "after_commit"])
async def test_a_frozen_worker_that_wakes_after_another_took_over_publishes_at_most_its_batch(
    services: Services, control_url: str, point: str
) -> None:
    async def work(points: Points) -> None:
        await points.run_zombie(point)

    assert await find(services, control_url, point.replace("_", "-"), work) == []


async def _die_after_commit(points: Points) -> None:
    await points.run(Case("grant", "after_commit"))


async def _die_after_publish(points: Points) -> None:
    await points.run(Case("grant", "after_publish"))


async def _wake_a_zombie(points: Points) -> None:
    await points.run_zombie("after_commit")


@pytest.mark.parametrize(
    ("bug", "work"),
    [
        ("no_inbox", _die_after_commit),
        ("wrong_position", _die_after_commit),
        ("random_id", _die_after_publish),
        ("no_owner_fence", _wake_a_zombie),
    ],
)
async def test_the_judge_notices_a_planted_bug(
    services: Services, control_url: str, bug: str, work: Callable[[Points], Awaitable[None]]
) -> None:
    assert await find(services, control_url, "bug-" + bug.replace("_", "-"), work, bug) != []
