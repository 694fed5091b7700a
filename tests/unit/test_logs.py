"""The last words of a process that must not go on."""

import asyncio
from typing import Any

import pytest

from workers import logs


@pytest.fixture
def deaths(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the tasks with which the process would have ended."""
    ended: list[str] = []

    def note(event: str, error: BaseException | None = None, **details: Any) -> None:
        ended.append(f"{details['task']}: {error!r}")

    monkeypatch.setattr(logs, "die", note)
    return ended


async def test_a_process_ends_with_a_task_that_should_run_for_ever(deaths: list[str]) -> None:
    async def divide(by: int) -> None:
        1 % by

    for by in (0, 1):
        task = asyncio.create_task(divide(by), name=f"by {by}")
        logs.die_with(task)
        await asyncio.wait([task])
        await asyncio.sleep(0)

    assert deaths == ["by 0: ZeroDivisionError('integer modulo by zero')", "by 1: None"]


async def test_a_process_goes_on_when_a_task_is_cancelled(deaths: list[str]) -> None:
    task = asyncio.create_task(asyncio.sleep(60), name="long")
    logs.die_with(task)
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    await asyncio.sleep(0)

    assert deaths == []
