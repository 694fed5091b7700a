"""Asks the judge, who is a program of its own."""

import asyncio
import json
import sys
from collections.abc import Sequence

from tests.chaos.cluster import PROJECT
from tests.chaos.generator import Json


class NoVerdictError(Exception):
    """The judge failed; the message has what it wrote."""


async def ask_judge(
    servers: str, control_url: str, *, merchants: Sequence[str] = (), repeats_max: int | None = None
) -> Json:
    """Return the judge's verdict on merchants, on all of them by default."""
    command = [sys.executable, "-m", "tests.chaos.judge", servers, control_url, *merchants]
    if repeats_max is not None:
        command.append(f"--repeats-max={repeats_max}")
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, cwd=PROJECT, stdout=pipe, stderr=pipe)
    out, err = await process.communicate()
    if process.returncode not in (0, 1) or not out:
        raise NoVerdictError(f"exit code {process.returncode}: {err.decode()[-3000:]}")
    verdict: Json = json.loads(out)
    return verdict
