"""Named places in the pipeline where a test can make the process die, hang or raise; inert unless enabled.

``CREDITS_FAULT=name:action[:count]`` strikes at the count-th pass (default the first) of the named point, once in the
life of a process. The actions: ``die`` as if killed, ``hang`` for ever, ``stop`` the process as SIGSTOP does, ``raise``
trouble (the surroundings' fault), ``break`` with a defect (ours).

``CREDITS_PLANT=name`` brings one known bug back, so that a test can show that its checks would notice it.

A worker with one of the two starts only where ``CREDITS_TEST_FAULTS=1`` says that it is a test.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Mapping

import structlog

from workers.logs import die

log = structlog.get_logger(__name__)

POINTS = (
    "after_decode",
    "after_begin",
    "after_positions",
    "after_lock",
    "before_decide",
    "after_decide",
    "after_ledger",
    "after_documents",
    "before_commit",
    "after_commit",
    "after_publish",
)
ACTIONS = ("die", "hang", "stop", "raise", "break")

BUGS = (
    "commit_early",  # offsets are committed before the batch, and an assignment trusts them
    "no_inbox",  # every delivery is decided as if it were the first
    "wrong_position",  # what is only applied is noted as published
    "no_owner_fence",  # whoever comes last writes, whoever owns the partition
    "random_id",  # each publication of a result has another id
)


class InjectedError(ConnectionError):
    """Trouble made on purpose."""


class InjectedDefectError(RuntimeError):
    """A defect made on purpose."""


class _Fault:
    def __init__(self, setting: str) -> None:
        name, _, rest = setting.partition(":")
        action, _, count = rest.partition(":")
        self.name, self.action, self.left = name, action or "die", int(count or 1)
        if self.name not in POINTS or self.action not in ACTIONS:
            raise ValueError(f"CREDITS_FAULT names no point or action: {setting}")

    async def strike(self) -> None:
        self.left -= 1
        if self.left != 0:
            return
        sys.stderr.write(f"fault: {self.action} at {self.name}\n")
        sys.stderr.flush()
        if self.action == "die":
            os._exit(137)
        if self.action == "hang":
            await asyncio.Event().wait()
        if self.action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
            return
        raise InjectedError(self.name) if self.action == "raise" else InjectedDefectError(self.name)


_fault: _Fault | None = None
_planted: str | None = None


def enable(fault: str | None, bug: str | None = None) -> None:
    """Set the fault of this process and the bug planted in it, if any."""
    global _fault, _planted
    if bug and bug not in BUGS:
        raise ValueError(f"CREDITS_PLANT names no bug: {bug}")
    _fault, _planted = _Fault(fault) if fault else None, bug or None


def enable_from_env(environ: Mapping[str, str] = os.environ) -> None:
    """Set what the environment asks for; end the process if it asks and this is no test."""
    asked = {name: environ[name] for name in ("CREDITS_FAULT", "CREDITS_PLANT") if environ.get(name)}
    if not asked:
        return
    if environ.get("CREDITS_TEST_FAULTS") != "1":
        die("faults are for tests, and CREDITS_TEST_FAULTS=1 is not set", None, **asked)
    log.critical("this worker has faults on purpose", **asked)
    enable(environ.get("CREDITS_FAULT"), environ.get("CREDITS_PLANT"))


async def point(name: str) -> None:
    """Pass a named place."""
    if _fault is not None and _fault.name == name:
        await _fault.strike()


def planted(name: str) -> bool:
    """Tell whether a known bug was brought back on purpose."""
    return name == _planted
