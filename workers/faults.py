"""Named places in the pipeline where a test can make the process die, hang or raise; inert unless enabled.

``CREDITS_FAULT=name:action[:count]`` strikes at the count-th pass (default the first) of the named point, once in the
life of a process. The actions: ``die`` as if killed, ``hang`` for ever, ``raise`` trouble (the surroundings' fault),
``break`` with a defect (ours).

``CREDITS_PLANT=name`` brings one known bug back, so that a test can show that its checks would notice it.
"""

import asyncio
import os
import sys

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
ACTIONS = ("die", "hang", "raise", "break")

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
        raise InjectedError(self.name) if self.action == "raise" else InjectedDefectError(self.name)


_FAULT = _Fault(os.environ["CREDITS_FAULT"]) if os.environ.get("CREDITS_FAULT") else None
_PLANTED = os.environ.get("CREDITS_PLANT")


async def point(name: str) -> None:
    """Pass a named place."""
    if _FAULT is not None and _FAULT.name == name:
        await _FAULT.strike()


def planted(name: str) -> bool:
    """Tell whether a known bug was brought back on purpose."""
    return name == _PLANTED
