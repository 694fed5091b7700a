"""Restores a merchant's database from a dump, and brings it forward to what was published since.

The merchant is suspended meanwhile. The dump goes into a database of its own, in which the published history is imposed
and audited; only then it takes the place of the lost one, which is kept beside it under another name. See
`docs/operations/restore.md`.
"""

import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, OffsetAndMetadata
from aiokafka import TopicPartition as TP
from aiokafka.errors import KafkaError
from sqlalchemy import URL, make_url
from sqlalchemy.ext.asyncio import AsyncConnection

import merchants.registry
from catalog.sql import fetch
from console.backup import run_program
from console.merchants import UnknownMerchantError
from console.processes import StackError
from merchants.databases import CONTROL_SETTINGS, create_unpooled_engine, engine_url
from merchants.registry import WORKER_GROUP, Merchant, names, quoted
from merchants.schema import on_database
from migrations import runner
from schemas.codec import parse_time
from schemas.topics import CHANNELS, input_topic, receipts_topic, results_topic
from workers.audit import Report, verify
from workers.checkpoints import compare, last_checkpoint
from workers.lanes import Record
from workers.reimpose import SEARCH_PATH, History, NotReproducedError, Outcome, Published, Reimposition
from workers.settings import WorkerSettings

Progress = Callable[[str, int, int], None]
READ_MS = 500
DISCONNECT_TRIES = 5


@dataclass
class Restored:
    """What a restore came to.

    Attributes:
        outcome: of the imposed history.
        report: of the audit of the restored books.
        kept: the name of the lost database, if it was still there.
        checkpoint: in what the books are not as the last checkpoint had them.
        offsets_reset: whether the group's offsets were set back; None if no partition needed it.
    """

    outcome: Outcome
    report: Report
    kept: str | None = None
    checkpoint: list[str] = field(default_factory=list)
    offsets_reset: bool | None = None


async def restore(settings: WorkerSettings, merchant_id: str, dump: Path, progress: Progress) -> Restored:
    """Restore a suspended merchant's database.

    Args:
        settings: where control database and broker are; the group and bounds are the workers'.
        merchant_id: of the merchant.
        dump: a file made by `credits backup`.
        progress: is told (what is being done, done, in all).

    Raises:
        StackError: it can't be done; nothing was changed. The message says why.
    """
    control_url = settings.control_database_url
    merchant, clock = await _suspended(control_url, merchant_id)
    role, database = names(merchant_id)
    made = f"{database}_restored"
    progress("the dump", 0, 1)
    await _load(control_url, merchant, dump, made)
    url = make_url(on_database(control_url, made))
    history = await _read_history(settings, merchant, url, clock)
    outcome = await _impose(settings, merchant, url, history, progress)
    progress("the audit", 0, 1)
    report = await verify(url)
    if broken := "; ".join(f"{finding.name}: {finding.first}" for finding in report.broken):
        raise StackError(f"The restored books do not add up, the database {made} is left for a look: {broken}")
    restored = Restored(outcome, report)
    restored.checkpoint = await _compare(settings, merchant_id, url)
    restored.kept = await _swap(control_url, role, database, made)
    restored.offsets_reset = await reset_offsets(settings, outcome.next_offsets)
    return restored


async def _suspended(control_url: str, merchant_id: str) -> tuple[Merchant, list[tuple[datetime, timedelta]]]:
    """Return the merchant and how its test clock was moved, if it has one."""
    engine = create_unpooled_engine(engine_url(control_url), CONTROL_SETTINGS)
    try:
        async with engine.connect() as connection:
            merchant = await merchants.registry.find(connection, merchant_id)
            if merchant is None:
                raise UnknownMerchantError(merchant_id)
            if merchant.state != "suspended":
                raise StackError(
                    f"{merchant_id} is {merchant.state}. Suspend it first, so that no worker writes meanwhile: "
                    f"credits send {merchant_id} Merchant.Suspend."
                )
            sql = "SELECT result FROM inbox WHERE type = 'Clock.Advance' AND outcome = 'applied'"
            results = [json.loads(row[0]) for row in await fetch(connection, sql)]
    finally:
        await engine.dispose()
    moved = [r["effects"] for r in results if r["effects"].get("merchant_id") == merchant_id]
    return merchant, sorted((parse_time(m["now"]), timedelta(seconds=m["offset_seconds"])) for m in moved)


async def _load(control_url: str, merchant: Merchant, dump: Path, database: str) -> None:
    """Load the dump into a new database, and bring that to the newest schema."""
    await runner.ensure_role(on_database(control_url, "postgres"), WORKER_GROUP)
    async with _administration(control_url) as connection:
        await merchants.registry.make_role(connection, names(merchant.merchant_id)[0], merchant.password)
        await connection.exec_driver_sql(f"DROP DATABASE IF EXISTS {quoted(database)} WITH (FORCE)")
        await connection.exec_driver_sql(f"CREATE DATABASE {quoted(database)} TEMPLATE template0")
        # Its tables are open to the group of all merchants' roles.
        await connection.exec_driver_sql(f"REVOKE ALL ON DATABASE {quoted(database)} FROM PUBLIC")
    url = make_url(on_database(control_url, database))
    run_program("pg_restore", ["--exit-on-error", "--no-owner", f"--dbname={database}", str(dump)], url)
    await runner.upgrade(url.render_as_string(hide_password=False), "merchant")
    engine = create_unpooled_engine(url, CONTROL_SETTINGS)
    try:
        async with engine.connect() as connection:
            whose = (await fetch(connection, "SELECT merchant_id FROM merchant_state"))[0][0]
    finally:
        await engine.dispose()
    if whose != merchant.merchant_id:
        raise StackError(f"{dump} is a backup of {whose}, not of {merchant.merchant_id}.")


# What the topics tell


async def _read_history(
    settings: WorkerSettings, merchant: Merchant, url: URL, clock: Sequence[tuple[datetime, timedelta]]
) -> History:
    """Read the commands that the dump does not know, and all that was published since the first of them."""
    name = merchant.merchant_id
    engine = create_unpooled_engine(url, CONTROL_SETTINGS)
    try:
        async with engine.connect() as connection:
            rows = await fetch(connection, "SELECT topic, partition, applied_next FROM positions")
    finally:
        await engine.dispose()
    applied = {TP(topic, partition): offset for topic, partition, offset in rows}
    inputs = [TP(input_topic(name, c), p) for c in CHANNELS for p in range(merchant.partitions)]
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap_servers,
        enable_auto_commit=False,
        isolation_level="read_committed",
        **settings.security_kwargs(),
    )
    await consumer.start()
    try:
        commands = await _read(consumer, {tp: applied.get(tp, 0) for tp in inputs})
        since = min((records[0].timestamp for records in commands.values() if records), default=None)
        results = await _read_since(consumer, results_topic(name), merchant.partitions, since)
        documents = await _read_since(consumer, receipts_topic(name), merchant.partitions, since)
    finally:
        await consumer.stop()
    shown: dict[str, Mapping[str, Any]] = {}
    for record in documents:
        document = json.loads(record.value or b"")
        # A document published again after an erasure is the same one without its buyer.
        shown.setdefault(document["number"], document)
    return History(commands, [Published.of(record) for record in results], shown, clock)


async def _read_since(consumer: AIOKafkaConsumer, topic: str, partitions: int, since: int | None) -> list[Record]:
    """Read a topic from a record time on."""
    if since is None:
        return []
    tps = [TP(topic, partition) for partition in range(partitions)]
    found = await consumer.offsets_for_times(dict.fromkeys(tps, since))
    starts = {tp: found[tp].offset for tp in tps if found.get(tp) is not None}
    return [record for records in (await _read(consumer, starts)).values() for record in records]


async def _read(consumer: AIOKafkaConsumer, starts: Mapping[TP, int]) -> dict[TP, list[Record]]:
    """Read partitions from offsets to their present ends.

    Raises:
        StackError: a part of what is to be read is gone from its topic.
    """
    found: dict[TP, list[Record]] = {tp: [] for tp in starts}
    if not starts:
        return found
    consumer.assign(list(starts))
    begins, ends = await consumer.beginning_offsets(list(starts)), await consumer.end_offsets(list(starts))
    for tp, start in starts.items():
        if start < begins[tp]:
            raise StackError(
                f"{tp.topic} {tp.partition} begins at {begins[tp]}, the backup needs it from {start}: "
                "what is between is past its retention. Use a newer backup."
            )
        consumer.seek(tp, min(start, ends[tp]))
    while behind := [tp for tp in starts if await consumer.position(tp) < ends[tp]]:
        for tp, records in (await consumer.getmany(*behind, timeout_ms=READ_MS)).items():
            found[tp] += [record for record in records if record.offset < ends[tp]]
    return found


# What is made of it


async def _impose(
    settings: WorkerSettings, merchant: Merchant, url: URL, history: History, progress: Progress
) -> Outcome:
    engine = create_unpooled_engine(
        engine_url(url.render_as_string(hide_password=False)), CONTROL_SETTINGS | {"search_path": SEARCH_PATH}
    )
    imposing = Reimposition(
        engine,
        merchant,
        history,
        Decimal(settings.resource_amount_max),
        lambda done, total: progress("published results", done, total),
    )
    try:
        return await imposing.run()
    except NotReproducedError as error:
        raise StackError(
            f"What was published cannot be reproduced from this backup, and nothing was changed: {error}"
        ) from error
    finally:
        await engine.dispose()


async def _compare(settings: WorkerSettings, merchant_id: str, url: URL) -> list[str]:
    checkpoint = await last_checkpoint(settings.kafka_bootstrap_servers, merchant_id, settings.security_kwargs())
    if checkpoint is None:
        return []
    engine = create_unpooled_engine(url, CONTROL_SETTINGS)
    try:
        async with engine.connect() as connection:
            return await compare(connection, checkpoint)
    finally:
        await engine.dispose()


async def _swap(control_url: str, role: str, database: str, made: str) -> str | None:
    """Put the restored database in place of the lost one; return the name under which that is kept, if it exists."""
    async with _administration(control_url) as connection:
        kept = None
        if await fetch(connection, "SELECT 1 FROM pg_database WHERE datname = $1", database):
            stamp = (await fetch(connection, "SELECT to_char(clock_timestamp(), 'YYYYMMDD_HH24MISS')"))[0][0]
            kept = f"{database}_lost_{stamp}"
            await connection.exec_driver_sql(f"ALTER DATABASE {quoted(database)} ALLOW_CONNECTIONS false")
            await _disconnect(connection, database)
            await connection.exec_driver_sql(f"ALTER DATABASE {quoted(database)} RENAME TO {quoted(kept)}")
            await connection.exec_driver_sql(f"ALTER DATABASE {quoted(kept)} ALLOW_CONNECTIONS true")
            await connection.exec_driver_sql(f"REVOKE ALL ON DATABASE {quoted(kept)} FROM PUBLIC, {quoted(role)}")
        await _disconnect(connection, made)
        await connection.exec_driver_sql(f"ALTER DATABASE {quoted(made)} RENAME TO {quoted(database)}")
        await connection.exec_driver_sql(f"GRANT CONNECT ON DATABASE {quoted(database)} TO {quoted(role)}")
    return kept


async def _disconnect(connection: AsyncConnection, database: str) -> None:
    """End a database's connections and wait for it; the server allows each five seconds."""
    sql = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = $1"
    for _ in range(DISCONNECT_TRIES):
        # It says false as well of one that has just ended by itself: only an empty list tells.
        if not await fetch(connection, sql, database):
            return
    raise StackError(f"Connections to {database} do not end. Stop the workers and try again.")


@asynccontextmanager
async def _administration(control_url: str) -> AsyncIterator[AsyncConnection]:
    url = engine_url(on_database(control_url, "postgres"))
    engine = create_unpooled_engine(url, CONTROL_SETTINGS, isolation_level="AUTOCOMMIT")
    try:
        async with engine.connect() as connection:
            yield connection
    finally:
        await engine.dispose()


async def reset_offsets(settings: WorkerSettings, positions: Mapping[TP, int]) -> bool | None:
    """Set the group's committed offsets back to where the database stands, where they are ahead of it.

    The workers' own positions are in the database; Kafka's only say where fetching starts, and must not be later.

    Returns:
        None if there was nothing to do, False if the group has members, so that the broker refuses: restart them all.
    """
    tps = list(positions)
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap_servers,
        group_id=settings.group,
        enable_auto_commit=False,
        **settings.security_kwargs(),
    )
    await consumer.start()
    try:
        consumer.assign(tps)
        committed = {tp: await consumer.committed(tp) for tp in tps}
        ahead = {tp: positions[tp] for tp in tps if (committed[tp] or 0) > positions[tp]}
        if not ahead:
            return None
        await consumer.commit({tp: OffsetAndMetadata(offset, "") for tp, offset in ahead.items()})
        return True
    except KafkaError:
        return False
    finally:
        await consumer.stop()


def lines(restored: Restored) -> Iterable[str]:
    """Say what a restore came to."""
    outcome = restored.outcome
    yield f"{outcome.commands} commands imposed in {outcome.batches} batches, {outcome.documents} documents among them"
    yield f"the books add up: {restored.report.entries} entries checked"
    if restored.checkpoint:
        yield "the last checkpoint is not reached yet: " + "; ".join(restored.checkpoint)
    if outcome.salts_lost:
        yield f"{len(outcome.salts_lost)} buyer blocks can no longer be checked against their documents"
    if restored.kept:
        yield f"the former database is kept as {restored.kept}; drop it when it is not needed any more"
    if restored.offsets_reset is False:
        yield "stop all workers and start them again: the group's offsets are ahead of the database"
    yield "resume the merchant: Merchant.Resume"
