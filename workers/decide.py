"""Decides a batch, message by message, over what was loaded for it: pure (spec §9).

The order of every message: seen before? refused for what it is? business key known? its dependency there? Only then
do time and the command move the books.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

import catalog.decisions
import ledger.decisions
import merchants.decisions
from catalog.decisions import Row as CatalogRow
from ledger.books import Books
from ledger.decisions import DEPENDENCIES, FULFILMENTS, Dependency, Given
from ledger.model import Account, LotsNeeded, TimeEffects, account_id_of
from merchants.decisions import Settings
from schemas.canonical import format_time
from schemas.envelope import Incoming, differing_fields, message_identity
from schemas.errors import Code, Refusal
from schemas.payloads import ReceiptAttachFiscal
from workers.inbox import DeadLetter, Parked, Position, Row, conflict_identity, incoming_of, payload_text

PARKED_FOR = {"operation": timedelta(minutes=15), "receipt": timedelta(minutes=15)}
PARKED_FOR_MONEY = timedelta(days=7)

# Commands that are decided for erased users too; every other one that names such a user is refused.
_DESPITE_ERASURE = frozenset({"Lot.Expire", "Operation.Expire"})


class PoisonError(Exception):
    """A command could not be decided for a reason that is a defect of ours; it names where the command stands."""

    def __init__(self, topic: str, partition: int, offset: int) -> None:
        super().__init__(topic, partition, offset)
        self.position = (topic, partition, offset)


@dataclass(slots=True)
class Answer:
    """One delivery's answer: the row whose result is published, and how this delivery asked for it."""

    row: Row
    partition: int
    source: str
    id: str
    payload: Any
    reply_to: str | None
    traceparent: str | None
    whole: bool  # also what else the command put out: documents, and results of released commands
    times: int = 1


@dataclass(slots=True)
class Fiscal:
    """Fiscal receipts of a batch: the documents known by number, and what was attached."""

    numbers: set[str] = field(default_factory=set)
    attached: list[tuple[Any, ...]] = field(default_factory=list)


@dataclass(kw_only=True)
class Reception:
    """Tells first deliveries from repeated ones, and keeps what is to be answered (spec §9.2–§9.6).

    ``inbox`` holds the rows of messages seen before by identity, ``keys`` by business key.
    """

    merchant_id: str | None
    now: datetime
    inbox: dict[bytes, Row] = field(default_factory=dict)
    keys: dict[bytes, Row] = field(default_factory=dict)
    parked: dict[bytes, Parked] = field(default_factory=dict)
    condemned: frozenset[Position] = frozenset()

    new_rows: list[Row] = field(default_factory=list)
    new_parked: dict[bytes, Parked] = field(default_factory=dict)
    changed_parked: dict[bytes, Parked] = field(default_factory=dict)
    letters: list[DeadLetter] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    refused_purchases: list[tuple[Row, str | None, Refusal]] = field(default_factory=list)

    @cached_property
    def applied_at(self) -> str:
        """The moment of all that is decided now, as it is shown."""
        return format_time(self.now)

    def decide(self, row: Row, incoming: Incoming) -> None:
        """Decide a command that is new in every respect."""
        raise NotImplementedError

    def account_id(self, incoming: Incoming) -> int | None:  # noqa: ARG002 - a merchant's desk knows accounts
        """Tell whose account a command concerns, if any."""
        return None

    def account_of(self, row: Row) -> Account | None:  # noqa: ARG002 - a merchant's desk knows accounts
        """Return the account whose figures the result shows."""
        return None

    def receive(self, incoming: Incoming) -> None:
        """Answer one delivery. Raises LotsNeeded, or PoisonError for what is a defect of ours."""
        try:
            self._receive(incoming)
        except LotsNeeded:
            raise
        except Exception as error:
            raise PoisonError(incoming.topic, incoming.partition, incoming.offset) from error

    def _receive(self, incoming: Incoming) -> None:
        seen = self.inbox.get(incoming.identity)
        if seen is None:
            self._first_delivery(incoming)
        elif seen.fingerprint == incoming.fingerprint:
            self._answer_again(seen, incoming)
        else:
            self._other_content(seen, incoming)

    def _answer_again(self, row: Row, incoming: Incoming) -> None:
        if row.result is None and not row.body:
            waiting = self.parked[row.identity]
            waiting.waiting += 1
            if row.identity not in self.new_parked:
                self.changed_parked[row.identity] = waiting
            return
        self.answers.append(self.answer(row, incoming, whole=False))

    def _other_content(self, seen: Row, incoming: Incoming) -> None:
        identity = conflict_identity(incoming)
        again = self.inbox.get(identity)
        if again is not None:
            self._answer_again(again, incoming)
            return
        self._refuse(self.row(incoming, identity), incoming, incoming.error or self.conflict(seen, incoming))
        if incoming.error is not None:
            self.dead_letter(incoming, incoming.error)

    def _first_delivery(self, incoming: Incoming) -> None:
        row = self.row(incoming, incoming.identity)
        first = self.keys.get(incoming.business_key) if incoming.business_key is not None else None
        if incoming.error is not None:
            self._refuse(row, incoming, incoming.error)
            self.dead_letter(incoming, incoming.error)
        elif (incoming.topic, incoming.partition, incoming.offset) in self.condemned:
            refusal = Refusal(Code.INTERNAL_ERROR, "the command could not be decided; the operators know", {})
            self._refuse(row, incoming, refusal)
            self.dead_letter(incoming, refusal)
        elif first is None:
            self.decide(row, incoming)
        elif first.fingerprint == incoming.fingerprint:
            self.repeat(row, first, incoming)
            self.add(row, incoming)
        else:
            self._refuse(row, incoming, self.conflict(first, incoming))

    def repeat(self, row: Row, first: Row, incoming: Incoming) -> None:
        """Give a new message with a known business key the original's outcome under its own identity."""
        row.outcome, row.code, row.account_id = first.outcome, first.code, first.account_id
        row.decided_at = self.now
        row.body = replayed(self._names(incoming), self._result_of(first))

    def _result_of(self, row: Row) -> dict[str, Any]:
        return row.body or row.stored_result()

    def conflict(self, first: Row, incoming: Incoming) -> Refusal:
        """Name what differs from the first message, and which one that was."""
        fields = differing_fields(first.digests, incoming.digests)
        if first.type != incoming.type:
            fields = ["ce_type", *fields]
        waiting = self.parked.get(first.identity)
        original = named(self._result_of(first)) if waiting is None else waiting.names()
        details = {"fields": fields, "first": original}
        return Refusal(Code.IDEMPOTENCY_CONFLICT, "the same message or key came with other content before", details)

    def row(self, incoming: Incoming, identity: bytes) -> Row:
        return Row(
            identity=identity,
            fingerprint=incoming.fingerprint,
            digests=incoming.digests,
            business_key=None,
            type=incoming.type,
            topic=incoming.topic,
            partition=incoming.partition,
            kafka_offset=incoming.offset,
            encoding=int(incoming.encoding),
            account_id=None,
            actor=member(incoming.payload, "actor"),
        )

    def _names(self, incoming: Incoming) -> dict[str, Any]:
        names = {"command_id": incoming.id, "command_source": incoming.source, "command_type": incoming.type}
        merchant_id = self.merchant_id or incoming.merchant_id
        return names if merchant_id is None else names | {"merchant_id": merchant_id}

    def add(self, row: Row, incoming: Incoming) -> None:
        """Keep a decided message's row, and have it answered."""
        self.inbox[row.identity] = row
        self.new_rows.append(row)
        self.answers.append(self.answer(row, incoming, whole=True))

    def answer(self, row: Row, incoming: Incoming, *, whole: bool) -> Answer:
        return Answer(
            row,
            incoming.partition,
            incoming.source,
            incoming.id,
            # What was refused without its payload is answered without it, even if it would be let through by now.
            incoming.payload if row.digests else None,
            incoming.reply_to,
            incoming.traceparent,
            whole,
        )

    def _refuse(self, row: Row, incoming: Incoming, refusal: Refusal) -> None:
        if incoming.payload is not None:
            # So that a repetition of the answer names the user as the account does then, not as the message did.
            row.account_id = self.account_id(incoming)
        self.conclude(row, incoming, refusal, {}, None)
        self.add(row, incoming)

    def dead_letter(self, incoming: Incoming, refusal: Refusal) -> None:
        self.letters.append(
            DeadLetter(
                incoming.topic,
                incoming.partition,
                incoming.offset,
                incoming.value_sha256,
                refusal.code,
                refusal.message,
                self.now,
            )
        )

    def conclude(
        self,
        row: Row,
        incoming: Incoming,
        refusal: Refusal | None,
        effects: dict[str, Any],
        time_effects: dict[str, Any] | None,
    ) -> None:
        """Write the outcome into the row, with the figures of its account after the command."""
        row.outcome = "applied" if refusal is None else "rejected"
        row.decided_at = self.now
        body = self._names(incoming)
        body["outcome"] = row.outcome
        if refusal is not None:
            row.code = refusal.code
            if incoming.type == "Purchase.Settled":
                external_ref = member(incoming.payload, "external_ref") or incoming.order
                self.refused_purchases.append((row, external_ref, refusal))
            body["error"] = {"code": refusal.code, "message": refusal.message, "details": refusal.details}
        account = self.account_of(row)
        if account is not None:
            body["user_seq"] = account.last_seq
            body["balance"] = account.balance
            body["debt"] = account.debt
        body["applied_at"] = self.applied_at
        body["effects"] = effects
        if time_effects:
            body["time_effects"] = time_effects
        row.body = body

    def claim_key(self, row: Row, incoming: Incoming) -> None:
        """Let no other message with the command's business key be decided again."""
        row.business_key = incoming.business_key
        if incoming.business_key is not None:
            self.keys[incoming.business_key] = row


@dataclass(kw_only=True)
class Desk(Reception):
    """A merchant's batch while it is decided: what was loaded, and what has come of it so far."""

    secret: bytes
    books: Books
    settings: Settings
    fiscal: Fiscal = field(default_factory=Fiscal)
    tombstones: dict[str, int] = field(default_factory=dict)
    clock_offset: timedelta = timedelta(0)
    # When a test clock was moved after the batch's records were taken, and how far.
    advances: Sequence[tuple[datetime, timedelta]] = ()

    resolved_rows: list[Row] = field(default_factory=list)
    gone_parked: list[bytes] = field(default_factory=list)
    catalog_rows: list[CatalogRow] = field(default_factory=list)
    released_by_job: list[bytes] = field(default_factory=list)
    _accounts: dict[str, int] = field(default_factory=dict)

    def account_of(self, row: Row) -> Account | None:
        return self.books.account(row.account_id) if row.account_id is not None else None

    # Commands

    def decide(self, row: Row, incoming: Incoming) -> None:
        dependency_of = DEPENDENCIES.get(incoming.type)
        dependency = dependency_of(incoming.payload) if dependency_of else None
        if dependency is not None and not self.is_there(dependency):
            row.account_id = self.account_id(incoming)
            if not names_erased(incoming, self.account_of(row)):
                self._park(row, incoming, dependency)
                return
        self._settle(row, incoming)
        self.add(row, incoming)
        if incoming.type == "User.Erase" and row.outcome == "applied" and row.account_id is not None:
            merchants.decisions.forget(self.settings, row.account_id)
        released = self.released_by_job + self._release_after(incoming, row)
        self.released_by_job = []
        row.released = b"".join(released) or None

    def is_there(self, dependency: Dependency) -> bool:
        books = self.books
        match dependency.kind:
            case "operation":
                return dependency.key in books.operations
            case "purchase":
                return dependency.key in books.purchases
            case "dispute":
                return ("chargeback", dependency.key) in books.reversals
            case _:
                return dependency.key in self.fiscal.numbers

    def _park(self, row: Row, incoming: Incoming, dependency: Dependency) -> None:
        now = self.books.now
        waiting = Parked(
            row.identity,
            dependency.kind,
            dependency.key,
            row.account_id,
            now,
            now + PARKED_FOR.get(dependency.kind, PARKED_FOR_MONEY),
            self.on_clock(incoming.record_time),
            incoming.source,
            incoming.id,
            incoming.type,
            payload_text(incoming),
            incoming.reply_to,
            incoming.traceparent,
            1,
        )
        self.inbox[row.identity] = row
        self.new_rows.append(row)
        self.parked[row.identity] = self.new_parked[row.identity] = waiting

    def on_clock(self, record_time: datetime) -> datetime:
        """Tell what the merchant's clock showed when the broker took a record: what moved it later does not count."""
        later = (step for at, step in self.advances if at > record_time)
        return record_time + self.clock_offset - sum(later, timedelta(0))

    def _settle(self, row: Row, incoming: Incoming, *, record_time: datetime | None = None) -> None:
        """Let time pass for the command's account, then decide it."""
        row.account_id = self.account_id(incoming)
        account = self.account_of(row)
        taken = self.on_clock(incoming.record_time) if record_time is None else record_time
        given = Given(incoming.payload, incoming.identity, row.account_id, taken)
        passed = self.books.let_time_pass(account, incoming.identity, opening=incoming.type == "Operation.Open")
        try:
            if names_erased(incoming, account):
                raise Refusal(Code.ACCOUNT_ERASED, "the user was erased", {})
            effects = self._effects(incoming, given)
        except Refusal as refusal:
            self.conclude(row, incoming, refusal, {}, passed.as_object())
            if incoming.type == "Operation.Open":
                ledger.decisions.refuse_open(self.books, given)
                self.claim_key(row, incoming)
        else:
            self.conclude(row, incoming, None, effects, reported(passed, effects))
            self.claim_key(row, incoming)

    def _effects(self, incoming: Incoming, given: Given) -> dict[str, Any]:
        handler = ledger.decisions.HANDLERS.get(incoming.type)
        if handler is not None:
            return handler(self.books, given)
        change = catalog.decisions.HANDLERS.get(incoming.type)
        if change is not None:
            changed = change(self.books.catalog, incoming.payload, self.books.now)
            self.books.catalog = changed.catalog
            self.catalog_rows.extend(changed.changed)
            return changed.shown
        return _OTHERS[incoming.type](self, given)

    def account_id(self, incoming: Incoming) -> int | None:
        """Tell whose account a command concerns, if any: its user's, or that of the purchase it reverses."""
        payload = incoming.payload
        user_id = member(payload, "user_id")
        if user_id is not None:
            return self.account_id_of(user_id)
        if incoming.type in ("Refund.Apply", "Chargeback.Apply"):
            purchase = self.books.purchases.get(payload.external_ref)
            return purchase.account_id if purchase is not None else None
        if incoming.type == "Chargeback.Reverse":
            reversal = self.books.reversals.get(("chargeback", payload.dispute_id))
            return reversal.account_id if reversal is not None else None
        return None

    def account_id_of(self, user_id: str) -> int:
        known = self._accounts.get(user_id)
        if known is None:
            known = self.tombstones.get(user_id) or account_id_of(user_id, self.secret)
            self._accounts[user_id] = known
        return known

    # Parked commands

    def _release_after(self, incoming: Incoming, row: Row) -> list[bytes]:
        """Decide what waited for this command, in order of arrival, and what waited for that; returns who that was."""
        released: list[bytes] = []
        if incoming.type == "User.Erase" and row.outcome == "applied":
            self._release([w for w in self.parked.values() if w.account_id == row.account_id], released)
            return released
        fulfilled = FULFILMENTS.get(incoming.type)
        final = row.outcome == "applied" or incoming.type == "Operation.Open"
        if fulfilled is not None and final:
            self._release_for(fulfilled(incoming.payload), released)
        return released

    def _release_for(self, dependency: Dependency, released: list[bytes]) -> None:
        key = (dependency.kind, dependency.key)
        self._release([w for w in self.parked.values() if (w.dependency_kind, w.dependency_key) == key], released)

    def _release(self, waiting: Iterable[Parked], released: list[bytes]) -> None:
        for parked in waiting:
            if parked.identity not in self.parked:
                continue
            incoming = self.unpark(parked, released)
            fulfilled = FULFILMENTS.get(incoming.type)
            if fulfilled is not None and self.inbox[parked.identity].outcome == "applied":
                self._release_for(fulfilled(incoming.payload), released)

    def unpark(self, waiting: Parked, released: list[bytes], refusal: Refusal | None = None) -> Incoming:
        """Decide a parked command now, or refuse it; its deliveries so far are all answered."""
        row = self.inbox[waiting.identity]
        incoming = incoming_of(waiting, row, self.secret)
        del self.parked[waiting.identity]
        if self.new_parked.pop(waiting.identity, None) is None:
            self.changed_parked.pop(waiting.identity, None)
            self.gone_parked.append(waiting.identity)
            self.resolved_rows.append(row)
        first = self.keys.get(incoming.business_key) if incoming.business_key is not None else None
        if refusal is not None:
            row.account_id = self.account_id(incoming)
            passed = self.books.let_time_pass(self.account_of(row), incoming.identity)
            self.conclude(row, incoming, refusal, {}, passed.as_object())
        elif first is not None and first.fingerprint != incoming.fingerprint:
            self.conclude(row, incoming, self.conflict(first, incoming), {}, None)
        elif first is not None:
            self.repeat(row, first, incoming)
        else:
            self._settle(row, incoming, record_time=waiting.record_time)
        answer = self.answer(row, incoming, whole=True)
        answer.times = waiting.waiting
        self.answers.append(answer)
        released += [row.identity] * waiting.waiting
        return incoming

    def release_for_documents(self, numbers: Mapping[bytes, str]) -> None:
        """Decide what waited for documents that have their numbers by now; ``numbers`` by the command's identity."""
        for identity, number in numbers.items():
            self.fiscal.numbers.add(number)
            released: list[bytes] = []
            self._release_for(Dependency("receipt", number), released)
            if released:
                row = self.inbox[identity]
                row.released = (row.released or b"") + b"".join(released)


def answer_from_store(row: Row) -> Answer:
    """Make the answer of a released command again, when the command that released it is repeated."""
    result = row.stored_result()
    return Answer(row, row.partition, result["command_source"], result["command_id"], None, None, None, True)


def member(payload: Any, name: str) -> Any:
    """Return a member of a payload that not every command has (asking a model for what it lacks is slow)."""
    return None if payload is None else payload.__dict__.get(name)


def names_erased(incoming: Incoming, account: Account | None) -> bool:
    """Tell whether the user that a command names, and whose account this is, was erased: nothing waits for him."""
    is_erased = account is not None and account.erased_at is not None
    return is_erased and member(incoming.payload, "user_id") is not None and incoming.type not in _DESPITE_ERASURE


def reported(passed: TimeEffects, effects: dict[str, Any]) -> dict[str, Any] | None:
    """List time's effects once: what a job's own effects tell already is left out."""
    named = effects.get("lot_id")
    passed.expired = [lot for lot in passed.expired if lot["lot_id"] != named]
    return passed.as_object()


def replayed(names: dict[str, Any], original: Mapping[str, Any]) -> dict[str, Any]:
    """Make the result for a known business key in a new message: its own identity, the original's outcome."""
    kept = ("outcome", "error", "user_seq", "balance", "debt", "applied_at", "effects")
    return names | {"replay_of": named(original)} | {name: original[name] for name in kept if name in original}


def named(result: Mapping[str, Any]) -> dict[str, str]:
    return {"command_source": result["command_source"], "command_id": result["command_id"]}


# Commands that move neither the ledger nor the catalogue


def configure(desk: Desk, given: Given) -> dict[str, Any]:
    shown = merchants.decisions.configure(desk.settings, given.payload, given.identity)
    desk.books.config, desk.books.config_version = desk.settings.config, desk.settings.version
    return shown


def assign_role(desk: Desk, given: Given) -> dict[str, Any]:
    account = desk.books.account(desk.account_id_of(given.payload.subject))
    if account is not None and account.erased_at is not None:
        raise Refusal(Code.ACCOUNT_ERASED, "the user was erased", {})
    return merchants.decisions.assign_role(desk.settings, desk.account_id_of(given.payload.subject), given.payload)


def revoke_role(desk: Desk, given: Given) -> dict[str, Any]:
    return merchants.decisions.revoke_role(desk.settings, desk.account_id_of(given.payload.subject), given.payload)


def attach_fiscal(desk: Desk, given: Given) -> dict[str, Any]:
    command: ReceiptAttachFiscal = given.payload
    desk.fiscal.attached.append(
        (
            command.receipt_number,
            command.kind,
            command.fiscal_number,
            command.authority,
            command.register_number,
            command.qr_url,
            command.fiscal_at,
            command.actor,
            given.identity,
            desk.books.now,
        )
    )
    shown = command.model_dump(exclude_none=True, exclude={"actor", "fiscal_at"})
    return shown | {"fiscal_at": format_time(command.fiscal_at)}


def resolve(desk: Desk, given: Given) -> dict[str, Any]:
    """Decide a parked command whose dependency is there by now, or give it up when its time is over."""
    identity = message_identity(given.payload.source, given.payload.id)
    names = {"source": given.payload.source, "id": given.payload.id}
    row, waiting = desk.inbox.get(identity), desk.parked.get(identity)
    if waiting is not None:
        dependency = Dependency(waiting.dependency_kind, waiting.dependency_key)
        refusal = None
        if not desk.is_there(dependency):
            if waiting.due_at > desk.books.now:
                raise Refusal(Code.NOT_DUE, "the command still may wait", {"due_at": format_time(waiting.due_at)})
            details = {dependency.kind: dependency.key, "parked_at": format_time(waiting.parked_at)}
            refusal = Refusal(Code.DEPENDENCY_TIMEOUT, "what the command depends on never came", details)
        desk.unpark(waiting, desk.released_by_job, refusal)
        row = desk.inbox[identity]
    if row is None or row.outcome is None:
        raise Refusal(Code.NOT_DUE, "no such command waits", names)
    return names | {"outcome": row.outcome}


_OTHERS: Mapping[str, Callable[[Desk, Given], dict[str, Any]]] = {
    "Merchant.Configure": configure,
    "UserRole.Assign": assign_role,
    "UserRole.Revoke": revoke_role,
    "Receipt.AttachFiscal": attach_fiscal,
    "Command.Resolve": resolve,
}
