"""Connections: one small pool of writers a merchant, opened on first use and closed when idle for long.

All sessions carry timeouts, so that neither a frozen worker nor a slow statement can hold locks for ever.
"""

import asyncio
from collections import OrderedDict
from typing import Any

import asyncpg
from sqlalchemy import URL, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

WRITER_SETTINGS = {
    "application_name": "credits-writer",
    "lock_timeout": "4s",
    "statement_timeout": "30s",
    "idle_in_transaction_session_timeout": "5s",
    "timezone": "UTC",
    "jit": "off",
    # All it looks up has an index. A plan made while a merchant's tables are small would read them whole, and is kept
    # while they grow, until they are analyzed: 70 ms a batch after a minute of commands.
    "enable_seqscan": "off",
}
READER_SETTINGS = {
    "application_name": "credits-reader",
    "statement_timeout": "5s",
    "idle_in_transaction_session_timeout": "5s",
    "default_transaction_read_only": "on",
    "timezone": "UTC",
    "jit": "off",
    # Some queries have to read tables whole, so that each is planned for the size that they have by then.
    "plan_cache_mode": "force_custom_plan",
}
CONTROL_SETTINGS = {
    "application_name": "credits-control",
    "lock_timeout": "10s",
    "statement_timeout": "60s",
    "timezone": "UTC",
}


# Below this the numbers of types are given by hand, and the same in every database of every release
# (`access/transam.h`, FirstGenbkiObjectId).
_BUILTIN_OIDS_END = 10_000
_builtin_types: dict[frozenset[int], Any] = {}


class Connection(asyncpg.Connection):
    """A connection that asks for PostgreSQL's own types once in a process.

    asyncpg asks on each connection for each array type that it meets, with three statements that take 3 ms.
    """

    async def _introspect_types(self, typeoids: Any, *limit: Any) -> Any:
        wanted = frozenset(typeoids)
        if (known := _builtin_types.get(wanted)) is not None:
            return known
        found = await super()._introspect_types(typeoids, *limit)  # type: ignore[misc]  # a private name
        if max(wanted) < _BUILTIN_OIDS_END:
            _builtin_types[wanted] = found
        return found


def engine_url(url: URL | str, *, password: str | None = None) -> URL:
    """Turn a plain ``postgresql://`` URL into one for SQLAlchemy over asyncpg, which calls ``sslmode`` ``ssl``."""
    parsed = make_url(url).set(drivername="postgresql+asyncpg")
    if "sslmode" in parsed.query:
        parsed = parsed.difference_update_query(["sslmode"]).update_query_dict({"ssl": parsed.query["sslmode"]})
    return parsed.set(password=password) if password is not None else parsed


def create_engine(url: URL, settings: dict[str, str], *, pool_size: int, max_overflow: int = 0) -> AsyncEngine:
    return create_async_engine(
        url,
        pool_size=pool_size,
        max_overflow=max_overflow,
        pool_timeout=5,
        pool_pre_ping=False,
        isolation_level="READ COMMITTED",
        hide_parameters=True,  # an error's text goes into logs, a command's content does not
        connect_args=connect_args(settings),
    )


def create_unpooled_engine(url: URL, settings: dict[str, str], **options: Any) -> AsyncEngine:
    """For administration: each use is one connection, closed at once."""
    return create_async_engine(
        url, poolclass=NullPool, hide_parameters=True, connect_args=connect_args(settings), **options
    )


def connect_args(settings: dict[str, str]) -> dict[str, Any]:
    return {"server_settings": settings, "timeout": 10, "command_timeout": 60, "connection_class": Connection}


def in_a_line(error: BaseException) -> str:
    """Return what a database's error says, on one line for people; one that ran out of time says nothing by itself."""
    return (str(error) or type(error).__name__).splitlines()[0][:300]


class Pools:
    """The pools of one kind (writers or readers) for all merchants; those not used for the longest time are closed."""

    def __init__(self, settings: dict[str, str], *, pool_size: int, merchants_max: int) -> None:
        self._settings = settings
        self._pool_size = pool_size
        self._merchants_max = merchants_max
        self._engines: OrderedDict[str, AsyncEngine] = OrderedDict()
        self._used_at: dict[str, float] = {}

    def has(self, merchant_id: str) -> bool:
        """Tell whether a merchant's engine is there already."""
        return merchant_id in self._engines

    async def engine(self, merchant_id: str, database_url: str, password: str) -> AsyncEngine:
        """Return a merchant's engine; may close that of the merchant not used for the longest time."""
        engine = self._engines.get(merchant_id)
        if engine is None:
            url = engine_url(database_url, password=password)
            engine = self._engines[merchant_id] = create_engine(url, self._settings, pool_size=self._pool_size)
        self._engines.move_to_end(merchant_id)
        self._used_at[merchant_id] = asyncio.get_running_loop().time()
        if len(self._engines) > self._merchants_max:
            await self._close_oldest()
        return engine

    async def _close_oldest(self) -> None:
        merchant_id, oldest = self._engines.popitem(last=False)
        del self._used_at[merchant_id]
        # Connections in use go on, and are closed when they come back.
        await oldest.dispose()

    async def close_idle(self, seconds: float) -> None:
        """Close the pools that nobody asked for in the last ``seconds``: thousands of merchants are quiet ones."""
        before = asyncio.get_running_loop().time() - seconds
        while self._engines and self._used_at[next(iter(self._engines))] < before:
            await self._close_oldest()

    async def close(self) -> None:
        while self._engines:
            await self._close_oldest()
