"""One batch of a merchant in one transaction: lock, load, decide, save (spec §9.1; the order of locks is the design).

Locks, always in this order: positions, accounts, parked commands, the merchant's state, unique keys, document series.
What can change is read after the account locks; then the clock is read, once.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from aiokafka import TopicPartition as TP
from sqlalchemy.ext.asyncio import AsyncConnection

import catalog.decisions
import catalog.store
import ledger.store
import merchants.store
import receipts.store
from catalog.model import Catalog
from catalog.sql import insert_rows
from ledger.books import Books
from ledger.decisions import FULFILMENTS
from ledger.model import TOMBSTONE, Account, account_id_of, parse_entry_id
from merchants.decisions import Settings
from receipts.tables import fiscal_receipts
from schemas import payloads
from schemas.envelope import Incoming, Undeliverable, business_key_digest, message_identity
from schemas.payloads import COMMANDS, MerchantConfig
from workers import documents, inbox, positions
from workers.decide import Answer, Desk, answer_from_store, member
from workers.documents import Issued, numbers_by_command
from workers.faults import planted, point
from workers.inbox import DeadLetter, Parked, Row
from workers.positions import Claim, LostOwnershipError, Position
from workers.publisher import OutMessage

Message = Incoming | Undeliverable

_SETTINGS_COMMANDS = frozenset({"Merchant.Configure", "UserRole.Assign", "UserRole.Revoke"})


class SuspendedError(Exception):
    """The merchant is suspended: its messages stay in their topics."""


class RacedError(Exception):
    """Another worker committed between this batch's reads before its locks and those after: read again."""


class StaleContextError(Exception):
    """The merchant's configuration changed since the batch was decoded: decode it again."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a worker remembers of a merchant between batches; versions tell whether it still holds."""

    merchant_id: str
    secret: bytes
    simulated: bool
    config_version: int = 0
    config: MerchantConfig | None = None
    catalog: Catalog = field(default_factory=Catalog)


@dataclass(slots=True)
class Plan:
    """What becomes of a batch's messages, by where their partitions stand."""

    rows: dict[TP, Position]
    seek: dict[TP, int] = field(default_factory=dict)
    gaps: set[tuple[TP, int, int]] = field(default_factory=set)  # why; known as soon as the batch is committed
    repeat: list[Message] = field(default_factory=list)  # decided already, published perhaps
    fresh: list[Message] = field(default_factory=list)


@dataclass(slots=True)
class Applied:
    """What a committed batch has to publish, and the context as it left it."""

    context: Context
    seek: dict[TP, int] = field(default_factory=dict)
    next_offsets: dict[TP, int] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    issued: list[Issued] = field(default_factory=list)
    republished: list[receipts.store.Stored] = field(default_factory=list)  # documents read back
    letters: list[DeadLetter] = field(default_factory=list)
    accounts: Mapping[int, Account] = field(default_factory=dict)
    messages: list[OutMessage] = field(default_factory=list)


@dataclass(slots=True)
class Wanted:
    """What the commands of a batch name, so that all of it can be loaded at once."""

    accounts: set[int] = field(default_factory=set)
    operations: set[str] = field(default_factory=set)
    purchases: set[str] = field(default_factory=set)
    disputes: set[str] = field(default_factory=set)
    lots: set[tuple[int, int]] = field(default_factory=set)
    receipts: set[str] = field(default_factory=set)
    subjects: set[int] = field(default_factory=set)
    tombstones: set[str] = field(default_factory=set)
    targets: set[bytes] = field(default_factory=set)  # of Command.Resolve
    fulfilled: set[tuple[str, str]] = field(default_factory=set)
    erased: set[int] = field(default_factory=set)
    types: set[str] = field(default_factory=set)

    def add(self, command_type: str, payload: Any, secret: bytes) -> None:
        self.types.add(command_type)
        user_id = payload.__dict__.get("user_id")
        if user_id is not None:
            account_id = account_id_of(user_id, secret)
            self.accounts.add(account_id)
            self._add_tombstone(user_id)
            if command_type == "User.Erase":
                self.erased.add(account_id)
        fulfils = FULFILMENTS.get(command_type)
        if fulfils is not None:
            dependency = fulfils(payload)
            self.fulfilled.add((dependency.kind, dependency.key))
        match payload:
            case payloads.OperationRecordAndClose() | payloads.OperationCancel():
                self.operations.add(payload.operation_id)
            case payloads.OperationExpire():
                self.operations.add(payload.operation_id)
            case payloads.LotExpire():
                key = parse_entry_id(payload.lot_id)
                if key is not None:
                    self.lots.add(key)
            case payloads.RefundApply() | payloads.ChargebackApply():
                self.purchases.add(payload.external_ref)
            case payloads.ChargebackReverse():
                self.disputes.add(payload.dispute_id)
            case payloads.ReceiptAttachFiscal():
                self.receipts.add(payload.receipt_number)
            case payloads.UserRoleAssign() | payloads.UserRoleRevoke():
                subject = account_id_of(payload.subject, secret)
                self.subjects.add(subject)
                self.accounts.add(subject)
                self._add_tombstone(payload.subject)
            case payloads.CommandResolve():
                self.targets.add(message_identity(payload.source, payload.id))

    def _add_tombstone(self, user_id: str) -> None:
        """Have an erased user's account found by the tombstone, which is the only name others have of it."""
        if user_id.startswith(TOMBSTONE):
            self.tombstones.add(user_id)


def next_offsets(messages: Iterable[Message]) -> dict[TP, int]:
    """Tell, for each partition, the offset after its last message."""
    return {TP(m.topic, m.partition): m.offset + 1 for m in messages}


async def plan(
    connection: AsyncConnection,
    messages: Sequence[Message],
    *,
    claim: Claim,
    first: set[TP],
    published: Mapping[TP, int],
    known_gaps: Set[tuple[TP, int, int]],
) -> Plan:
    """Lock the positions and sort the messages out: done with, decided already, fresh.

    ``first`` are partitions newly assigned: this worker takes them over, and one that does not begin where the last
    owner's published results end is read again from there (once for the same gap: compaction and retention are legal).
    """
    starts: dict[TP, int] = {}
    for message in messages:
        starts.setdefault(TP(message.topic, message.partition), message.offset)
    rows = await positions.lock(connection, starts, claim)
    result = Plan(rows)
    for tp, row in rows.items():
        row.note_published(published.get(tp, 0))
        if tp in first:
            row.take_over(claim)
            gap = (tp, row.published_next, starts[tp])
            if starts[tp] > row.published_next and gap not in known_gaps and not planted("commit_early"):
                result.gaps.add(gap)
                result.seek[tp] = row.published_next
        elif row.owner != claim.worker_id and not planted("no_owner_fence"):
            raise LostOwnershipError(f"{tp.topic} {tp.partition} belongs to {row.owner}")
    for message in messages:
        tp = TP(message.topic, message.partition)
        row = rows[tp]
        if tp in result.seek or message.offset < row.published_next:
            continue
        (result.repeat if message.offset < row.applied_next else result.fresh).append(message)
    return result


async def _nothing_published() -> Mapping[TP, int]:
    return {}


@dataclass
class Batch:
    """The transaction of one batch.

    ``published`` is asked last, and may wait for it: how far the batches before this one are published.
    """

    connection: AsyncConnection
    context: Context
    lots_wanted: Mapping[int, int] = field(default_factory=dict)
    condemned: frozenset[inbox.Position] = frozenset()
    published: Callable[[], Awaitable[Mapping[TP, int]]] = _nothing_published

    async def apply(self, todo: Plan) -> Applied:
        """Decide the fresh messages, read back what the others were answered, save everything."""
        applied = Applied(self.context, todo.seek)
        fresh = [m for m in todo.fresh if isinstance(m, Incoming)]
        if fresh or todo.repeat:
            desk = await self._load(fresh, [m for m in todo.repeat if isinstance(m, Incoming)])
            await self._repeat(todo.repeat, desk, applied)
            await point("before_decide")
            for message in todo.fresh:
                if isinstance(message, Incoming):
                    desk.receive(message)
                else:
                    desk.letters.append(inbox.letter_of(message, desk.now))
            await point("after_decide")
            await self._save(desk, applied)
            applied.answers += desk.answers
            applied.letters += desk.letters
            applied.accounts = desk.books.accounts
        elif todo.fresh:
            state = await merchants.store.read_state(self.connection)
            applied.letters = [inbox.letter_of(m, state.now) for m in todo.fresh if isinstance(m, Undeliverable)]
            await inbox.save_dead_letters(self.connection, applied.letters)
        for tp, offset in next_offsets(todo.fresh).items():
            todo.rows[tp].applied_next = offset
        published = await self.published()
        for tp, row in todo.rows.items():
            row.note_published(published.get(tp, 0))
            if planted("wrong_position"):
                row.published_next = row.applied_next
        await positions.save(self.connection, todo.rows)
        return applied

    # Loading

    async def _load(self, fresh: Sequence[Incoming], repeated: Sequence[Incoming]) -> Desk:
        context, connection = self.context, self.connection
        wanted = Wanted()
        for message in fresh:
            if message.payload is not None:
                wanted.add(message.type, message.payload, context.secret)
        waiting = await self._candidates(wanted, [m.identity for m in fresh])
        await self._name_accounts(wanted)
        accounts = await ledger.store.lock_accounts(connection, wanted.accounts)
        await point("after_lock")
        if waiting:
            identities = [parked.identity for parked in waiting]
            waiting = await inbox.parked_for(connection, (), (), identities, lock=True)
        desk = await self._desk(wanted, accounts)
        if context.simulated and fresh:
            oldest = min(message.record_time for message in fresh)
            desk.advances = await merchants.store.advances_since(connection, oldest, desk.clock_offset)
        desk.parked = {parked.identity: parked for parked in waiting}
        await self._load_inbox(desk, [*fresh, *repeated], waiting)
        await ledger.store.load(
            connection,
            desk.books,
            operation_ids=wanted.operations,
            external_refs=wanted.purchases,
            named_lots=wanted.lots,
            lots_wanted=self.lots_wanted,
        )
        await self._load_rest(desk, wanted)
        self._check_for_races(desk, fresh)
        return desk

    def _check_for_races(self, desk: Desk, fresh: Sequence[Incoming]) -> None:
        """Make sure that what was looked up before the locks is what was found after them."""
        books = desk.books
        owners = {purchase.account_id for purchase in books.purchases.values()}
        if not owners <= books.accounts.keys():
            raise RacedError("a purchase came in")
        for message in fresh:
            row = desk.inbox.get(message.identity)
            if row is not None and row.result is None and row.identity not in desk.parked:
                raise RacedError("a command was parked")

    async def _candidates(self, wanted: Wanted, identities: list[bytes]) -> list[Parked]:
        """Read, without locks yet, the parked commands that this batch may repeat or release, and what these name."""
        found: dict[bytes, Parked] = {}
        sought: set[tuple[str, str]] = set()
        keys, names = wanted.fulfilled, [*identities, *wanted.targets]
        while keys or names:
            sought |= keys
            for parked in await inbox.parked_for(self.connection, list(keys), list(wanted.erased), names):
                if parked.identity not in found:
                    found[parked.identity] = parked
                    model = COMMANDS[parked.type].model
                    wanted.add(parked.type, model.model_validate_json(parked.payload), self.context.secret)
            keys, names = wanted.fulfilled - sought, []
        return sorted(found.values(), key=lambda parked: parked.arrived)

    async def _name_accounts(self, wanted: Wanted) -> None:
        """Find out whose accounts the commands concern that do not name a user."""
        connection = self.connection
        if wanted.disputes:
            found = await ledger.store.purchases_of_disputes(connection, sorted(wanted.disputes))
            wanted.purchases |= set(found.values())
        if wanted.purchases:
            owners = await ledger.store.accounts_of_purchases(connection, sorted(wanted.purchases))
            wanted.accounts |= set(owners.values())
        if wanted.tombstones:
            erased = await ledger.store.accounts_of_tombstones(connection, sorted(wanted.tombstones))
            wanted.accounts |= set(erased.values())

    async def _desk(self, wanted: Wanted, accounts: dict[int, Account]) -> Desk:
        changes_settings = bool(wanted.types & (_SETTINGS_COMMANDS | catalog.decisions.HANDLERS.keys()))
        state = await merchants.store.read_state(self.connection, for_update=changes_settings)
        if state.suspended:
            raise SuspendedError
        context = self.context
        if state.config_version != context.config_version or context.config is None:
            config = await merchants.store.read_config(self.connection, state.config_version)
            is_stale = context.config is None or config.external_ref_patterns != context.config.external_ref_patterns
            context = replace(context, config_version=state.config_version, config=config)
            self.context = context
            if is_stale:
                raise StaleContextError
        if state.catalog_version != context.catalog.version:
            context = replace(context, catalog=await catalog.store.load(self.connection, state.catalog_version))
            self.context = context
        assert context.config is not None
        newest = (a.last_entry_at for a in accounts.values() if a.last_entry_at is not None)
        books = Books(
            now=max(chain((state.now,), newest)),
            config=context.config,
            config_version=context.config_version,
            catalog=context.catalog,
            accounts=accounts,
        )
        settings = Settings(context.config_version, context.config)
        return Desk(
            merchant_id=context.merchant_id,
            now=books.now,
            secret=context.secret,
            books=books,
            settings=settings,
            condemned=self.condemned,
            clock_offset=state.clock_offset,
        )

    async def _load_inbox(self, desk: Desk, messages: Sequence[Incoming], waiting: Sequence[Parked]) -> None:
        identities = {m.identity for m in messages} | {parked.identity for parked in waiting}
        identities |= {message_identity(m.payload.source, m.payload.id) for m in messages if _is_resolve(m)}
        keys = {m.business_key for m in messages if m.business_key is not None}
        keys |= {key for parked in waiting if (key := _parked_key(parked, desk.secret)) is not None}
        self._add_rows(desk, await inbox.load(self.connection, list(identities), list(keys)))
        conflicts = [
            inbox.conflict_identity(m)
            for m in messages
            if (seen := desk.inbox.get(m.identity)) is not None and seen.fingerprint != m.fingerprint
        ]
        if conflicts:
            self._add_rows(desk, await inbox.load(self.connection, conflicts, ()))

    def _add_rows(self, desk: Desk, rows: Iterable[Row]) -> None:
        for row in rows:
            desk.inbox[row.identity] = row
            if row.business_key is not None:
                desk.keys[row.business_key] = row

    async def _load_rest(self, desk: Desk, wanted: Wanted) -> None:
        if wanted.receipts:
            found = await receipts.store.existing_numbers(self.connection, sorted(wanted.receipts))
            desk.fiscal.numbers |= found
        if wanted.subjects:
            desk.settings.roles = await merchants.store.load_roles(self.connection, sorted(wanted.subjects))
        if "Merchant.Configure" in wanted.types:
            desk.settings.prefixes = await merchants.store.load_prefixes(self.connection)
        if wanted.tombstones:
            desk.tombstones = {a.user_id: a.account_id for a in desk.books.accounts.values() if a.erased_at is not None}

    # Deliveries that were decided before

    async def _repeat(self, messages: Sequence[Message], desk: Desk, applied: Applied) -> None:
        """Answer from what is stored; at its own position a command repeats all that it put out."""
        released: list[tuple[bytes, str | None]] = []
        own: list[bytes] = []
        for message in messages:
            if not isinstance(message, Incoming):
                continue
            row = desk.inbox[message.identity]
            place = (message.topic, message.partition, message.offset)
            # What is read from the same bytes may differ from the first time, when the configuration or the release
            # has changed since; the position tells that it is the same message.
            if row.position != place and row.fingerprint != message.fingerprint:
                row = desk.inbox.get(inbox.conflict_identity(message), row)
            whole = row.position == place
            if whole:
                own.append(row.identity)
                user_id = member(message.payload, "user_id")
                released += [(identity, user_id) for identity in row.released_identities()]
            if row.result is not None:
                applied.answers.append(desk.answer(row, message, whole=whole))
        identities = [identity for identity, _ in released]
        rows = {row.identity: row for row in await inbox.load(self.connection, identities, ())} if released else {}
        for identity, user_id in released:
            row = rows[identity]
            if row.user_id is None and user_id is not None and desk.account_id_of(user_id) == row.account_id:
                # The user has no account: nothing but the command that released this one names him.
                row.user_id = user_id
            applied.answers.append(answer_from_store(row))
        applied.republished = await receipts.store.documents_of(self.connection, [*own, *identities])
        places = [(m.topic, m.partition, m.offset) for m in messages]
        applied.letters += await inbox.load_dead_letters(self.connection, places)

    # Saving

    async def _save(self, desk: Desk, applied: Applied) -> None:
        connection, books = self.connection, desk.books
        await ledger.store.save_ledger(connection, books)
        await point("after_ledger")
        catalog_changed = bool(desk.catalog_rows)
        if catalog_changed:
            await catalog.store.save(connection, desk.catalog_rows)
        if desk.settings.new_versions or desk.settings.changed_roles:
            await merchants.store.save_settings(connection, desk.settings, books.now)
        if desk.settings.new_versions or catalog_changed:
            await merchants.store.bump_versions(
                connection, config_version=desk.settings.version, catalog_changed=catalog_changed
            )
        applied.issued = await documents.issue(
            connection, books, clock_offset=desk.clock_offset, simulated=self.context.simulated
        )
        if applied.issued:
            await self._release_for_documents(desk, applied.issued)
        _show_numbers(desk, applied.issued)
        await ledger.store.save_purchases(connection, books)
        names = tuple(column.name for column in fiscal_receipts.columns)
        await insert_rows(connection, fiscal_receipts, names, desk.fiscal.attached)
        if books.erased:
            erased = [account.account_id for account in books.erased]
            await receipts.store.erase_buyers(connection, erased)
        await point("after_documents")
        await self._save_delivery(desk)
        applied.context = self.context

    async def _release_for_documents(self, desk: Desk, issued: Sequence[Issued]) -> None:
        numbers = numbers_by_command(issued)
        dependencies = [("receipt", number) for number in numbers.values()]
        known = desk.parked.keys() | set(desk.gone_parked)
        found = await inbox.parked_for(self.connection, dependencies, lock=True)
        waiting = [parked for parked in found if parked.identity not in known]
        rows = await inbox.load(self.connection, [parked.identity for parked in waiting], ()) if waiting else []
        desk.inbox |= {row.identity: row for row in rows}
        # Those of former batches arrived before those of this one.
        desk.parked = {parked.identity: parked for parked in waiting} | desk.parked
        desk.release_for_documents(numbers)

    async def _save_delivery(self, desk: Desk) -> None:
        for row in chain(desk.new_rows, desk.resolved_rows):
            if row.body:
                row.result = inbox.result_text(row)
        await inbox.save(self.connection, desk.new_rows, desk.resolved_rows)
        new, changed = list(desk.new_parked.values()), list(desk.changed_parked.values())
        await inbox.save_parked(self.connection, new, changed, desk.gone_parked)
        await inbox.save_dead_letters(self.connection, desk.letters)
        refused = [
            (row.identity, external_ref, refusal.code, refusal.message, row.decided_at)
            for row, external_ref, refusal in desk.refused_purchases
        ]
        await ledger.store.save_refusals(self.connection, refused)


def _is_resolve(message: Incoming) -> bool:
    return message.type == "Command.Resolve" and message.payload is not None


def _parked_key(parked: Parked, secret: bytes) -> bytes | None:
    spec = COMMANDS[parked.type]
    key = spec.business_key(spec.model.model_validate_json(parked.payload))
    return None if key is None else business_key_digest(parked.type, key, secret)


def _show_numbers(desk: Desk, issued: Sequence[Issued]) -> None:
    for item in issued:
        name = documents.NUMBER_IN_EFFECTS.get(item.document.kind)
        if name is not None:
            desk.inbox[item.document.command].body["effects"][name] = item.document.number
