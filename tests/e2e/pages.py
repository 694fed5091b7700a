"""The commands of the documents, taken from their text and run as they stand there."""

import asyncio
import os
import re
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from console.backup import program
from tests.e2e.blackbox import WAIT_SECONDS_MAX

ROOT = Path(__file__).parents[2]
PROGRAMS = {"credits", "curl", "psql", "pg_isready", "pg_restore", "make", "pip", "python", "docker", "java", "GET"}
# Commands that no test runs from the page, and why. There are no others.
EXEMPT = {
    "make ": "`make check` and `make test` are what runs this (.ci/run). test_demo.py, test_stack.py and "
    "test_chaos_short.py run what others do, on folders of their own; measuring is for a quiet machine.",
    "docker compose ": "Needs a Docker engine. tests/unit/test_compose.py reads the file.",
    "pip install ": "The example that needs it runs in test_operations.py, with the locked version.",
}
_CODE = re.compile(r"^ *```(?P<kind>\w*)\n(?P<block>.*?)^ *```$|`(?P<inline>[^`\n]+)`", re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    """Return the commands of a page in their order: the lines of its console blocks, and those within sentences.

    Those that are exempt are left out.
    """
    found: list[str] = []
    for code in _CODE.finditer((ROOT / page).read_text()):
        if code["inline"]:
            found += [code["inline"]] if code["inline"].split()[0] in PROGRAMS and " " in code["inline"] else []
        elif code["kind"] == "console":
            found += _whole(code["block"].splitlines())
        else:
            hidden = [line for line in code["block"].splitlines() if line.split()[:1] and line.split()[0] in PROGRAMS]
            assert not hidden, f"{page}: {hidden} should stand in a console block"
    return [command for command in found if not command.startswith(tuple(EXEMPT))]


def _whole(lines: list[str]) -> list[str]:
    """Join the lines of a command that goes on, within quotes or after a backslash."""
    found: list[str] = []
    begun = ""
    for line in filter(str.strip, lines):
        begun += line.strip()
        try:
            shlex.split(begun, comments=True)
            found.append(begun)
            begun = ""
        except ValueError:
            begun = begun.removesuffix("\\") + "\n"
    assert not begun, begun
    return found


def database(merchant: str) -> str:
    """Return the name of a merchant's database and role."""
    return f"credits_m_{merchant.replace('-', '_')}"


class Script:
    """A page's commands, to be run in the page's order and up to the last.

    Args:
        page: the document, from the project's folder on.
        folder: where the commands run.
        environment: what an operator has in theirs.
    """

    def __init__(self, page: str, folder: Path, environment: Mapping[str, str]) -> None:
        self._page = page
        self._left = commands(page)
        self._folder = folder
        self.environment = os.environ | {"COLUMNS": "200"} | environment
        path = f"{Path(sys.executable).parent}:{program('psql').parent}:{os.environ['PATH']}"
        self.environment["PATH"] = path
        self._stand_ins: dict[str, str] = {}

    def about(self, merchant: str) -> None:
        """Say which merchant stands for acme."""
        self.put({"acme": merchant, "credits_m_acme": database(merchant)})

    def put(self, stand_ins: Mapping[str, str]) -> None:
        """Say what to put for further words."""
        self._stand_ins |= stand_ins

    def take(self, begin: str) -> str:
        """Return the page's next command, which begins so, with stand-ins put."""
        assert self._left, f"{self._page} has no {begin} any more"
        command = self._left.pop(0)
        assert command.startswith(begin), f"{self._page}: {command} comes before {begin}"
        # The longest first: a place contains its merchant.
        for word in sorted(self._stand_ins, key=len, reverse=True):
            command = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", self._stand_ins[word], command)
        return command

    async def run(self, begin: str, code: int = 0, **environment: str) -> str:
        """Run the page's next command, which begins so; return what it said."""
        return await self.shell(self.take(begin), code, **environment)

    async def shell(self, command: str, code: int = 0, **environment: str) -> str:
        """Run a command that is not the page's; return what it said."""
        process = await self._start(command, environment)
        out, _ = await process.communicate()
        assert process.returncode == code, f"{self._page}: {command}\n{out.decode()}"
        return out.decode()

    async def run_until(self, begin: str, said: str, **environment: str) -> str:
        """Run the page's next command, which goes on for ever, and end it when it has said something."""
        process = await self._start(self.take(begin), {"FORCE_COLOR": "1"} | environment)
        assert process.stdout is not None
        out = ""
        try:
            async with asyncio.timeout(WAIT_SECONDS_MAX):
                while not re.search(said, re.sub(r"\x1b\[[\d;?]*\w", "", out)):
                    more = (await process.stdout.read(65536)).decode()
                    assert more, f"{self._page}: {begin} ended without {said}\n{out}"
                    out += more
        finally:
            # Not SIGINT: a shell has what it runs in the background ignore that.
            process.send_signal(signal.SIGTERM)
            await process.communicate()
        return out

    async def get(self, accept: str = "application/json") -> str:
        """Send the page's next command, an HTTP request, and return the body of the answer."""
        path = self.take("GET ").removeprefix("GET ")
        line = f'curl -sS --fail-with-body -H "Authorization: Bearer $CREDITS_TOKEN" -H "Accept: {accept}"'
        return await self.shell(f'{line} "$CREDITS_URL{path}"')

    @asynccontextmanager
    async def meanwhile(self, begin: str, **environment: str) -> AsyncIterator[None]:
        """Have the page's next command run, which goes on until it is told to end."""
        process = await self._start(self.take(begin), environment)
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            out, _ = await process.communicate()
        assert process.returncode == 0, out.decode()

    async def _start(self, command: str, environment: Mapping[str, str]) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            "bash",
            "-c",
            # A shell becomes its only command, so that signals reach that.
            command,
            cwd=self._folder,
            env=self.environment | dict(environment),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )

    def over(self) -> None:
        """Make sure that no command of the page was left out."""
        assert self._left == [], f"{self._page} has commands that were not run"
