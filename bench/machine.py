"""What the figures depend on: the machine, the versions, and what the processors did meanwhile."""

import os
import platform
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import asyncpg
import psutil

from bench.figures import percentile
from bench.ground import Ground
from bench.scenarios import ROOT
from console import kafka

SYNCS = 200


async def facts(ground: Ground) -> dict[str, Any]:
    """Return what somebody needs to know to compare the figures with others."""
    connection = await asyncpg.connect(ground.stack.postgres.url("postgres"))
    try:
        names = ("server_version", "fsync", "synchronous_commit", "full_page_writes", "shared_buffers", "max_wal_size")
        settings = {name: await connection.fetchval(f"SHOW {name}") for name in names}
    finally:
        await connection.close()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "kafka": kafka.VERSION,
        "postgres": settings,
        "faust": version("faust-streaming"),
        "fsync_p50_ms": fsync_ms(ground.stack.state),
        "workers": ground.workers,
        "batch_max": ground.batch_max,
        "commit": _commit(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def fsync_ms(folder: Path) -> float:
    """Return how long it takes to bring 8 KiB to the disk, the median in milliseconds."""
    took = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(SYNCS):
            file.seek(0)
            file.write(os.urandom(8192))
            file.flush()
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            took.append(1000 * (time.perf_counter() - began))
    return round(percentile(took, 50), 3)


class Processors:
    """Tells what used the processors between two moments, in cores."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._began = time.monotonic()
        self._busy = _busy_seconds()
        self._used = self._read()

    def _read(self) -> dict[str, float]:
        return {name: sum(map(_cpu_seconds, pids)) for name, pids in self._ground.pids().items()}

    def seconds(self) -> dict[str, float]:
        """Return the processor time of each part since the start."""
        return {name: max(0.0, now - self._used[name]) for name, now in self._read().items()}

    def cores(self) -> dict[str, float]:
        """Return the cores that each part used on average since the start, and `others`, programs not ours."""
        seconds = time.monotonic() - self._began
        used = {name: spent / seconds for name, spent in self.seconds().items()}
        used["others"] = max(0.0, (_busy_seconds() - self._busy) / seconds - sum(used.values()))
        return {name: round(cores, 2) for name, cores in used.items()}


def memory_mib(pids: list[int]) -> int:
    """Return the resident memory of processes together."""
    return round(sum(psutil.Process(pid).memory_info().rss for pid in pids) / 2**20)


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def _cpu_seconds(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)
