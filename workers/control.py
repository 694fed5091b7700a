"""The commands of ``credits.control``: registering, suspending, resuming merchants, moving a test clock.

They change more than one database, so they are not one transaction: each step can be done again, and the last one,
in the control database, writes the result and the position together.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

import structlog
from aiokafka import TopicPartition as TP
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

import merchants.registry
import merchants.store
from catalog.sql import fetch
from merchants.databases import WRITER_SETTINGS, create_unpooled_engine, engine_url
from merchants.registry import Merchant
from schemas import payloads
from schemas.canonical import format_time
from schemas.envelope import DecodeContext, Incoming
from schemas.errors import Code, Refusal
from schemas.topics import CONTROL_CHANNEL
from workers import inbox, outgoing, positions
from workers.decide import Answer, Reception
from workers.inbox import DeadLetter, Row
from workers.lanes import Lease, Outcome, Record
from workers.pipeline import DATABASE_IS_LOST, Backoff, decode_safely, is_race, is_trouble, sqlstate
from workers.positions import REFUSED_WAIT_SECONDS, Claim, LostOwnershipError, Standoff
from workers.publisher import LeaseEndedError, Publisher, PublishTimeoutError
from workers.transaction import Message, plan

log = structlog.get_logger(__name__)

EnsureTopics = Callable[[Merchant], Awaitable[None]]
SendDue = Callable[[Merchant], Awaitable[object]]

PATIENCE_SECONDS = 30.0
"""How long a merchant's own database may keep the commands of other merchants waiting."""
_DEFECT = "the command could not be decided; the operators know"
_NO_ANSWER = "the merchant's database does not answer, send the command again when it does"
# What can be left half done and sent again.
_CAN_BE_REFUSED = frozenset({"Merchant.Suspend", "Merchant.Resume"})


@dataclass(kw_only=True)
class ControlDesk(Reception):
    """One message of the control topic; a command that is new waits in ``fresh`` for what it has to do."""

    fresh: tuple[Row, Incoming] | None = None

    def decide(self, row: Row, incoming: Incoming) -> None:
        self.fresh = (row, incoming)


@dataclass
class Control:
    """The handler of the control topic.

    ``ensure_topics`` makes a merchant's topics; ``send_due`` has a merchant's due jobs sent.
    """

    engine: AsyncEngine
    admin_url: str
    publisher: Publisher
    ensure_topics: EnsureTopics
    send_due: SendDue
    observers: list[Callable[[None, Sequence[Answer], Sequence[DeadLetter]], None]] = field(default_factory=list)
    _published: dict[TP, int] = field(default_factory=dict)
    _known_gaps: set[tuple[TP, int, int]] = field(default_factory=set)
    _secret: bytes = b""
    _standoff: Standoff = field(default_factory=Standoff)

    async def process(self, records: Sequence[Record], lease: Lease) -> Outcome:
        """Work on the records one by one; see ``workers.lanes.Handler``."""
        outcome = Outcome()
        for record in records:
            tp = TP(record.topic, record.partition)
            if tp in outcome.seek:
                continue
            try:
                if not await self._until_done(record, lease, outcome):
                    break
            except LostOwnershipError as lost:
                log.warning("a control command is dropped", reason=str(lost))
                self._standoff.begin(lease, asyncio.get_running_loop().time())
                await asyncio.sleep(REFUSED_WAIT_SECONDS)
                lease.first.add(tp)
                outcome.seek[tp] = record.offset
            else:
                self._standoff.end()
        return outcome

    async def idle(self, lease: Lease) -> None:
        try:
            async with self.engine.begin() as connection:
                await positions.note_published(connection, self._published, lease.worker_id)
        except Exception as error:
            # The next command's batch writes it again.
            if not is_trouble(error):
                raise
            log.warning("control positions are not noted", error=repr(error)[:500])

    async def _until_done(self, record: Record, lease: Lease, outcome: Outcome) -> bool:
        """Work on one record until it is done; False when it is this worker's no more."""
        backoff = Backoff(CONTROL_CHANNEL, lease)
        loop = asyncio.get_running_loop()
        impatient_at = loop.time() + PATIENCE_SECONDS
        while lease.alive():
            try:
                await self._once(record, lease, outcome, is_patient=loop.time() < impatient_at)
                return True
            except LostOwnershipError:
                raise
            except LeaseEndedError:
                return False
            except Exception as error:
                if not (is_trouble(error) or is_race(error) or isinstance(error, PublishTimeoutError)):
                    raise
                if not await backoff.wait(error):
                    return False
        return False

    async def _once(self, record: Record, lease: Lease, outcome: Outcome, *, is_patient: bool) -> None:
        tp = TP(record.topic, record.partition)
        message = await self._decode(record)
        async with self.engine.begin() as connection:
            todo, desk = await self._look_up(connection, message, lease)
        self._known_gaps |= todo.gaps
        if todo.seek:
            outcome.seek |= todo.seek
            return
        is_fresh = bool(todo.fresh)
        if is_fresh and desk.fresh is not None:
            await self._decide(desk, *desk.fresh, is_patient=is_patient)
        if is_fresh:
            await self._save(desk, message, lease)
        await self._publish(desk, lease)
        self._published[tp] = outcome.commit[tp] = record.offset + 1

    async def _decode(self, record: Record) -> Message:
        if not self._secret:
            async with self.engine.begin() as connection:
                self._secret = await merchants.registry.control_secret(connection)
        return decode_safely(record, DecodeContext(None, CONTROL_CHANNEL, self._secret, {}, Decimal(10**9)))

    async def _look_up(self, connection: AsyncConnection, message: Message, lease: Lease) -> tuple[Any, ControlDesk]:
        """Lock the position, and answer what was seen before."""
        todo = await plan(
            connection,
            [message],
            claim=self._standoff.claim(lease, asyncio.get_running_loop().time()),
            first=lease.first,
            published=self._published,
            known_gaps=self._known_gaps,
        )
        now = await self._now(connection)
        desk = ControlDesk(merchant_id=None, now=now)
        if not todo.seek and isinstance(message, Incoming):
            keys = [message.business_key] if message.business_key is not None else []
            identities = [message.identity, inbox.conflict_identity(message)]
            for row in await inbox.load(connection, identities, keys, control=True):
                desk.inbox[row.identity] = row
                if row.business_key is not None:
                    desk.keys[row.business_key] = row
            if todo.fresh or todo.repeat:
                desk.receive(message)
        elif todo.fresh and not isinstance(message, Incoming):
            log.error("a control message has no identity", code=message.code, offset=message.offset)
        await positions.save(connection, todo.rows)
        return todo, desk

    async def _now(self, connection: AsyncConnection) -> datetime:
        now: datetime = (await fetch(connection, "SELECT clock_timestamp()"))[0][0]
        return now

    async def _decide(self, desk: ControlDesk, row: Row, incoming: Incoming, *, is_patient: bool) -> None:
        try:
            effects = await _HANDLERS[incoming.type](self, incoming)
        except Refusal as refusal:
            desk.conclude(row, incoming, refusal, {}, None)
        except Exception as error:
            is_defect = not (is_trouble(error) or is_race(error))
            if not is_defect and (is_patient or incoming.type not in _CAN_BE_REFUSED):
                raise
            # Neither a defect of ours nor one merchant's database may stop the commands behind this one.
            log.exception("a control command cannot be decided", offset=incoming.offset)
            failure = Refusal(Code.INTERNAL_ERROR, _DEFECT if is_defect else _NO_ANSWER, {})
            desk.conclude(row, incoming, failure, {}, None)
            if is_defect:
                desk.dead_letter(incoming, failure)
        else:
            desk.conclude(row, incoming, None, effects, None)
            desk.claim_key(row, incoming)
        desk.add(row, incoming)

    async def _save(self, desk: ControlDesk, message: Message, lease: Lease) -> None:
        tp = TP(message.topic, message.partition)
        async with self.engine.begin() as connection:
            locked = await positions.lock(connection, [tp], Claim(lease.worker_id, lease.generation))
            if locked[tp].owner != lease.worker_id:
                raise LostOwnershipError(tp.topic)
            for row in desk.new_rows:
                row.result = inbox.result_text(row)
            await inbox.save(connection, desk.new_rows, [])
            letters = desk.letters
            if not isinstance(message, Incoming):
                letters = [inbox.letter_of(message, desk.now)]
            await inbox.save_dead_letters(connection, letters)
            locked[tp].applied_next = message.offset + 1
            await positions.save(connection, locked)

    async def _publish(self, desk: ControlDesk, lease: Lease) -> None:
        await self.publisher.publish(outgoing.results(None, desk.answers, {}), lease)
        for observer in self.observers:
            observer(None, desk.answers, desk.letters)
        for reply in outgoing.replies(None, desk.answers, {}):
            await self.publisher.publish_quietly(reply)

    # Commands

    async def _merchant(self, merchant_id: str) -> Merchant:
        async with self.engine.connect() as connection:
            merchant = await merchants.registry.find(connection, merchant_id)
        if merchant is None or merchant.state == "provisioning":
            raise Refusal(Code.UNKNOWN_MERCHANT, "there is no such merchant", {"merchant_id": merchant_id})
        return merchant

    async def register(self, incoming: Incoming) -> dict[str, Any]:
        """Make a merchant: registry row, role, database, configuration, topics, then `active`."""
        command: payloads.MerchantRegister = incoming.payload
        async with self.engine.begin() as connection:
            merchant = await merchants.registry.reserve(
                connection,
                command.merchant_id,
                database_url=merchants.registry.server_url(self.admin_url),
                partitions=command.partitions,
                simulated=command.simulated,
                command=incoming.identity,
                fingerprint=incoming.fingerprint,
            )
        if merchant.fingerprint != incoming.fingerprint:
            raise Refusal(
                Code.IDEMPOTENCY_CONFLICT,
                "another registration of this merchant is under way",
                {"fields": [], "first": {}},
            )
        await merchants.registry.provision(self.admin_url, merchant, command.config, command.actor)
        await self.ensure_topics(merchant)
        async with self.engine.begin() as connection:
            await merchants.registry.set_state(connection, merchant.merchant_id, "active")
        log.info("merchant registered", merchant=merchant.merchant_id)
        return {
            "merchant_id": merchant.merchant_id,
            "state": "active",
            "version": 1,
            "partitions": merchant.partitions,
            "simulated": merchant.simulated,
        }

    async def suspend(self, incoming: Incoming) -> dict[str, Any]:
        return await self._set_state(incoming, "suspended")

    async def resume(self, incoming: Incoming) -> dict[str, Any]:
        return await self._set_state(incoming, "active")

    async def _set_state(self, incoming: Incoming, state: str) -> dict[str, Any]:
        """Write a state into the merchant's own database, where every batch sees it, and into the registry.

        A database that is lost has no batches. Its merchant is suspended, as a restore wants it, and not resumed.
        """
        merchant = await self._merchant(incoming.payload.merchant_id)
        try:
            async with self._database(merchant) as connection:
                await merchants.store.set_suspended(connection, state == "suspended")
        except DBAPIError as error:
            if sqlstate(error) != DATABASE_IS_LOST:
                raise
            if state != "suspended":
                raise Refusal(Code.INTERNAL_ERROR, "the merchant's database is lost, restore it first", {}) from error
        async with self.engine.begin() as connection:
            await merchants.registry.set_state(connection, merchant.merchant_id, state)
        return {"merchant_id": merchant.merchant_id, "state": state}

    @asynccontextmanager
    async def _database(self, merchant: Merchant) -> AsyncIterator[AsyncConnection]:
        url = engine_url(merchant.database_url, password=merchant.password)
        engine = create_unpooled_engine(url, WRITER_SETTINGS)
        try:
            async with engine.begin() as connection:
                yield connection
        finally:
            await engine.dispose()

    async def advance(self, incoming: Incoming) -> dict[str, Any]:
        """Move a simulated merchant's clock; done when everything due by then has been sent."""
        command: payloads.ClockAdvance = incoming.payload
        merchant = await self._merchant(command.merchant_id)
        if not merchant.simulated:
            raise Refusal(
                Code.IMMUTABLE, "only a simulated merchant's clock moves", {"merchant_id": command.merchant_id}
            )
        try:
            async with self._database(merchant) as connection:
                offset, now = await merchants.store.advance_clock(connection, command.seconds, incoming.identity)
        except OverflowError as error:
            raise Refusal(Code.LIMIT_EXCEEDED, f"seconds: {error}", {"fields": ["seconds"]}) from error
        await self.send_due(merchant)
        return {
            "merchant_id": command.merchant_id,
            "offset_seconds": offset.days * 86_400 + offset.seconds,
            "now": format_time(now),
        }


_HANDLERS: Mapping[str, Callable[[Control, Incoming], Awaitable[dict[str, Any]]]] = {
    "Merchant.Register": Control.register,
    "Merchant.Suspend": Control.suspend,
    "Merchant.Resume": Control.resume,
    "Clock.Advance": Control.advance,
}
