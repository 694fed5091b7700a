"""A worker whose handler does nothing: how fast Faust and the lanes are alone (``python -m bench.idle``)."""

import json
import os
import signal
import sys
import time
from collections.abc import Mapping

from bench.figures import WARM_UP
from workers.app import create_app, run_worker
from workers.lanes import TP, Lease, Outcome, Record
from workers.logs import configure_logging
from workers.settings import WorkerSettings


class Idle:
    """Counts records, and ends the process when all have come."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._seen = 0
        self._began: tuple[float, int] | None = None

    async def process(self, _merchant: str, records: list[Record], _lease: Lease) -> Outcome:
        """Do nothing but tell what may be committed."""
        self._seen += len(records)
        now = time.perf_counter()
        if self._began is None and self._seen >= self._count // WARM_UP:
            self._began = (now, self._seen)
        if self._seen >= self._count and self._began is not None:
            seconds, records_then = now - self._began[0], self._seen - self._began[1]
            sys.stdout.write(json.dumps({"records_per_second": records_then / seconds}) + "\n")
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGTERM)
        return Outcome(commit={TP(record.topic, record.partition): record.offset + 1 for record in records})

    async def idle(self, _merchant: str, _partitions: set[TP], _lease: Lease) -> None:
        """Do nothing at all."""


def main() -> None:
    spec = json.loads(sys.stdin.read())
    settings = WorkerSettings.from_env()
    configure_logging("ERROR")

    async def merchants() -> Mapping[str, list[str]]:
        topics: Mapping[str, list[str]] = spec["topics"]
        return topics

    run_worker(create_app(settings, Idle(spec["count"]), merchants=merchants))


if __name__ == "__main__":
    main()
