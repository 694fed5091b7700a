"""How long it takes until work is done: a local stack, and a worker of many merchants; and their connections."""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
from rich.console import Console
from rich.table import Table

from bench import machine, service
from bench.figures import check, rate
from bench.ground import FOLDER, Ground, jars, results_topics
from bench.scenarios import ROOT, STARTUP
from console.processes import StackError

IDLE_SECONDS = 5
SAMPLE_SECONDS = 0.1
REGISTER_AT_ONCE = 50

Say = Callable[[str], None]


async def measure(ground: Ground, say: Say, console: Console) -> dict[str, Any]:
    """Measure both; the ground's stack is used for the second."""
    told: dict[str, Any] = {}
    say("make up, twice")
    told |= await asyncio.to_thread(_up)
    told |= await _many_merchants(ground, say)
    told["machine"] = await machine.facts(ground)
    _show(console, told)
    return told


def _up() -> dict[str, float]:
    """Time `credits up` for an empty folder, and once more after `credits down`; the download is there already."""
    root = FOLDER / "up"
    _remove(root)
    (root / ".credits").mkdir(parents=True)
    (root / ".credits" / "jars").symlink_to(jars())
    try:
        first = _run("up", root)
        _run("down", root)
        again = _run("up", root)
        return {"up_first_seconds": first, "up_seconds": again, "down_seconds": _run("down", root)}
    finally:
        _remove(root)


def _run(command: str, root: Path) -> float:
    """Run a command of the command line for a folder; returns the seconds it took."""
    began = time.monotonic()
    arguments, environment = [sys.executable, "-m", "console.main", command], {**os.environ, "CREDITS_ROOT": str(root)}
    done = subprocess.run(arguments, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise StackError(f"credits {command} failed:\n{done.stdout}{done.stderr}")
    return round(time.monotonic() - began, 1)


def _remove(root: Path) -> None:
    if root.exists():
        _run("down", root)
        shutil.rmtree(root)


async def _many_merchants(ground: Ground, say: Say) -> dict[str, Any]:
    merchants = service.merchants_of(STARTUP)
    told: dict[str, Any] = {"merchants": STARTUP.merchants}
    async with ground.serving([]):
        began = time.monotonic()
        for first in range(0, STARTUP.merchants, REGISTER_AT_ONCE):
            say(f"registering merchants, {first} of {STARTUP.merchants}")
            await ground.register(merchants[first : first + REGISTER_AT_ONCE], STARTUP.partitions)
        told["registration_seconds_each"] = round((time.monotonic() - began) / STARTUP.merchants, 2)
        await service.prepare(ground, STARTUP, merchants)
    say("starting a worker for them")
    began = time.monotonic()
    async with ground.serving([]):
        told["ready_seconds"] = round(time.monotonic() - began, 1)
        idle, _ = await _connections_during(ground, asyncio.sleep(IDLE_SECONDS))
        told["connections_while_idle"] = idle
        say("load for all of them")
        peak, served = await _connections_during(ground, _drain(ground, merchants))
        told |= {"connections_under_load": peak, "commands_per_second": round(served.commands_per_second)}
        told["worker_memory_mib"] = served.memory_mib
        last, _ = await _connections_during(ground, asyncio.sleep(IDLE_SECONDS))
        told["connections_after_load"] = last
    return told


async def _drain(ground: Ground, merchants: list[str]) -> service.Served:
    served = service.Served(STARTUP.commands)
    starts = await ground.ends(results_topics(merchants), STARTUP.partitions)
    await ground.generate(STARTUP, merchants, STARTUP.commands, "load")
    ends = await ground.wait(starts, STARTUP.commands, STARTUP.commands / service.COMMANDS_A_SECOND_MIN)
    answers = await ground.answers(starts, ends)
    check(answers, STARTUP.commands)
    served.rates.append(rate(answers.times.values()))
    served.memory_mib = machine.memory_mib(ground.pids()["worker"])
    return served


async def _connections_during(ground: Ground, work: Any) -> tuple[int, Any]:
    """Return the most connections that the service held at once while the work went on, and its result."""
    task = asyncio.ensure_future(work)
    connection = await asyncpg.connect(ground.stack.postgres.url("postgres"))
    sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'credits-%'"
    most = 0
    while not task.done():
        most = max(most, await connection.fetchval(sql))
        await asyncio.sleep(SAMPLE_SECONDS)
    await connection.close()
    return most, task.result()


def _show(console: Console, told: dict[str, Any]) -> None:
    table = Table("what", "figure", "target", header_style="bold")
    targets = {
        "up_seconds": "≤ 10",
        "ready_seconds": "≤ 30",
        "connections_while_idle": "≤ 64",
        "connections_under_load": "≤ 150",
    }
    for name, figure in told.items():
        if name != "machine":
            table.add_row(name.replace("_", " "), f"{figure:,}", targets.get(name, ""))
    console.print(table)
