"""A TCP proxy that misbehaves on command: between the workers and PostgreSQL, and between the workers and Kafka."""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

CHUNK = 65536


@dataclass(eq=False)
class Link:
    """One connection of a client, and the one to the server that it is passed on to."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    deaf: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def cut(self) -> None:
        self.over.set()
        for writer in (self.client, self.server):
            # A reset, not an orderly end: what is under way is lost.
            writer.transport.abort()


class Proxy:
    """Passes 127.0.0.1:`port` on to 127.0.0.1:`target`, in a thread of its own; all methods are for other threads."""

    def __init__(self, target: int, port: int = 0) -> None:
        self.target = target
        self.port = port
        self._links: set[Link] = set()
        self._refusing = False
        self._delay = 0.0
        self._rate = 0
        self._cut_after: bytes | None = None
        self.cuts = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._run(self._listen())

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """End all connections and the thread."""
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    # Misbehaviour

    def cut(self) -> int:
        """Reset all connections; new ones work. Returns how many there were."""
        count = len(self._links)
        self._run(self._cut())
        return count

    def refuse(self, refusing: bool) -> None:
        """Reset all connections and, for as long as it is set, every new one."""
        self._refusing = refusing
        if refusing:
            self.cut()

    def slow(self, delay: float, rate: int = 0) -> None:
        """Hold every piece back by so many seconds, and let through so many bytes a second (0: no limit)."""
        self._delay, self._rate = delay, rate

    def deafen(self) -> None:
        """Leave all connections of now half-open: nothing passes any more, and nobody is told."""
        self._run(self._deafen())

    def cut_after(self, text: bytes | None) -> None:
        """Pass on the next piece from a client that contains a text, then reset that connection before the answer."""
        self._cut_after = text

    def server_ports(self, client_ports: set[int]) -> list[int]:
        """Return the ports that the server sees for connections that clients made from these ports."""
        return [
            link.server.get_extra_info("sockname")[1]
            for link in list(self._links)
            if link.client.get_extra_info("peername")[1] in client_ports
        ]

    async def _close(self) -> None:
        self._server.close()
        self._refusing = True
        await self._cut()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _cut(self) -> None:
        for link in list(self._links):
            link.cut()

    async def _deafen(self) -> None:
        for link in self._links:
            link.deaf = True

    # Passing on

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.transport.abort()
            return
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        link = Link(writer, server_writer)
        self._links.add(link)
        await asyncio.gather(
            self._pass(link, reader, server_writer, from_client=True),
            self._pass(link, server_reader, writer, from_client=False),
        )
        self._links.discard(link)

    async def _pass(
        self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, from_client: bool
    ) -> None:
        with contextlib.suppress(ConnectionError, OSError, asyncio.CancelledError):
            while data := await reader.read(CHUNK):
                if link.deaf:
                    await link.over.wait()
                if self._delay:
                    await asyncio.sleep(self._delay)
                if self._rate:
                    await asyncio.sleep(len(data) / self._rate)
                strike = from_client and self._cut_after is not None and self._cut_after in data
                if strike:
                    self._cut_after = None
                    self.cuts += 1
                    # The answer finds nobody: the other direction is deaf from now on.
                    link.deaf = True
                writer.write(data)
                await writer.drain()
                if strike:
                    await asyncio.sleep(0.2)
                    break
        link.cut()
