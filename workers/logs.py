"""Logs: one JSON object a line on stderr, and the last words of a process that must not go on."""

import asyncio
import logging
import logging.config
import os
import sys
import time
from typing import Any, NoReturn

import structlog

_LIBRARIES = ("aiokafka", "alembic", "faust", "mode")


class RateLimit(logging.Filter):
    """Let each message of a library through at most `burst` times in `period` seconds.

    A broker that is away makes the libraries write dozens of lines a second; the next line that gets through says how
    many were left out.
    """

    def __init__(self, burst: int = 3, period: float = 30.0) -> None:
        super().__init__()
        self._burst = burst
        self._period = period
        self._windows: dict[tuple[str, str], list[float]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is written."""
        if not record.name.startswith(_LIBRARIES):
            return True
        now = time.monotonic()
        # The text without its arguments: a node or an address in it must not make it a message of its own.
        window = self._windows.setdefault((record.name, str(record.msg)[:80]), [now, 0.0])
        if now - window[0] > self._period:
            if left_out := int(window[1]) - self._burst:
                record.left_out = max(0, left_out)
            window[:] = [now, 0.0]
        window[1] += 1
        return window[1] <= self._burst


def configure_logging(level: str = "INFO") -> None:
    """Send everything that is logged in this process, by us or by a library, to stderr as JSON."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    logging.config.dictConfig(_logging_config(level, shared))


def _logging_config(level: str, shared: list[structlog.typing.Processor]) -> dict[str, Any]:
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"rate": {"()": RateLimit}},
        "formatters": {
            "json": {
                "()": structlog.stdlib.ProcessorFormatter,
                "foreign_pre_chain": [*shared, structlog.stdlib.ExtraAdder({"left_out"})],
                "processors": [
                    structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                    structlog.processors.JSONRenderer(sort_keys=False, default=str),
                ],
            }
        },
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "stream": "ext://sys.__stderr__",
                "formatter": "json",
                "filters": ["rate"],
            }
        },
        "root": {"level": level.upper(), "handlers": ["stderr"]},
        # Below a warning the libraries tell each step of each rebalance.
        "loggers": {name: {"level": "WARNING"} for name in _LIBRARIES},
    }


def die(event: str, error: BaseException | None = None, **details: Any) -> NoReturn:
    """Log why, and end the process at once with exit code 1.

    Nothing is lost: what was not committed is delivered again, to whoever owns the partition then. An orderly end could
    hang, or acknowledge what was not done.
    """
    structlog.get_logger(__name__).critical(event, exc_info=error, **details)
    if sys.__stderr__ is not None:
        sys.__stderr__.flush()
    os._exit(1)


def die_with(task: asyncio.Task[None]) -> None:
    """End the process when a task that runs for ever ends: what it does would be done no more, and nobody would see."""
    task.add_done_callback(_ended)


def _ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        die("a task ended", task.exception(), task=task.get_name())
