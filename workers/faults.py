"""Named places in the pipeline where a test can make the process die, hang or raise; inert unless enabled.

``CREDITS_FAULT=name:action[:count]`` with action ``die``, ``hang`` or ``raise``; it strikes at the count-th pass
(default the first) of the named point, once in the life of a process.
"""

import asyncio
import os


class InjectedError(ConnectionError):
    """Trouble made on purpose."""


class _Fault:
    def __init__(self, setting: str) -> None:
        name, _, rest = setting.partition(":")
        action, _, count = rest.partition(":")
        self.name, self.action, self.left = name, action or "die", int(count or 1)

    async def strike(self) -> None:
        self.left -= 1
        if self.left != 0:
            return
        if self.action == "die":
            os._exit(137)
        if self.action == "hang":
            await asyncio.Event().wait()
        raise InjectedError(self.name)


_FAULT = _Fault(os.environ["CREDITS_FAULT"]) if os.environ.get("CREDITS_FAULT") else None

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
    "after_offsets",
)


async def point(name: str) -> None:
    """Pass a named place."""
    if _FAULT is not None and _FAULT.name == name:
        await _FAULT.strike()
